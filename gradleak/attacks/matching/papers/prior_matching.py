"""Cosine matching with a prior relative to what is unexplained: the default for models with kinks."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.papers.inverting_gradients import inverting_gradients
from gradleak.attacks.matching.priors import ColorVariation

__all__ = ["prior_matching"]


def prior_matching(
    *,
    iterations: int = 4800,
    lr: float = 0.1,
    variation: float = 6.0,
    restarts: int = 1,
    init_std: float = 1.0,
    dtype: torch.dtype | None = None,
    budget: float | None = None,
    trace: bool = True,
) -> GradientMatching:
    """Match the gradient's direction as :func:`inverting_gradients` does, with a far stronger prior on its logarithm.

    Minimized is log(1 − cos) + ``variation`` · :class:`ColorVariation`: the noise level of a Gaussian model is profiled
    out, so that the prior counts in proportion to what is left unexplained. It leads past the local minima of networks
    with kinks while the distance is large, also after training, and fades as the update is explained. ``variation``
    counts in model-input units; inputs that are no images have no such prior. The other options are those of
    :func:`inverting_gradients`.

    Source: Geiping et al. 2020 (cosine, signed Adam, box, step sizes); Åström, Åkesson, Heyden 2016 (the prior, which a
    preset of Geiping's library ``breaching`` has too). Deviation: the logarithm.
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
    return replace(made, priors=(ColorVariation(variation),), relative=True)
