"""The backward walk: what comes before each layer, for N ≥ 1 examples, from what is known behind the last one.

An activation is undone value by value, a layer by solving its equations (:mod:`gradleak.exact.layer_equations`): by the
gradient equations alone where they determine the inputs of several examples
(:mod:`gradleak.exact.layer_direct`), else together with the known outputs (:mod:`gradleak.exact.layer_iterative`).
Maps without parameters that do not only reorder, such as average pooling, become part of the layer before them; so does
max-pooling, once :mod:`gradleak.exact.choices` has told which values it took.

Sources: R-GAP (Zhu & Blaschko, ICLR 2021, Section 3) and R-CONV (arXiv 2406.04227), both for one example. Deviations: a
batch; equations weighted by what is known how well; errors that are stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradleak.exact.choices import Chosen, Task, anneal
from gradleak.exact.counting import LayerReport, count, kept, too_long
from gradleak.exact.layer_direct import solve_directly
from gradleak.exact.layer_equations import Composite, LayerEquations
from gradleak.exact.layer_iterative import MISSING, Going, Known, solve_layer
from gradleak.solve.conjugate_gradients import Rows, conjugate_gradients
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed, Maximum, Step

__all__ = ["Refine", "Walked", "walk_back"]

Tensors = Mapping[str, Tensor]
Refine = Callable[[Chain, int, Tensor, Rows], Tensor]
"""(Chain, index of a layer, its inputs (N, n), an approximate inverse of its normal matrix) → better inputs."""

_DIRECT = 1e-3
"""Relative error (three standard errors) up to which gradient equations alone are enough."""
_TOGETHER = 2e-2
"""The same where forward equations helped: enough as a start of steps on the whole update."""
_FLIPS = 6
"""Most re-solves after the ReLU pattern changes."""
_SURE = 4.0
"""Standard errors above zero from which on a ReLU's output counts as active, until the solution says otherwise."""
_UNSURE = 4.0
"""Factor around that, within which neither is taken for granted while choices are searched."""
_GUESSED = 1e-3
"""Error that a guess is treated with, relative to its size; with its true one, nothing before it would be seen."""
_SETTLED = 1e-7
"""Relative residual at which they do however small the noise: the search itself goes no further."""
_CHOSEN = 4.0
"""Relative residual at which the choices of max-pooling count as known, in units of what is known to be noise."""
_TEMPER = 0.7
"""Tempering exponent of the first layer's weights: 0 = equal weights, 1 = estimated inverse variance. Measured on
LeNets, 0.7 takes two thirds of the iterations, and the error stays within a tenth."""
_ACCURATE = 1e-3
"""Relative accuracy of a batch's error samples. Twins in a batch hardly show apart, and with 0.1 their error was
estimated a hundred times too small."""
_ROUGH = 0.1
"""The same for one example, whose estimate at the end rests on the residual as well. Measured on LeNets, it is one to
eight times the true error."""
_DOUBT = 0.1
"""Share of the output gradients' own error that counts as noise of a batch's gradient equations. Measured on LeNets,
the whole of it makes the error a third smaller and takes four times the iterations."""


@final
@dataclass(frozen=True, eq=False)
class Walked:
    """What is known of every example, as far back as linear algebra leads.

    Attributes:
        index: ``chain.steps[:index]`` are the steps that remain.
        known: about their outputs; without any solved layer, what the walk began with.
        chain: with max-pooling replaced by the linear maps that took the same values, as far as these are known.
        layers: reports, from the last layer to the first that was tried.
        stop: why the walk ended, or what was the first not to be determined; None where the input was reached.
        start: (N, n) values of the input of ``chain.steps``, behind ``stop`` guessed; None where none was reached.

    """

    index: int
    known: Known
    chain: Chain
    layers: tuple[LayerReport, ...]
    stop: str | None
    start: Tensor | None

    @property
    def error(self) -> float:
        """Predicted root mean square error of the values (three standard errors), of the worst example.

        NaN where no layer was solved, infinite where an activation hides some value.
        """
        if not any(r.determined for r in self.layers):
            return math.nan
        return 3 * self.known.deviation if bool((self.known.weights > 0).all()) else math.inf


