"""First-order solvers: signed or plain steps on many problems at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.solve.base import Best, Evaluate, Monitor, Outcome, Project, Referee, Solver

__all__ = ["Adam", "GradientDescent"]


@dataclass(frozen=True)
class _FirstOrder(Solver, ABC):
    """Shared loop of the first-order solvers: step, project, keep the best objective.

    Attributes:
        lr: step size.
        iterations: number of steps.
        signed: use only the sign of the gradient (Geiping et al. 2020, Section 5.1).
        decay: multiply the step size by 0.1 after 3/8, 5/8 and 7/8 of the iterations (same source).
        check_every: rounds between looks at the stopping rule.

    """

    lr: float = 0.1
    iterations: int = 2000
    signed: bool = False
    decay: bool = False
    check_every: int = 50

    def _rate(self, step: int) -> float:
        if not self.decay:
            return self.lr
        passed = sum(step >= self.iterations * k / 8 for k in (3, 5, 7))
        return float(self.lr * 0.1**passed)

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
    ) -> Outcome:
        """Minimize from ``start`` (P, D); the step size follows each problem's own rounds, so groups take turns."""
        best, had = Best(start), list(spent or [0] * len(start))
        left = [i for i, n in enumerate(had) if n < self.iterations]
        every, begun = torch.tensor(left, dtype=torch.long, device=start.device), min((had[i] for i in left), default=0)
        groups = every.split(slots or max(len(every), 1)) if left else ()
        interrupted = False
        try:
            for number, rows in enumerate(groups):
                waiting = number + 1 < len(groups)
                if self._minimize(evaluate, start, rows, best, begun, waiting, tolerance, project, monitor, referee):
                    break
        except KeyboardInterrupt:
            interrupted = True
        best.converged |= best.objective <= tolerance
        return best.outcome(interrupted)

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
    ) -> bool:
        """Work on ``rows`` until they are done; return whether the monitor stopped the run."""
        x = start[rows]
        state = self._state(x)
        for step in range(begun, self.iterations + 1):
            objective, gradient = evaluate(x, rows)
            best.see(rows, x, objective)
            best.evaluations[rows] += 1
            if monitor is not None and monitor(step, rows, x, objective):
                return True
            if step == self.iterations:
                break
            best.iterations[rows] += 1
            if self.signed:
                gradient = gradient.sign()
            x = x + self._rate(step) * self._step(torch.nan_to_num(gradient), state, step)
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
        return False


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
