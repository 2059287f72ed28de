from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.capture import MANIFEST, Manifest, describe_space, describe_training, read_capture, write_capture
from gradleak.data import read_tensors
from gradleak.errors import GradleakError, InvalidFile, InvalidInput
from gradleak.spaces import Number, TableSpace
from gradleak.training import SGD, Adam
from gradleak.types import NoteKind

HEAD = {"schema": "gradleak-capture", "version": 1}


def tensors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weight": scale * torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def stated(folder: Path, **fields: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(HEAD | fields))
    return folder


def test_what_is_written_is_read(tmp_path) -> None:
    manifest = Manifest(
        framework="plain", model="lenet", model_arg={"act": "relu", "width": 3}, mean=(0.1, 1 / 3), batch_size=4,
        mode="eval", defense=("clip:norm=1", "gaussian_noise:sigma=0.1"),
    )  # fmt: skip
    space = gl.ImageSpace((3, 8, 8))
    update = gl.Update(tensors(0.5), gl.UpdateKind.WEIGHT_DELTA)
    training = gl.FedAvg(0.1, epochs=2, loss=gl.CrossEntropy("sum", 0.1))
    manifest = Manifest(**{**vars(manifest), **describe_training(training)})
    home = write_capture(tmp_path / "c", manifest, tensors(), update, space=space)
    (entry,) = read_capture(tmp_path / "c").entries
    assert home == entry.folder == tmp_path / "c"
    assert entry.manifest.created
    assert entry.manifest.number_format == "float32"
    options = entry.options()
    for name, expected in (("weights", tensors()), ("update", tensors(0.5))):
        found = read_tensors(options[name])
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert options["model_arg"] == ["act=relu", "width=3"]
    assert options["defense"] == ["clip:norm=1", "gaussian_noise:sigma=0.1"]
    assert options["mean"] == "0.1,0.3333333333333333"
    wanted = {"kind": "weight_delta", "lr": "0.1", "local_epochs": "2", "input_shape": "3,8,8", "reduction": "sum"}
    assert {k: options[k] for k in wanted} == wanted
    assert entry.notes == ()


def test_many_share_their_weights_and_are_sorted(tmp_path) -> None:
    clients = ["b", "a/../b", "ä"]
    for number in (2, 1):
        for client in clients:
            write_capture(tmp_path, Manifest(round=number, client=client), tensors(number), tensors())
    capture = read_capture(tmp_path)
    assert [(e.manifest.round, e.manifest.client) for e in capture.entries] == [
        (r, c) for r in (1, 2) for c in sorted(clients)
    ]
    assert len(list(tmp_path.glob("weights-*"))) == 2
    assert len({e.options()["weights"] for e in capture.entries}) == 2
    assert capture.entry(2, "ä").manifest.client == "ä"
    for which in ((None, "b"), (3, "b"), (None, None)):
        with pytest.raises(InvalidInput, match="choose one of them with --round and --client"):
            capture.entry(*which)


def test_writers_side_by_side(tmp_path) -> None:
    def write(index: int) -> None:
        write_capture(tmp_path, Manifest(round=0, client=str(index)), tensors(), tensors(index))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(16)))
    assert len(read_capture(tmp_path).entries) == 16
    assert not list(tmp_path.glob("**/*.partial"))


def test_nothing_private_unless_asked(tmp_path) -> None:
    truth = gl.Batch(torch.rand(2, 3), torch.tensor([0, 1]))
    home = write_capture(tmp_path, Manifest(round=1), tensors(), tensors(), truth=truth)
    assert read_capture(tmp_path).entry().options()["truth"] == home / "truth.safetensors"
    write_capture(tmp_path, Manifest(round=1), tensors(), tensors())
    assert "truth" not in read_capture(tmp_path).entry().options()
    assert sorted(p.name for p in home.iterdir()) == ["U.safetensors", MANIFEST]


def test_a_table_brings_its_schema(tmp_path) -> None:
    from gradleak.data import read_schema

    space = TableSpace((Number("age", mean=40, std=10), Number("hours")))
    write_capture(tmp_path, Manifest(), tensors(), tensors(), space=space)
    options = read_capture(tmp_path).entry().options()
    assert read_schema(options["table"]).columns == space.columns
    assert "input_shape" not in options


