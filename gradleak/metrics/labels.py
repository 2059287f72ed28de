"""Label accuracy."""

from __future__ import annotations

from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["label_accuracy"]


def _equal(guess: Tensor, truth: Tensor) -> Tensor:
    return (guess == truth).double()


label_accuracy = Metric(
    "label_accuracy", "", higher_is_better=True, fn=_equal, reads="labels", meaning="1 where the class was recovered"
)
"""1 where the reconstructed class index equals the private one of the assigned example, else 0."""
