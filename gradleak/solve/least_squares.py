"""Levenberg–Marquardt: the one loop for nonlinear least squares; who calls it says how a linear step is solved.

Source: Levenberg 1944, Marquardt 1963; damping of Nielsen 1999.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from gradleak.clock import TimeSpent

__all__ = ["Linear", "Problem", "State", "minimize"]


class Linear(Protocol):
    """A problem linearized at one point, with Jacobian J and residual r."""

    evaluations: int

    def step(self, damping: float) -> Tensor:
        """Return the step −(JᵀJ + shift)⁻¹ Jᵀ r, the shift in proportion to ``damping``."""

    def decrease(self, change: Tensor) -> float:
        """Return ‖r‖² − ‖r + J change‖²."""


System = TypeVar("System", bound=Linear)


class Problem(Protocol[System]):
    """A residual as a function of its unknowns."""

    def cost(self, z: Tensor) -> float:
        """Return the sum of squares at ``z`` (n,)."""

    def linearize(self, z: Tensor, former: System | None) -> System:
        """Return the problem linearized at ``z``; ``former`` may lend its preconditioner."""


@dataclass
class State:
    """Where a search stands: unknowns (n,), sum of squares, why it ended, steps and evaluations so far."""

    z: Tensor
    cost: float
    status: str = "budget"
    steps: int = 0
    evaluations: int = 0


def minimize(
    problem: Problem[System],
    z: Tensor,
    *,
    iterations: int,
    damping: float = 1e-3,
    enough: float = 1e-7,
    least: float = 0.0,
    going: Callable[[State, float], bool] | None = None,
) -> State:
    """Return where Levenberg–Marquardt from ``z`` (n,) ends.

    Args:
        problem: the residual.
        z: where to start.
        iterations: steps at most.
        damping: to begin with; zero takes Gauss–Newton steps as long as they help.
        enough: share of the cost below which the fall that a linear step promises is no information.
        least: cost that rounding may leave, below which a step that does not halve it is the last.
        going: (state, damping) → whether to go on, asked before every step; a ``KeyboardInterrupt`` from it, or from
            anything below, ends the search as well. Either way the best so far is returned.
    """
    state = State(z, problem.cost(z))
    growth = 2.0
    system: System | None = None
    try:
        while state.steps < iterations and (going is None or going(state, damping)):
            system = problem.linearize(state.z, system)
            state.evaluations += system.evaluations
            while True:
                change = system.step(damping)
                predicted = system.decrease(change)
                if predicted <= enough * state.cost + 1e-300:
                    state.status = "converged"
                    return state
                cost = problem.cost(state.z + change)
                state.evaluations += 1
                gain = (state.cost - cost) / predicted if math.isfinite(cost) else -1.0
                if gain > 1e-3:
                    break
                if state.cost <= least:
                    state.status = "converged"
                    return state
                if damping > 1e10:
                    state.status = "stalled"
                    return state
                damping, growth = damping * growth if damping > 0 else 1e-6, growth * 2
            fall = state.cost - cost
            state.z, state.cost, state.steps = state.z + change, cost, state.steps + 1
            if damping > 0:
                damping = max(damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 1e-14)
            growth = 2.0
            if (fall <= 1e-4 * state.cost and damping < 1e-3) or (state.cost <= least and fall < state.cost):
                state.status = "converged"
                return state
            if gain < 0.9:
                system = None  # What was lent no longer fits.
    except KeyboardInterrupt as end:
        state.status = "budget" if isinstance(end, TimeSpent) else "interrupted"
    return state
