"""The one reader of ``.npz`` files, and what a zip archive would unpack to before it does."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradleak.errors import InvalidFile, reason
from gradleak.files import read_file

__all__ = ["ENTRIES", "GENEROUS", "check_unpacked", "is_npz", "read_arrays", "unpack_arrays"]

Array = npt.NDArray[Any]

GENEROUS = 1 << 30
"""Bytes that a file may unpack to beyond its own size where nobody said what to expect."""
ENTRIES = 20_000
"""Most tensors of one file."""
_FILE = 1 << 34
"""Most bytes of an .npz file."""


def is_npz(data: bytes) -> bool:
    """Tell a zip of ``.npy`` members from that of PyTorch, and from a damaged one."""
    if data[:4] not in (b"PK\x03\x04", b"PK\x05\x06") or data.count(b"PK\x01\x02") > ENTRIES:
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error):
        return False


def check_unpacked(data: bytes, path: Path, limit: int | None = None) -> int:
    """Return the bytes that the zip archive ``data`` unpacks to, which its directory states.

    No member can yield more than is stated for it, because the readers stop there.

    Raises:
        InvalidFile: it has more than :data:`ENTRIES` members, or unpacks to more than its own size and ``limit``.
        zipfile.BadZipFile: its directory is damaged; other errors of :mod:`zipfile` likewise.
    """
    # Each member's entry in the directory begins with these bytes, so there are no more members than that.
    if data.count(b"PK\x01\x02") > ENTRIES:
        raise InvalidFile(f"{str(path)!r} holds more than {ENTRIES:,} tensors; save only those of the model.")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    allowed = len(data) + (GENEROUS if limit is None else limit)
    if size > allowed:
        raise InvalidFile(
            f"{str(path)!r} of {len(data):,} bytes unpacks to {size:,}, more than the {allowed:,} that are expected; "
            "save it uncompressed, and do not trust the file if you did not make it."
        )
    return size


def read_arrays(
    path: str | Path, names: Collection[str] | None = None, *, limit: int | None = None
) -> dict[str, Array]:
    """Return the arrays of an ``.npz`` file by name.

    Args:
        path: of the file; pickled arrays in it are refused.
        names: those that are wanted, where the file has them; all of them if None.
        limit: bytes that it may unpack to beyond its own size; 1 GiB if None.

    Raises:
        InvalidFile: it is absent, damaged, no ``.npz`` file, pickled, or unpacks to more.
    """
    path = Path(path)
    return unpack_arrays(read_file(path, limit=_FILE), path, names, limit=limit)


def unpack_arrays(
    data: bytes, path: Path, names: Collection[str] | None = None, *, limit: int | None = None
) -> dict[str, Array]:
    """Return the arrays in the content ``data`` of ``path``; see :func:`read_arrays`."""
    try:
        check_unpacked(data, path, limit)
        with warnings.catch_warnings(), np.load(io.BytesIO(data), allow_pickle=False) as file:
            warnings.simplefilter("ignore")  # what NumPy thinks of a damaged file is decided here
            arrays = {name: file[name] for name in file.files if names is None or name in names}
        strange = next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None)
        if strange is not None:
            raise ValueError(f"entry {strange!r} is no array")
    except InvalidFile:
        raise
    except Exception as error:  # a hostile archive can fail in any way
        pickled = "holds pickled Python objects, which gradleak does not load"
        what = pickled if "allow_pickle" in str(error) else f"is a damaged .npz file, or none ({reason(error)})"
        raise InvalidFile(
            f"{str(path)!r} {what}; save arrays of numbers by name with numpy.savez(path, **arrays)."
        ) from error
    return arrays
