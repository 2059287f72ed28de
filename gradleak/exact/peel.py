"""The recursion for batches: activations of every example, layer by layer, once those at the head are known.

:func:`gradleak.exact.features` shows every example's features, and with them the gradient of the client's loss
with respect to each. From there the chain is walked backward for all N examples at once. At a layer, the output
gradients δ_i of all examples are known, and the shared weight gradient is linear in the sought inputs a_i:

    G = Σ_i M(δ_i) a_i,

with one matrix [M(δ_1), …, M(δ_N)] for every input channel: for a convolution with O output channels and T taps, O·T
equations for the N·p values of a channel (p positions). Where that is enough, the inputs of the layer follow by linear
least squares, each example's for itself. Where it is not, the recovered outputs of the layer are equations as well
(:mod:`gradleak.exact.joint`).

The least squares' own residual tells the noise, and the normal matrix what it does to each example.

Relative: R-CONV (arXiv 2406.04227), for one example. Deviations: a batch, forward equations only where they are needed,
errors that are stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradleak.exact.joint import Outputs, solve_jointly
from gradleak.solve.cholesky import cholesky
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed

__all__ = ["Peeled", "PeeledLayer", "obstacle", "peel"]

Tensors = Mapping[str, Tensor]

_LARGEST = 4096
"""Values of one channel, of all examples, up to which the normal matrix is factorized."""
_TOLERANCE = 1e-3
"""Predicted error (three standard errors), relative to the spread between examples, up to which a layer is peeled."""
_ROUGH = 2e-2
"""The same where forward equations helped: for a start of steps on all layers together."""
_ODD = 6.0
"""Misfit of an output's equations, in medians, from which on they do not fit the others."""
_FLIPS = 6
"""How often the signs that a solution implies are taken for another one."""
_MARGIN = 1.02
"""Equations for an unknown from which on forward and gradient equations are solved together."""
_WORK = 1 << 28
"""Multiplications of a layer, for all examples, up to which they are: some thousand passes, minutes at most."""


@final
@dataclass(frozen=True)
class PeeledLayer:
    """How the inputs of one layer were determined, for all examples together.

    Attributes:
        name: the layer's path in the model.
        unknowns: values of one input channel, of all examples.
        equations: gradient equations that these values share.
        rank_bound: the most that their rank can be, known before solving.
        error: predicted root mean square error of the values (three standard errors), relative to the spread between
            examples; of the worst example. Infinite where nothing was solved, NaN where some direction did not show.
        determined: whether the error is small enough to go on.
        forward: forward equations that were used as well, for each input channel; zero where they were not needed.

    """

    name: str
    unknowns: int
    equations: int
    rank_bound: int
    error: float
    determined: bool
    forward: int = 0

    def __str__(self) -> str:
        more = f" and {self.forward} forward equations" if self.forward else ""
        if math.isnan(self.error):
            return (
                f"{self.name}: solving {self.equations} gradient{more} did not show every direction of "
                f"{self.unknowns} values of a channel"
            )
        if math.isinf(self.error):
            return (
                f"{self.name}: {self.equations} gradient equations of rank at most {self.rank_bound}{more} do not "
                f"determine {self.unknowns} values of a channel"
            )
        state = "determined" if self.determined else "not determined well enough"
        what = f"gradient{more}" if self.forward else "equations"
        return (
            f"{self.name}: {state}, {self.unknowns} values of a channel from {self.equations} {what}, "
            f"relative error at most {self.error:.1e}"
        )


@final
@dataclass(frozen=True, eq=False)
class Peeled:
    """What is known of every example, as far back as linear algebra leads.

    Attributes:
        index: ``chain.steps[:index]`` are the steps that remain.
        values: (N, n) outputs of the remaining steps.
        cotangents: (N, n) gradients of the client's loss with respect to them.
        error: predicted root mean square error of ``values`` (three standard errors); NaN where nothing was peeled.
        layers: reports, from the last layer to the first that was tried.
        stop: why the walk ended, None where the input was reached.

    """

    index: int
    values: Tensor
    cotangents: Tensor
    error: float
    layers: tuple[PeeledLayer, ...]
    stop: str | None


