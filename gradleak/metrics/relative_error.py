"""Relative error, for inputs that are no images: in units of what each position usually holds."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["relative_error", "scales"]


def scales(truth: Tensor) -> Tensor:
    """Return the size of every value position of a batch (N, *shape): the root mean square over it, (*shape), float64.

    A position that is zero throughout takes the median of the other scales, 1 where all are zero. Of one example alone,
    whose values say less about their positions, none is less than 1e-5 times the median.
    """
    sizes = truth.detach().to("cpu", torch.float64).square().mean(0).sqrt()
    known = sizes[sizes > 0].sort().values
    # torch.median returns the lower one of two middle values.
    middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if len(known) else torch.ones_like(sizes)
    least = 1e-5 * middle if len(truth) == 1 else torch.zeros_like(middle)
    return torch.where(sizes > 0, sizes.maximum(least), middle)


def _relative(guess: Tensor, truth: Tensor) -> Tensor:
    squared = ((guess - truth) / scales(truth)) ** 2
    return (squared.flatten(1).mean(1) if squared.ndim > 1 else squared).sqrt()


relative_error = Metric("relative_error", "", higher_is_better=False, fn=_relative, reads="values")
"""Root mean square over the values of one example of (guess − truth) / scale, one of :func:`scales` for each position.

Zeros score about 1, whatever the units of the columns: exactly 1 in the mean square over a batch without columns of
zeros. The scales of a batch of one are its own values, so that a small one must be right to its own digits.
"""
