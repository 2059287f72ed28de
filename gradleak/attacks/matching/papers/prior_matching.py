"""Cosine matching with a strong prior that fades: the default for models with kinks."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.papers.inverting_gradients import inverting_gradients
from gradleak.attacks.matching.priors import ColorVariation

__all__ = ["prior_matching"]


def prior_matching(
    *,
    iterations: int = 2400,
    lr: float = 0.1,
    variation: float = 0.1,
    last_variation: float = 0.02,
    restarts: int = 1,
    init_std: float = 1.0,
    dtype: torch.dtype | None = None,
    budget: float | None = None,
    trace: bool = True,
) -> GradientMatching:
    """Match the gradient's direction as :func:`inverting_gradients` does, with a far stronger prior that fades.

    Kinks leave the cosine distance full of local minima: where the prior counts from the start, the search ends at
    a smaller distance than without it. Its weight falls from ``variation`` to ``last_variation`` over the run
    (:class:`ColorVariation`, in model-input units; inputs that are no images have no such prior). ``iterations`` are
    steps, fewer under a ``budget``, which shortens the schedules of steps and prior alike; the other options are those
    of :func:`inverting_gradients`.

    Source: Geiping et al. 2020 (distance, signed Adam, box, step sizes); Åström, Åkesson, Heyden 2016 (the prior, in a
    preset of Geiping's library ``breaching`` too). Deviation: the prior fades.
    """
    made = inverting_gradients(
        iterations=iterations,
        lr=lr,
        restarts=restarts,
        init_std=init_std,
        dtype=dtype,
        budget=budget,
        trace=trace,
    )
    return replace(made, priors=(ColorVariation(variation, last_variation),))
