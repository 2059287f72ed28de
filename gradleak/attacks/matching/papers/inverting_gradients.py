"""Inverting Gradients: Geiping, Bauermeister, Dröge, Moeller, NeurIPS 2020."""

from __future__ import annotations

import torch

from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.objectives import Cosine
from gradleak.attacks.matching.priors import TotalVariation
from gradleak.solve import Adam, StepDecay

__all__ = ["inverting_gradients"]


def inverting_gradients(
    *,
    iterations: int = 4800,
    lr: float = 0.1,
    total_variation: float = 1e-4,
    restarts: int = 1,
    init_std: float = 1.0,
    dtype: torch.dtype | None = None,
    budget: float | None = None,
    trace: bool = True,
) -> GradientMatching:
    """Match the gradient's direction by cosine with a total-variation prior and signed Adam inside the image box.

    Source: Geiping, Bauermeister, Dröge, Moeller, *Inverting Gradients*, NeurIPS 2020, Equation 4 and Section 5.1.

    Deviations: the best iterate by objective is returned, not the last; 4,800 steps instead of 24,000 by default;
    unknown labels are recovered as class counts, or as in :func:`idlg` where those cannot be had.

    ``iterations`` are steps; their size falls tenfold after 3/8, 5/8 and 7/8 of them, or sooner under a ``budget``, so
    that the small steps at the end are taken all the same. ``total_variation`` is the weight of the prior; the other
    options are those of :func:`dlg`.
    """
    return GradientMatching(
        Cosine(),
        Adam(iterations=iterations, lr=lr, signed=True, schedule=StepDecay()),
        priors=(TotalVariation(total_variation),),
        labels="recovered",
        init_std=init_std,
        restarts=restarts,
        box=True,
        dtype=dtype,
        budget=budget,
        trace=trace,
    )
