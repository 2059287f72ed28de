"""The backward walk: what comes before each layer, for N ≥ 1 examples, from what is known behind the last one.

An activation is undone value by value, a layer by solving its equations (:mod:`gradleak.exact.layer_equations`): by the
gradient equations alone where they determine the inputs of several examples
(:mod:`gradleak.exact.layer_direct`), else together with the known outputs (:mod:`gradleak.exact.layer_iterative`).
Maps without parameters that do not only reorder, such as average pooling, become part of the layer before them.

Sources: R-GAP (Zhu & Blaschko, ICLR 2021, Section 3) and R-CONV (arXiv 2406.04227), both for one example. Deviations: a
batch; equations weighted by what is known how well; errors that are stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradleak.exact.layer_direct import LARGEST, solve_directly
from gradleak.exact.layer_equations import Composite, LayerEquations, counts
from gradleak.exact.layer_iterative import MISSING, Going, Known, solve_layer
from gradleak.solve.conjugate_gradients import Rows, conjugate_gradients
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed, Step

__all__ = ["LayerReport", "Refine", "Walked", "obstacle", "walk_back"]

Tensors = Mapping[str, Tensor]
Refine = Callable[[int, Tensor, Rows], Tensor]
"""(Index of a layer, its inputs (N, n), an approximate inverse of its normal matrix for rows) → better inputs."""

_DIRECT = 1e-3
"""Relative error (three standard errors) up to which gradient equations alone are enough."""
_TOGETHER = 2e-2
"""The same where forward equations helped: enough as a start of steps on the whole update."""
_MARGIN = 1.02
"""Equations for an unknown from which on a batch's layer is tried: a square system would be ill-conditioned."""
_WORK = 1 << 30
"""Multiplications of one pass through a layer, for all examples, up to which it is solved: some thousand passes."""
_FLIPS = 6
"""Most re-solves after the ReLU pattern changes."""
_SURE = 4.0
"""Standard errors above zero from which on a ReLU's output counts as active, until the solution says otherwise."""
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
@dataclass(frozen=True)
class LayerReport:
    """How one layer's inputs were determined, for all examples together.

    Attributes:
        name: the layer's path in the model.
        unknowns: values of the layer's inputs.
        forward: usable forward equations: an output that a ReLU holds at zero gives none.
        gradient: gradient equations.
        rank_bound: the most that forward and gradient equations together can have as rank, known before solving.
        determined: whether every direction shows in the equations, as solved, and the error is small enough to go on.
        error: estimated root mean square error of the inputs, of the worst example; infinite where nothing was solved.
        relative: three times that, relative to the spread between examples (one example: its size); NaN where some
            direction shows in no equation.
        iterations: of conjugate gradients.

    """

    name: str
    unknowns: int
    forward: int
    gradient: int
    rank_bound: int
    determined: bool = False
    error: float = math.inf
    relative: float = math.inf
    iterations: int = 0

    def __str__(self) -> str:
        state, error = "determined" if self.determined else "not determined", ""
        if math.isnan(self.relative):
            error = ", which some direction does not show in"
        elif math.isfinite(self.relative):
            error = f", relative error at most {self.relative:.1e}"
            state = state if self.determined else f"{state} well enough"
        return (
            f"{self.name}: {state}, {self.unknowns} unknowns, {self.forward} forward and {self.gradient} gradient "
            f"equations of rank at most {self.rank_bound}{error}"
        )


@final
@dataclass(frozen=True, eq=False)
class Walked:
    """What is known of every example, as far back as linear algebra leads.

    Attributes:
        index: ``chain.steps[:index]`` are the steps that remain.
        known: about their outputs; without any solved layer, what the walk began with.
        layers: reports, from the last layer to the first that was tried.
        stop: why the walk ended, or what was the first not to be determined; None where the input was reached.
        start: (N, n) values of the input of ``chain.steps``, behind ``stop`` guessed; None where none was reached.

    """

    index: int
    known: Known
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
        going: whether to go on, asked in every iteration.

    Raises:
        NotApplicable: ``going`` said no.

    """
    params = {k: p.detach().double() for k, p in params.items()}
    walk = _Walk(chain, params, seen, known, noise, seed, refine, tolerance, going)
    return walk.run(onward=onward)


def obstacle(chain: Chain, params: Tensors, names: Collection[str], examples: int) -> str | None:
    """Return what keeps the walk from the model's input for so many ``examples``, as counting alone can tell."""
    if chain.stop is not None:
        return chain.stop
    pending: list[Step] = []
    known = chain.anchor.inputs
    for step in reversed(chain.steps):
        if isinstance(step, Affine):
            shared = step.weight_name in names
            _, alone, reason = _count(step, params[step.weight_name], examples, examples * known, shared)
            if reason is not None and not (alone and examples > 1):
                return reason
            pending, known = [], step.inputs
        elif isinstance(step, Fixed) and not step.reorders:
            pending.insert(0, step)
        elif isinstance(step, Elementwise) and not (step.affine and pending):
            if pending and known < step.outputs:
                return _kept(pending, known, f"the output of {step.name!r}")
            pending, known = [], step.inputs
    return _kept(pending, known, "the model's input") if pending and known < pending[0].inputs else None


def _count(
    step: Affine, weight: Tensor, examples: int, forward: int, shared: bool
) -> tuple[LayerReport, bool, str | None]:
    """Return a layer's report before it is solved, whether its gradient alone may do, and what stops it if not."""
    own, unknowns = counts(step, weight, examples), examples * step.inputs
    rank = own.rank * step.channels * shared
    report = LayerReport(step.name, unknowns, forward, weight.numel() * shared, min(unknowns, forward + rank))
    alone, reason = shared and own.rank >= own.unknowns and own.unknowns <= LARGEST, None
    if rank + forward < (_MARGIN if examples > 1 else 1) * unknowns:
        reason = f"the input of {report}"
    elif examples * weight.numel() * math.prod(step.out_shape[1:]) > _WORK:
        reason = (
            f"solving for the input of {step.name!r} takes more than {_WORK:.0e} multiplications in every iteration"
        )
    return report, alone, reason


