"""What ``hostile.py`` and ``tests/hostile`` share: valid files of every kind, ways to break them, what must hold."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from gradleak.audit.folder import Folder, read_folder, write_folder
from gradleak.audit.records import (
    Aggregate,
    AttackRun,
    CertificateRecord,
    Curves,
    Example,
    Lift,
    Match,
    Outcome,
    Record,
    Subject,
    Success,
    Threat,
    Verdict,
)  # fmt: skip
from gradleak.capture import read_capture
from gradleak.data import load_images, read_batch, read_rows, read_schema, read_tensors
from gradleak.errors import InvalidFile, InvalidInput
from gradleak.papers.expected import read_expected
from gradleak.report import picture, render

SHAPE = (1, 4, 4)
LIMIT = 1 << 16
"""Bytes of the tensors that a reader is told to expect."""

# ------------------------------------------------------------------------------------------------------ valid files


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors such as an update has."""
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(3, 1, 3, 3, generator=generator),
        "fc.bias": torch.randn(5, generator=generator, dtype=torch.float64),
        "counter": torch.tensor(7),
    }


def tensor_files() -> dict[str, bytes]:
    """Return the content of a valid tensor file of each format, by name."""
    plain = {k: v.numpy() for k, v in tensors().items()}
    files = {"a.safetensors": safetensors.torch.save(tensors())}
    files["a.npz"] = npz(plain)
    files["deflated.npz"] = npz(plain, zipfile.ZIP_DEFLATED)
    for name, new in (("a.pt", True), ("old.pt", False)):
        stream = io.BytesIO()
        torch.save(tensors(), stream, _use_new_zipfile_serialization=new)
        files[name] = stream.getvalue()
    return files


