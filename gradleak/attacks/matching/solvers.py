"""Batched solvers: many independent minimizations advance together, one evaluation a round for all of them.

A problem's variables are one row of a matrix (P, D). ``evaluate(x, rows)`` returns the objectives (A,) and gradients
(A, D) of problems ``rows`` at ``x`` (A, D). Nothing inside a round asks a tensor for its value, so no device is
synchronized; every ``check_every`` rounds the finished problems are dropped once they are half of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

__all__ = ["LBFGS", "Adam", "GradientDescent", "Outcome", "Project", "Solver"]

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Monitor = Callable[[int, Tensor, Tensor, Tensor], bool]
"""(round, rows (A,), iterates (A, D), objectives (A,)) → whether to stop."""
Project = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Best iterates (P, D), their objectives (P,), iterations (P,), evaluations (P,) and whether each converged."""

    x: Tensor
    objective: Tensor
    iterations: Tensor
    evaluations: Tensor
    converged: Tensor
    stalled: Tensor
    interrupted: bool = False


@dataclass(frozen=True)
class Solver(ABC):
    """Minimizes P independent problems together, in at most ``iterations`` rounds."""

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
    ) -> Outcome:
        """Minimize from ``start`` (P, D); a problem stops once its objective is at most ``tolerance``.

        A ``KeyboardInterrupt`` (from the keyboard or from ``monitor``) ends the run with the best iterates so far.
        """


class _Best:
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
        better = objective < self.objective[rows]
        self.objective[rows] = torch.where(better, objective, self.objective[rows])
        self.x[rows] = torch.where(better[:, None], x, self.x[rows])

    def outcome(self, interrupted: bool) -> Outcome:
        return Outcome(
            self.x, self.objective, self.iterations, self.evaluations, self.converged, self.stalled, interrupted
        )


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
    ) -> Outcome:
        """Minimize from ``start`` (P, D)."""
        best, x = _Best(start), start.clone()
        rows = torch.arange(start.shape[0], device=start.device)
        state, interrupted = self._state(start), False
        try:
            for step in range(self.iterations + 1):
                objective, gradient = evaluate(x, rows)
                best.see(rows, x, objective)
                best.evaluations[rows] += 1
                last = step == self.iterations
                if monitor is not None and monitor(step, rows, x, objective):
                    break
                if last:
                    break
                best.iterations[rows] += 1
                if self.signed:
                    gradient = gradient.sign()
                x = x + self._rate(step) * self._step(torch.nan_to_num(gradient), state, step)
                if project is not None:
                    x = project(x)
                if step % self.check_every == self.check_every - 1 and tolerance > 0:
                    done = best.objective[rows] <= tolerance
                    best.converged[rows] = done
                    if bool(done.all()):
                        break
                    if int(done.sum()) * 2 >= len(rows):
                        keep = ~done
                        rows, x = rows[keep], x[keep]
                        state[:] = [s[keep] for s in state]
        except KeyboardInterrupt:
            interrupted = True
        best.converged |= best.objective <= tolerance
        return best.outcome(interrupted)


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


def _cubic(t1: Tensor, f1: Tensor, d1: Tensor, t2: Tensor, f2: Tensor, d2: Tensor) -> Tensor:
    """Return the minimizer of the cubic through two points and slopes (Nocedal and Wright 2006, Equation 3.59)."""
    a = d1 + d2 - 3 * (f1 - f2) / (t1 - t2)
    square = a * a - d1 * d2
    b = torch.sign(t2 - t1) * square.clamp_min(0).sqrt()
    t = t2 - (t2 - t1) * ((d2 + b - a) / (d2 - d1 + 2 * b))
    return torch.where((square >= 0) & torch.isfinite(t), t, 0.5 * (t1 + t2))


