"""The inputs of a layer behind which the largest value of every window was taken, for N examples.

Max-pooling hides two things: the layer's inputs a, and which value won. The maximum of a window u is replaced by
(log Σ exp(β u) − log k) / β, whose derivative, softmax(β u), is a soft choice: just what the layer's weight gradient
sees. The relaxed equations

    pool_β(K a) = z  (and ≤, ≥ where an activation hid the value),   Σ_i M(δ_β(a_i)) a_i = G

are least squares, solved by Gauss–Newton steps while β rises and the choice becomes hard by itself. Once all choices
are right, every equation is linear in a, and the residual falls to the noise at once; nothing else makes the choices
known. Where the equations are too few, a prior takes their place, and nothing is known.

Two things known of activations lead there: values below the lowest one that the layer before can have are held back,
and differences of neighboring ones are held small while β is low. At the end the latter count only where equations
lack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.clock import TimeSpent
from gradleak.errors import NotApplicable
from gradleak.exact.layer_equations import Composite
from gradleak.solve.conjugate_gradients import Rows, conjugate_gradients
from gradleak.structure.chain import Affine, Elementwise, Fixed, Maximum

__all__ = ["Chosen", "Task", "anneal"]

_BETAS = 4.0, 4e4
"""β at the beginning and the largest one, in units of the largest output."""
_HARD = 64.0
"""β from which on it is asked whether the choices are known."""
_FACTOR = 1.6
"""By which β rises; the last try takes the square root of it."""
_TRIES = 3
"""Random starts."""
_NEAR = 1e3
"""Residual, in units of the one that is sought, from which on the choices are taken anew."""
_STUCK = 5, 0.8
"""A try ends where so many β in a row do not bring the residual below this share of the least one before them."""
_STEPS = 8
"""Gauss–Newton steps for one β at most."""
_FALL = 0.05
"""Share by which a step must lower the cost for another one at the same β."""
_ITERATIONS = 40
"""Conjugate gradient steps for one Gauss–Newton step."""
_BLOCK = 2048
"""Values of a channel up to which the gradient equations precondition."""
_LENGTHS = tuple(0.5**i for i in range(8))
"""Lengths at which a step is tried."""
_NEGATIVE = 10.0
"""Weight of inputs below the lowest value that the layer before can have. With a thousandth and without smoothness, no
second layer of the tutorials' small CNN was solved."""
_SMOOTH = 2.0
"""Weight of the differences between neighboring pixels, times 1/β."""
_FADES = 200.0
"""β from which on it falls with the third power instead."""
_PRIOR = 3e-3
"""The weight that stays where the equations are too few."""
_ROUND = 1e-3
"""Difference between pixels below which its absolute value is rounded off."""


@final
@dataclass(frozen=True, eq=False)
class Task:
    """What is known about a layer and the max-pooling behind it.

    Attributes:
        step: the layer.
        before: affine maps between it and the pooling.
        pool: the pooling.
        params: float64 parameters by name.
        values: (N, m) outputs of the pooling, or the bounds beyond which an activation hid them.
        sides: (N, m) zero where the output is known, −1 where it is at most the value, 1 where it is at least that,
            NaN where nothing is known.
        pull: (N, m) gradients of the loss at the pooling's outputs.
        gradient: of the layer's weight.
        unsure: (outputs of the layer's weight,) channels whose gradient is not used, since some output may be hidden
            or not.
        floor: lowest value that the inputs can have, None where that is not known.
        goal: relative residual at which the choices count as known; None where the equations are too few for that.
        smooth: whether neighboring inputs tend to be equal.

    """

    step: Affine
    before: tuple[Affine | Fixed | Elementwise, ...]
    pool: Maximum
    params: dict[str, Tensor]
    values: Tensor
    sides: Tensor
    pull: Tensor
    gradient: Tensor
    unsure: Tensor
    floor: float | None
    goal: float | None
    smooth: bool


@final
@dataclass(frozen=True, eq=False)
class Chosen:
    """What the search found.

    Attributes:
        values: (N, n) inputs of the layer.
        residual: relative, of the equations with hard choices; infinite where that was not asked.
        found: whether the choices are known.

    """

    values: Tensor
    residual: float
    found: bool


