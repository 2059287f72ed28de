"""Mean squared error."""

from __future__ import annotations

from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["mse"]


def _mse(guess: Tensor, truth: Tensor) -> Tensor:
    squared = (guess - truth) ** 2
    return squared.flatten(1).mean(1) if squared.ndim > 1 else squared


mse = Metric(
    "mse",
    "",
    higher_is_better=False,
    fn=_mse,
    meaning="mean squared difference of the values, in squares of their unit; 0 is identical",
)
"""Mean over the entries of one example of (guess − truth)², in squared units of the input (images: [0, 1])."""