def walk_back(
    chain: Chain,
    params: Tensors,
    seen: Tensors,
    known: Known,
    noise: float,
    *,
    seed: int = 0,
    refine: Refine | None = None,
    tolerance: float = _TOGETHER,
    onward: bool = False,
    smooth: bool = False,
    going: Going | None = None,
) -> Walked:
    """Return what comes before ``known``, layer by layer.

    Args:
        chain: its last output is what is known.
        params: parameters by name.
        seen: gradients by name, up to a common factor with ``known.pull``.
        known: about the last output of ``chain``, for all examples.
        noise: relative noise of the gradients.
        seed: of the samples of the error.
        refine: improves the inputs of every layer but the first by what the later layers say.
        tolerance: relative error (three standard errors) of a layer's inputs up to which they count as determined.
        onward: whether to go on behind a layer that is not determined, for a start of matching.
        smooth: whether neighboring values of the model's input tend to be equal, as pixels do.
        going: whether to go on, asked in every iteration.

    Raises:
        NotApplicable: ``going`` said no.

    """
    params = {k: p.detach().double() for k, p in params.items()}
    walk = _Walk(chain, params, seen, known, noise, seed, refine, tolerance, going, smooth=smooth)
    return walk.run(onward=onward)


class _StoppedError(Exception):
    """The walk ends here."""


