"""Relative error divided by that of the best guess without the update, for inputs that are no images."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.metrics.base import Metric
from gradleak.metrics.relative_error import relative_error

__all__ = ["null_guess_ratio"]

_HIT = 1e-6


def _mean(errors: Tensor) -> Tensor:
    return errors.square().mean().sqrt()


def _ratio(guess: Tensor, truth: Tensor) -> Tensor:
    errors = relative_error(guess, truth)
    if not bool(truth.any()):
        return torch.ones_like(errors)  # Zeros throughout are what is guessed without an update.
    nulls = [torch.zeros_like(truth), torch.full_like(truth, float(truth.mean())), truth.mean(0).expand_as(truth)]
    ratios = []
    for null in nulls:
        bars = relative_error(null, truth)
        if _mean(bars) > _HIT:  # A mean that is the truth itself, as of one example, is no guess.
            # An example that a guess hits by chance says nothing alone; there the whole batch is compared.
            ratios.append(torch.where(bars > _HIT, errors / bars, _mean(errors) / _mean(bars)))
    return torch.stack(ratios).amax(0)


null_guess_ratio = Metric(
    "null_guess_ratio",
    "",
    higher_is_better=False,
    fn=_ratio,
    reads="values",
    meaning="the relative error divided by that of the best guess without the update (zeros, or a mean of the private "
    "values); from 1 on nothing was learned, and above 0.5 no example counts as back",
)
"""The :data:`relative_error` of each example divided by the least that a guess without the update has there.

The guesses are zeros, the mean of all values of the batch, and the batch's mean at each position. Below 1 the
reconstruction is better than all of them. Means that are the batch itself, as of one example, are left out; an example
within 1e-6 of a guess takes the ratio of the whole batch's root mean squares.
"""