def obstacle(chain: Chain, params: Tensors, names: Collection[str], count: int) -> str | None:
    """Return what keeps the walk from the model's input for ``count`` examples, as counting alone can tell."""
    if chain.stop is not None:
        return chain.stop
    averaged, outputs = "the model's input", True
    for step in reversed(chain.steps):
        if isinstance(step, Fixed) and not step.reorders:
            averaged, outputs = f"what {step.name!r} averages", False
        elif isinstance(step, Elementwise) and averaged.startswith("what"):
            return f"{averaged} passes an activation before, which takes single values"
        elif isinstance(step, Affine):
            averaged = "the model's input"
            weight = params[step.weight_name]
            rows, rank, unknowns = _counts(step, weight, count)
            shared = step.weight_name in names
            rows, rank = rows * shared, rank * shared
            known = count * step.outputs if outputs else 0
            if (rank < unknowns or unknowns > _LARGEST) and not _together(step, weight, rank, count, known):
                forward = known // step.channels
                return str(PeeledLayer(step.name, unknowns, rows, rank, math.inf, False, forward))
            outputs = True
    return None if averaged == "the model's input" else f"{averaged} is the input itself"


def _counts(step: Affine, weight: Tensor, count: int) -> tuple[int, int, int]:
    """Return the gradient equations that the values of one channel share, the most their rank can be, and the values.

    With a stride, every tap sees one phase of the positions only, so each phase needs equations of its own.
    """
    outs = weight.shape[0] // step.groups
    if step.linear:
        return outs, min(outs, count), count
    axes = []
    for axis, before in ((0, step.padding[0]), (1, step.padding[2])):
        stride, size = step.stride[axis], step.in_shape[1 + axis]
        taps = [(t * step.dilation[axis] - before) % stride for t in range(weight.shape[2 + axis])]
        axes.append([(taps.count(a), len(range(a, size, stride))) for a in range(stride)])
    pairs = [(outs * t * u, count * p * q) for t, p in axes[0] for u, q in axes[1]]
    return sum(r for r, _ in pairs), sum(min(pair) for pair in pairs), sum(v for _, v in pairs)


def _together(step: Affine, weight: Tensor, rank: int, count: int, forward: int) -> bool:
    """Tell whether gradient equations of ``rank`` for each channel and ``forward`` outputs may do, and are feasible."""
    work = count * weight.numel() * math.prod(step.out_shape[1:])
    return work <= _WORK and rank * step.channels + forward >= _MARGIN * count * step.inputs