@dataclass(frozen=True)
class LBFGS(Solver):
    """Limited-memory BFGS whose strong-Wolfe line searches run in lockstep, one evaluation a round for every problem.

    Each problem is a small state machine: it brackets, zooms, or accepts (Nocedal and Wright 2006, Algorithms 3.5,
    3.6 and 7.4). A problem that accepts takes its new direction in the same round, so problems never wait for each
    other. A failed search drops the history once and tries steepest descent; a second failure ends the problem.

    Attributes:
        iterations: rounds, that is evaluations per problem.
        history: number of correction pairs.
        c1: sufficient decrease.
        c2: curvature.
        search: evaluations of one line search before it gives up.
        history_dtype: correction pairs are kept in this type; they only precondition, so half the traffic is free.
        check_every: rounds between looks at the stopping rules (each look synchronizes the device).
        patience: rounds without a relative decrease of ``stall`` after which a problem is said to stall.
        stall: see ``patience``.

    """

    iterations: int = 3000
    history: int = 50
    c1: float = 1e-4
    c2: float = 0.9
    search: int = 20
    history_dtype: torch.dtype = torch.float32
    check_every: int = 25
    patience: int = 300
    stall: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.c1 < self.c2 < 1 or min(self.iterations, self.history, self.search, self.check_every) < 1:
            raise InvalidInput("LBFGS needs 0 < c1 < c2 < 1 and positive counts; keep the defaults if in doubt.")

    def minimize(
        self,
        evaluate: Evaluate,
        start: Tensor,
        *,
        tolerance: float = 0.0,
        project: Project | None = None,
        monitor: Monitor | None = None,
    ) -> Outcome:
        """Minimize from ``start`` (P, D); ``project`` is refused: a projected step breaks the Wolfe conditions."""
        if project is not None:
            raise InvalidInput("L-BFGS searches along lines and cannot project; use Adam, or drop the projection.")
        best = _Best(start)
        run = _Lockstep(self, start)
        interrupted = False
        try:
            for step in range(self.iterations):
                objective, gradient = evaluate(run.trial(), run.rows)
                best.evaluations[run.rows] += 1
                run.advance(objective, gradient)
                if monitor is not None and monitor(step, run.rows, run.x, run.f):
                    break
                if step % self.check_every == self.check_every - 1:
                    run.watch(step)
                    done = run.finished | (run.f <= tolerance)
                    if int(done.sum()) * 2 >= len(run.rows):
                        run.report(best, tolerance)
                        if bool(done.all()):
                            run.keep(~done)
                            break
                        run.keep(~done)
        except KeyboardInterrupt:
            interrupted = True
        run.report(best, tolerance)
        return best.outcome(interrupted)


