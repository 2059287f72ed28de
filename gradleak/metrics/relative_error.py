"""Relative error, for inputs that are no images: in units of what each position usually holds."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["relative_error", "scales"]


_SEVERAL = 4.0
_LEAST, _LEAST_DOMINATED = 0.1, 1e-5


def scales(truth: Tensor) -> Tensor:
    """Return the size of every value position of a batch (N, *shape): the root mean square over it, (*shape), float64.

    A position that is zero throughout takes the median of the other scales, 1 where all are zero. None is less than a
    tenth of the root mean square of the whole: the base line of a sensor reading must be right in units of the reading,
    not of its own vanishing values. Where fewer than four positions make up most of the whole (their participation
    ratio, (Σ s²)² / Σ s⁴), as in rows whose columns have units of their own, it is 1e-5 of it.
    """
    sizes = truth.detach().to("cpu", torch.float64).square().mean(0).sqrt()
    known = sizes[sizes > 0].sort().values
    if len(known) == 0:
        return torch.ones_like(sizes)
    # torch.median returns the lower one of two middle values.
    middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
    shares = (known / known[-1]).square()
    several = shares.sum().square() / shares.square().sum() >= _SEVERAL
    least = (_LEAST if several else _LEAST_DOMINATED) * sizes.square().mean().sqrt()
    return torch.where(sizes > 0, sizes, middle).maximum(least)


def _relative(guess: Tensor, truth: Tensor) -> Tensor:
    squared = ((guess - truth) / scales(truth)) ** 2
    return (squared.flatten(1).mean(1) if squared.ndim > 1 else squared).sqrt()


relative_error = Metric(
    "relative_error",
    "",
    higher_is_better=False,
    fn=_relative,
    reads="values",
    meaning="root mean square of the differences, each divided by the size that its position usually has in the "
    "private batch; 0 is identical, zeros score about 1",
)
"""Root mean square over the values of one example of (guess − truth) / scale, one of :func:`scales` for each position.

Zeros score about 1, less where many positions are nearly zero. The scales of a batch of one are its own values.
"""