def _too_long(step: Affine, weight: Tensor, examples: int) -> str | None:
    if examples * weight.numel() * math.prod(step.out_shape[1:]) <= _WORK:
        return None
    return f"solving for the input of {step.name!r} takes more than {_WORK:.0e} multiplications in every iteration"


def _kept(pending: list[Step], known: int, where: str) -> str:
    names = ", ".join(repr(s.name) for s in pending)
    return f"{names} keeps {known} of the {pending[0].inputs} values before it, so {where} is not determined"


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
    ) -> None:
        self.chain, self.params, self.seen, self.noise = chain, params, seen, noise
        self.refine, self.tolerance, self.going = refine, tolerance, going
        self.known, self.draw = known, torch.Generator().manual_seed(seed)
        self.pending: list[Fixed | Elementwise] = []
        self.kink: Known | None = None  # What is known behind a ReLU, right before which the walk stands.
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
        return Walked(*self.best, tuple(self.reports), self.stop, start)

    def _back(self, step: Step, index: int) -> None:
        if isinstance(step, Affine):
            self._layer(step, index)
        elif isinstance(step, Elementwise) and not (step.affine and self.pending):
            self._resolve(f"the output of {step.name!r}")
            self._activation(step)
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
        maps, count = Composite(tuple(self.pending), self.params), len(self.known.values)
        kept, unknowns = self.known.values.shape[1], self.pending[0].inputs
        reason = _kept(list(self.pending), kept, where)
        if kept < unknowns:
            self._halt(reason)
        echo = torch.randn((count, unknowns), generator=self.draw, dtype=torch.float64).to(self.known.values)
        seen = torch.cat([self.known.values[None] - maps.constant(self.known.values), self.known.errors])
        values, _, done = conjugate_gradients(
            lambda v: maps.adjoint(maps.apply(v)),
            maps.adjoint(torch.cat([maps.apply(echo), seen.flatten(0, 1)])),
            lambda r: r,
            tolerance=1e-14,
            limit=500,
        )
        # What a random vector's image does not give back shows nowhere.
        if not done or float((values[:count] - echo).square().mean()) > MISSING**2:
            names = ", ".join(repr(s.name) for s in self.pending)
            self._halt(f"{names} hides some direction of the values before it, so {where} is not determined")
        values = values[count:]
        parts = values.view(-1, count, unknowns)
        pulls = maps.adjoint(torch.cat([self.known.pull[None], self.known.slips]).flatten(0, 1)).view(
            -1, count, unknowns
        )
        self.known = Known(parts[0], maps.squares(self.known.weights), parts[1:], pulls[0], pulls[1:])
        self.pending = []

    def _activation(self, step: Elementwise) -> None:
        known = self.known
        before = step.inverse(known.values.view(-1, *step.in_shape)).flatten(1)
        if step.rectifies:
            # A ReLU is never negative: the most negative value measures the error of the others.
            least = max(3 * float((-known.values).max()), _SURE * known.deviation)
            slope = (known.values > least).to(before)
            self.kink, self.known = known, known.before(before, slope, torch.zeros_like(slope))
            return
        slopes, bends = zip(*(step.derivatives(row) for row in before), strict=True)
        self.known = known.before(before, torch.stack(slopes), torch.stack(bends))

    def _layer(self, step: Affine, index: int) -> None:
        gradient, known, kink = self.seen.get(step.weight_name), self.known, self.kink
        maps = Composite((step, *self.pending), self.params)
        shared = gradient is not None and bool((gradient != 0).any())
        usable = int((known.weights > 0).sum())
        report, alone, reason = _count(step, self.params[step.weight_name], len(known.values), usable, shared)
        alone = alone and (len(known.values) > 1 or kink is not None)
        if reason is not None and not alone:
            self._end(report, reason)
            if _too_long(step, self.params[step.weight_name], len(known.values)):
                raise _StoppedError  # Not even a start is worth so much time.
        for flip in range(_FLIPS + 1 if kink is not None else 1):
            equations = LayerEquations(maps, gradient, known.pull)
            robust = kink is not None and flip == 0
            done, found, precondition = self._solved(equations, known, report, index, alone, reason, robust=robust)
            if kink is None or not done.determined:
                break
            # The solution itself tells every unit's sign, better than its noisy output did.
            outputs = equations.apply(found.values[None])[0] + maps.constant(found.values)
            slope = (outputs > 0).to(outputs)
            if torch.equal(slope * kink.pull, known.pull):
                break
            known = kink.before(known.values, slope, torch.zeros_like(slope))
        if not done.determined:
            self._end(done, reason or f"the input of {done}")
        elif self.stop is None:  # Behind the first gap, values only serve as a start.
            self.reports.append(done)
            if self.refine is not None and precondition is not None and index > self.first:
                found = replace(found, values=self.refine(index, found.values, precondition))
            self.best = index, found
        self.known, self.pending, self.kink = found, [], None

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
        report = replace(
            report,
            determined=solved.complete and relative <= self.tolerance and reason is None,
            error=solved.known.deviation,
            relative=relative if solved.complete else math.nan,
            iterations=solved.iterations,
        )
        return report, solved.known, solved.precondition


def _relative(values: Tensor, deviation: float) -> float:
    """Return three standard errors, relative to the spread between examples (one example: its size)."""
    around = values - values.mean(0) if len(values) > 1 else values
    return 3 * deviation / max(float(around.square().mean().sqrt()), 1e-300)
