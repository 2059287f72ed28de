"""Options with values that nobody expects: each ends in a job or in one sentence."""

from __future__ import annotations

import random

import pytest

VALUES = (
    "", " ", "nan", "inf", "-inf", "-1", "0", "1", "3", "0.5", "1e308", "1e-320", "9" * 5000, "0x10", "1_000", "٣",
    "True", "none", "null", "é\udcff", "\x1b[31m", "a" * 20_000, "1,2,3", "1,,2", ",", "1x8x8", "8,8", "1,8,8,",
    "x=1", "=", "a=", "norm=nan", "clip:norm=1", "clip:", "clip:norm", "sign:x=1", ":", "a:b", "os:getcwd", "os:path",
    "torch:Tensor", "victim:small", "victim:quits", "victim:broken", "victim:wrong", "victim.py:small", "nowhere.py:x",
    ".", "..", "/dev/null", "/dev/zero", "weights.safetensors", "truth.safetensors", "victim.py", "2m", "0s", "1e9h",
    "mean", "sum", "sgd", "adamw", "tensor", "image", "weight_delta", "gradient", "cpu", "cuda:99", "meta", "float64",
    "iterations=1", "restarts=0", "iterations=-1", "dtype=float16", "norm=true", "classes=0", "width=100000",
)  # fmt: skip
OPTIONS = (
    "attack", "attack_option", "batch_size", "budget", "class_weights", "classes", "data", "defense", "device", "dtype",
    "input_kind", "input_shape", "kind", "label_smoothing", "labels", "local_batch_size", "local_epochs", "local_steps",
    "lora", "loss", "lr", "mean", "mode", "model", "model_arg", "momentum", "optimizer", "reduction", "seed", "std",
    "table", "task", "truth", "update", "weight_decay", "weights", "round", "client",
)  # fmt: skip


def test_every_option_is_tried() -> None:
    import inspect

    from gradleak.cli import commands

    assert {*OPTIONS, "out", "context", "capture"} == set(inspect.signature(commands.attack).parameters)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_unexpected_values_end_in_a_job_or_one_sentence(case, monkeypatch, part: int) -> None:
    monkeypatch.setattr("gradleak.cli.attack.run", lambda job, watch: 0)
    monkeypatch.setattr("gradleak.cli.attack.choose_threads", lambda work: 1)
    draw = random.Random(part)
    for _ in range(100):
        changed = {option: draw.choice(VALUES) for option in draw.sample(OPTIONS, draw.choice((1, 1, 2, 3)))}
        done = case.attack(**changed)
        assert done.code in (0, 2), changed
        said = done.err.splitlines()
        assert len(said) <= 1 or done.code == 0, (changed, done.err)
        assert len(done.err) < 3000, changed
        assert "\x1b" not in done.err, changed
        if done.code == 2:
            assert said[0].startswith("gradleak: "), changed
            assert said[0].endswith((".", "?")), changed