def test_what_is_not_known_is_named(tmp_path) -> None:
    stated(tmp_path, model="lenet", secure=True, unknown_filters=["site.Scramble"])
    entry = read_capture(tmp_path).entry()
    assert entry.manifest.more == {"secure": True}
    assert [n.kind for n in entry.notes] == [NoteKind.LIMIT, NoteKind.ASSUMPTION]
    assert "'secure'" in entry.notes[0]
    assert "site.Scramble" in entry.notes[1]


@pytest.mark.parametrize(
    ("training", "more"),
    [
        (gl.FedSGD(), set()),
        (gl.FedSGD(nn.SmoothL1Loss()), {"own_loss"}),
        (gl.FedAvg(optimizer=SGD(0.1, 0.9, nesterov=True), steps=3), {"nesterov"}),
        (gl.FedAvg(optimizer=Adam(0.1, (0.8, 0.999)), loss=gl.BinaryCrossEntropy(pos_weight=2.0)), {"betas"}),
    ],
)
def test_trainings_are_described(training, more) -> None:
    found = describe_training(training)
    assert set(found.get("more", {})) == more
    assert found["kind"] == training.kind.value


def test_sentences_are_not_described() -> None:
    with pytest.raises(InvalidInput, match="sentences"):
        describe_space(gl.TokenSpace(torch.rand(4, 2), 3))


@pytest.mark.parametrize("name", ["weights", "update", "table", "truth"])
def test_no_path_leaves_the_capture(tmp_path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    folder = stated(tmp_path / "c")
    (folder / "link").symlink_to(tmp_path / "secret")
    for path in ("../secret", str(tmp_path / "secret"), "link", "a\0b"):
        stated(folder, **{name: path})
        with pytest.raises(InvalidFile, match="lies outside of the capture"):
            read_capture(folder).entry().options()
        assert name not in read_capture(folder).entry().options(without={name})


def test_code_of_others_is_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    for name in ("mine.py", "os.py", "c/theirs.py", "yaml.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("def make(): ...")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    outside = tmp_path.parent / f"{tmp_path.name}.py"
    outside.write_text("")
    folder = stated(tmp_path / "c")
    for model in ("mine:make", "mine.py:make", "pack:make", "lenet"):
        stated(folder, model=model)
        assert read_capture(folder).entry().options()["model"] == model
    hostile = ("os:system", "subprocess:run", "torch:load", "c/theirs.py:make", "c.theirs:make", "../x:y", ":", "a b:c",
               f"../{outside.name}:make", f"{outside}:make", "hf:../..", "hf:/etc", "\0.py:x")  # fmt: skip
    for option in ("model", "loss"):
        for spec in hostile:
            stated(folder, **{option: spec})
            with pytest.raises(InvalidFile):
                read_capture(folder).entry().options()
    (folder / "hf").mkdir()
    stated(folder, model="hf:hf")
    assert read_capture(folder).entry().options()["model"] == f"hf:{folder / 'hf'}"


HOSTILE = [
    b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"schema": "gradleak-capture"}',
    b'{"schema": "gradleak-capture", "version": 2}', b'{"schema": ["gradleak-capture"], "version": 1}',
]  # fmt: skip
WRONG = {
    "lr": [1e999, "0.1", True, [1]], "round": ["1", 1.5], "client": [3], "mean": [0.5, ["a"]], "input_shape": [[1.5]],
    "model_arg": [[], {"a": []}], "defense": ["clip:norm=1", [1]], "model": [7], "batch_size": [{}],
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_manifests_are_refused(tmp_path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InvalidFile) as refused:
        read_capture(tmp_path)
    assert "\n" not in str(refused.value)


def test_wrong_types_are_refused(tmp_path) -> None:
    for name, values in WRONG.items():
        for value in values:
            stated(tmp_path, **{name: value})
            with pytest.raises(InvalidFile, match=f"{name!r} in .* must be"):
                read_capture(tmp_path)


def test_large_manifests_are_not_read(tmp_path) -> None:
    stated(tmp_path, junk="x" * (1 << 20))
    with pytest.raises(InvalidFile, match="bytes where at most"):
        read_capture(tmp_path)


@pytest.mark.parametrize("path", ["absent", "empty", "file", "a\0b"])
def test_no_capture(tmp_path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(GradleakError):
        read_capture(tmp_path / path)
