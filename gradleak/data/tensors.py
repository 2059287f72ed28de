"""Tensor files: read safely and with a bound, written whole or not at all."""

from __future__ import annotations

import io
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gradleak.data.archives import ENTRIES, check_unpacked, is_npz, unpack_arrays
from gradleak.errors import InvalidFile, reason
from gradleak.files import read_file, write_bytes

__all__ = ["float64_bytes", "named", "read_tensors", "write_tensors"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_HEADER = 1 << 22
"""Most bytes of a safetensors header; a tensor takes about a hundred of them."""
_CHECKPOINT = 8
"""How many times as large as the expected tensors a file may be: a checkpoint holds the optimizer's state as well."""
_PICKLES = 5
"""Pickles at the beginning of a file in the earlier format of PyTorch."""
_DEPTH = 12
"""Deepest tuples in tuples; tensors by name need three."""
_SHARED = 2
"""How many times the bytes of a file its tensors may have together: tied weights share theirs."""
_OVERHEAD = 1 << 24
"""Bytes of a file beyond that: names, padding."""
_REMEDY = "save it again with safetensors.torch.save_file(tensors, path)"


def float64_bytes(model: nn.Module) -> int:
    """Return the bytes that the parameters and buffers of ``model`` take in float64, the ``limit`` of its files."""
    return 8 * sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def read_tensors(path: str | Path, *, limit: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` or ``.npz`` file, or of a ``.pt`` file with a flat state dict, by name.

    The content decides the format, not the name. Nothing is unpickled: ``.pt`` files go through
    ``torch.load(weights_only=True)``, ``.npz`` files through ``numpy.load(allow_pickle=False)``.

    Args:
        path: of the file.
        limit: bytes of the tensors that are expected (:func:`float64_bytes`). Before anything is unpacked, a file is
            refused that is more than eight times as large, or that would unpack to more than this beyond its own
            size. If None, files may be of any size and unpack to 1 GiB more.

    Returns:
        Dense tensors on the CPU; floats are of 16, 32 or 64 bits, integers (labels, counters) and booleans pass.

    Raises:
        InvalidFile: the file is absent, empty, truncated, of another format, holds anything but tensors, claims
            more values than it has bytes for, or exceeds ``limit``.
    """
    path = Path(path)
    data = read_file(path, limit=None if limit is None else _CHECKPOINT * limit + _OVERHEAD)
    size, tensors = len(data), None
    if not data:
        raise InvalidFile(f"{str(path)!r} is empty; {_REMEDY}.")
    if data[8:9] == b"{":
        _check_header(data, path)
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, KeyError, ValueError, RuntimeError, MemoryError, OverflowError) as error:
            raise InvalidFile(f"{str(path)!r} is a damaged safetensors file ({reason(error)}); {_REMEDY}.") from error
    elif is_npz(data):
        tensors = {name: _tensor(name, a, path) for name, a in unpack_arrays(data, path, limit=limit).items()}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
    elif data[:4] == b"PK\x03\x04" or data[:1] == b"\x80":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what its readers think of a damaged file is decided here
                if zipfile.is_zipfile(io.BytesIO(data)):
                    size = max(size, check_unpacked(data, path, limit))
                    with zipfile.ZipFile(io.BytesIO(data)) as archive:
                        pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
                else:
                    pickles = [data]
                if any(map(_nests_deeply, pickles)):
                    raise InvalidFile(f"{str(path)!r} nests tuples too deeply for tensors by name; {_REMEDY}.")
                tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except InvalidFile:
            raise
        except Exception as error:  # a hostile file can make the restricted reader fail in any way
            raise InvalidFile(
                f"{str(path)!r} is truncated or holds pickled Python objects, which gradleak does not load; {_REMEDY}."
            ) from error
    else:
        raise InvalidFile(f"{str(path)!r} is neither a safetensors, PyTorch nor .npz file, or is truncated; {_REMEDY}.")
    return _checked(tensors, path, size)


def _nests_deeply(pickled: bytes) -> bool:
    """Return whether pickled tuples lie in tuples to a depth at which hashing them, as names, would take for ever.

    Each may hold the one before twice, so the time doubles with every level. Nothing is unpickled for this.
    """
    stream, mark = io.BytesIO(pickled), pickletools.markobject
    stack, marks, memo = list[int](), list[int](), dict[Any, int]()
    try:
        for _ in range(_PICKLES):
            for code, argument, _at in pickletools.genops(stream):
                if code.name.endswith("GET"):
                    stack.append(memo.get(argument, 0))
                elif code.name == "MEMOIZE" or code.name.endswith("PUT"):
                    memo[len(memo) if argument is None else argument] = stack[-1]
                elif code.name == "MARK":
                    marks.append(len(stack))
                else:
                    taken = len(code.stack_before)
                    if mark in code.stack_before:
                        taken = len(stack) - marks.pop() + code.stack_before.index(mark)
                    depth = 1 + max(stack[len(stack) - taken :], default=0) if "TUPLE" in code.name else 0
                    if depth > _DEPTH:
                        return True
                    del stack[len(stack) - taken :]
                    stack += [depth] * len(code.stack_after)
    except (ValueError, IndexError, TypeError):  # no pickle, or its end: whatever is wrong, the reader will find it
        return False
    return False


def _check_header(data: bytes, path: Path) -> None:
    """Refuse a header that would take minutes to read."""
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise InvalidFile(f"{str(path)!r} is a damaged safetensors file, or is truncated; {_REMEDY}.")
    if size > _HEADER or data.count(b"data_offsets", 8, 8 + size) > ENTRIES:
        raise InvalidFile(
            f"{str(path)!r} names more than {ENTRIES:,} tensors in a header of {size:,} bytes; "
            "save only those of the model."
        )


def _tensor(name: str, array: np.ndarray, path: Path) -> Tensor:
    """Return an array in native byte order, row by row; without a copy where it is so already."""
    try:
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))
    except TypeError as error:
        raise InvalidFile(
            f"Array {name!r} of {str(path)!r} has the unsupported type {array.dtype}; "
            "convert it to float32 or float64 before saving."
        ) from error


def named(
    tensors: dict[str, Tensor], path: str | Path, *orders: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], bool]:
    """Return ``tensors`` by the model's names, and whether they had only positions (``arr_0``, ``arr_1``, …).

    ``orders`` are the model's tensors by name in each order that a client may have saved them; the first that fits
    counts.

    Raises:
        InvalidFile: there are positions only, and their number or shapes fit no order.
    """
    count = len(tensors)
    if set(tensors) != {f"arr_{i}" for i in range(count)}:
        return tensors, False
    values = [tensors[f"arr_{i}"] for i in range(count)]
    for order in orders:
        if [v.shape for v in values] == [v.shape for v in order.values()]:
            return dict(zip(order, values, strict=True)), True
    shapes = [tuple(v.shape) for v in orders[0].values()]
    at = next((i for i, (v, s) in enumerate(zip(values, shapes, strict=False)) if tuple(v.shape) != s), None)
    differs = (
        f"arr_{at} has shape {tuple(values[at].shape)} where {list(orders[0])[at]!r} has {shapes[at]}"
        if count == len(shapes) and at is not None
        else f"there are {count} arrays for {len(shapes)} trainable parameters"
    )
    raise InvalidFile(
        f"The arrays of {str(path)!r} have no names and do not fit the model in order ({differs}); "
        "save them by parameter name with numpy.savez(path, **arrays)."
    )


def _checked(tensors: object, path: Path, size: int) -> dict[str, Tensor]:
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping):
        raise InvalidFile(f"{str(path)!r} holds a {type(tensors).__name__}, not tensors by name; {_REMEDY}.")
    if not tensors:
        raise InvalidFile(f"{str(path)!r} holds no tensor; {_REMEDY}.")
    if len(tensors) > ENTRIES:
        raise InvalidFile(f"{str(path)!r} holds more than {ENTRIES:,} tensors; save only those of the model.")
    result: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InvalidFile(
                f"Entry {_shown(name)} of {str(path)!r} is a {type(tensor).__name__}, not a tensor by name; "
                "save only the model's or the update's tensors, for example model.state_dict()."
            )
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InvalidFile(f"Tensor {name!r} of {str(path)!r} is not dense; call to_dense() before saving it.")
        if tensor.dtype not in _FLOATS + _INTEGERS:
            raise InvalidFile(
                f"Tensor {name!r} of {str(path)!r} has the unsupported type {tensor.dtype}; "
                "convert it to float32 or float64 before saving."
            )
        total += tensor.numel() * tensor.element_size()
        if total > _SHARED * size:
            raise InvalidFile(
                f"Tensor {name!r} of {str(path)!r} claims more values than the file can hold; "
                "call contiguous() before saving it, and do not trust the file if you did not make it."
            )
        result[name] = tensor
    return result


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` as a safetensors file, whole or not at all; an existing file is replaced in one step.

    Raises:
        InvalidFile: the file cannot be written there.
    """
    # Cloned, because the format refuses tensors that share memory.
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes(path, safetensors.torch.save(whole))


def _shown(name: object) -> str:
    # Of what is no text only the type: nested tuples of a few bytes are exponentially long when written out.
    plain = isinstance(name, str) or (isinstance(name, int) and abs(name) < 1 << 63)
    return repr(name) if plain else f"under a {type(name).__name__}"
