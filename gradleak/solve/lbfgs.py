"""L-BFGS with a strong-Wolfe line search, for many problems in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import InvalidInput
from gradleak.solve.base import Best, Evaluate, Monitor, Outcome, Project, Referee, Solver

__all__ = ["LBFGS"]


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

    def memory(self, size: int, bytes_per_number: int) -> int:
        """Return about how many bytes the solver keeps for one working problem of ``size`` variables."""
        return size * (2 * self.history * self.history_dtype.itemsize + 12 * bytes_per_number)

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
        """Minimize from ``start`` (P, D); ``project`` is refused: a projected step breaks the Wolfe conditions."""
        if project is not None:
            raise InvalidInput("L-BFGS searches along lines and cannot project; use Adam, or drop the projection.")
        best = Best(start)
        left = [self.iterations - (spent[i] if spent else 0) for i in range(len(start))]
        waiting = [i for i, n in enumerate(left) if n > 0]
        taken, waiting = waiting[: slots or len(waiting)], waiting[slots or len(waiting) :]
        run = _Lockstep(self, start[taken], taken, [left[i] for i in taken])
        step, interrupted, late = 0, False, False
        try:
            while run.rows.numel():
                objective, gradient = evaluate(run.trial(), run.rows)
                run.advance(objective, gradient)
                step += 1
                if monitor is not None and monitor(step - 1, run.rows, run.x, run.f):
                    break
                if deadline is not None:
                    deadline.raise_if_over()
                if step % self.check_every and step < run.next_end:
                    continue
                done = run.check(step, tolerance, referee, bool(waiting))
                if not any(done):
                    continue
                run.report(best, step, tolerance)
                places = [i for i, over in enumerate(done) if over]
                come, waiting = waiting[: len(places)], waiting[len(places) :]
                run.admit(places[: len(come)], start[come], come, [left[i] for i in come], step)
                if len(come) < len(places):
                    gone = set(places[len(come) :])
                    run.keep([i for i in range(len(done)) if i not in gone])
        except TimeSpent:
            late = True
        except KeyboardInterrupt:
            interrupted = True
        run.report(best, step, tolerance)
        return best.outcome(interrupted=interrupted, late=late)


def _pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return rows of ``yes`` where ``mask``, else of ``no``; on a CPU, looking first costs less than copying."""
    if not mask.is_cuda:
        if not bool(mask.any()):
            return no
        if bool(mask.all()):
            return yes
    return torch.where(mask[:, None], yes, no)


