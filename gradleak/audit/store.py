"""Where measured cases and what was built are kept: under the hash of what was asked.

What is damaged counts as not stored, so that it is measured again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradleak.data.archives import read_arrays
from gradleak.errors import InvalidFile, InvalidInput
from gradleak.files import read_file, write_bytes

__all__ = [
    "Measured", "count_measured", "hardware", "place", "read_case", "short", "today", "write_case",
]  # fmt: skip

BUILT = "artefacts"
"""Folder of what was built for several cases."""
_KEY = 24
"""Hexadecimal digits of a hash that name a file."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One stored case: what was asked, what came out, and where and when.

    Attributes:
        values: what it returned; arrays come back as ``numpy.ndarray``.
        date: when, as YYYY-MM-DD.
    """

    case: Mapping[str, Any]
    values: Mapping[str, Any]
    seconds: float
    hardware: str
    date: str

    def __getitem__(self, name: str) -> Any:
        """Return one value by name."""
        return self.values[name]


def place(folder: Path, module: str, function: str, case: Mapping[str, Any], *, version: int = 1) -> Path:
    """Return the file of one case: its name is the hash of the module, its version, the function and the case.

    Raises:
        InvalidInput: the case is not plain JSON.
    """
    content = {
        "module": module,
        "function": function,
        "version": version,
        "case": dict(case),
    }
    try:
        text = json.dumps(content, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"The case {short(case)} of {function} is not plain JSON ({error}); use numbers, text, lists."
        ) from error
    return folder / (hashlib.sha256(text.encode()).hexdigest()[:_KEY] + ".json")


def write_case(path: Path, function: str, case: Mapping[str, Any], values: Mapping[str, Any], seconds: float) -> None:
    """Store what ``function`` measured or built in ``seconds``: JSON values, and arrays or tensors by name.

    Arrays go to an ``.npz`` file beside ``path`` (see :func:`place`), which is written first.

    Raises:
        InvalidFile: it cannot be written there.
    """
    arrays = {
        k: np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v)
        for k, v in values.items()
        if isinstance(v, Tensor | np.ndarray)
    }
    record = {
        "case": dict(case),
        "function": function,
        "seconds": seconds,
        "hardware": hardware(),
        "date": today(),
        "values": {k: v for k, v in values.items() if k not in arrays},
        "arrays": sorted(arrays),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrays:
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        write_bytes(path.with_suffix(".npz"), stream.getvalue())
    write_bytes(path, json.dumps(record, indent=1, default=_plain).encode())


def read_case(path: Path, case: Mapping[str, Any]) -> Measured | None:
    """Return the stored ``case``, or None where it is absent or damaged."""
    try:
        record = json.loads(read_file(path))
        values, names = dict(record["values"]), list(record["arrays"])
        if names:
            arrays = read_arrays(path.with_suffix(".npz"), names)
            values |= {name: arrays[name] for name in names}
        where = (str(record[key]) for key in ("hardware", "date"))
        found = Measured(dict(record["case"]), values, float(record["seconds"]), *where)
    except (InvalidFile, ValueError, TypeError, LookupError, RecursionError, OverflowError):
        return None
    return found if found.case == json.loads(json.dumps(dict(case))) else None


def count_measured(out: Path) -> int:
    """Return how many measured cases are stored under ``out``."""
    cases = (path for path in out.glob("*/*.json") if path.parent.name != BUILT)
    return sum(re.fullmatch(f"[0-9a-f]{{{_KEY}}}", path.stem) is not None for path in cases)


def hardware() -> str:
    """Return the machine in words: processor, cores, accelerator, torch."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [s.partition(":")[2].strip() for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        processor = names[0] if names else processor
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {os.cpu_count()} cores{device}, torch {torch.__version__}"


def short(case: Mapping[str, Any]) -> str:
    """Return a case in at most a hundred characters."""
    return ", ".join(f"{k}={v}" for k, v in case.items())[:100]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain JSON; return numbers, text, lists, tensors or arrays")


def today() -> str:
    """Return the date as YYYY-MM-DD, UTC."""
    return datetime.now(UTC).date().isoformat()
