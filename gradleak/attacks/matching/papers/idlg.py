"""Improved Deep Leakage from Gradients: Zhao, Mopuri, Bilen, 2020."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.papers.dlg import dlg

__all__ = ["idlg"]


def idlg(
    *,
    solver: str = "lbfgs",
    iterations: int = 10000,
    lr: float = 0.1,
    restarts: int = 1,
    init_std: float = 0.05,
    natural_images: bool | None = None,
    tolerance: float = 1e-12,
    dtype: torch.dtype | None = torch.float64,
    backend: str = "eager",
    budget: float | None = None,
    trace: bool = True,
) -> GradientMatching:
    """Read the labels off the last layer's gradient first, then match as DLG does.

    Source: Zhao, Mopuri, Bilen, *iDLG*, 2020, Section 3.

    Deviations: those of :func:`dlg`; batches are served by exact class counts, where the paper has one example only.
    Where the last layer says nothing about labels, a lone example is searched under every class, if there are few, and
    otherwise the labels are optimized as in :func:`dlg`, whose options it has.

    Raises:
        UnknownName: no such solver.
    """
    joint = dlg(
        solver=solver,
        iterations=iterations,
        lr=lr,
        restarts=restarts,
        init_std=init_std,
        natural_images=natural_images,
        tolerance=tolerance,
        dtype=dtype,
        backend=backend,
        budget=budget,
        trace=trace,
    )
    return replace(joint, labels="recovered")
