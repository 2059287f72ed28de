"""The folder of one result: ``result.json``, ``reconstruction.safetensors``, ``trace.safetensors``, ``report.html``.

It is written whole or not at all, and read without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from gradleak.audit.records import REFUSED, Record, from_json, to_json
from gradleak.errors import InvalidFile, InvalidInput

__all__ = ["Folder", "check_writable", "read_folder", "write_files", "write_folder"]

Array = npt.NDArray[Any]

RESULT, TENSORS, TRACE, REPORT = "result.json", "reconstruction.safetensors", "trace.safetensors", "report.html"


@dataclass(frozen=True, eq=False)
class Folder:
    """What a result folder holds.

    Attributes:
        record: everything but the arrays.
        inputs: (N, *shape) reconstructed inputs, in the attack's order; images in [0, 1].
        labels: (N,) recovered classes, None where the attack says nothing.
        truth: (N, *shape) private inputs, None without ground truth.
        snapshots: (K, N, *shape) decoded candidates at the points of ``record.curves``.

    """

    record: Record
    inputs: Array
    labels: Array | None = None
    truth: Array | None = None
    snapshots: Array | None = None


def check_writable(directory: Path) -> None:
    """Check, before a long run, that ``directory`` can be written: by writing there, for root may be refused as well.

    Nothing of it stays behind.

    Raises:
        InvalidInput: it is a file, or :func:`write_files` would be refused there.

    """
    place = directory
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InvalidInput(f"{str(place)!r} is not a folder; name another one with --out.")
    made: list[Path] = []
    temporary: Path | None = None
    moved: Path | None = None
    try:
        _make_parents(directory.parent, made)
        temporary = _make_temporary(directory)
        (temporary / "empty").touch()
        if directory.is_dir():
            moved = directory / temporary.name
            (temporary / "empty").replace(moved)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInput(
            f"The folder {str(directory)!r} cannot be written ({reason}); name another one with --out."
        ) from error
    finally:
        if moved is not None:
            moved.unlink(missing_ok=True)
        _remove(temporary, made)


def write_folder(directory: Path, folder: Folder, report: str) -> None:
    """Write all files of a result; see :func:`write_files`.

    Raises:
        InvalidFile: they cannot be written there.

    """
    tensors = {"inputs": folder.inputs}
    if folder.labels is not None:
        tensors["labels"] = folder.labels
    trace = {}
    if folder.truth is not None:
        trace["truth"] = folder.truth
    if folder.snapshots is not None:
        trace["snapshots"] = folder.snapshots
    write_files(
        directory,
        {
            TENSORS: _pack(tensors),
            TRACE: _pack(trace),
            REPORT: report.encode(),
            RESULT: to_json(folder.record).encode(),
        },
    )


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into ``directory``: first all of them beside it, then under their names.

    A new folder appears in one step. In an existing one each file is replaced in one step and other files stay. On
    any failure, and on Ctrl-C, what was there before is left as it was.

    Raises:
        InvalidFile: they cannot be written there.

    """
    made: list[Path] = []
    temporary: Path | None = None
    try:
        try:
            _make_parents(directory.parent, made)
            temporary = _make_temporary(directory)
            for name, data in files.items():
                with (temporary / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            if directory.is_dir():
                for name in files:
                    (temporary / name).replace(directory / name)
            else:
                temporary.chmod(0o777 & ~_umask())
                temporary.replace(directory)
        except BaseException:
            _remove(temporary, made)
            raise
        shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidFile(
            f"The folder {str(directory)!r} cannot be written ({reason}); make room or name another one with --out."
        ) from error


def read_folder(directory: Path) -> Folder:
    """Return what :func:`write_folder` wrote.

    Raises:
        InvalidFile: a file is absent or damaged, or they do not belong together.

    """
    if not directory.is_dir():
        raise InvalidFile(f"There is no folder {str(directory)!r}; name one that gradleak attack or demo wrote.")
    record = from_json(_read(directory / RESULT).decode("utf-8", errors="replace"))
    tensors = _unpack(directory / TENSORS)
    trace = _unpack(directory / TRACE) if (directory / TRACE).exists() else {}
    folder = Folder(
        record, tensors.get("inputs", np.empty(0)), tensors.get("labels"), trace.get("truth"), trace.get("snapshots")
    )
    _check_together(directory, folder)
    return folder


def _check_together(directory: Path, folder: Folder) -> None:
    inputs, truth, snapshots = folder.inputs, folder.truth, folder.snapshots
    shape, examples = tuple(folder.record.subject.input_shape), folder.record.examples or ()
    features = folder.record.outcome.shows == "features"
    points = len(folder.record.curves.iterations) if folder.record.curves is not None else 0
    fits = (
        inputs.ndim >= 1
        and (len(inputs) > 0) == (folder.record.outcome.status not in REFUSED)
        and (folder.record.subject.input_kind != "image" or features or inputs.shape[1:] == shape)
        and (truth is None or truth.shape[1:] == inputs.shape[1:])
        and (snapshots is None or snapshots.shape == (points, *inputs.shape))
        and all(e.guess is None or 0 <= e.guess < len(inputs) for e in examples)
        and all(truth is None or 0 <= e.index < len(truth) for e in examples)
    )
    if not fits:
        raise InvalidFile(
            f"The files in {str(directory)!r} do not belong together; run the attack again to write them anew."
        )


def _pack(arrays: Mapping[str, Array]) -> bytes:
    return safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})


def _unpack(path: Path) -> dict[str, Array]:
    try:
        return dict(safetensors.numpy.load(_read(path)))
    except (SafetensorError, struct.error, json.JSONDecodeError, KeyError, ValueError, OverflowError) as error:
        raise InvalidFile(
            f"{str(path)!r} is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "run the attack again to write it anew."
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidFile(
            f"There is no {path.name} in {str(path.parent)!r}; name a folder that gradleak attack or demo wrote."
        ) from error
    except OSError as error:
        raise InvalidFile(f"{str(path)!r} cannot be read ({error.strerror}); check its permissions.") from error


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Create ``folder`` and what is missing above it; append what is created to ``made``, outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for place in reversed(missing):
        place.mkdir()
        made.append(place)


def _make_temporary(directory: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))


def _remove(temporary: Path | None, made: list[Path]) -> None:
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
