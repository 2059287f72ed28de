"""Tensor files: read safely, written whole or not at all."""

from __future__ import annotations

import io
import os
import secrets
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gradleak.errors import InvalidFile

__all__ = ["named", "read_tensors", "write_bytes", "write_tensors"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DEFLATE = 1100
"""No deflated byte holds more bytes than this."""
_REMEDY = "save it again with safetensors.torch.save_file(tensors, path)"


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` or ``.npz`` file, or of a ``.pt`` file with a flat state dict, by name.

    The content decides the format, not the name. Nothing is unpickled: ``.pt`` files go through
    ``torch.load(weights_only=True)``, ``.npz`` files through ``numpy.load(allow_pickle=False)``.

    Returns:
        Dense tensors on the CPU; floats are of 16, 32 or 64 bits, integers (labels, counters) and booleans pass.

    Raises:
        InvalidFile: the file is absent, empty, truncated, of another format, holds anything but tensors, or claims
            more values than it has bytes for.

    """
    path = Path(path)
    data = _read(path)
    if data[8:9] == b"{":
        try:
            tensors: object = safetensors.torch.load(data)
        except (SafetensorError, KeyError, ValueError, RuntimeError, MemoryError, OverflowError) as error:
            raise InvalidFile(f"{str(path)!r} is a damaged safetensors file ({_first(error)}); {_REMEDY}.") from error
    elif _is_npz(data):
        tensors, size = _read_npz(data, path)
        return _checked(tensors, path, size)
    elif data[:4] == b"PK\x03\x04" or data[:1] == b"\x80":
        try:
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a hostile file can make the restricted reader fail in any way
            raise InvalidFile(
                f"{str(path)!r} is truncated or holds pickled Python objects, which gradleak does not load; {_REMEDY}."
            ) from error
    else:
        raise InvalidFile(f"{str(path)!r} is neither a safetensors, PyTorch nor .npz file, or is truncated; {_REMEDY}.")
    return _checked(tensors, path, len(data))


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise InvalidFile(f"{str(path)!r} is a folder; name the .safetensors file in it.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidFile(f"There is no file {str(path)!r}; check the path.") from error
    except (OSError, ValueError) as error:
        raise InvalidFile(f"{str(path)!r} cannot be read ({_first(error)}); check its permissions.") from error
    if not data:
        raise InvalidFile(f"{str(path)!r} is empty; {_REMEDY}.")
    return data


def _is_npz(data: bytes) -> bool:
    """Tell a zip of ``.npy`` members from that of PyTorch, and from a damaged one."""
    if data[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error):
        return False


def _read_npz(data: bytes, path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of an ``.npz`` file by name, and the number of bytes that they take unpacked."""
    tensors: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _DEFLATE * len(data):
            raise InvalidFile(
                f"{str(path)!r} claims to unpack to more than its bytes can hold; do not trust the file if you did "
                "not make it."
            )
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            for name in file.files:
                array = file[name]
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"entry {name!r} is no array")
                # In native byte order and in memory of its own.
                native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
                try:
                    tensors[name] = torch.from_numpy(native)
                except TypeError as error:
                    raise InvalidFile(
                        f"Array {name!r} of {str(path)!r} has the unsupported type {array.dtype}; "
                        "convert it to float32 or float64 before saving."
                    ) from error
    except InvalidFile:
        raise
    except Exception as error:  # a hostile archive can fail in any way
        pickled = "holds pickled Python objects, which gradleak does not load"
        what = pickled if "allow_pickle" in str(error) else f"is a damaged .npz file ({_first(error)})"
        raise InvalidFile(
            f"{str(path)!r} {what}; save arrays of numbers by name with numpy.savez(path, **arrays)."
        ) from error
    return tensors, size


def named(
    tensors: dict[str, Tensor], path: str | Path, *orders: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], bool]:
    """Return ``tensors`` by the model's names, and whether they had only positions (``arr_0``, ``arr_1``, …).

    Args:
        tensors: what :func:`read_tensors` returned.
        path: the file that they come from.
        orders: the model's tensors by name in each order that a client may have saved them; the first that fits counts.

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
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InvalidFile(
                f"Entry {name!r} of {str(path)!r} is a {type(tensor).__name__}, not a tensor by name; "
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
        if tensor.numel() * tensor.element_size() > size:
            raise InvalidFile(
                f"Tensor {name!r} of {str(path)!r} claims more values than the file holds; "
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


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to a temporary name in the same folder, then rename it; on failure nothing is left behind.

    Raises:
        InvalidFile: the file cannot be written there.

    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or _first(error)
        raise InvalidFile(f"{str(path)!r} cannot be written ({reason}); choose another place.") from error


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