def npz(arrays: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return what ``numpy.savez`` writes, without the time at which it does."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), compression)
    return stream.getvalue()


def image_files() -> dict[str, bytes]:
    """Return the content of a valid file of images of each format, by name."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
    files = {"i.npz": npz({"x_test": pixels, "y_test": np.arange(3)})}
    for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm"):
        stream = io.BytesIO()
        Image.fromarray(pixels[0]).save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        files[f"p.{suffix}"] = stream.getvalue()
    return files


def batch_files() -> dict[str, bytes]:
    """Return the content of a valid private batch in each format, by name."""
    inputs, labels = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    arrays = {"inputs": inputs, "labels": labels}
    return {"t.safetensors": safetensors.torch.save(arrays), "t.npz": npz({k: v.numpy() for k, v in arrays.items()})}


SCHEMA = """{"columns": [{"name": "age", "range": [17, 90], "mean": 40, "std": 10, "decimals": 0},
{"name": "job", "values": ["clerk", "nurse", "cook"]}], "target": {"name": "income", "values": ["low", "high"]}}
"""
ROWS = "age,job,income\n" + "".join(f"{20 + i},{('clerk', 'nurse', 'cook')[i % 3]},high\n" for i in range(9))


def table_files() -> dict[str, bytes]:
    """Return the content of a valid schema of a table, and of a file of its rows, by name."""
    return {"s.json": SCHEMA.encode(), "r.csv": ROWS.encode()}


CAPTURE = """{"schema": "gradleak-capture", "version": 1, "framework": "Flower 1.41", "round": 3, "client": "site-1",
"model": "lenet", "model_arg": {"width": 4}, "weights": "W.npz", "update": "U.npz", "kind": "weight_delta", "lr": 0.1,
"input_shape": [3, 8, 8], "mean": [0.5], "batch_size": 4, "defense": ["clip:norm=1"], "unknown_filters": ["Mine"]}
"""


def capture_files() -> dict[str, bytes]:
    """Return the content of a valid manifest of a capture, by name."""
    return {"capture.json": CAPTURE.encode()}


def result() -> Folder:
    """Return a result that uses every field of a record."""
    inputs = np.random.default_rng(0).random((2, *SHAPE))
    record = Record(
        subject=Subject("lenet", "LeNet", 10, 2, "image", SHAPE, 5, 2, "gradient", "float32", "FedSGD", "mean 0.5"),
        threat=Threat(("BATCH_SIZE",), ("LABELS",)),
        attack=AttackRun("dlg", {"iterations": 3, "solver": "lbfgs", "tolerance": 1e-9, "shared": True}),
        outcome=Outcome("converged", 1e-3, 5, 7, 1.5, (1, 2), ("A note.",)),
        verdict=Verdict("leaked", "It came back.", "Because.", ("It means.",), ("Remedy.",)),
        match=Match(1e-3, 1e-7),
        certificate=CertificateRecord("matched", 1e-3, 1e-7, 3, 4, ("matched", "unproved"), "Because."),
        examples=(Example(1, 0, 2, 2, {"mse": 0.5, "psnr": 3.0}), Example(0, 1, 1, None, {"mse": None})),
        aggregates=(Aggregate("mse", "", 1, 0.5, None, 0.5, 0.5, 0.5),),
        success=Success(1e-3, 1, 2, 0.1, 0.9, 0.5),
        lifts=(Lift("gray", 10.0, 3.0), Lift("best", 11.0, None, True)),
        curves=Curves((0, 2, 500), (1.0, 0.5, 0.1), {"conv.weight": (1.0, 0.1, 0.0)}, (0.3, 0.2, 0.1)),
        command="gradleak demo",
        environment={"torch": "2"},
        created="2026-01-01",
    )
    return Folder(record, inputs, np.array([1, 2]), inputs * 0.5, np.stack([inputs] * 3).astype(np.float32))


EXPECTED = b"""# By hand.
[toy."median square"]
paper = 3.0
source = "Table 1"
target = "<= 100"
factor = 1.5
ours_interval = [0.1, 0.2]
"""

# ---------------------------------------------------------------------------------------------------------- readers


def read(folder: Path, name: str) -> None:
    """Read the file ``name`` of ``folder`` as a command would, as deep as it can."""
    path = folder / name
    if name.startswith(("i.", "p.")):
        load_images(path, shape=(3, 4, 4))
    elif name.startswith("t."):
        read_batch(path, SHAPE, count=2)
    elif name.startswith("s."):
        read_schema(path)
    elif name.startswith("r."):
        (folder / "s.json").write_text(SCHEMA)
        read_rows(path, read_schema(folder / "s.json"))
    elif name == "capture.json":
        entry = read_capture(folder).entry()
        assert all(map(str, (entry.name, entry.notes, entry.options())))
    elif name == "expected.toml":
        read_expected(folder)
    elif name == "result":
        show(path)
    else:
        read_tensors(path, limit=LIMIT)


def show(folder: Path) -> None:
    """Render the result in ``folder`` as ``gradleak report`` does."""
    found = read_folder(folder)
    render(found.record, picture(found.record, found.inputs, found.truth, found.snapshots)).encode()


def refusal(call: Callable[..., None], *given: Any) -> str | None:
    """Return the sentence with which ``call`` refuses what it is given, None if it takes it."""
    try:
        call(*given)
    except InvalidInput as error:
        check_sentence(str(error))
        return str(error)
    return None


def check_sentence(text: str) -> None:
    """Check that ``text`` is one printable sentence of sane length that ends with a remedy."""
    assert text.endswith((".", "?")), text
    assert text.isprintable(), text
    assert len(text) <= 1000, text
    assert "; " in text or ": " in text, text
    assert "Traceback" not in text, text


# --------------------------------------------------------------------------------------------------- broken in bytes


def broken_bytes(data: bytes, seed: int) -> bytes:
    """Return ``data`` broken in one of many ways, by seed."""
    rng = random.Random(seed)
    changed, at = bytearray(data), rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 2, 8, 40, 400)))
    match rng.randrange(10):
        case 0 | 1:
            return data[:at]
        case 2:
            changed[at:end] = rng.randbytes(end - at)
        case 3:
            changed[at:end] = b"\xff" * (end - at)
        case 4:
            changed[at:end] = b"\0" * (end - at)
        case 5:
            del changed[at:end]
        case 6:
            changed[at:at] = changed[at:end] or b"x"
        case 7:
            changed[:end] = rng.randbytes(end)
        case 8:
            changed[at] ^= 1 << rng.randrange(8)
        case _:
            return rng.randbytes(rng.choice((1, 8, 9, 64, 5000)))
    return bytes(changed)


# ------------------------------------------------------------------------------------------------- broken in meaning

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, -(2**63), 10**400, 1.5, 1e308, -1e308, 5e-324, "NaN", "Infinity", "", "x", "x" * 20_000,
    "\ud800", "\x1b[2J\a", "\u202e", [], {}, [[]], [None], [1e308, 5e-324], {"": {}}, {"\udcff": 1}, {"mse": 1e308},
)  # fmt: skip


def broken_json(text: str, seed: int) -> str:
    """Return the JSON object ``text`` with one value replaced, removed, repeated or added, by seed."""
    rng = random.Random(seed)
    tree = json.loads(text)
    holder, key = rng.choice(list(_places(tree)))
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("extra", "\ud800", "x" * 5000))] = rng.choice(STRANGE)
        case 1:
            holder.append(holder[key])
        case _:
            holder[key] = rng.choice(STRANGE)
    return json.dumps(tree)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


def broken_arrays(seed: int) -> Folder:
    """Return a result whose arrays do not fit its record, or each other, by seed."""
    rng, whole = random.Random(seed), result()
    inputs = whole.inputs
    strange = (
        inputs[:0], inputs[:1], inputs[0], inputs[..., :0], inputs[:, :, :2], inputs.reshape(2, 16), inputs.T,
        inputs.astype(np.int64), inputs.astype(bool), inputs.astype(np.complex64), inputs * np.nan, inputs * np.inf,
        np.zeros((2, 0, 4, 4)), np.zeros(()), np.zeros((2, 3, 4, 4)), np.full_like(inputs, 1.7e308),
        np.stack([inputs] * 2), np.stack([inputs] * 3)[..., :1],
    )  # fmt: skip
    return dataclasses.replace(whole, **{rng.choice(("inputs", "truth", "snapshots", "labels")): rng.choice(strange)})


# -------------------------------------------------------------------------------------------------------------- bombs


def write_bombs(folder: Path) -> list[str]:
    """Write small files that unpack to gigabytes, large ones without content, and things that are no files."""
    zeros = 1 << 31
    with zipfile.ZipFile(folder / "zeros.npz", "w", zipfile.ZIP_DEFLATED) as file:
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({zeros // 4096}, 1, 64, 64)}}\n".encode()
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        with file.open("inputs.npy", "w") as member:
            member.write(header + b"\0" * 1000)
        with file.open("more.npy", "w") as member:
            member.write(header + b"\0" * 1000)
    _claim(folder / "zeros.npz", zeros)
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 20)}, stream)
    with zipfile.ZipFile(stream) as stored, zipfile.ZipFile(folder / "zeros.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for entry in stored.infolist():
            file.writestr(entry.filename, stored.read(entry))
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}
    head = json.dumps(many).encode()
    (folder / "many.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    with zipfile.ZipFile(folder / "many.npz", "w") as file:
        for i in range(21_000):
            file.writestr(f"{i}.npy", b"")
    with (folder / "hollow.safetensors").open("wb") as sparse:
        sparse.write(struct.pack("<Q", 1 << 40) + b"{")
        sparse.truncate(1 << 40)
    (folder / "p.wide.png").write_bytes(_png(30_000, 30_000))
    (folder / "p.tall.png").write_bytes(_png(1, 2**31 - 1))
    names = [
        "zeros.npz", "t.zeros.npz", "i.zeros.npz", "zeros.pt", "many.safetensors", "many.npz", "hollow.safetensors",
        "p.wide.png", "p.tall.png", "endless.npz", "i.endless.npz", "t.endless.pt",
    ]  # fmt: skip
    for name in ("t.zeros.npz", "i.zeros.npz"):
        (folder / name).write_bytes((folder / "zeros.npz").read_bytes())
    for name in ("endless.npz", "i.endless.npz", "t.endless.pt"):
        (folder / name).symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.safetensors")
    return [*names, "pipe.safetensors"]


def _claim(path: Path, size: int) -> None:
    """Have the directory of a zip state that its first member has ``size`` bytes."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, size)
    path.write_bytes(data)


def _png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    struct.pack_into(">II", data, 16, width, height)
    import zlib

    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def resident() -> int:
    """Return the peak of this process's memory in bytes since :func:`forget_peak`; 0 where that is not told."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak() -> bool:
    """Start measuring the peak of this process's memory anew; return whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


__all__ = [
    "EXPECTED", "InvalidFile", "batch_files", "broken_arrays", "broken_bytes", "broken_json", "check_sentence",
    "forget_peak", "image_files", "read", "refusal", "resident", "result", "show", "tensor_files", "write_bombs",
    "write_folder",
]  # fmt: skip
