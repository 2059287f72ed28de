"""Reading with a bound, messages without control characters; writing is tested with what writes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from gradleak.errors import InvalidFile, InvalidInput, NotApplicable, UnknownName, clean
from gradleak.files import read_file, sweep, write_bytes


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a") == read_file(str(tmp_path / "a"), limit=5) == b"12345"
    with pytest.raises(InvalidFile, match="has 5 bytes where at most 4 are expected"):
        read_file(tmp_path / "a", limit=4)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "loop").symlink_to("loop")
    wrong = {
        "/dev/zero": "device or a pipe", str(tmp_path / "pipe"): "device or a pipe", str(tmp_path): "is a folder",
        str(tmp_path / "absent"): "There is no file", str(tmp_path / "pipe" / "x"): "There is no file",
        "a\0b": "cannot be read", str(tmp_path / "loop"): "cannot be read", "x" * 5000: "cannot be read",
    }  # fmt: skip
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for path, message in wrong.items():
        with pytest.raises(InvalidFile, match=message) as caught:
            read_file(path)
        assert str(caught.value).isprintable()
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        try:
            Path.replace = lambda *_: os._exit(0)  # type: ignore[method-assign]
            write_bytes(tmp_path / "a", b"1")
        finally:
            os._exit(1)
    os.waitpid(process, 0)
    assert len(os.listdir(tmp_path)) == 1
    sweep(tmp_path, "b")
    assert len(os.listdir(tmp_path)) == 1
    write_bytes(tmp_path / "a", b"2")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a b c"), ("\x1b[2J\a", r"\x1b[2J\x07"), ("\udcff", r"\udcff"), ("\u202e", r"\u202e"),
        ("naïve − “x” …", "naïve − “x” …"),
    ],
)  # fmt: skip
def test_messages_are_printable(text: str, shown: str) -> None:
    assert clean(text) == str(InvalidInput(text)) == str(NotApplicable(text)) == shown


def test_messages_have_an_end() -> None:
    text = str(InvalidFile("begin " + "x" * 10**6 + "; the remedy."))
    assert len(text) == 1000
    assert text.startswith("begin ")
    assert text.endswith("; the remedy.")
    assert len(str(UnknownName("attack", "y" * 10**6, ["dlg"]))) < 300


def test_errors_travel_between_processes() -> None:
    for error in (UnknownName("attack", "dlq", ["dlg"]), NotApplicable("No.")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