class _Lockstep:
    """The state of the line searches and histories of all working problems."""

    _ROWWISE = (
        *("rows", "x", "f", "g", "direction", "slope", "t", "fresh", "zooming", "finished", "failed"),
        *("tries", "steps", "g_lo", "gamma", "mark"),
    )

    def __init__(self, options: LBFGS, start: Tensor) -> None:
        o, (n, d) = options, start.shape
        self.options, self.rows = o, torch.arange(n, device=start.device)
        zero = start.new_zeros(n)
        self.x, self.f, self.g = start.clone(), torch.full_like(zero, torch.inf), torch.zeros_like(start)
        self.direction, self.slope = torch.zeros_like(start), zero.clone()
        self.t = zero.clone()  # The first round evaluates the start itself.
        self.fresh = torch.ones(n, dtype=torch.bool, device=start.device)
        self.zooming = torch.zeros_like(self.fresh)
        self.finished = torch.zeros_like(self.fresh)
        self.failed = torch.zeros_like(self.fresh)
        self.tries, self.steps = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.lo = [zero.clone() for _ in range(3)]
        self.hi = [zero.clone() for _ in range(3)]
        self.g_lo = torch.zeros_like(start)
        self.s = torch.zeros(o.history, n, d, dtype=o.history_dtype, device=start.device)
        self.y = torch.zeros_like(self.s)
        self.rho = torch.zeros(o.history, n, dtype=start.dtype, device=start.device)
        self.gamma = torch.ones_like(zero)
        self.slot = self.filled = 0
        self.mark, self.mark_step = torch.full_like(zero, torch.inf), 0

    def trial(self) -> Tensor:
        return torch.addcmul(self.x, self.t[:, None], self.direction)

    def advance(self, f: Tensor, g: Tensor) -> None:
        """Digest one evaluation at the trial points: every problem accepts, brackets or zooms."""
        o = self.options
        f = torch.where(torch.isfinite(f), f, torch.inf)
        g = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
        slope = (g * self.direction).sum(1)
        t, (t_lo, f_lo, d_lo), (t_hi, f_hi, d_hi) = self.t, self.lo, self.hi
        first = self.tries == 0
        # Within rounding of the objective, only the slope can still tell progress (Hager and Zhang 2005, Section 2).
        rounding = 1e-14 if f.dtype == torch.float64 else 3e-7
        flat = (f - self.f).abs() <= rounding * self.f.abs()
        armijo = (f <= self.f + o.c1 * t * self.slope) | (flat & (slope <= (1 - 2 * o.c1) * -self.slope))
        wolfe = slope.abs() <= -o.c2 * self.slope
        worse = ~armijo | (torch.where(self.zooming | ~first, f >= f_lo, torch.zeros_like(first)) & ~flat)
        accept = ~worse & wolfe

        # Bracketing keeps the previous trial in lo; zooming keeps the best point in lo and the other end in hi.
        point = [t, f, slope]
        flip = ~worse & torch.where(self.zooming, slope * (t_hi - t_lo) >= 0, slope >= 0)
        grow = ~worse & ~flip & ~self.zooming & ~accept
        new_hi = [
            torch.where(worse, p, torch.where(flip, near, far))
            for p, near, far in zip(point, self.lo, self.hi, strict=True)
        ]
        new_lo = [torch.where(worse, near, p) for p, near in zip(point, self.lo, strict=True)]
        t_old = t_lo
        self.g_lo = torch.where(worse[:, None], self.g_lo, g)
        self.lo, self.hi = new_lo, new_hi
        self.zooming = self.zooming | worse | flip
        self.tries = self.tries + 1

        (t_lo, f_lo, d_lo), (t_hi, f_hi, d_hi) = self.lo, self.hi
        width = (t_hi - t_lo).abs()
        middle = _cubic(t_lo, f_lo, d_lo, t_hi, f_hi, d_hi)
        low, high = torch.minimum(t_lo, t_hi), torch.maximum(t_lo, t_hi)
        middle = torch.where(torch.isfinite(f_hi), middle, 0.5 * (t_lo + t_hi))
        middle = torch.minimum(torch.maximum(middle, low + 0.1 * width), high - 0.1 * width)
        further = torch.minimum(torch.maximum(2 * t, t + (t - t_old)), 10 * t)
        next_t = torch.where(grow, further, middle)

        narrow = self.zooming & (width <= 1e-9 * t_hi.abs().clamp_min(1e-12))
        exhausted = ~accept & ((self.tries >= o.search) | narrow)
        # A search that ran out still takes its best point if that decreased the objective.
        rescue = exhausted & (t_lo > 0) & (f_lo < self.f) & ~self.fresh
        fail = exhausted & ~rescue & ~self.fresh
        starting = self.fresh
        accept = (accept & ~starting) | rescue
        step_t = torch.where(rescue, t_lo, t)
        step_f = torch.where(rescue, f_lo, f)
        step_g = torch.where(rescue[:, None], self.g_lo, g)

        self._remember(accept, step_t, step_g)
        moved = accept | starting
        self.x = torch.where(accept[:, None], torch.addcmul(self.x, step_t[:, None], self.direction), self.x)
        self.f = torch.where(moved, step_f, self.f)
        self.g = torch.where(moved[:, None], step_g, self.g)
        self.steps = self.steps + accept
        self.finished = self.finished | (fail & self.failed) | (starting & ~torch.isfinite(f))
        self.failed = torch.where(moved, torch.zeros_like(fail), self.failed | fail)
        turn = moved | fail
        direction = self._direction(fail)
        slope = (direction * self.g).sum(1)
        steepest = (slope >= 0) | (self.steps == 0) | fail
        direction = torch.where(steepest[:, None], -self.g, direction)
        slope = torch.where(steepest, -(self.g * self.g).sum(1), slope)
        first_t = torch.where(steepest, (1 / self.g.abs().sum(1).clamp_min(1e-30)).clamp_max(1.0), torch.ones_like(t))
        self.direction = torch.where(turn[:, None], direction, self.direction)
        self.slope = torch.where(turn, slope, self.slope)
        self.t = torch.where(turn, first_t, next_t)
        zero = torch.zeros_like(t)
        self.lo = [torch.where(turn, a, b) for a, b in zip([zero, self.f, self.slope], self.lo, strict=True)]
        self.hi = [torch.where(turn, zero, h) for h in self.hi]
        self.g_lo = torch.where(turn[:, None], self.g, self.g_lo)
        self.tries = torch.where(turn, torch.zeros_like(self.tries), self.tries)
        self.zooming = self.zooming & ~turn
        self.fresh = torch.zeros_like(self.fresh)

    def _remember(self, accept: Tensor, t: Tensor, g: Tensor) -> None:
        """Store one correction pair a round; problems that did not accept store an empty one (rho = 0)."""
        s = t[:, None] * self.direction
        y = g - self.g
        sy, yy = (s * y).sum(1), (y * y).sum(1)
        good = accept & (sy > 1e-10 * yy.sqrt() * (s * s).sum(1).sqrt()) & (yy > 0)
        k = self.slot
        self.s[k] = torch.where(good[:, None], s, 0).to(self.s.dtype)
        self.y[k] = torch.where(good[:, None], y, 0).to(self.y.dtype)
        inner = (self.s[k].to(s.dtype) * self.y[k].to(s.dtype)).sum(1)
        self.rho[k] = torch.where(good & (inner > 0), 1 / inner.clamp_min(1e-300), 0)
        self.gamma = torch.where(good, sy / yy.clamp_min(1e-300), self.gamma)
        self.slot = (k + 1) % self.options.history
        self.filled = min(self.filled + 1, self.options.history)

    def _direction(self, forget: Tensor) -> Tensor:
        """Return −H g by the two-loop recursion; problems in ``forget`` lose their history first."""
        self.rho = torch.where(forget, 0, self.rho)
        m = self.options.history
        order = [(self.slot - 1 - i) % m for i in range(self.filled)]
        q = self.g.to(self.s.dtype)
        norm = q.abs().amax(1, keepdim=True).clamp_min(1e-30)  # Keeps float32 pairs away from underflow.
        q = q / norm
        rho = self.rho
        alphas: list[Tensor] = []
        for k in order:
            alpha = (rho[k] * (self.s[k] * q).sum(1)).to(q.dtype)
            q = torch.addcmul(q, -alpha[:, None], self.y[k])
            alphas.append(alpha)
        q = q * self.gamma[:, None].to(q.dtype)
        for k, alpha in zip(reversed(order), reversed(alphas), strict=True):
            beta = (rho[k] * (self.y[k] * q).sum(1)).to(q.dtype)
            q = torch.addcmul(q, (alpha - beta)[:, None], self.s[k])
        return -(q * norm).to(self.g.dtype)

    def watch(self, step: int) -> None:
        """End problems whose objective has hardly moved for ``patience`` rounds."""
        if step - self.mark_step >= self.options.patience:
            self.finished = self.finished | (self.f > self.mark * (1 - self.options.stall))
            self.mark, self.mark_step = self.f.clone(), step

    def report(self, best: _Best, tolerance: float) -> None:
        best.see(self.rows, self.x, self.f)
        best.iterations[self.rows] = self.steps
        best.converged[self.rows] = self.f <= tolerance
        best.stalled[self.rows] = self.finished & (self.f > tolerance)

    def keep(self, mask: Tensor) -> None:
        """Drop the problems outside ``mask``."""
        for name in self._ROWWISE:
            setattr(self, name, getattr(self, name)[mask])
        self.lo, self.hi = [v[mask] for v in self.lo], [v[mask] for v in self.hi]
        self.s, self.y, self.rho = self.s[:, mask], self.y[:, mask], self.rho[:, mask]
