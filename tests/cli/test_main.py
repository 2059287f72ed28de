from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import gradleak
from gradleak.audit.records import from_json
from gradleak.cli import demo, names

ROOT = Path(__file__).resolve().parents[2]


def test_help_needs_no_torch_and_answers_at_once() -> None:
    code = (
        "import sys\nfrom gradleak.cli import main\nsys.argv = ['gradleak', '--help']\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'numpy', 'rich'} & set(sys.modules), 'too much'\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "attack", "report", "list", "reproduce"):
        assert command in done.stdout
    # Processor time, which other load on the machine does not change much.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", ["demo", "attack", "report", "list", "reproduce"])
def test_help_of_a_command_is_plain_text(run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert "\\" not in done.out
    assert ("[required]" in done.out) == (command not in ("demo", "list"))


def test_version(run) -> None:
    assert run("--version").out == f"gradleak {gradleak.__version__}\n"


def test_no_command_shows_help(run) -> None:
    done = run()
    assert "Usage" in done.out + done.err


def test_unknown_commands(run) -> None:
    done = run("atack")
    assert done.code == 2
    assert "No such command 'atack'" in done.err
    assert done.err.count("\n") == 1


def test_a_missing_option_is_named(run) -> None:
    done = run("attack", "--model", "lenet")
    assert done.code == 2
    assert "--out" in done.err
    assert "gradleak attack --help" in done.err
    done = run("attack", "--model", "lenet", "--out", "x")
    assert done.code == 2
    assert "--update" in done.err


@pytest.mark.parametrize("kind", ["attacks", "models", "metrics", "defenses"])
def test_list(run, kind: str) -> None:
    done = run("list", kind)
    package = names.NAMED[kind]
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines
    for line in lines:
        name, _, words = line.strip().partition(" ")
        assert name in package.__all__
        assert words.strip().endswith(".")
        assert "`" not in words


def test_list_everything_and_nothing(run) -> None:
    done = run("list")
    assert all(f"{kind}\n" in done.out for kind in names.NAMED)
    done = run("list", "attack")
    assert done.code == 2
    assert "did you mean 'attacks'" in done.err


PAPER = '''"""A toy."""
from gradleak.papers.experiment import Result, Row, median
NAME, SMOKE, DEFAULT, FULL = "toy", 3, 3, 3

def one(lab, *, number):
    if number == 2 and not (lab.out / "go").exists():
        raise KeyboardInterrupt
    return {"square": number**2}

def run(config, lab):
    records = lab.measure(one, [{"number": i} for i in range(config)])
    return Result([Row("median square", median([r["square"] for r in records]))])
'''


def test_an_interrupted_reproduction_says_what_stays_and_resumes(run, tmp_path, monkeypatch) -> None:
    from gradleak.papers import reproduce

    paper = tmp_path / "papers" / "1999_toy"
    paper.mkdir(parents=True)
    (paper / "toy.py").write_text(PAPER)
    (paper / "expected.toml").write_text("")
    monkeypatch.setattr(reproduce, "_base", lambda root: tmp_path / "papers")
    done = run("reproduce", "1999_toy", "--smoke")
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        "Interrupted; 2 measured cases stay in 'runs/1999_toy'; run the same command again to go on."
    )
    assert len(list((tmp_path / "runs" / "1999_toy" / "toy").glob("*.json"))) == 2
    (tmp_path / "runs" / "1999_toy" / "go").touch()
    done = run("reproduce", "1999_toy", "--smoke")
    assert done.code == 0, done.err
    assert "one, 1 of 3 cases to measure" in done.err


def test_unexpected_system_errors_are_sentences(run, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(names, "list_names", refuse)
    done = run("list")
    assert done.code == 2
    assert "'/somewhere'" in done.err
    assert "Traceback" not in done.err


def test_bugs_are_not_hidden(run, monkeypatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(names, "list_names", bug)
    with pytest.raises(ZeroDivisionError):
        run("list")


def test_demo_on_a_picture_of_ones_own(run, tmp_path, monkeypatch) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "me.png")
    original = demo.build_attack
    monkeypatch.setattr(demo, "build_attack", lambda name, options: original(name, {"iterations": 5}))
    monkeypatch.setattr(demo, "_TRANSFORMER", {"width": 256, "depth": 1, "dropout": 0.1})
    done = run("demo", "--image", "me.png", "--out", "seen")
    assert done.code == 0, done.err
    found = from_json((tmp_path / "seen" / "result.json").read_text(encoding="utf-8"))
    assert found.subject.model == "lenet"
    assert found.command == "gradleak demo --image me.png --out seen"
    assert "me.png" in done.out
    assert "psnr, dB" in done.out
    large = from_json((tmp_path / "seen" / "vision-transformer" / "result.json").read_text(encoding="utf-8"))
    assert large.certificate.verdict == "proved"
    assert large.examples[0].mse <= 1e-8


def test_demo_refuses_what_is_no_picture(run, tmp_path) -> None:
    (tmp_path / "me.png").write_bytes(b"not a picture")
    done = run("demo", "--image", "me.png")
    assert done.code == 2
    assert "cannot be read as an image" in done.err
    assert sorted(os.listdir(tmp_path)) == ["me.png"]


@pytest.mark.slow
def test_demo_leaks_the_photograph(run, tmp_path) -> None:
    done = run("demo")
    assert done.code == 0, done.err
    found = from_json((tmp_path / "gradleak-demo" / "result.json").read_text(encoding="utf-8"))
    assert found.examples[0].mse <= 1e-4
    assert found.examples[0].label == found.examples[0].recovered