class _Lockstep:
    """The state of the line searches and histories of the problems at work."""

    _ROWWISE = (
        *("rows", "x", "f", "g", "direction", "slope", "t", "fresh", "zooming", "finished", "failed"),
        *("tries", "steps", "g_lo", "gamma", "s", "y", "sy", "yy", "live", "slot"),
    )

    def __init__(self, options: LBFGS, start: Tensor, rows: Sequence[int], limits: Sequence[int]) -> None:
        o, (n, d) = options, start.shape
        self.options, self.rows = o, torch.tensor(rows, dtype=torch.long, device=start.device)
        zero, m = start.new_zeros(n), o.history
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
        # Pairs divided by their step's length, a scale that the method does not see: no float32 square underflows.
        self.s = torch.zeros(n, m, d, dtype=o.history_dtype, device=start.device)
        self.y = torch.zeros_like(self.s)
        self.sy = torch.zeros(n, m, m, dtype=torch.float64, device=start.device)  # s_i · y_j where j is not older.
        self.yy = torch.zeros_like(self.sy)
        self.live = torch.zeros(n, m, dtype=torch.bool, device=start.device)
        self.slot = torch.zeros_like(self.rows)  # Where the next pair goes.
        self.gamma = torch.ones_like(zero)
        self.upper = torch.ones(m, m, dtype=torch.bool, device=start.device).triu()
        self.pushes = 0
        # What the stopping rules need is kept by the host.
        self.born, self.limits = [0] * n, list(limits)
        self.marks: list[tuple[float, int]] = [(float("inf"), 0)] * n

    @property
    def next_end(self) -> int:
        """The first round at which a problem has had all its rounds."""
        return min(b + n for b, n in zip(self.born, self.limits, strict=True))

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
        self.g_lo = _pick(worse, self.g_lo, g)
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
        step_g = _pick(rescue, self.g_lo, g)

        pair = self._remember(accept, step_t, step_g)
        moved = accept | starting
        self.x = _pick(accept, torch.addcmul(self.x, step_t[:, None], self.direction), self.x)
        self.f = torch.where(moved, step_f, self.f)
        self.g = _pick(moved, step_g, self.g)
        self.steps = self.steps + accept
        self.finished = self.finished | (fail & self.failed) | (starting & ~torch.isfinite(f))
        self.failed = torch.where(moved, torch.zeros_like(fail), self.failed | fail)
        turn = moved | fail
        direction = self._direction(pair, fail)
        slope = (direction * self.g).sum(1)
        steepest = ~(slope < 0) | (self.steps == 0) | fail
        direction = _pick(steepest, -self.g, direction)
        slope = torch.where(steepest, -(self.g * self.g).sum(1), slope)
        first_t = torch.where(steepest, (1 / self.g.abs().sum(1).clamp_min(1e-30)).clamp_max(1.0), torch.ones_like(t))
        self.direction = _pick(turn, direction, self.direction)
        self.slope = torch.where(turn, slope, self.slope)
        self.t = torch.where(turn, first_t, next_t)
        zero = torch.zeros_like(t)
        self.lo = [torch.where(turn, a, b) for a, b in zip([zero, self.f, self.slope], self.lo, strict=True)]
        self.hi = [torch.where(turn, zero, h) for h in self.hi]
        self.g_lo = _pick(turn, self.g, self.g_lo)
        self.tries = torch.where(turn, torch.zeros_like(self.tries), self.tries)
        self.zooming = self.zooming & ~turn
        self.fresh = torch.zeros_like(self.fresh)

    def _remember(self, accept: Tensor, t: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pairs of the problems that accepted; return which are good, and the stored y."""
        s, y = t[:, None] * self.direction, g - self.g
        sy, yy, ss = (s * y).sum(1), (y * y).sum(1), (s * s).sum(1)
        good = accept & (sy > 1e-10 * (yy * ss).sqrt()) & (yy > 0)
        self.gamma = torch.where(good, sy / yy.clamp_min(1e-300), self.gamma)
        size = torch.where(good, ss, torch.ones_like(ss)).rsqrt()[:, None]
        every, k = torch.arange(len(s), device=s.device), self.slot
        y = (y * size).to(self.y.dtype)
        self.s[every, k] = _pick(good, (s * size).to(self.s.dtype), self.s[every, k])
        self.y[every, k] = _pick(good, y, self.y[every, k])
        self.live[every, k] |= good
        self.pushes += 1
        return good, y

    def _direction(self, pair: tuple[Tensor, Tensor], forget: Tensor) -> Tensor:
        """Return −H g, problems in ``forget`` without their history.

        The two-loop recursion (Nocedal and Wright 2006, Algorithm 7.4), carried out on the inner products of the
        pairs (Byrd, Nocedal and Schnabel 1994, Section 2): two triangular solves, and two passes over the history.
        """
        good, y = pair
        m, k = self.options.history, min(self.pushes, self.options.history)
        self.live &= ~forget[:, None]
        norm = self.g.abs().amax(1, keepdim=True).clamp_min(1e-300)
        g = (self.g / norm).to(self.s.dtype)
        both = torch.stack([g, y], 1)  # Two rows on the left: two columns on the right took five times as long.
        on_s = torch.bmm(both, self.s[:, :k].mT).double()
        on_y = torch.bmm(both, self.y[:, :k].mT).double()
        every = torch.arange(len(g), device=g.device)
        new, put = good[:, None], self.slot
        self.sy[every, :k, put] = torch.where(new, on_s[:, 1], self.sy[every, :k, put])
        self.yy[every, :k, put] = torch.where(new, on_y[:, 1], self.yy[every, :k, put])
        self.yy[every, put, :k] = torch.where(new, on_y[:, 1], self.yy[every, put, :k])
        # Rounding can leave no curvature in a pair as it is stored.
        self.live[every, put] &= ~good | (self.sy[every, put, put] > 0)
        self.slot = torch.where(good, (self.slot + 1) % m, self.slot)
        live, sy, yy, s_g, y_g = self.live[:, :k], self.sy[:, :k, :k], self.yy[:, :k, :k], on_s[:, 0], on_y[:, 0]
        order = None
        if k == m:  # The oldest pair comes first; before the ring is full, it does so anyway.
            order = (self.slot[:, None] + torch.arange(m, device=g.device)) % m
            rows, columns = order[:, :, None].expand(-1, m, m), order[:, None, :].expand(-1, m, m)
            sy, yy = (a.gather(1, rows).gather(2, columns) for a in (sy, yy))
            live, s_g, y_g = (a.gather(1, order) for a in (live, s_g, y_g))
        s_g = s_g * live
        if not live.is_cuda and bool(live.all()):
            R = sy.triu()
        else:
            used = live[:, :, None] & live[:, None, :] & self.upper[:k, :k]
            R = torch.where(used, sy, torch.diag_embed((~live).double()))
        gamma = self.gamma.double()[:, None]
        a = torch.linalg.solve_triangular(R, s_g[:, :, None], upper=True)[:, :, 0]
        past = gamma * live * (y_g - (yy @ a[:, :, None])[:, :, 0])
        right = R.diagonal(dim1=1, dim2=2) * a - past
        b = torch.linalg.solve_triangular(R.mT, right[:, :, None], upper=False)[:, :, 0]
        a, b = gamma * a * live, b * live
        if order is not None:
            a, b = (torch.zeros_like(v).scatter(1, order, v) for v in (a, b))
        weights = torch.stack([a, b], 1).to(g.dtype)
        change = torch.bmm(weights[:, :1], self.y[:, :k]) - torch.bmm(weights[:, 1:], self.s[:, :k])
        return norm * (change[:, 0].to(self.g.dtype) - self.gamma[:, None] * (self.g / norm))

    def check(self, step: int, tolerance: float, referee: Referee | None, waiting: bool) -> list[bool]:
        """Return which problems end: converged, out of rounds or ways, stalled for ``patience``, or sent off."""
        o, values, working = self.options, self.f.tolist(), self.rows.tolist()
        done = self.finished.tolist()
        ages = [step - b for b in self.born]
        ended = referee(working, ages, values, waiting) if referee is not None else ()
        for i, (f, age) in enumerate(zip(values, ages, strict=True)):
            mark, since = self.marks[i]
            if age - since >= o.patience:
                if f > mark * (1 - o.stall):
                    done[i] = True
                    self.finished[i] = True
                self.marks[i] = (f, age)
            done[i] = done[i] or f <= tolerance or age >= self.limits[i] or working[i] in ended
        return done

    def report(self, best: Best, step: int, tolerance: float) -> None:
        best.see(self.rows, self.x, self.f)
        best.iterations[self.rows] = self.steps
        best.evaluations[self.rows] = torch.tensor(
            [step - b for b in self.born], dtype=torch.long, device=self.rows.device
        )
        best.converged[self.rows] = self.f <= tolerance
        best.stalled[self.rows] = self.finished & (self.f > tolerance)

    def admit(self, places: list[int], start: Tensor, rows: list[int], limits: list[int], step: int) -> None:
        """Begin problems ``rows`` in the places of others."""
        if not places:
            return
        fresh = _Lockstep(self.options, start, rows, limits)
        self.rows = self.rows.clone()  # Other rows are another tensor: callers keep what belongs to one.
        for name in self._ROWWISE:
            getattr(self, name)[places] = getattr(fresh, name)
        for mine, new in zip([*self.lo, *self.hi], [*fresh.lo, *fresh.hi], strict=True):
            mine[places] = new
        for i, place in enumerate(places):
            self.born[place], self.limits[place], self.marks[place] = step, limits[i], (float("inf"), 0)

    def keep(self, places: list[int]) -> None:
        """Drop the problems outside ``places``."""
        for name in self._ROWWISE:
            setattr(self, name, getattr(self, name)[places])
        self.lo, self.hi = [v[places] for v in self.lo], [v[places] for v in self.hi]
        self.born, self.limits = [self.born[i] for i in places], [self.limits[i] for i in places]
        self.marks = [self.marks[i] for i in places]
