from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gradleak.files as module
from gradleak.audit.folder import Folder, check_writable, read_folder, write_files, write_folder, write_report
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
    assert replace(back.record, files={}) == folder.record
    for name, written in back.record.files.items():
        assert hashlib.sha256((tmp_path / "new" / "out" / name).read_bytes()).hexdigest() == written
    assert set(back.record.files) == {"reconstruction.safetensors", "trace.safetensors"}
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
    def refuse(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", refuse)
    for place in (tmp_path / "a" / "b" / "c", tmp_path):
        with pytest.raises(InvalidInput, match="No space left"):
            check_writable(place)
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


def forget_hashes(folder: Path) -> None:
    """Make ``result.json`` that of an earlier version, which named no hashes."""
    stored = json.loads((folder / "result.json").read_text())
    del stored["files"]
    (folder / "result.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("name", ["reconstruction.safetensors", "trace.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_tensors(tmp_path, name: str, keep: int) -> None:
    write_folder(tmp_path, WHOLE, "")
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:keep])
    with pytest.raises(InvalidFile, match=r"is not the file that belongs to result\.json"):
        read_folder(tmp_path)
    forget_hashes(tmp_path)
    with pytest.raises(InvalidFile, match="is damaged"):
        read_folder(tmp_path)


def test_results_of_earlier_versions_are_read(tmp_path) -> None:
    write_folder(tmp_path, replace(WHOLE, truth=None, snapshots=None), "")
    forget_hashes(tmp_path)
    (tmp_path / "trace.safetensors").unlink()
    assert np.array_equal(read_folder(tmp_path).inputs, INPUTS)


def test_files_of_two_runs_are_told_apart(tmp_path) -> None:
    write_folder(tmp_path / "a", WHOLE, "")
    write_folder(tmp_path / "b", replace(WHOLE, inputs=1 - INPUTS), "")
    (tmp_path / "b" / "reconstruction.safetensors").replace(tmp_path / "a" / "reconstruction.safetensors")
    with pytest.raises(InvalidFile, match=r"one of them was changed, or writing them was stopped in between"):
        read_folder(tmp_path / "a")


def test_a_rename_that_fails_puts_back_what_was_there(tmp_path, monkeypatch) -> None:
    write_folder(tmp_path, WHOLE, "<old>")
    (tmp_path / "notes.txt").write_text("mine")
    before, rename, calls = contents(tmp_path), Path.replace, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InvalidFile, match="Input/output error"):
        write_folder(tmp_path, replace(WHOLE, inputs=1 - INPUTS), "<new>")
    assert contents(tmp_path) == before


def test_disks_without_hard_links(tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_folder(tmp_path, WHOLE, "<old>")
    write_folder(tmp_path, replace(WHOLE, inputs=1 - INPUTS), "<new>")
    assert np.array_equal(read_folder(tmp_path).inputs, 1 - INPUTS)
    assert (tmp_path / "report.html").read_text() == "<new>"


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path) -> None:
    out = tmp_path / "out"
    gone, alive = 2**22 + 1, os.getppid()  # above the largest process number
    left = [
        tmp_path / f".out.{module._machine()}-{gone}-{'0' * 8}.partial",
        out / f".out.{'0' * 8}-1-{'1' * 8}.partial",
    ]
    stay = [
        tmp_path / f".out.{module._machine()}-{alive}-{'0' * 8}.partial",
        tmp_path / f".out.{'0' * 8}-{gone}-{'0' * 8}.partial",  # of another machine, and fresh
        tmp_path / f".other.{module._machine()}-{gone}-{'0' * 8}.partial",
        tmp_path / ".out.mine.partial",
    ]
    for folder in [left[0], *stay]:
        folder.mkdir(parents=True)
        (folder / "a").touch()
    write_files(out, {"a": b"1"})
    assert sorted(tmp_path.iterdir()) == sorted([out, *stay])
    left[1].mkdir()
    os.utime(left[1], (0, 0))
    write_files(out, {"a": b"2"})
    assert contents(out) == {"a": b"2"}


def test_the_page_alone_is_replaced(tmp_path) -> None:
    write_folder(tmp_path, WHOLE, "<old>")
    write_report(tmp_path, "<new> \udcff")
    assert (tmp_path / "report.html").read_text() == "<new> ?"
    assert np.array_equal(read_folder(tmp_path).inputs, INPUTS)


def test_names_that_are_no_unicode_do_not_cost_the_result(tmp_path) -> None:
    write_folder(tmp_path, replace(WHOLE, record=replace(RECORD, command="gradleak \udcff")), "\udcff")
    assert read_folder(tmp_path).record.command == "gradleak ?"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"iterations": 5', f'"iterations": {2**63}'),
        ('"iterations": 5', '"iterations": ' + "9" * 5000),
        ('"objective": 0.001', '"objective": ' + "9" * 4000),
        ('"files": {', '"files": {"notes.txt": "", '),
    ],
)
def test_records_that_no_run_writes(tmp_path, old: str, new: str) -> None:
    write_folder(tmp_path, WHOLE, "")
    text = (tmp_path / "result.json").read_text()
    assert old in text
    (tmp_path / "result.json").write_text(text.replace(old, new))
    with pytest.raises(InvalidFile, match=r"^result\.json is"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(WHOLE, inputs=INPUTS[:, :, :2]),
        replace(WHOLE, inputs=INPUTS[:0]),
        replace(WHOLE, truth=INPUTS[:1]),
        replace(WHOLE, snapshots=np.stack([INPUTS] * 2)),
        replace(WHOLE, inputs=INPUTS.astype(np.complex64)),
        replace(WHOLE, record=replace(RECORD, curves=Curves((0, 2, 5), (1.0, 0.5)))),
        replace(WHOLE, record=replace(RECORD, curves=Curves((0, 2, 5), (1.0, 0.5, 0.1), {"w": (1.0,)}))),
        replace(WHOLE, record=replace(RECORD, curves=Curves((0, 2, 5), (1.0, 0.5, 0.1), {}, (1.0,)))),
        replace(WHOLE, record=replace(RECORD, examples=(Example(0, 7, None, None, {}),))),
        replace(WHOLE, record=replace(RECORD, examples=(Example(-1, 0, None, None, {}),))),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, wrong: Folder) -> None:
    write_folder(tmp_path, wrong, "")
    with pytest.raises(InvalidFile, match=r"do not belong together|\d entries, not \d"):
        read_folder(tmp_path)
