"""First-order solvers: signed or plain steps on many problems at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradleak.clock import Deadline, TimeSpent
from gradleak.solve.base import Best, Evaluate, Monitor, Outcome, Project, Referee, Solver
from gradleak.solve.schedules import Constant, Schedule

__all__ = ["Adam", "GradientDescent"]


@dataclass(frozen=True)
class _FirstOrder(Solver, ABC):
    """Shared loop of the first-order solvers: step, project, keep the best objective.

    Attributes:
        lr: step size.
        iterations: number of steps.
        signed: use only the sign of the gradient (Geiping et al. 2020, Section 5.1).
        schedule: how the step size changes. A deadline shortens the schedule: where the time is the shorter of the
            two, the share of it that is over decides, so the small steps at the end are taken all the same.
        check_every: rounds between looks at the stopping rule.
    """

    lr: float = 0.1
    iterations: int = 2000
    signed: bool = False
    schedule: Schedule = field(default_factory=Constant)
    check_every: int = 50

    def _rate(self, step: int, spent: float) -> float:
        """Return the step size after ``step`` rounds and the share ``spent`` of the time."""
        return self.lr * self.schedule(max(step / self.iterations, spent))

    @abstractmethod
    def _step(self, gradient: Tensor, state: list[Tensor], step: int) -> Tensor:
        """Return the change of the iterate for a step size of one; ``state`` persists (one list per run)."""

    @abstractmethod
    def _state(self, start: Tensor) -> list[Tensor]:
        """Return the initial state tensors, each with the problem axis first."""

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
        """Minimize from ``start`` (P, D); the step size follows each problem's own rounds, so groups take turns."""
        best, had = Best(start), list(spent or [0] * len(start))
        left = [i for i, n in enumerate(had) if n < self.iterations]
        every, begun = torch.tensor(left, dtype=torch.long, device=start.device), min((had[i] for i in left), default=0)
        groups = every.split(slots or max(len(every), 1)) if left else ()
        interrupted = late = False
        try:
            for number, rows in enumerate(groups):
                waiting = len(groups) - number - 1
                # Groups share what is left of the time.
                window = Deadline(None if deadline is None else deadline.left() / (waiting + 1))
                stop, short = self._minimize(
                    evaluate, start, rows, best, begun, waiting > 0, tolerance, project, monitor, referee, window
                )
                late |= short
                if stop:
                    break
        except TimeSpent:
            late = True
        except KeyboardInterrupt:
            interrupted = True
        best.converged |= best.objective <= tolerance
        return best.outcome(interrupted=interrupted, late=late)

    def _minimize(
        self,
        evaluate: Evaluate,
        start: Tensor,
        rows: Tensor,
        best: Best,
        begun: int,
        waiting: bool,
        tolerance: float,
        project: Project | None,
        monitor: Monitor | None,
        referee: Referee | None,
        window: Deadline,
    ) -> tuple[bool, bool]:
        """Work on ``rows`` until they are done; return whether the monitor stopped the run, and the time ended it."""
        x = start[rows]
        state, seconds = self._state(x), window.left()
        for step in range(begun, self.iterations + 1):
            objective, gradient = evaluate(x, rows)
            best.see(rows, x, objective)
            best.evaluations[rows] += 1
            if monitor is not None and monitor(step, rows, x, objective):
                return True, False
            spent = 1 - window.left() / seconds if 0 < seconds < math.inf else 0.0
            if step == self.iterations:
                break
            if window.over:
                return False, True
            best.iterations[rows] += 1
            if self.signed:
                gradient = gradient.sign()
            x = x + self._rate(step, spent) * self._step(torch.nan_to_num(gradient), state, step)
            if project is not None:
                x = project(x)
            if step % self.check_every == self.check_every - 1 and (tolerance > 0 or referee is not None):
                done = best.objective[rows] <= tolerance
                best.converged[rows] = done
                if referee is not None:
                    working = rows.tolist()
                    ended = referee(working, [step + 1] * len(working), best.objective[rows].tolist(), waiting)
                    if ended:
                        done = done | torch.tensor([i in ended for i in working], device=done.device)
                if bool(done.all()):
                    break
                if bool(done.any()):
                    keep = ~done
                    rows, x = rows[keep], x[keep]
                    state[:] = [s[keep] for s in state]
        return False, False


@dataclass(frozen=True)
class Adam(_FirstOrder):
    """Adam (Kingma and Ba 2015, Algorithm 1), optionally on signed gradients."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def _state(self, start: Tensor) -> list[Tensor]:
        return [torch.zeros_like(start), torch.zeros_like(start)]

    def _step(self, gradient: Tensor, state: list[Tensor], step: int) -> Tensor:
        (b1, b2), (m, v) = self.betas, state
        m.mul_(b1).add_(gradient, alpha=1 - b1)
        v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        return -(m / (1 - b1 ** (step + 1))) / ((v / (1 - b2 ** (step + 1))).sqrt() + self.eps)


@dataclass(frozen=True)
class GradientDescent(_FirstOrder):
    """Gradient descent with heavy-ball momentum (the SGD of Zhu et al. 2019)."""

    momentum: float = 0.9

    def _state(self, start: Tensor) -> list[Tensor]:
        return [torch.zeros_like(start)]

    def _step(self, gradient: Tensor, state: list[Tensor], step: int) -> Tensor:
        state[0].mul_(self.momentum).add_(gradient)
        return -state[0]
