from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.data import read_tensors, write_bytes, write_tensors
from gradleak.data.tensors import named
from gradleak.errors import InvalidFile
from gradleak.models import resnet20


def sample():
    generator = torch.Generator().manual_seed(0)
    return {
        "fc.weight": torch.randn(3, 4, generator=generator),
        "fc.bias": torch.randn(3, generator=generator, dtype=torch.float64),
        "half": torch.randn(2, generator=generator).half(),
        "labels": torch.tensor([3, 1]),
        "scalar": torch.tensor(2.5),
    }


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name])


def refused(path, match=r"\.$"):
    with pytest.raises(InvalidFile, match=match) as caught:
        read_tensors(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")


def test_round_trip(tmp_path):
    write_tensors(tmp_path / "u.safetensors", sample())
    same(read_tensors(tmp_path / "u.safetensors"), sample())
    same(safetensors.torch.load_file(tmp_path / "u.safetensors"), sample())
    assert os.listdir(tmp_path) == ["u.safetensors"]


def test_writes_views_shared_and_graph_tensors(tmp_path):
    base = torch.randn(4, 4, requires_grad=True)
    tensors = {"a": base.t(), "b": base[:, ::2], "c": base, "d": base, "e": torch.ones(1).expand(5)}
    write_tensors(tmp_path / "u.safetensors", tensors)
    same(read_tensors(tmp_path / "u.safetensors"), {k: v.detach() for k, v in tensors.items()})


def test_reads_state_dicts_with_counters(tmp_path):
    state = resnet20(width=2, seed=0).state_dict()
    torch.save(state, tmp_path / "w.pt")
    same(read_tensors(tmp_path / "w.pt"), dict(state))
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    same(read_tensors(tmp_path / "checkpoint.pth"), dict(state))
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "p.pt")
    assert type(read_tensors(tmp_path / "p.pt")["w"]) is torch.Tensor


def test_reads_the_old_torch_format(tmp_path):
    torch.save(OrderedDict(sample()), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    same(read_tensors(tmp_path / "w.pt"), sample())


def test_the_content_decides_not_the_name(tmp_path):
    write_tensors(tmp_path / "w.pt", sample())
    same(read_tensors(tmp_path / "w.pt"), sample())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_arrays_by_name(tmp_path, save):
    tensors = sample() | {"pruned": torch.zeros(100_000)}
    save(tmp_path / "u.npz", **{k: v.numpy() for k, v in tensors.items()})
    same(read_tensors(tmp_path / "u.npz"), tensors)
    swapped = {"w": np.arange(6.0, dtype=">f4").reshape(2, 3), "f": np.asfortranarray(np.eye(3))}
    save(tmp_path / "u.npz", **swapped)
    read = read_tensors(tmp_path / "u.npz")
    assert torch.equal(read["w"], torch.arange(6.0).reshape(2, 3))
    assert read["f"].is_contiguous()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"w": np.array([{}], dtype=object)}, "pickled Python objects"),
        ({"w": np.array(["a"])}, "unsupported type <U1"),
        ({"w": np.ones(2, dtype=complex)}, "unsupported type torch.complex128"),
        ({"w": np.ones(2, dtype=np.longdouble)}, "unsupported type float128|float32 or float64"),
        ({"w": np.ones(2, dtype=np.uint16)}, "float32 or float64"),
        ({}, "holds no tensor"),
    ],
)
def test_other_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "u.npz", **arrays)
    refused(tmp_path / "u.npz", message)


