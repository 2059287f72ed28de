"""Plans: what they say, and that one that cannot run is refused before anything runs, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradleak.audit.plan import read_plan
from gradleak.audit.running import run
from gradleak.errors import GradleakError

GOOD = """
[audit]
seeds = 2

[[case]]
name = "ward"
model = "perceptron"
model_arg = { width = 8, depth = 1 }
data = "synthetic"
input_shape = [1, 4, 4]
classes = 3
examples = 20
batch_sizes = [1, 2]
filters = [
  "clip:norm=1",
  "gaussian_noise:sigma=0.1",
]

[case.training]
lr = 0.1

[[case]]
model = "perceptron"
data = "synthetic"
input_shape = [5]

[[remedy]]
batch_size = 4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_a_plan_says_what_is_tried(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, GOOD))
    first, second = plan.cases
    assert (first.name, second.name, plan.seeds) == ("ward", "case 2", 2)
    assert first.filters == ("clip:norm=1", "gaussian_noise:sigma=0.1")
    assert first.training.lr == 0.1
    assert plan.remedies[0].batch_size == 4


@pytest.mark.parametrize(
    ("old", "new", "line", "word"),
    [
        ("gaussian_noise:sigma", "gausian_noise:sigma", 16, "gaussian_noise"),
        ("sigma=0.1", "sigma=x", 16, "sigma"),
        ("clip:norm=1", "clip:norm=0", 15, "norm"),
        ('"perceptron"\nmodel_arg', '"perceptrom"\nmodel_arg', 7, "perceptron"),
        ("width = 8", "widht = 8", 7, "widht"),
        ('"synthetic"\ninput_shape = [1', '"nowhere"\ninput_shape = [1', 9, "nowhere"),
        ("batch_sizes = [1, 2]", "batch_sizes = [1, 99]", 13, "99"),
        ("batch_sizes = [1, 2]", "batch_size = [1, 2]", 13, "batch_size"),
        ("lr = 0.1", "lr = -1", 20, "above 0"),
        ("lr = 0.1", 'loss = "cross-entropi"', 20, "cross-entropy"),
        ("lr = 0.1", "local_steps = 2", 19, "lr"),
        ("seeds = 2", 'attacks = ["autto"]', 3, "auto"),
        ("seeds = 2", "seeds = 0", 3, "whole number"),
        ("classes = 3", "classes = 3\nmode = 'evall'", 12, "eval"),
        (
            'model = "perceptron"\nmodel_arg = { width = 8, depth = 1 }',
            f'model = "{__file__}:other"',
            7,
            "shape",
        ),
        ("batch_size = 4", "batch_size = 400", 28, "400"),
        ("[[remedy]]", "[[remedi]]", 27, "remedy"),
        ("input_shape = [5]", "", 24, "input_shape"),
    ],
)
def test_what_cannot_run_is_refused_with_its_line(old: str, new: str, line: int, word: str, tmp_path: Path) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(GradleakError) as refused:
        run(path, tmp_path / "out")
    text = str(refused.value)
    assert text.startswith(f"Line {line} of 'plan.toml': ")
    assert word in text
    assert text.count("\n") == 0
    assert not (tmp_path / "out").exists()


def other() -> object:
    """Return a model that the data do not fit."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(17, 3))


def test_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GradleakError, match=r"at line 2"):
        read_plan(write(tmp_path, "[audit]\nseeds = = 2"))
    with pytest.raises(GradleakError, match="no case"):
        read_plan(write(tmp_path, "[audit]\nseeds = 2"))