class _Walk:
    """The walk; its state is what is known about the tensor that it has reached."""

    def __init__(
        self,
        chain: Chain,
        params: Tensors,
        seen: Tensors,
        known: Known,
        noise: float,
        seed: int,
        refine: Refine | None,
        tolerance: float,
        going: Going | None,
        *,
        smooth: bool,
    ) -> None:
        self.smooth = smooth
        self.chain, self.params, self.seen, self.noise = chain, params, seen, noise
        self.refine, self.tolerance, self.going = refine, tolerance, going
        self.known, self.draw = known, torch.Generator().manual_seed(seed)
        self.pending: list[Fixed | Elementwise | Maximum] = []
        self.kink: Known | None = None  # What a ReLU would leave known if it hid nothing, right before it.
        self.limits: tuple[Tensor, Tensor] | None = None  # (N, n) each: beyond them it does hide,
        self.doubt: Tensor | None = None  # and where that is in doubt.
        self.blank: Tensor | None = None  # (N, n) values that nothing behind them depends on.
        self.reports: list[LayerReport] = []
        self.stop: str | None = None
        self.first = next((i for i, s in enumerate(chain.steps) if isinstance(s, Affine)), -1)
        self.best = len(chain.steps), known
        self.onward = False

    def run(self, *, onward: bool) -> Walked:
        self.onward = onward and self.chain.stop is None
        start: Tensor | None = None
        try:
            for index in range(len(self.chain.steps) - 1, -1, -1):
                self._back(self.chain.steps[index], index)
            if self.chain.stop is not None:
                self._halt(self.chain.stop)
            self._resolve("the model's input")
            start = self.known.values
            if self.stop is None:
                self.best = 0, self.known
        except _StoppedError:
            pass
        return Walked(*self.best, self.chain, tuple(self.reports), self.stop, start)

    def _back(self, step: Step, index: int) -> None:
        if isinstance(step, Affine):
            self._layer(step, index)
        elif isinstance(step, Elementwise) and not (step.affine and self.pending):
            if step.folds or not all(isinstance(s, Maximum) for s in self.pending):  # Increasing maps commute with it.
                self._resolve(f"the output of {step.name!r}")
            self._activation(step)
        elif isinstance(step, Maximum):
            self._resolve(f"the output of {step.name!r}")
            self.pending.insert(0, step)
        elif isinstance(step, Elementwise) or (isinstance(step, Fixed) and not step.reorders):
            self.pending.insert(0, step)

    def _halt(self, reason: str) -> None:
        self.stop = self.stop or reason
        if not self.onward:
            raise _StoppedError

    def _resolve(self, where: str) -> None:
        """Solve the maps without parameters that wait between the current tensor and what is known."""
        if not self.pending:
            return
        if any(isinstance(s, Maximum) for s in self.pending):
            self.stop = self.stop or kept(self.pending, self.known.values.shape[1], where)
            raise _StoppedError
        if self.blank is not None:
            self.stop = self.stop or f"some value behind {self.pending[0].name!r} shows nowhere"
            raise _StoppedError
        maps, number = Composite(_affine(self.pending), self.params), len(self.known.values)
        left, unknowns = self.known.values.shape[1], self.pending[0].inputs
        reason = kept(self.pending, left, where)
        if left < unknowns:
            self._halt(reason)
        echo = torch.randn((number, unknowns), generator=self.draw, dtype=torch.float64).to(self.known.values)
        seen = torch.cat([self.known.values[None] - maps.constant(self.known.values), self.known.errors])
        values, _, done = conjugate_gradients(
            lambda v: maps.adjoint(maps.apply(v)),
            maps.adjoint(torch.cat([maps.apply(echo), seen.flatten(0, 1)])),
            lambda r: r,
            tolerance=1e-14,
            limit=500,
        )
        # What a random vector's image does not give back shows nowhere.
        if not done or float((values[:number] - echo).square().mean()) > MISSING**2:
            names = ", ".join(repr(s.name) for s in self.pending)
            self._halt(f"{names} hides some direction of the values before it, so {where} is not determined")
        values = values[number:]
        parts = values.view(-1, number, unknowns)
        pulls = maps.adjoint(torch.cat([self.known.pull[None], self.known.slips]).flatten(0, 1)).view(
            -1, number, unknowns
        )
        self.known = Known(parts[0], maps.squares(self.known.weights), parts[1:], pulls[0], pulls[1:])
        self.pending = []

    def _activation(self, step: Elementwise) -> None:
        known = self.known
        if self.pending:
            step = replace(step, in_shape=self.pending[-1].out_shape, out_shape=self.pending[-1].out_shape)
        before = step.inverse(known.values.view(-1, *step.in_shape)).flatten(1)
        if step.clips:
            (low, high), slope = step.bounds, torch.full_like(before, step.inner)
            self.kink = known.before(before, slope, torch.zeros_like(slope))
            least, inner = self._least(low, high), torch.minimum(known.values - low, high - known.values)
            self.limits = (step.inverse(torch.full_like(before, low)), step.inverse(torch.full_like(before, high)))
            self.doubt = (inner > least / _UNSURE) & (inner < least * _UNSURE)
            self.known = known.before(before, slope * (inner > least), torch.zeros_like(slope))
            return
        slopes, bends = map(torch.stack, zip(*(step.derivatives(row) for row in before), strict=True))
        self.known = known.before(before, slopes, bends)
        if self.kink is not None and self.limits is not None:
            self.kink = self.kink.before(before, slopes, bends)
            one, other = (step.inverse(e.view(-1, *step.in_shape)).flatten(1) for e in self.limits)
            self.limits = torch.minimum(one, other), torch.maximum(one, other)

    def _least(self, low: float, high: float) -> Tensor:
        """Return how far from a bound a value must lie to count as inside: the values beyond tell the error."""
        size = float(self.known.values.square().mean().sqrt())
        deviation = self.known.weights.clamp(min=1e-300).rsqrt().clamp(min=1e-12 * size + 1e-150)
        over = torch.maximum(low - self.known.values, self.known.values - high) / deviation
        # A guess violates the bounds by far; what it says of the values inside is all that there is.
        return deviation * (max(_SURE, 3 * float(over.max())) if self.stop is None else _SURE)

    def _layer(self, step: Affine, index: int) -> None:
        gradient, known = self.seen.get(step.weight_name), self.known
        weight, kinked = self.params[step.weight_name], self.kink is not None
        shared = gradient is not None and bool((gradient != 0).any())
        usable = int((known.weights > 0).sum())
        pool = next((i for i, s in enumerate(self.pending) if isinstance(s, Maximum)), None)
        pooled = pool is not None
        report, alone, reason = count(step, weight, len(known.values), usable, shared, pooled=pooled)
        # Which outputs are known is certain behind pooling, once its choices are.
        alone = alone and (len(known.values) > 1 or kinked) and pool is None
        if reason is not None and not alone:
            self._end(report, reason)
            if too_long(step, weight, len(known.values), pooled=pooled):
                raise _StoppedError  # Not even a start is worth so much time.
        places: Tensor | None = None
        chosen: Chosen | None = None
        maps = _affine(self.pending)
        if pool is not None:
            chosen = self._choose(step, index, pool, determined=reason is None and self.stop is None)
            known, maps, places = self._seen(step, chosen.values, pool, None)
            if not chosen.found:
                missed = f"at best the layer's equations hold to {chosen.residual:.1e}"
                self._end(report, f"which values {self.pending[pool].name!r} took is not known: {missed}")
                self._take(maps)
                pull = LayerEquations(Composite((step, *maps), self.params), gradient, known.pull)
                size = _GUESSED * float(chosen.values.square().mean().sqrt())
                self._reached(Known.plain(chosen.values, pull.adjoint(known.pull[None])[0], size, self.draw))
                return
        for flip in range(_FLIPS + 1 if kinked or pool is not None else 1):
            equations = LayerEquations(Composite((step, *maps), self.params), gradient, known.pull)
            robust = kinked and flip == 0
            done, found, precondition = self._solved(
                equations, known, report, index, alone, reason, robust=robust, pooled=pool is not None
            )
            if done.unseen and chosen is not None:  # What the search left them at takes no maximum.
                found = replace(found, values=torch.where(found.weights > 0, found.values, chosen.values))
            if not (kinked or pool is not None) or not done.determined:
                break
            # The solution itself tells every unit's sign, better than its noisy output did.
            again, maps, others = self._seen(step, found.values, pool, places)
            if torch.equal(again.pull, known.pull) and (
                places is None or others is None or torch.equal(places, others)
            ):
                break
            known, places = again, others
        if not done.determined:
            if pool is not None:
                self._take(maps)
            self._end(done, reason or f"the input of {done}")
        elif self.stop is None:  # Behind the first gap, values only serve as a start.
            self.reports.append(done)
            self._take(maps)
            if self.refine is not None and precondition is not None and index > self.first:
                found = replace(found, values=self.refine(self.chain, index, found.values, precondition))
            self.best = index, found
        self._reached(found)

    def _take(self, maps: Sequence[Step]) -> None:
        """Put the choices that were found into the chain."""
        taken = {id(former): now for former, now in zip(self.pending, maps, strict=True)}
        self.chain = replace(self.chain, steps=tuple(taken.get(id(s), s) for s in self.chain.steps))

    def _choose(self, step: Affine, index: int, pool: int, *, determined: bool) -> Chosen:
        """Search which values a pooling took."""
        known, maximum, gradient = self.known, self.pending[pool], self.seen.get(step.weight_name)
        weight = self.params[step.weight_name]
        assert isinstance(maximum, Maximum) and not any(isinstance(s, Maximum) for s in self.pending[:pool])
        sides, unsure = torch.zeros_like(known.values), torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        if self.limits is not None and self.doubt is not None:
            low, high = self.limits
            sides = torch.where(known.values - low < high - known.values, -1.0, 1.0) * (known.weights == 0)
            doubt = self.doubt.view(len(sides), maximum.in_shape[0], -1).any(2).any(0)
            unsure = doubt if len(doubt) == len(unsure) and float(doubt.double().mean()) < 0.5 else unsure
        if self.blank is not None:
            sides = sides.masked_fill(self.blank, math.nan)
        live = sides == 0
        if not bool((known.values * live).any()):
            self.stop = self.stop or f"no output of {maximum.name!r} shows a value"
            raise _StoppedError
        error = (1 / known.weights[live]).mean().sqrt() / known.values[live].square().mean().sqrt()
        earlier = (s for s in reversed(self.chain.steps[:index]) if isinstance(s, Affine | Elementwise))
        floor = next((s.bounds[0] for s in earlier if isinstance(s, Elementwise)), -math.inf)
        task = Task(
            step, _affine(self.pending[:pool]), maximum, dict(self.params), known.values, sides, known.pull,
            torch.zeros_like(weight) if gradient is None else gradient.to(weight), unsure,
            floor if math.isfinite(floor) else None,
            max(_CHOSEN * max(self.noise, float(error)), _SETTLED) if determined else None,
            self.smooth and len(step.in_shape) == 3,
        )  # fmt: skip
        return anneal(task, self.draw, self.going)

    def _seen(
        self, step: Affine, values: Tensor, pool: int | None, former: Tensor | None
    ) -> tuple[Known, tuple[Fixed | Elementwise, ...], Tensor | None]:
        """Return what inputs (N, n) of a layer make known of its outputs, the maps up to these, and what was chosen."""
        maps, places = _affine(self.pending), None
        if pool is not None:
            before, maximum = Composite((step, *_affine(self.pending[:pool])), self.params), self.pending[pool]
            assert isinstance(maximum, Maximum)
            places = maximum.largest(before.apply(values) + before.constant(values), former)
            maps = (*_affine(self.pending[:pool]), maximum.chosen(places))
        if self.kink is None or self.limits is None:
            return self.known, maps, places
        whole = Composite((step, *maps), self.params)
        outputs = whole.apply(values) + whole.constant(values)
        inside = ((outputs > self.limits[0]) & (outputs < self.limits[1])).to(outputs)
        return self.kink.before(self.known.values, inside, torch.zeros_like(inside)), maps, places

    def _reached(self, found: Known) -> None:
        self.known, self.pending, self.kink, self.limits, self.doubt = found, [], None, None, None
        blank = found.weights == 0
        self.blank = blank if bool(blank.any()) else None

    def _end(self, report: LayerReport, reason: str) -> None:
        if self.stop is None:
            self.reports.append(report)
        self._halt(reason)

    def _solved(
        self,
        equations: LayerEquations,
        known: Known,
        report: LayerReport,
        index: int,
        alone: bool,
        reason: str | None,
        *,
        robust: bool,
        pooled: bool,
    ) -> tuple[LayerReport, Known, Rows | None]:
        """Return the report of a solved layer, what is then known of its inputs, and an approximate inverse."""
        direct = solve_directly(equations, known.slips, self.noise, robust=robust) if alone else None
        if direct is not None:
            values, deviation = direct
            relative = _relative(values, deviation)
            if relative <= _DIRECT:
                deviation = max(deviation, self.noise * float(values.square().mean().sqrt()))
                pulls = equations.adjoint(torch.cat([known.pull[None], known.slips]))
                found = replace(Known.plain(values, pulls[0], deviation, self.draw), slips=pulls[1:])
                return replace(report, determined=True, error=deviation, relative=relative), found, None
            report = replace(report, error=deviation, relative=relative)
        if reason is not None and self.stop is None:
            return report, known, None
        doubt, accuracy = _DOUBT, _ACCURATE
        if self.refine is not None:
            doubt, accuracy = 0.0, _ROUGH
            if index > self.first:  # What the later layers say takes the output gradients' own errors out.
                known = replace(known, slips=torch.zeros_like(known.slips))
        if index == self.first and bool((known.weights > 0).any()):
            median = known.weights[known.weights > 0].median()
            known = replace(known, weights=known.weights**_TEMPER * median ** (1 - _TEMPER))
        solved = solve_layer(equations, known, self.noise, self.draw, doubt=doubt, accuracy=accuracy, going=self.going)
        relative = _relative(solved.known.values, solved.known.deviation)
        unseen = int(solved.unseen.sum())  # They do no harm where those that depend on them are known not to count.
        complete = solved.complete and (unseen == 0 or (pooled and index > self.first))
        report = replace(
            report,
            determined=complete and relative <= self.tolerance and reason is None,
            error=solved.known.deviation,
            relative=relative if complete else math.nan,
            iterations=solved.iterations,
            unseen=unseen,
        )
        return report, solved.known, solved.precondition


def _relative(values: Tensor, deviation: float) -> float:
    """Return three standard errors, relative to the spread between examples (one example: its size)."""
    around = values - values.mean(0) if len(values) > 1 else values
    return 3 * deviation / max(float(around.square().mean().sqrt()), 1e-300)


def _affine(maps: Sequence[Fixed | Elementwise | Maximum]) -> tuple[Fixed | Elementwise, ...]:
    return tuple(s for s in maps if not isinstance(s, Maximum))