def npy(shape, body=b"", descr="<f4"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + body


@pytest.mark.parametrize(
    "member", [npy("(10**9,)"), npy("(1000000000,)"), npy("(4,)", b"\0" * 8), npy("(-1,)"), b"", b"\x93NUMPY", b"text"]
)
def test_hostile_arrays(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "u.npz", "w") as file:
        file.writestr("w.npy", member)
    refused(tmp_path / "u.npz", "damaged|unsupported")


def test_an_archive_that_unpacks_to_more_than_it_can_hold(tmp_path):
    np.savez(tmp_path / "u.npz", w=np.zeros(10))
    data = bytearray((tmp_path / "u.npz").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 2**31)
    (tmp_path / "u.npz").write_bytes(data)
    refused(tmp_path / "u.npz", "unpacks to 2,147,483,648, more than the")


def test_positions_are_given_the_names_that_fit(tmp_path):
    trained = {"b": torch.ones(3), "a": torch.ones(2, 3)}
    stored = trained | {"mean": torch.ones(3)}
    assert named(dict(trained), "u.npz", trained, stored) == (trained, False)
    values = [2 * v for v in stored.values()]
    for count in (2, 3):
        found, positional = named({f"arr_{i}": v for i, v in enumerate(values[:count])}, "u.npz", trained, stored)
        assert positional
        assert list(found) == ["b", "a", "mean"][:count]
        assert torch.equal(found["a"], values[1])
    with pytest.raises(InvalidFile, match="1 arrays for 2 trainable parameters"):
        named({"arr_0": values[0]}, "u.npz", trained, stored)
    with pytest.raises(InvalidFile, match=r"arr_0 has shape \(2, 3\) where 'b' has \(3,\)"):
        named({"arr_0": values[1], "arr_1": values[0]}, "u.npz", trained, stored)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_do_not_run(tmp_path):
    ran = tmp_path / "ran"
    hostile = Hostile(str(ran))
    with zipfile.ZipFile(tmp_path / "zipped.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(hostile))
        file.writestr("archive/version", "3")
    for protocol in range(6):
        (tmp_path / f"p{protocol}.pt").write_bytes(pickle.dumps(hostile, protocol=protocol))
    torch.save({"w": hostile}, tmp_path / "saved.pt")
    torch.save({"w": hostile}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == 10
    for path in files:
        refused(path, "pickled Python objects|neither a safetensors, PyTorch nor")
    assert not ran.exists()


def nested(levels):
    """Return a pickled dictionary whose name is a tuple that holds a tuple twice, which holds one twice, ..."""
    return b"\x80\x02)q\x01" + b"h\x01h\x01\x86q\x01" * levels + b"}h\x01K\x01s."


@pytest.mark.parametrize("zipped", [True, False])
def test_names_that_take_for_ever_to_hash(tmp_path, zipped):
    path = tmp_path / "w.pt"
    for levels, message in ((3, "under a tuple|pickled Python objects"), (100, "nests tuples too deeply")):
        path.write_bytes(nested(levels))
        if zipped:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("archive/data.pkl", nested(levels))
                file.writestr("archive/version", "3")
                file.writestr("archive/byteorder", "little")
        refused(path, message)


def test_absent_empty_folder(tmp_path):
    refused(tmp_path / "absent.safetensors", "There is no file")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "is empty")
    refused(tmp_path / "bad\0name", "cannot be read")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "old.pt"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"u.{suffix}"
    if suffix == "safetensors":
        write_tensors(path, sample())
    else:
        torch.save(sample(), path, _use_new_zipfile_serialization=suffix == "pt")
    data = path.read_bytes()
    for length in {1, 4, 7, 8, 9, 20, len(data) // 3, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:length])
        refused(path)


def header(text, body=b""):
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{" + b" " * 100,
        header(b"{"),
        header(b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}', b"\0" * 8),
        header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
        header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        header(b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', b"\0"),
        header(b'{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', b"\0" * 8),
        header(b"{" + b'"a":{' * 5000 + b"}" * 5001),
        header(b'{"a":"\xff\xfe"}'),
        header(b"{}"),
        b"hello world, this is no tensor file",
        b"PK\x03\x04 and then nothing",
        b"PK\x05\x06" + b"\0" * 18,
        b"\x80\x02.",
        b"\x80",
    ],
)
def test_hostile_files(tmp_path, data):
    (tmp_path / "u.safetensors").write_bytes(data)
    refused(tmp_path / "u.safetensors")


@given(where=st.integers(0, 3000), value=st.integers(0, 255), old=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_never_ends_in_another_error(tmp_path_factory, where, value, old):
    path = tmp_path_factory.mktemp("flip") / "u.pt"
    buffer = io.BytesIO()
    torch.save(sample(), buffer, _use_new_zipfile_serialization=not old)
    arrays = io.BytesIO()
    np.savez(arrays, **{k: v.numpy() for k, v in sample().items()})
    for data in (buffer.getvalue(), safetensors.torch.save(sample()), arrays.getvalue()):
        changed = bytearray(data)
        changed[where % len(data)] = value
        path.write_bytes(bytes(changed))
        try:
            tensors = read_tensors(path)
        except InvalidFile:
            continue
        assert all(isinstance(t, torch.Tensor) for t in tensors.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": 3}, "is a int, not a tensor"),
        ({3: torch.ones(1)}, "Entry 3"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({}, "no tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"w": torch.ones(1).expand(10**12)}, "more values than the file can hold"),
        ({"w": torch.eye(3).to_sparse()}, "not dense"),
        ({"w": torch.ones(3, device="meta")}, "not dense|pickled"),
    ],
)
def test_other_contents(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", message)


class TestWriting:
    def test_replaces_in_one_step(self, tmp_path):
        path = tmp_path / "a.bin"
        write_bytes(path, b"one")
        write_bytes(str(path), b"two")
        assert path.read_bytes() == b"two"
        assert os.listdir(tmp_path) == ["a.bin"]

    def test_permissions_are_the_usual_ones(self, tmp_path):
        write_bytes(tmp_path / "a", b"")
        (tmp_path / "b").write_bytes(b"")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode

    def test_nothing_is_left_behind_and_the_old_file_stays(self, tmp_path, monkeypatch):
        path = tmp_path / "a.safetensors"
        write_tensors(path, sample())
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InvalidFile, match="No space left on device"):
            write_tensors(path, {"w": torch.zeros(2)})
        assert os.listdir(tmp_path) == ["a.safetensors"]
        assert path.read_bytes() == before

    def test_an_interruption_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupted(descriptor):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(tmp_path / "a", b"data")
        assert os.listdir(tmp_path) == []

    def test_impossible_places(self, tmp_path):
        with pytest.raises(InvalidFile, match="cannot be written"):
            write_bytes(tmp_path / "absent" / "a", b"")
        (tmp_path / "folder").mkdir()
        with pytest.raises(InvalidFile, match="cannot be written"):
            write_bytes(tmp_path / "folder", b"")
        assert os.listdir(tmp_path) == ["folder"]
