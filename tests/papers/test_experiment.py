from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gradleak.errors import InvalidInput
from gradleak.papers.experiment import Lab, bootstrap, mean, median, share, write_atomically


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


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def _measure(lab: Lab, *, value: object) -> dict[str, object]:
    return {"value": value}


def test_cases_are_plain_json(tmp_path: Path) -> None:
    lab = Lab("x", tmp_path)
    assert lab.measure(_measure, [{"value": 1}, {"value": "a"}])[1]["value"] == "a"
    with pytest.raises(InvalidInput, match="not plain JSON"):
        lab.measure(_measure, [{"value": tmp_path}])
    with pytest.raises(InvalidInput, match="not plain JSON"):
        lab.measure(_measure, [{"value": math.nan}])
