from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from gradleak.errors import InvalidFile, InvalidInput
from gradleak.papers.experiment import Lab, bootstrap, mean, median, share


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 20), (7, 20), (20, 20), (300, 1000)])
def test_share_is_wilson(hits: int, n: int) -> None:
    ours = share([True] * hits + [False] * (n - hits))
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert ours.value == hits / n
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("n", [1, 5, 6, 20, 33])
def test_median_interval_covers(n: int) -> None:
    estimate = median(list(range(n)))
    assert estimate.value == np.median(range(n))
    rank = int(estimate.low) + 1
    assert n - rank == estimate.high
    outside = 2 * stats.binom.cdf(rank - 1, n, 0.5)
    assert outside <= 0.05 or rank == 1
    if rank > 1 or n >= 6:  # the next narrower interval would cover less than 95 %
        assert 2 * stats.binom.cdf(rank, n, 0.5) > 0.05


def test_diverged_runs_count_as_the_worst() -> None:
    assert median([1.0, math.nan, math.nan]).value == math.inf
    assert median([1.0, 2.0, math.nan]).value == 2.0


def test_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=400)
    estimate = mean(list(values))
    error = values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert mean(list(values)) == estimate
    pairs = np.stack([values, values * 2], 1)
    assert bootstrap(pairs, lambda a: float(a[:, 1].mean() - a[:, 0].mean())).value == pytest.approx(values.mean())


@pytest.mark.parametrize("estimate", [share, median, mean])
def test_no_values_is_an_error(estimate: object) -> None:
    with pytest.raises(InvalidInput, match="at least one"):
        estimate([])  # type: ignore[operator]


def test_sample_is_random_distinct_and_repeatable() -> None:
    one = Lab.sample(1000, 30, seed=1)
    assert one == Lab.sample(1000, 30, seed=1) != Lab.sample(1000, 30, seed=2)
    assert len(set(one)) == 30
    assert Lab.sample(1000, 10, seed=1) == one[:10]
    with pytest.raises(InvalidInput, match="only 3"):
        Lab.sample(3, 4)


def _measure(lab: Lab, *, value: object) -> dict[str, object]:
    return {"value": value}


def test_cases_are_plain_json(tmp_path: Path) -> None:
    lab = Lab("x", tmp_path)
    assert lab.measure(_measure, [{"value": 1}, {"value": "a"}])[1]["value"] == "a"
    with pytest.raises(InvalidInput, match="not plain JSON"):
        lab.measure(_measure, [{"value": tmp_path}])
    with pytest.raises(InvalidInput, match="not plain JSON"):
        lab.measure(_measure, [{"value": math.nan}])


CALLS: list[object] = []


def _with_array(lab: Lab, *, value: int) -> dict[str, object]:
    CALLS.append(value)
    return {"value": value, "array": np.full(3, value)}


def _build(lab: Lab, *, value: int) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    CALLS.append(value)
    return {"w": torch.full((2,), float(value))}, {"accuracy": 0.5}


def _swap(path: Path) -> None:
    one, other = sorted(path.parent.glob("*.json"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"arrays": ["other"]})),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": "long"})),
        lambda path: path.with_suffix(".npz").unlink(),
        lambda path: path.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes()[:-9]),
    ],
)
def test_a_damaged_case_is_measured_again(tmp_path: Path, damage: object) -> None:
    told: list[str] = []
    lab = Lab("x", tmp_path, callback=told.append)
    lab.measure(_with_array, [{"value": 1}])
    (path,) = (tmp_path / "x").glob("*.json")
    damage(path)  # type: ignore[operator]
    CALLS.clear()
    (again,) = lab.measure(_with_array, [{"value": 1}])
    assert (again["value"], again["array"].tolist()) == (1, [1, 1, 1])
    assert CALLS == [1]
    assert any("1 of 1 cases to measure" in phrase for phrase in told[-2:])
    lab.measure(_with_array, [{"value": 1}])
    assert CALLS == [1]


def test_a_case_under_the_name_of_another_is_measured_again(tmp_path: Path) -> None:
    lab = Lab("x", tmp_path)
    cases = [{"value": 1}, {"value": 2}]
    lab.measure(_with_array, cases)
    _swap(tmp_path / "x" / "any")
    assert [r["value"] for r in lab.measure(_with_array, cases)] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 50])
@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_what_was_built_is_built_again_when_damaged(tmp_path: Path, content: bytes, suffix: str) -> None:
    lab = Lab("x", tmp_path)
    CALLS.clear()
    lab.tensors(_build, value=3)
    lab.tensors(_build, value=3)
    assert CALLS == [3]
    (path,) = (tmp_path / "artefacts").glob(f"*{suffix}")
    path.write_bytes(content)
    tensors, notes = lab.tensors(_build, value=3)
    assert tensors["w"].tolist() == [3, 3]
    assert notes["accuracy"] == 0.5
    assert CALLS == [3, 3]


def test_damaged_data_files_are_named(tmp_path: Path) -> None:
    lab = Lab("x", tmp_path / "out", tmp_path)
    np.savez(tmp_path / "lfw.npz", x=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(InvalidFile, match="no array 'view1'"):
        lab.arrays("lfw.npz", ["x", "view1"])
    for content in (b"", (tmp_path / "lfw.npz").read_bytes()[:-30]):
        (tmp_path / "lfw.npz").write_bytes(content)
        for read in (lambda: lab.arrays("lfw.npz", ["x"]), lambda: lab.images("lfw")):
            with pytest.raises(InvalidFile, match=r"lfw\.npz"):
                read()
    (tmp_path / "words.txt").write_bytes(b"\xff")
    with pytest.raises(InvalidFile, match=r"words\.txt' is damaged"):
        lab.text("words.txt")
