"""Broken files of every kind, and options without a meaning: one sentence each, bounded memory, nothing left behind."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch

from gradleak import cli
from gradleak.audit import store
from gradleak.papers import reproduce

TIMES = 40
"""Ways in which each file is broken."""


@pytest.mark.parametrize("kind", ["tensor_files", "image_files", "batch_files", "table_files", "capture_files"])
def test_broken_bytes_are_read_or_refused_in_one_sentence(hostile: ModuleType, tmp_path: Path, kind: str) -> None:
    for name, data in getattr(hostile, kind)().items():
        path = tmp_path / name
        path.write_bytes(data)
        assert hostile.refusal(hostile.read, tmp_path, name) is None, name
        refused = 0
        for seed in range(TIMES):
            path.write_bytes(hostile.broken_bytes(data, seed))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")  # an error would hide that something is said besides the sentence
                refused += hostile.refusal(hostile.read, tmp_path, name) is not None
            assert not said, (name, seed, [str(w.message) for w in said])
        assert refused >= TIMES // 3, name  # a flipped bit may be any number, and most decoders forgive


def test_broken_manifests_are_read_or_refused_in_one_sentence(hostile: ModuleType, tmp_path: Path) -> None:
    for seed in range(200):
        (tmp_path / "capture.json").write_text(hostile.broken_json(hostile.CAPTURE, seed))
        hostile.refusal(hostile.read, tmp_path, "capture.json")


def test_small_files_that_would_take_all_memory(hostile: ModuleType, tmp_path: Path) -> None:
    names = hostile.write_bombs(tmp_path)
    measured = hostile.forget_peak()
    before = hostile.resident()
    for name in names:
        assert hostile.refusal(hostile.read, tmp_path, name) is not None, name
    assert not measured or hostile.resident() - before < 64 << 20


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000, b"{}" * 9, b"\xff", b'{"classes": ' + b"9" * 5000 + b"}",
        b'{"classes": {"' + b"9" * 5000 + b'": 1}}',
        b'{"classes": {"99999999": "x"}}', b'{"classes": {"-1": "x"}}', b'{"class_of_index": {"\xc2\xb2": "x"}}',
        b'{"classes": [[[[1]]], null, "\\ud800\\u001b[2J"]}',
    ],
)  # fmt: skip
def test_broken_names_of_classes(hostile: ModuleType, tmp_path: Path, content: bytes) -> None:
    from gradleak.data import load_images

    (tmp_path / "i.npz").write_bytes(hostile.image_files()["i.npz"])
    (tmp_path / "i.json").write_bytes(content)
    if hostile.refusal(hostile.read, tmp_path, "i.npz") is None:
        assert all(name.isprintable() for name in load_images(tmp_path / "i.npz").classes or ())


def test_broken_results_are_rendered_or_refused(hostile: ModuleType, tmp_path: Path) -> None:
    out, refused = tmp_path / "out", 0
    hostile.write_folder(out, hostile.result(), "<html>")
    text = (out / "result.json").read_text()
    for seed in range(6 * TIMES):
        (out / "result.json").write_text(hostile.broken_json(text, seed))
        refused += hostile.refusal(hostile.show, out) is not None
    assert refused >= TIMES
    (out / "result.json").write_text(text)
    hostile.show(out)
    for name in ("result.json", "reconstruction.safetensors", "trace.safetensors"):
        data = (out / name).read_bytes()
        for seed in range(TIMES):
            broken = hostile.broken_bytes(data, seed)
            (out / name).write_bytes(broken)
            # A flipped digit of the record is another number; of the tensors every bit is known by the hash.
            said = hostile.refusal(hostile.show, out)
            assert said is not None or name == "result.json" or broken == data
        (out / name).write_bytes(data)


def test_arrays_that_do_not_fit_their_record(
    hostile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time
    refused = 0
    for seed in range(2 * TIMES):
        hostile.write_folder(tmp_path / "out", hostile.broken_arrays(seed), "<html>")
        refused += hostile.refusal(hostile.show, tmp_path / "out") is not None
    assert refused >= TIMES // 2


def test_broken_files_of_a_paper(hostile: ModuleType, tmp_path: Path) -> None:
    case = {"image": 3, "solver": "lbfgs"}
    path = tmp_path / "case.json"
    store.write_case(path, "run", case, {"mse": 0.5, "image": np.ones(3)}, 1.0)
    record = path.read_bytes()
    assert store.read_case(path, case) is not None
    result = json.dumps(
        {
            "title": "t", "scale": "smoke", "scaled": "", "gpu": False, "hardware": "h", "date": "d", "seconds": 1.0,
            "rows": [{"name": "r", "ours": {"value": 1.0, "low": 0.0, "high": 2.0, "n": 3}, "published": None,
                      "unit": "", "cost": "", "note": ""}],
            "texts": {"a": "b"}, "figures": [{"name": "f", "caption": "c", "file": "x/f.png"}],
        }
    )  # fmt: skip
    for seed in range(3 * TIMES):
        (tmp_path / "expected.toml").write_bytes(hostile.broken_bytes(hostile.EXPECTED, seed))
        hostile.refusal(hostile.read, tmp_path, "expected.toml")
        path.write_bytes(hostile.broken_bytes(record, seed))
        store.read_case(path, case)  # damaged is absent
        path.write_text(hostile.broken_json(record.decode(), seed))
        store.read_case(path, case)
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / "toy.json").write_text(hostile.broken_json(result, seed))
        known = reproduce._results(tmp_path / "results", None)
        assert reproduce.to_markdown("1999_toy", known, {})
        assert reproduce.to_html("1999_toy", known, {}, tmp_path).encode(errors="replace")


# --------------------------------------------------------------------------------------------------- command line

MODULE = """
import torch
from torch import nn
def small(classes=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Sigmoid(), nn.Linear(6, classes))
"""


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return how to run ``gradleak attack`` with some options changed; it must be refused in one sentence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim.py").write_text(MODULE)
    sys.modules.pop("victim", None)
    generator = torch.Generator().manual_seed(0)
    shapes = {"1.weight": (6, 16), "1.bias": (6,), "3.weight": (5, 6), "3.bias": (5,)}
    values = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    safetensors.torch.save_file(values, tmp_path / "weights.safetensors")
    safetensors.torch.save_file({k: v / 9 for k, v in values.items()}, tmp_path / "update.safetensors")
    before = set(os.listdir(tmp_path)) | {"__pycache__"}

    def go(*more: str, **changed: str) -> str:
        options = {
            "model": "victim:small", "weights": "weights.safetensors", "update": "update.safetensors",
            "input_shape": "1,4,4", "classes": "5", "batch_size": "1", "attack": "dlg", "out": "out",
        } | changed  # fmt: skip
        words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
        monkeypatch.setattr(sys, "argv", ["gradleak", "attack", *words, *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        asked = " ".join((*more, *(f"--{k} {v}" for k, v in changed.items())))[:200]
        assert ended.value.code == 2, (asked, said)
        assert said.startswith("gradleak: "), (asked, said)
        assert said.endswith((".\n", "?\n")), (asked, said)
        assert said.count("\n") == 1, (asked, said)
        assert said[:-1].isprintable(), (asked, said)
        assert len(said) < 1100, (asked, said)
        left = {name for name in os.listdir(tmp_path) if not name.startswith("broken")} - before
        assert not left, (asked, left)
        return said

    return go


@pytest.mark.slow
def test_broken_files_on_the_command_line(hostile: ModuleType, attack: Callable[..., str], tmp_path: Path) -> None:
    count = 0
    whole = hostile.tensor_files() | hostile.image_files() | hostile.batch_files()
    for name, data in whole.items():
        for role in ("update", "weights", "truth", "data"):
            for length in (0, 9, len(data) // 2):
                if role == "data" and not name.startswith(("i.", "p.")):
                    continue
                (tmp_path / f"broken.{name}").write_bytes(data[:length])
                attack(**{role: f"broken.{name}"})
                count += 1
    assert count >= 100


def test_bombs_on_the_command_line(hostile: ModuleType, attack: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    names = hostile.write_bombs(tmp_path / "broken")
    measured = hostile.forget_peak()
    before = hostile.resident()
    for name in names:
        for role in ("update", "weights", "truth"):
            attack(**{role: f"broken/{name}"})
    assert not measured or hostile.resident() - before < 128 << 20


WHOLE = ("-1", "0", "nan", "1.5", "", "x", "1e3", "9" * 5000, "\u0661.0", "--")
REAL = ("nan", "inf", "-inf", "-1", "", "x", "1e400", "0x10", "9" * 5000)
SEVERAL = ("", ",", "1,,2", "nan", "inf,inf", "x", "1,2,3,4,5,6,7,8,9", "1;2", "9" * 5000, "\x1b[2J")
NAME = ("", "x", "\x1b[2J", "a" * 100_000, "\udcff", "None", "../..", "torch:Tensor", "os:getcwd", ":", "a\nb")
OPTIONS: dict[str, tuple[str, ...]] = {
    "batch_size": WHOLE, "classes": WHOLE, "local_epochs": WHOLE, "local_batch_size": WHOLE, "local_steps": WHOLE,
    "seed": tuple(v for v in WHOLE if v != "0"), "lr": (*REAL, "0"), "label_smoothing": (*REAL, "1"),
    "momentum": REAL, "weight_decay": REAL, "mean": SEVERAL, "std": (*SEVERAL, "0", "-1"), "input_shape": SEVERAL,
    "labels": SEVERAL, "class_weights": SEVERAL, "budget": (*REAL, "0", "-1s", "1e400h", "s"), "model": NAME,
    "kind": NAME, "mode": NAME, "reduction": NAME, "dtype": NAME, "device": NAME, "attack": NAME, "loss": NAME,
    "optimizer": NAME, "input_kind": NAME, "update": NAME, "weights": NAME, "truth": NAME, "data": NAME,
    "table": NAME, "round": WHOLE, "client": NAME,
    "defense": (*NAME, "gaussian_noise:sigma=nan", "gaussian_noise:x=1", "gaussian_noise:", "pruning:share=2"),
    "attack_option": (*NAME, "iterations=-1", "iterations=nan", "iterations=1e400", "iterations=", "=3", "x=1",
                      "iterations=" + "9" * 5000, "restarts=0", "restarts=-1", "solver=x"),
    "model_arg": (*NAME, "classes=-1", "classes=nan", "classes=" + "9" * 5000, "classes=x", "x=1", "=", "classes"),
}  # fmt: skip


TRAINING = ("lr", "local_epochs", "local_batch_size", "local_steps", "momentum", "weight_decay", "optimizer")
"""Options of local training, which are refused with gradients."""


@pytest.mark.parametrize("option", OPTIONS)
def test_options_without_a_meaning(attack: Callable[..., str], option: str) -> None:
    for value in OPTIONS[option]:
        more = {"kind": "weight_delta", "lr": "0.1"} if option in TRAINING else {}
        said = attack(**more | {option: value})
        # Not refused for another reason: the sentence names the option, or what was given.
        key, _, given = value.partition("=")
        shown = {value[:12], repr(value)[1:-1][:12], repr(key), given[:12]} - {""} if value else {"''", "'.'"}
        assert option.replace("_", "-") in said or any(v in said for v in shown), (option, value[:99], said)
