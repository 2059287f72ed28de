"""Batched solvers: many independent minimizations advance together, one evaluation a round for all of them.

A problem's variables are one row of a matrix (P, D). ``evaluate(x, rows)`` returns the objectives (A,) and gradients
(A, D) of problems ``rows`` at ``x`` (A, D). At most ``slots`` problems work at a time; the others wait, and take the
places of those that are done. Nothing inside a round asks a tensor for its value, so no device is synchronized; every
``check_every`` rounds the solver looks who is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.clock import Deadline

__all__ = ["Best", "Evaluate", "Monitor", "Outcome", "Project", "Referee", "Solver"]

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Monitor = Callable[[int, Tensor, Tensor, Tensor], bool]
"""(round, rows (A,), iterates (A, D), objectives (A,)) → whether to stop."""
Project = Callable[[Tensor], Tensor]
Referee = Callable[[Sequence[int], Sequence[int], Sequence[float], bool], Collection[int]]
"""(problems, evaluations of each so far, objectives, whether others wait) → the problems that are to end now."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Best iterates (P, D), their objectives (P,), iterations (P,), evaluations (P,) and how each ended.

    Attributes:
        x: best iterates.
        objective: of them; infinite where a problem never had its turn.
        iterations: steps taken.
        evaluations: of objective and gradient.
        converged: the objective reached the tolerance.
        stalled: the solver found no way on.
        interrupted: the whole run was stopped from outside.
        late: the time was over before the rounds were.
    """

    x: Tensor
    objective: Tensor
    iterations: Tensor
    evaluations: Tensor
    converged: Tensor
    stalled: Tensor
    interrupted: bool = False
    late: bool = False


@dataclass(frozen=True)
class Solver(ABC):
    """Minimizes P independent problems, each with at most ``iterations`` rounds."""

    iterations: int = 2000

    @abstractmethod
    def minimize(
        self,
        evaluate: Evaluate,
        start: Tensor,
        *,
        tolerance: float = 0.0,
        project: Project | None = None,
        monitor: Monitor | None = None,
        referee: Referee | None = None,
        slots: int | None = None,
        spent: Sequence[int] | None = None,
        deadline: Deadline | None = None,
    ) -> Outcome:
        """Minimize from ``start`` (P, D); a problem stops once its objective is at most ``tolerance``.

        A ``KeyboardInterrupt`` (from the keyboard or from ``monitor``) ends the run with the best iterates so far; so
        does the deadline, which is looked at in every round.

        Args:
            evaluate: returns objectives and gradients.
            start: (P, D).
            tolerance: objective at which a problem has converged.
            project: returns the nearest admissible iterates.
            monitor: is told of every round.
            referee: is asked now and then which problems should end.
            slots: how many problems work at a time; None lets all of them.
            spent: rounds that each problem has had before, which count against ``iterations``.
            deadline: when to end, with one evaluation of the first problems at least.
        """

    def memory(self, size: int, bytes_per_number: int) -> int:
        """Return about how many bytes the solver keeps for one working problem of ``size`` variables."""
        return 8 * size * bytes_per_number


class Best:
    """Best iterate of every problem, kept while rows of the working set come and go."""

    def __init__(self, start: Tensor) -> None:
        n = start.shape[0]
        self.x = start.clone()
        self.objective = torch.full((n,), torch.inf, dtype=start.dtype, device=start.device)
        self.iterations = torch.zeros(n, dtype=torch.long, device=start.device)
        self.evaluations = torch.zeros_like(self.iterations)
        self.converged = torch.zeros(n, dtype=torch.bool, device=start.device)
        self.stalled = torch.zeros_like(self.converged)

    def see(self, rows: Tensor, x: Tensor, objective: Tensor) -> None:
        """Keep those of the iterates ``x`` of problems ``rows`` that are better than before."""
        better = objective < self.objective[rows]
        self.objective[rows] = torch.where(better, objective, self.objective[rows])
        self.x[rows] = torch.where(better[:, None], x, self.x[rows])

    def outcome(self, *, interrupted: bool, late: bool) -> Outcome:
        """Return the best so far."""
        seen = self.x, self.objective, self.iterations, self.evaluations, self.converged, self.stalled
        return Outcome(*seen, interrupted, late)
