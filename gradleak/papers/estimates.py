"""Measured numbers with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradleak.audit.intervals import wilson
from gradleak.errors import InvalidInput

__all__ = ["Estimate", "bootstrap", "mean", "median", "share"]


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def share(successes: Sequence[bool]) -> Estimate:
    """Return the share of true values with Wilson's 95 % interval.

    Raises:
        InvalidInput: there are no values.

    """
    n, hits = _count(successes), sum(map(bool, successes))
    return Estimate(hits / n, *wilson(hits, n), n)


def median(values: Sequence[float]) -> Estimate:
    """Return the median with the distribution-free 95 % interval of order statistics.

    Values that are not a number count as infinite: a diverged run is the worst run, not a missing one. Below six
    values no order statistics reach 95 %, and the interval is the whole range.

    Raises:
        InvalidInput: there are no values.

    """
    n = _count(values)
    ordered = sorted(math.inf if math.isnan(v) else float(v) for v in values)
    middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    tail, k = 0.0, 0
    while k < n // 2 and (tail := tail + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    low = max(k - 1, 0)
    return Estimate(middle, ordered[low], ordered[n - 1 - low], n)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean with a percentile bootstrap 95 % interval (2,000 resamples, fixed seed)."""
    return bootstrap(values, lambda sample: float(sample.mean()))


def bootstrap(values: Sequence[float] | np.ndarray, statistic: Callable[[np.ndarray], float]) -> Estimate:
    """Return ``statistic`` of ``values`` (first axis: examples) with a percentile bootstrap 95 % interval.

    Raises:
        InvalidInput: there are no values.

    """
    n = _count(values)
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    draws = [statistic(array[rng.integers(0, n, n)]) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(statistic(array)), float(low), float(high), n)


def _count(values: Sequence[Any] | np.ndarray) -> int:
    if len(values) == 0:
        raise InvalidInput("An estimate needs at least one measured value; run at least one case.")
    return len(values)