def anneal(task: Task, draw: torch.Generator, going: Callable[[], bool] | None = None) -> Chosen:
    """Return the inputs of a layer, its choices found by annealing.

    Args:
        task: the equations.
        draw: draws the starts.
        going: whether to go on, asked before every step; what was found by then is returned, also where it raises.

    """
    rough, fine = _Relaxed(task, torch.float32), _Relaxed(task, torch.float64)
    best: Chosen | None = None
    try:
        for number in range(_TRIES if task.goal is not None else 1):
            start = torch.rand((len(task.values), task.step.inputs), generator=draw, dtype=torch.float64)
            factor = _FACTOR if number < _TRIES - 1 else _FACTOR**0.5
            for now in _descend(rough, fine, 0.3 * start.to(task.values), factor, going):
                best = now if best is None or task.goal is None or now.residual < best.residual else best
                if best.found:
                    return best
    except TimeSpent:
        if best is None:
            raise
    assert best is not None
    return best


def _descend(
    rough: _Relaxed, fine: _Relaxed, start: Tensor, factor: float, going: Callable[[], bool] | None
) -> Iterator[Chosen]:
    """Lower the cost while β rises; tell after every β where that led."""
    task, a, (beta, last), least = rough.task, start.float(), _BETAS, [math.inf]
    while beta <= last:
        point, inverse = rough.at(a, beta), None
        for _ in range(_STEPS):
            if going is not None and not going():
                raise NotApplicable(f"The time ended before the inputs of {task.step.name!r} were solved; allow more.")
            inverse = rough.preconditioner(point) if inverse is None else inverse
            move = rough.step(point, inverse, _ITERATIONS, 1e-2)
            after = next((p for t in _LENGTHS if (p := rough.at(point.a + t * move, beta)).cost < point.cost), None)
            if after is None:
                break
            fallen, point = 1 - after.cost / point.cost, after
            if fallen < _FALL:
                break
        a = point.a
        if task.goal is None:
            yield Chosen(a.to(task.values), math.sqrt(point.cost), False)
        elif beta > _HARD:
            values, residual = fine.finished(a.to(task.values))
            while task.goal < residual < _NEAR * task.goal:  # What is nearly right tells the last choices itself.
                again, left = fine.finished(values)
                if left > 0.9 * residual:
                    break
                values, residual = again, left
            yield Chosen(values, residual, residual <= task.goal)
            least.append(min(residual, least[-1]))
            if len(least) > _STUCK[0] + 1 and least[-1] > _STUCK[1] * least[-1 - _STUCK[0]]:
                return
            # What the choices so far lead to may be the better start for the next β.
            other = values.float()
            a = other if rough.at(other, factor * beta).cost < rough.at(a, factor * beta).cost else a
        beta *= factor


@final
@dataclass(frozen=True, eq=False)
class _Point:
    """The relaxed equations at one point; ``soft`` (N, c, q, k) is the choice and ``delta`` what it makes of the pull.

    ``cost`` is the sum of the squares of ``forward``, ``own`` and ``low``, the residuals of the outputs, the gradient
    and the inputs' lowest value, and of the prior with its weight ``tau`` and its ``sizes``.
    """

    a: Tensor
    beta: float
    soft: Tensor
    delta: Tensor
    weights: Tensor
    forward: Tensor
    own: Tensor
    low: Tensor
    tau: float
    sizes: tuple[Tensor, ...]
    cost: float


