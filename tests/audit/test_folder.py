from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gradleak.audit.folder as module
from gradleak.audit.folder import Folder, check_writable, read_folder, write_files, write_folder
from gradleak.audit.records import AttackRun, Curves, Example, Outcome, Record, Subject, Threat, Verdict
from gradleak.errors import InvalidFile, InvalidInput

RECORD = Record(
    subject=Subject("lenet", "LeNet", 10, 2, "image", (1, 4, 4), 5, 2, "gradient", "float32", "FedSGD"),
    threat=Threat(("BATCH_SIZE",)),
    attack=AttackRun("dlg"),
    outcome=Outcome("converged", 1e-3, 5, 7, 1.5),
    verdict=Verdict("leaked", "It came back.", "Because."),
    examples=(Example(1, 0, None, None, {"mse": 0.5}), Example(0, None, None, None, {})),
    curves=Curves((0, 2, 5), (1.0, 0.5, 0.1)),
)
INPUTS = np.random.default_rng(0).random((2, 1, 4, 4))
WHOLE = Folder(RECORD, INPUTS, np.array([1, 2]), INPUTS * 0.5, np.stack([INPUTS] * 3).astype(np.float32))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("folder", [WHOLE, Folder(replace(RECORD, examples=None, curves=None), INPUTS)])
def test_round_trip(tmp_path, folder: Folder) -> None:
    write_folder(tmp_path / "new" / "out", folder, "<html>")
    back = read_folder(tmp_path / "new" / "out")
    assert back.record == folder.record
    for name in ("inputs", "labels", "truth", "snapshots"):
        left, right = getattr(back, name), getattr(folder, name)
        assert (left is None) == (right is None)
        assert right is None or (np.array_equal(left, right) and left.dtype == right.dtype)
    assert sorted(os.listdir(tmp_path / "new")) == ["out"]
    assert sorted(os.listdir(tmp_path / "new" / "out")) == [
        "reconstruction.safetensors",
        "report.html",
        "result.json",
        "trace.safetensors",
    ]


def test_a_new_folder_is_as_readable_as_any(tmp_path) -> None:
    (tmp_path / "plain").mkdir()
    write_files(tmp_path / "out", {"a": b"1"})
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_existing_files_are_replaced_and_others_stay(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "a").write_text("old")
    write_files(tmp_path, {"a": b"new", "b": b"2"})
    assert contents(tmp_path) == {"notes.txt": b"mine", "a": b"new", "b": b"2"}


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, failure: BaseException, existing: bool) -> None:
    out = tmp_path / "deep" / "out" if not existing else tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "a").write_text("old")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    calls = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(module.os, "fsync", fail)
    expected = InvalidFile if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_files(out, {"a": b"new", "b": b"2"})
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    if existing:
        assert (out / "a").read_text() == "old"
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)


def test_places_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match="not a folder"):
            check_writable(bad)
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no folder that refuses root as well")
def test_a_folder_that_refuses_root_as_well() -> None:
    for bad in (Path("/proc/x"), Path("/proc/x/y"), Path("/proc/self")):
        with pytest.raises(InvalidInput, match=r"cannot be written \(.+\); name another one with --out"):
            check_writable(bad)


def test_a_check_that_is_refused_half_way_leaves_nothing(tmp_path, monkeypatch) -> None:
    def refuse(**_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.tempfile, "mkdtemp", refuse)
    with pytest.raises(InvalidInput, match="No space left"):
        check_writable(tmp_path / "a" / "b" / "c")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match="cannot be written"):
        check_writable(tmp_path / "out")


def test_absent_folders_and_files_are_named(tmp_path) -> None:
    with pytest.raises(InvalidFile, match="There is no folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(InvalidFile, match=r"There is no result\.json"):
        read_folder(tmp_path)
    write_folder(tmp_path, WHOLE, "")
    (tmp_path / "reconstruction.safetensors").unlink()
    with pytest.raises(InvalidFile, match=r"There is no reconstruction\.safetensors"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["reconstruction.safetensors", "trace.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_tensors(tmp_path, name: str, keep: int) -> None:
    write_folder(tmp_path, WHOLE, "")
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:keep])
    with pytest.raises(InvalidFile, match="is damaged"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(WHOLE, inputs=INPUTS[:, :, :2]),
        replace(WHOLE, inputs=INPUTS[:0]),
        replace(WHOLE, truth=INPUTS[:1]),
        replace(WHOLE, snapshots=np.stack([INPUTS] * 2)),
        replace(WHOLE, record=replace(RECORD, examples=(Example(0, 7, None, None, {}),))),
        replace(WHOLE, record=replace(RECORD, examples=(Example(-1, 0, None, None, {}),))),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, wrong: Folder) -> None:
    write_folder(tmp_path, wrong, "")
    with pytest.raises(InvalidFile, match="do not belong together"):
        read_folder(tmp_path)