def peel(
    chain: Chain,
    params: Tensors,
    seen: Tensors,
    features: Tensor,
    cotangents: Tensor,
    *,
    going: Callable[[], bool] | None = None,
) -> Peeled:
    """Return the activations of every example as far back as gradient equations determine them.

    Args:
        chain: back from the head.
        params: parameters by name.
        seen: gradients of the batch's loss by name.
        features: (N, d) inputs of the head.
        cotangents: (N, d) gradients of the loss with respect to them.
        going: whether to go on, asked where a layer takes long.

    Raises:
        NotApplicable: ``going`` said no.

    """
    params = {k: p.detach().double() for k, p in params.items()}
    values: Tensor | None = features.detach().double()
    pull = cotangents.detach().double()
    assert values is not None
    best = Peeled(len(chain.steps), values, pull, math.nan, (), None)
    layers: list[PeeledLayer] = []
    stop = chain.stop
    rounding = max((torch.finfo(t.dtype).eps for t in seen.values()), default=0.0)
    doubt = 16 * rounding * float(values.square().mean().sqrt())
    above, error = None, math.nan
    # What is known of the tensor that the walk has reached, as outputs of the layer before it.
    outputs: Outputs | None = _plain(values, doubt, pull)
    for index in range(len(chain.steps) - 1, -1, -1):
        step = chain.steps[index]
        if isinstance(step, Elementwise):
            if values is None:
                stop = f"what {step.name!r} puts out is averaged before the next layer"
                break
            above = pull if step.rectifies else None
            values, slope, bend = _activation(step, values, doubt)
            outputs = None if outputs is None else outputs.before(values, slope, bend)
            pull, error = pull * slope, float(error / slope.abs().min())
        elif isinstance(step, Fixed):
            pull = step.adjoint(pull)
            if not step.reorders:
                values = above = outputs = None
        elif isinstance(step, Affine):
            gradient = seen.get(step.weight_name)
            if above is None:
                solved, report = _solve(step, params[step.weight_name], gradient, pull)
            else:
                solved, report, pull = _solve_behind_kinks(step, params, gradient, pull, above)
            if solved is None and outputs is not None:
                known = replace(outputs, pull=pull)
                solved, report = _solve_together(step, params, gradient, known, rounding, report, going)
            above = None
            layers.append(report)
            if solved is None:
                stop = str(report)
                break
            values, error = solved
            doubt = max(doubt, 3 * error)
            pull = step.adjoint(pull, params[step.weight_name])
            outputs = _plain(values, max(error / 3, rounding * float(values.square().mean().sqrt())), pull)
            best = Peeled(index, values, pull, error, (), None)
    else:
        # What stands before the first layer is undone exactly, if it can be.
        if stop is None and values is not None:
            best = Peeled(0, values, pull, error, (), None)
        elif stop is None:
            stop = "the model averages its input"
    return replace(best, layers=tuple(layers), stop=stop)


def _plain(values: Tensor, deviation: float, pull: Tensor) -> Outputs:
    """Return values of one standard deviation as outputs."""
    return Outputs(values, torch.full_like(values, max(deviation, 1e-150) ** -2), pull, torch.zeros_like(pull))


