"""Deep Leakage from Gradients: Zhu, Liu, Han, NeurIPS 2019."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gradleak.attacks.matching.coordinates import NaturalImages
from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.objectives import SquaredError
from gradleak.errors import UnknownName
from gradleak.solve import LBFGS, Adam, GradientDescent, Solver

__all__ = ["dlg"]


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
    backend: str = "eager",
    budget: float | None = None,
    trace: bool = True,
) -> GradientMatching:
    """Match the gradient by squared error over a dummy input and a dummy label together.

    Source: Zhu, Liu, Han, *Deep Leakage from Gradients*, NeurIPS 2019, Algorithm 1; the dummy label passes a softmax
    as in the authors' code.

    Deviations: the line search is strong-Wolfe and the search ends in float64 (the published unit step in float32
    diverges on a third of random images); the objective is relative; images are searched from near mid-gray in
    coordinates in which natural images are white (:class:`NaturalImages`), where the paper starts from N(0, 1) pixels.

    The solver is "lbfgs", "adam" or "sgd", with at most ``iterations`` evaluations of the objective's gradient per
    candidate; ``lr`` is for the latter two. ``natural_images`` None searches in whitening coordinates with "lbfgs"
    only, since the step sizes of the others are in pixels. The other options are those of :class:`GradientMatching`.

    Raises:
        UnknownName: no such solver.
    """
    known: dict[str, Callable[[], Solver]] = {
        "lbfgs": lambda: LBFGS(iterations=iterations),
        "adam": lambda: Adam(iterations=iterations, lr=lr),
        "sgd": lambda: GradientDescent(iterations=iterations, lr=lr),
    }
    if solver not in known:
        raise UnknownName("solver", solver, known)
    return GradientMatching(
        SquaredError(),
        known[solver](),
        labels="joint",
        init_std=init_std,
        restarts=restarts,
        tolerance=tolerance,
        dtype=dtype,
        # L-BFGS begins in float32, which halves the cost, and ends in float64.
        warm_dtype=torch.float32 if solver == "lbfgs" and dtype == torch.float64 else None,
        coordinates=NaturalImages() if (natural_images is None and solver == "lbfgs") or natural_images else None,
        backend=backend,
        budget=budget,
        trace=trace,
    )