@final
class _Relaxed:
    """The equations with soft choices, every kind divided by its size, in one number format."""

    def __init__(self, task: Task, dtype: torch.dtype) -> None:
        self.task, step = task, task.step
        self.weight = task.params[step.weight_name].to(dtype)
        params = {**task.params, step.weight_name: self.weight}
        self.maps, self.behind = Composite((step, *task.before), params), Composite(task.before, params)
        self.shift = Composite((step, *task.before), task.params).constant(task.values).to(dtype)
        windows, (channels, *size) = task.pool.windows, task.pool.in_shape
        self.channels, self.places, self.padded = channels, math.prod(size), windows < 0
        self.count, self.q, self.k = len(task.values), *windows.shape
        self.windows = torch.where(self.padded, self.places, windows).flatten()
        # Where every position occurs in the windows, as often as the one that occurs most: sums instead of scattering.
        order = torch.argsort(self.windows, stable=True)
        owners = self.windows[order]
        first = torch.searchsorted(owners, owners)
        rank = torch.arange(len(owners)) - first
        inside = owners < self.places
        self.uses = torch.full((self.places, int(rank[inside].max()) + 1), len(owners))
        self.uses[owners[inside], rank[inside]] = order[inside]
        live = task.sides == 0
        self.sides = task.sides.to(dtype)
        self.values, self.pull = task.values.to(dtype), (task.pull * live).to(dtype)
        self.live = live
        self.scale = 1 / max(float((task.values * live).norm()), 1e-300)
        self.unit = max(float((task.values * live).abs().max()), 1e-300)
        used = (~task.unsure).to(dtype).view(-1, *[1] * (self.weight.ndim - 1))
        self.target = task.gradient.to(dtype) * used
        self.own = used / max(float(self.target.norm()), 1e-300)
        self.log = (self.k - self.padded.sum(1)).to(dtype).log()

    def spread(self, u: Tensor) -> Tensor:
        """Return the values of every window, (N, c, q, k), for rows u (N, c · p)."""
        padded = F.pad(u.reshape(self.count * self.channels, -1), (0, 1))
        return padded[:, self.windows].view(self.count, self.channels, self.q, self.k)

    def joined(self, w: Tensor) -> Tensor:
        """Return the transpose of :meth:`spread`."""
        padded = F.pad(w.reshape(self.count * self.channels, -1), (0, 1))
        return padded[:, self.uses.flatten()].view(self.count, -1, self.uses.shape[1]).sum(2)

    def gradient(self, delta: Tensor, a: Tensor) -> Tensor:
        """Return the layer's weighted gradient for gradients ``delta`` at the pooling's inputs."""
        return self.task.step.weight_gradient(self.behind.adjoint(delta), a, self.weight) * self.own

    def at(self, a: Tensor, beta: float) -> _Point:
        """Return the equations at inputs ``a``; an infinite ``beta`` chooses hard."""
        task, u = self.task, self.spread(self.maps.apply(a) + self.shift)
        u = u.masked_fill(self.padded, -math.inf)
        sharp = beta / self.unit
        if math.isinf(beta):
            top, place = u.max(3)
            soft, outputs = F.one_hot(place, self.k).to(u), top.flatten(1)
        else:
            soft = torch.softmax(sharp * u, 3)
            soft = torch.where(soft > 1e-12, soft, 0.0)  # Far smaller ones are slow to multiply with.
            outputs = ((torch.logsumexp(sharp * u, 3) - self.log) / sharp).flatten(1)
        beyond = outputs - self.values
        counts = self.live | (beyond * self.sides < 0)
        weights = counts.to(u) * self.scale
        delta = self.joined(self.pull.view(soft.shape[:3])[..., None] * soft)
        forward, own = beyond * weights, self.gradient(delta, a) - self.target * self.own
        low = torch.zeros_like(a) if task.floor is None else (task.floor - a).clamp(min=0)
        low = low * math.sqrt(_NEGATIVE / a.numel())
        cost = sum(float(r.double().square().sum()) for r in (forward, own, low))
        tau = 0.0 if math.isinf(beta) or not task.smooth else self.prior(beta)
        sizes = tuple((d.square() + _ROUND**2).sqrt() for d in self.differences(a)) if tau > 0 else ()
        cost += 2 * tau * sum(float(s.double().sum()) for s in sizes)
        return _Point(a, sharp, soft, delta, weights, forward, own, low, tau, sizes, cost)

    def prior(self, beta: float) -> float:
        """Return half the weight of one difference."""
        kept = _PRIOR if self.task.goal is None else 0.0
        return (_SMOOTH / beta / (1 + (beta / _FADES) ** 2) + kept) / (2 * self.count * self.task.step.inputs)

    def differences(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the differences of neighbors along both axes."""
        x = a.view(-1, *self.task.step.in_shape)
        return x.diff(dim=2), x.diff(dim=3)

    def smoothed(self, point: _Point, a: Tensor) -> Tensor | float:
        """Return the prior's weighted normal matrix times ``a``, its weights from ``point``."""
        if not point.sizes:
            return 0.0
        down, right = (d / s for d, s in zip(self.differences(a), point.sizes, strict=True))
        found = F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1)) + F.pad(right, (1, 0)) - F.pad(right, (0, 1))
        return point.tau * found.flatten(1)

    def push(self, point: _Point, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the change of the residuals with the inputs."""
        change = self.spread(self.maps.apply(v))
        mean = (point.soft * change).sum(3, keepdim=True)
        own = self.gradient(point.delta, v)
        if math.isfinite(point.beta):
            bend = point.beta * self.pull.view(*mean.shape) * point.soft * (change - mean)
            own = own + self.gradient(self.joined(bend), point.a)
        return mean.flatten(1) * point.weights, own, torch.where(point.low > 0, v, 0.0)

    def back(self, point: _Point, forward: Tensor, own: Tensor, low: Tensor) -> Tensor:
        """Return the transpose of :meth:`push`."""
        step, kernel = self.task.step, own * self.own
        shares = point.soft * (forward * point.weights).view(*point.soft.shape[:3], 1)
        if math.isfinite(point.beta):
            felt = self.spread(self.behind.apply(step.apply(point.a, kernel))) * self.pull.view(*shares.shape[:3], 1)
            tilted = point.soft * felt
            shares = shares + point.beta * (tilted - point.soft * tilted.sum(3, keepdim=True))
        found = self.maps.adjoint(self.joined(shares)) + step.adjoint(self.behind.adjoint(point.delta), kernel)
        return found - low if self.task.floor is not None else found

    def step(self, point: _Point, inverse: Rows, iterations: int, tolerance: float) -> Tensor:
        """Return the Gauss–Newton step, (N, n)."""
        weight = _NEGATIVE / point.a.numel() if self.task.floor is not None else 0.0

        def product(v: Tensor) -> Tensor:
            v = v.view_as(point.a)
            forward, own, low = self.push(point, v)
            found = self.back(point, forward, own, -weight * low) + self.smoothed(point, v)
            return found.view(1, -1)

        low = point.low * weight**0.5
        right = -(self.back(point, point.forward, point.own, low) + self.smoothed(point, point.a))
        found, _, _ = conjugate_gradients(product, right.view(1, -1), inverse, tolerance=tolerance, limit=iterations)
        return found.view_as(point.a)

    def preconditioner(self, point: _Point) -> Rows:
        """Return an approximate inverse of the normal matrix: for every example, what its channels share."""
        step, shape = self.task.step, point.a.shape
        entries = self.joined(point.soft.square() * point.weights.square().view(*point.soft.shape[:3], 1))
        forward = self.maps.squares(entries).view(shape[0], step.groups, -1, step.positions).mean(2)
        blocks = [step.gradient_block(row) for row in self.behind.adjoint(point.delta)]
        own = float(self.own.max())
        diagonal = forward + torch.stack([b.square().sum(1) for b in blocks]) * own**2
        floor = 1e-6 * diagonal.mean() + 1e-30
        if step.positions > _BLOCK:
            inverse = 1 / (diagonal + floor)
            return lambda r: (r.view(*inverse.shape[:2], -1, step.positions) * inverse[:, :, None]).view_as(r)
        grams = torch.stack([b.mT @ b for b in blocks]) * own**2 + torch.diag_embed(forward + floor)
        factor = torch.linalg.cholesky_ex(grams.double())[0]
        whole = torch.cholesky_inverse(factor).to(grams)
        return lambda r: (r.view(*whole.shape[:2], -1, step.positions) @ whole).view_as(r)

    def finished(self, a: Tensor) -> tuple[Tensor, float]:
        """Return the solution under the choices that ``a`` implies, and its relative residual under these."""
        point = self.at(a, math.inf)
        a = a + self.step(point, self.preconditioner(point), 2 * _ITERATIONS, 1e-7)
        change = self.push(point, a - point.a)
        left = [r + c for r, c in zip((point.forward, point.own), change, strict=False)]
        return a, math.sqrt(sum(float(r.square().sum()) for r in left))
