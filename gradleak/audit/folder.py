"""The folder of one result: ``result.json``, ``reconstruction.safetensors``, ``trace.safetensors``, ``report.html``.

Of a table, ``reconstruction.csv`` holds the reconstructed rows as people write them; of text, ``sentences.txt`` has one
sentence a line.

It is written whole or not at all, and read without torch. ``result.json`` names the SHA-256 of the tensor files and
is replaced after them, so that a folder which a killed process left half new is recognized.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from gradleak.audit.records import REFUSED, Curves, Record, Shown, from_json, to_json
from gradleak.errors import InvalidFile, reason
from gradleak.files import check_writable, read_file, write_files

__all__ = ["Folder", "check_writable", "read_folder", "write_files", "write_folder", "write_report"]

Array = npt.NDArray[Any]

RESULT, TENSORS, TRACE, REPORT = "result.json", "reconstruction.safetensors", "trace.safetensors", "report.html"
ROWS, SENTENCES = "reconstruction.csv", "sentences.txt"

_AGAIN = "run the attack again to write it anew"
_WHOLE = 1 << 63
"""Whole numbers of a record are smaller than this."""


@dataclass(frozen=True, eq=False)
class Folder:
    """What a result folder holds.

    Attributes:
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


def write_folder(directory: Path, folder: Folder, report: str) -> None:
    """Write all files of a result; see :func:`gradleak.files.write_files`.

    Raises:
        InvalidFile: they cannot be written there.
    """
    files = {
        TENSORS: _pack({"inputs": folder.inputs, "labels": folder.labels}),
        TRACE: _pack({"truth": folder.truth, "snapshots": folder.snapshots}),
    }
    if folder.record.subject.display == "table" and folder.record.shown is not None:
        files[ROWS] = _rows(folder.record.shown)
    if folder.record.subject.display == "text" and folder.record.shown is not None:
        files[SENTENCES] = _text("".join(f"{line}\n" for line in folder.record.shown.lines))
    record = dataclasses.replace(folder.record, files={name: _hash(data) for name, data in files.items()})
    # The page goes first and comes last: it never stands beside the numbers of another run.
    write_files(
        directory,
        {**files, RESULT: _text(to_json(record)), REPORT: _text(report)},
        drop=(REPORT, ROWS, SENTENCES),
    )


def _rows(shown: Shown) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows((shown.names, *shown.guess))
    return _text(file.getvalue())


def write_report(directory: Path, report: str) -> None:
    """Replace the page of a result.

    Raises:
        InvalidFile: it cannot be written there.
    """
    write_files(directory, {REPORT: _text(report)})


def _text(text: str) -> bytes:
    # A name that is no UTF-8, of a file on the command line say, must not cost the result.
    return text.encode("utf-8", errors="replace")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_folder(directory: Path) -> Folder:
    """Return what :func:`write_folder` wrote, fit to be rendered.

    Raises:
        InvalidFile: a file is absent or damaged, or they do not belong together.
    """
    if not directory.is_dir():
        raise InvalidFile(f"There is no folder {str(directory)!r}; name one that gradleak attack or demo wrote.")
    record = _record(directory)
    for name in record.files:
        if name not in (TENSORS, TRACE, ROWS, SENTENCES):
            raise InvalidFile(f"result.json is damaged: it names a file {name!r}; {_AGAIN}.")
    arrays = {name: _unpack(directory, name, record.files.get(name)) for name in (TENSORS, TRACE)}
    tensors, trace = arrays[TENSORS], arrays[TRACE]
    folder = Folder(
        record, tensors.get("inputs", np.empty(0)), tensors.get("labels"), trace.get("truth"), trace.get("snapshots")
    )
    _check_together(directory, folder)
    return folder