def _activation(step: Elementwise, values: Tensor, doubt: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what comes before an activation, and two derivatives there; values below ``doubt`` may be zero."""
    before = step.inverse(values.reshape(-1, *step.in_shape)).flatten(1)
    if step.rectifies:
        # A ReLU is never negative: the most negative recovered value measures the error of the others.
        slope = (values > max(3 * float((-values).max()), doubt)).to(values)
        return before, slope, torch.zeros_like(slope)
    slopes, bends = zip(*(step.derivatives(row) for row in before), strict=True)
    return before, torch.stack(slopes), torch.stack(bends)


Solved = tuple[Tensor, float] | None
"""Inputs (N, n) of a layer with their predicted error; None where they are not determined."""


def _solve_behind_kinks(
    step: Affine, params: Tensors, gradient: Tensor | None, pull: Tensor, above: Tensor
) -> tuple[Solved, PeeledLayer, Tensor]:
    """Solve a layer whose outputs pass a ReLU; return the corrected gradient at its output as well.

    A few units near zero may be taken for active or dead wrongly. Their equations stand out and are left out at first;
    then the solution itself tells every unit's sign.
    """
    weight = params[step.weight_name]
    solved, report = _solve(step, weight, gradient, pull, robust=True)
    for _ in range(_FLIPS):
        if solved is None:
            break
        right = above * (step.forward(solved[0].reshape(-1, *step.in_shape), params).flatten(1) > 0)
        if torch.equal(right, pull):
            break
        pull = right
        solved, report = _solve(step, weight, gradient, pull)
    return solved, report, pull


def _solve_together(
    step: Affine,
    params: Tensors,
    gradient: Tensor | None,
    outputs: Outputs,
    rounding: float,
    report: PeeledLayer,
    going: Callable[[], bool] | None,
) -> tuple[Solved, PeeledLayer]:
    """Solve a layer that its gradient equations do not determine with those of its outputs; ``report`` is theirs."""
    weight, count = params[step.weight_name], len(outputs.values)
    known = int((outputs.weights > 0).sum())
    report = replace(report, forward=known // step.channels)
    if not _together(step, weight, report.rank_bound, count, known):
        return None, report
    found = solve_jointly(step, params, gradient, outputs, rounding, going=going)
    if not found.complete:
        return None, replace(report, error=math.nan)
    error, relative = _relative(found.values, found.deviation)
    report = replace(report, error=relative, determined=relative <= _ROUGH)
    return ((found.values, error) if report.determined else None), report


def _relative(values: Tensor, deviation: float) -> tuple[float, float]:
    """Return three standard errors, and the same relative to the spread between examples (one example: its size)."""
    around = values - values.mean(0) if len(values) > 1 else values
    error = 3 * deviation
    return error, error / max(float(around.square().mean().sqrt()), 1e-300)


def _solve(
    step: Affine, weight: Tensor, gradient: Tensor | None, pull: Tensor, *, robust: bool = False
) -> tuple[Solved, PeeledLayer]:
    """Solve a layer for its inputs; ``robust`` leaves out outputs whose equations do not fit the others."""
    count, groups, per = len(pull), step.groups, step.channels // step.groups
    rows, rank, unknowns = _counts(step, weight, count)
    if gradient is None:
        rows = rank = 0
    no = PeeledLayer(step.name, unknowns, rows, rank, math.inf, False)
    if gradient is None or rank < unknowns or unknowns > _LARGEST:
        return None, no
    seen = gradient.detach().double()
    taps = rows * groups // weight.shape[0]
    right = seen.reshape(groups, -1, per, taps).transpose(1, 2).flatten(2)  # (g, c, r)
    values = torch.empty(count, groups, per, step.positions, dtype=seen.dtype, device=seen.device)
    variance = torch.empty(count, groups, dtype=seen.dtype, device=seen.device)
    block = torch.cat([step.gradient_block(row, weight) for row in pull], 2)  # (g, r, N p)
    rounding = torch.finfo(gradient.dtype).eps
    for g in range(groups):
        kept = torch.ones(rows, dtype=torch.bool, device=seen.device)
        while True:
            some, target = block[g][kept], right[g][:, kept]
            gram = some.T @ some
            scale = gram.diagonal().clamp_min(1e-300).rsqrt()
            factor, failed = cholesky((gram * scale * scale[:, None])[None])
            if bool(failed) or not bool(torch.isfinite(factor).all()):
                return None, no
            inverse = torch.cholesky_inverse(factor[0]) * scale * scale[:, None]
            found = target @ some @ inverse
            rest = target - found @ some.T
            misfit = rest.square().view(per, -1, taps).mean((0, 2)).sqrt()  # of every output
            usual = max(float(misfit.median()), 4 * rounding * float(target.square().mean().sqrt()))
            odd = (misfit > _ODD * usual).repeat_interleave(taps)
            left = int(kept.sum()) - int(odd.sum())
            if not robust or not bool(odd.any()) or left < max(1.25 * unknowns, 0.5 * rows):
                break
            kept[kept.nonzero().flatten()[odd]] = False
        noise = float(rest.square().sum()) / (max(len(some) - unknowns, 1) * per)
        noise = max(noise, float((0.25 * rounding * right[g]).square().mean()))
        values[:, g] = found.view(per, count, -1).transpose(0, 1)
        variance[:, g] = noise * inverse.diagonal().view(count, -1).mean(1)
    flat = values.flatten(1)
    error, relative = _relative(flat, float(variance.mean(1).max().sqrt()))
    report = PeeledLayer(step.name, unknowns, rows, rank, relative, relative <= _TOLERANCE)
    return ((flat, error) if report.determined else None), report
