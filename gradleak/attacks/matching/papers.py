"""Published attacks as choices of parts; each docstring cites its source and states every deviation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gradleak.attacks.matching.coordinates import NaturalImages
from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.objectives import Cosine, SquaredError
from gradleak.attacks.matching.priors import TotalVariation
from gradleak.errors import UnknownName
from gradleak.solve import LBFGS, Adam, GradientDescent, Solver

__all__ = ["dlg", "idlg", "inverting_gradients"]


def _solver(name: str, iterations: int, lr: float) -> Solver:
    known: dict[str, Callable[[], Solver]] = {
        "lbfgs": lambda: LBFGS(iterations=iterations),
        "adam": lambda: Adam(iterations=iterations, lr=lr),
        "sgd": lambda: GradientDescent(iterations=iterations, lr=lr),
    }
    if name not in known:
        raise UnknownName("solver", name, known)
    return known[name]()


def _warm(solver: str, dtype: torch.dtype | None) -> torch.dtype | None:
    # L-BFGS begins in float32, which halves the cost, and ends in float64.
    return torch.float32 if solver == "lbfgs" and dtype == torch.float64 else None


def dlg(
    *,
    solver: str = "lbfgs",
    iterations: int = 10000,
    lr: float = 0.1,
    restarts: int = 1,
    init_std: float = 0.05,
    natural_images: bool | None = None,
    tolerance: float = 1e-12,
    dtype: torch.dtype | None = torch.float64,
    backend: str = "auto",
    trace: bool = True,
) -> GradientMatching:
    """Match the gradient by squared error over a dummy input and a dummy label together.

    Source: Zhu, Liu, Han, *Deep Leakage from Gradients*, NeurIPS 2019, Algorithm 1; the dummy label passes a softmax
    as in the authors' code.

    Deviations: the line search is strong-Wolfe and the search ends in float64 (the published unit step in float32
    diverges on a third of random images); the objective is relative; images are searched from near mid-gray in
    coordinates in which natural images are white (:class:`NaturalImages`), where the paper starts from N(0, 1) pixels.

    Args:
        solver: "lbfgs", "adam" or "sgd".
        iterations: evaluations of the objective's gradient per candidate.
        lr: step size of "adam" and "sgd".
        restarts: independent starts, chosen by the objective.
        init_std: standard deviation of the start.
        natural_images: search in coordinates in which natural images are white; None does so with "lbfgs", since
            the step sizes of the others are in pixels. Other inputs are searched as they are.
        tolerance: relative squared distance at which a candidate is done.
        dtype: number type of the search; None keeps the model's.
        backend: "auto", "eager", "trace" or "compile"; see :class:`GradientMatching`.
        trace: record iterates for the report.

    Raises:
        UnknownName: no such solver.

    """
    return GradientMatching(
        SquaredError(),
        _solver(solver, iterations, lr),
        labels="joint",
        init_std=init_std,
        restarts=restarts,
        tolerance=tolerance,
        dtype=dtype,
        warm_dtype=_warm(solver, dtype),
        coordinates=NaturalImages() if (natural_images is None and solver == "lbfgs") or natural_images else None,
        backend=backend,
        trace=trace,
    )


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
    backend: str = "auto",
    trace: bool = True,
) -> GradientMatching:
    """Read the labels off the last layer's gradient first, then match as DLG does.

    Source: Zhao, Mopuri, Bilen, *iDLG*, 2020, Section 3.

    Deviations: those of :func:`dlg`; batches are served by exact class counts, where the paper has one example only.

    Args:
        solver: "lbfgs", "adam" or "sgd".
        iterations: evaluations of the objective's gradient per candidate.
        lr: step size of "adam" and "sgd".
        restarts: independent starts, chosen by the objective.
        init_std: standard deviation of the start.
        natural_images: search in coordinates in which natural images are white; None does so with "lbfgs", since
            the step sizes of the others are in pixels. Other inputs are searched as they are.
        tolerance: relative squared distance at which a candidate is done.
        dtype: number type of the search; None keeps the model's.
        backend: "auto", "eager", "trace" or "compile"; see :class:`GradientMatching`.
        trace: record iterates for the report.

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
        trace=trace,
    )
    return replace(joint, labels="recovered")


def inverting_gradients(
    *,
    iterations: int = 4800,
    lr: float = 0.1,
    total_variation: float = 1e-4,
    restarts: int = 1,
    init_std: float = 1.0,
    dtype: torch.dtype | None = None,
    trace: bool = True,
) -> GradientMatching:
    """Match the gradient's direction by cosine with a total-variation prior and signed Adam inside the image box.

    Source: Geiping, Bauermeister, Dröge, Moeller, *Inverting Gradients*, NeurIPS 2020, Equation 4 and Section 5.1.

    Deviations: the best iterate by objective is returned, not the last; 4,800 steps instead of 24,000 by default;
    unknown labels are recovered as class counts.

    Args:
        iterations: steps; the step size falls tenfold after 3/8, 5/8 and 7/8 of them.
        lr: step size.
        total_variation: weight of the prior.
        restarts: independent starts, chosen by the objective.
        init_std: standard deviation of the start.
        dtype: number type of the search; None keeps the model's.
        trace: record iterates for the report.

    """
    return GradientMatching(
        Cosine(),
        Adam(iterations=iterations, lr=lr, signed=True, decay=True),
        priors=(TotalVariation(total_variation),),
        labels="recovered",
        init_std=init_std,
        restarts=restarts,
        box=True,
        dtype=dtype,
        trace=trace,
    )