def _record(directory: Path) -> Record:
    text = _read(directory / RESULT).decode("utf-8", errors="replace")
    try:
        record = from_json(text)
        found = _strange(dataclasses.asdict(record))
    except (OverflowError, RecursionError) as error:
        raise InvalidFile(f"{RESULT} is damaged: it has a number that is out of range; {_AGAIN}.") from error
    rates = () if record.success is None else (record.success.low, record.success.high, record.success.labels)
    if not all(rate is None or 0 <= rate <= 1 for rate in rates):
        found = "a rate that is not within 0 and 1"
    if found:
        raise InvalidFile(f"{RESULT} is damaged: it has {found}; {_AGAIN}.")
    return record


def _strange(value: Any) -> str:
    """Return in words what in plain data no run can have written and no page can show; empty if there is nothing."""
    if isinstance(value, str):
        return "text that is not Unicode" if any("\ud800" <= c <= "\udfff" for c in value) else ""
    if isinstance(value, int) and not -_WHOLE < value < _WHOLE:
        return "a number that is out of range"
    if isinstance(value, Mapping):
        return next((said for pair in value.items() for said in map(_strange, pair) if said), "")
    if isinstance(value, (list, tuple)):
        return next((said for said in map(_strange, value) if said), "")
    return ""


def _check_together(directory: Path, folder: Folder) -> None:
    inputs, truth, snapshots = folder.inputs, folder.truth, folder.snapshots
    record, labels = folder.record, folder.labels
    shape, examples = tuple(record.subject.input_shape), record.examples or ()
    features = record.outcome.shows == "features"
    points = len(record.curves.iterations) if record.curves is not None else 0
    fits = (
        inputs.ndim >= 1
        and (inputs.size > 0) == (record.outcome.status not in REFUSED)
        and all(a is None or a.dtype.kind in "fiub" for a in (inputs, truth, snapshots))
        and (
            record.subject.input_kind != "image"
            or features
            or record.outcome.status in REFUSED
            or inputs.shape[1:] == shape
        )
        and (truth is None or record.subject.display == "text" or truth.shape[1:] == inputs.shape[1:])
        and (snapshots is None or snapshots.shape == (points, *inputs.shape))
        and (labels is None or labels.ndim > 0)
        and all(e.guess is None or 0 <= e.guess < len(inputs) for e in examples)
        and all(truth is None or 0 <= e.index < len(truth) for e in examples)
        and (record.curves is None or _complete(record.curves))
    )
    if not fits:
        raise InvalidFile(
            f"The files in {str(directory)!r} do not belong together; run the attack again to write them anew."
        )


def _complete(curves: Curves) -> bool:
    points = len(curves.iterations)
    lengths = [len(values) for values in (curves.objectives, *curves.layers.values())]
    ascending = all(0 <= a <= b for a, b in zip(curves.iterations, curves.iterations[1:], strict=False))
    return ascending and set(lengths) == {points} and len(curves.mse) in (0, points)


def _pack(arrays: Mapping[str, Array | None]) -> bytes:
    return safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None})


def _unpack(directory: Path, name: str, written: str | None) -> dict[str, Array]:
    path = directory / name
    if name == TRACE and written is None and not path.exists():  # earlier versions left an empty one out
        return {}
    data = _read(path)
    if written is not None and _hash(data) != written:
        raise InvalidFile(
            f"{str(path)!r} is not the file that belongs to {RESULT}: one of them was changed, or writing them was "
            "stopped in between; run the attack again to write them anew."
        )
    try:
        return dict(safetensors.numpy.load(data))
    except (SafetensorError, struct.error, json.JSONDecodeError, LookupError, ValueError, OverflowError) as error:
        raise InvalidFile(f"{str(path)!r} is damaged ({reason(error)}); {_AGAIN}.") from error


def _read(path: Path) -> bytes:
    if path.parent.is_dir() and not path.exists():
        raise InvalidFile(
            f"There is no {path.name} in {str(path.parent)!r}; name a folder that gradleak attack or demo wrote."
        )
    return read_file(path)
