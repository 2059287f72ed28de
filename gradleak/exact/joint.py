"""One layer of a batch from forward and gradient equations together, by conjugate gradients.

Where the gradient equations alone (:mod:`gradleak.exact.peel`) do not determine the inputs a_i of a layer, its
recovered outputs may: K a_i = z_i, with one equation per output. Each output is known as well as the activation behind
it lets through, so every equation is divided by its own deviation: a saturated activation hides its output and costs
nothing but that equation. Together,

    Σ_i ‖(K a_i − z_i) / σ_i‖² + ‖Σ_i M(δ_i) a_i − G‖² / τ²,

is a least squares problem over all channels and examples, solved without matrices of its size: the gradient equations
are one block for every phase of the stride, which all channels share, and precondition it.

Two questions go along. *Does every direction show?* A random vector is recovered from its own image; what no equation
touches, and what the iterations did not reach, would be missing. *How large is the error?* Samples of the noise pass
through the same solve: of the outputs, of the output gradients, which depend on them, and of the gradient's rounding.
They are scaled by what the fit leaves, compared with what it leaves of them.

The forward equations are those of R-GAP (Zhu & Blaschko, ICLR 2021, Section 3.2) for one example. Deviations: a batch,
weights, no explicit matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.errors import NotApplicable
from gradleak.exact.layers import Composite
from gradleak.solve.conjugate_gradients import conjugate_gradients
from gradleak.structure.chain import Affine

__all__ = ["Joint", "Outputs", "solve_jointly"]

_SAMPLES = 3
"""Samples of the error; each says something about every value."""
_TOLERANCE = 1e-8
"""Relative accuracy of the solves, in energy."""
_LIMIT = 1500
"""Conjugate gradient steps."""
_MISSING = 1e-3
"""Root mean square of what may be missing of a random vector that is recovered from its image."""
_BLOCK = 4096
"""Largest block of the gradient equations."""
_NUMBERS = 1 << 25
"""Numbers of the gradient equations' matrix up to which they are used."""


@final
@dataclass(frozen=True, eq=False)
class Outputs:
    """What is known about a layer's outputs z.

    Attributes:
        values: (N, m).
        weights: (N, m) one over their variance, zero where nothing is known.
        pull: (N, m) gradients of the loss with respect to them.
        bend: (N, m) by how much ``pull`` changes with them.

    """

    values: Tensor
    weights: Tensor
    pull: Tensor
    bend: Tensor

    @property
    def deviation(self) -> Tensor:
        """Standard deviations (N, m), zero where nothing is known."""
        return self.weights.rsqrt().where(self.weights > 0, torch.zeros_like(self.weights))

    def before(self, values: Tensor, slope: Tensor, bend: Tensor) -> Outputs:
        """Return what is then known before an activation, whose inputs are ``values``, with its two derivatives."""
        return Outputs(
            values, self.weights * slope.square(), self.pull * slope, self.bend * slope.square() + self.pull * bend
        )


@final
@dataclass(frozen=True, eq=False)
class Joint:
    """Inputs of a layer, for all examples.

    Attributes:
        values: (N, n).
        deviation: predicted root mean square error of the worst example.
        complete: whether every direction shows in the equations, as solved.

    """

    values: Tensor
    deviation: float
    complete: bool


def solve_jointly(
    step: Affine,
    params: Mapping[str, Tensor],
    gradient: Tensor | None,
    outputs: Outputs,
    rounding: float,
    *,
    going: Callable[[], bool] | None = None,
) -> Joint:
    """Return the inputs of ``step`` for all examples.

    Args:
        step: the layer.
        params: float64 parameters by name.
        gradient: its weight gradient, None where it is not shared.
        outputs: what is known of its outputs.
        rounding: unit of the update's number format.
        going: whether to go on, asked in every iteration.

    Raises:
        NotApplicable: ``going`` said no.

    """
    system = _System(step, params[step.weight_name], gradient, outputs, rounding, going)
    seen = outputs.values - Composite((step,), params).constant(outputs.values)
    target = system.target
    value = system.solve(system.pull(seen[None], target[None]))
    draw = torch.Generator().manual_seed(0)  # Always the same noise, so that a verdict is not a matter of luck.

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(seen)

    slips = outputs.deviation * normal(_SAMPLES, *seen.shape)
    drawn = system.noise * normal(_SAMPLES, *target.shape) - system.change(value[0], outputs.bend * slips)
    probe = normal(1, value[0].numel()).view_as(value)
    rights = torch.cat([system.pull(slips, drawn), system.product(probe)])
    solved = system.solve(rights)
    samples, echo = solved[:-1], solved[-1]
    missing = (echo - probe[0]).square().mean()
    # Noise is as large as the fit says: it leaves the same share of the samples' noise and of the update's.
    left = [system.left(seen[None], target[None], value), system.left(slips, drawn, samples)]
    scale = max([1.0, *(float(a / b) for a, b in zip(*left, strict=True) if float(b) > 0)])
    variance = scale * samples.square().mean((0, 2)).max() + missing * value.square().mean()
    return Joint(value[0], float(variance.sqrt()), float(missing) <= _MISSING**2)


def _doubt(outputs: Outputs, rounding: float) -> float:
    """Return the relative deviation of the gradient equations.

    A tenth of the output gradients' own counts: measured, the whole of it makes the error a third smaller and takes
    four times the iterations.
    """
    slips = (outputs.bend * outputs.deviation).square().mean()
    return max(rounding, 0.1 * float((slips / outputs.pull.square().mean().clamp_min(1e-300)).sqrt()))


class _System:
    """Kᵀ W K + Mᵀ M / τ² for rows (k, N, n); gradients are rows (k, groups, channels, equations)."""

    def __init__(
        self,
        step: Affine,
        weight: Tensor,
        gradient: Tensor | None,
        outputs: Outputs,
        rounding: float,
        going: Callable[[], bool] | None,
    ) -> None:
        self.step, self.weight, self.weights, self.going = step, weight, outputs.weights, going
        self.count, self.per = len(outputs.pull), step.channels // step.groups
        rows, size = weight.shape[0] // step.groups * weight[0, 0].numel(), self.count * step.positions
        phases = self._phases()
        self.block = weight.new_zeros(step.groups, 0, size)
        self.target, self.noise = weight.new_zeros(step.groups, self.per, 0), 1.0
        self.shared = (
            gradient is not None
            and rows * size <= _NUMBERS
            and max(map(len, phases)) <= _BLOCK
            and bool((gradient != 0).any())
        )
        if self.shared:
            assert gradient is not None
            self.block = torch.cat([step.gradient_block(row, weight) for row in outputs.pull], 2)  # (g, r, N p)
            self.target = gradient.to(weight).reshape(step.groups, -1, self.per, rows * step.groups // len(weight))
            self.target = self.target.transpose(1, 2).flatten(2)  # (g, c, r)
            self.noise = max(_doubt(outputs, rounding) * float(self.target.square().mean().sqrt()), 1e-300)
        diagonal = step.adjoint(self.weights, weight.square()).view(self.count, step.groups, self.per, -1)
        pooled = diagonal.mean(2).transpose(0, 1).reshape(step.groups, -1)  # (g, N p)
        own = (self.block / self.noise).square().sum(1)
        floor = pooled.mean(1, keepdim=True) + own.mean(1, keepdim=True)
        self.diagonal = diagonal + 1e-12 * floor.mean() + 1e-300
        self.grams: list[tuple[Tensor, Tensor]] = []
        self.inverses: list[tuple[Tensor, Tensor]] = []
        pooled = pooled + 1e-12 * floor + 1e-300
        for index in phases if self.shared else ():
            some = self.block[:, :, index] / self.noise
            gram = some.mT @ some
            factor = torch.linalg.cholesky_ex(gram + torch.diag_embed(pooled[:, index]))[0]
            self.grams.append((index, gram))
            self.inverses.append((index, torch.cholesky_inverse(factor)))

    def _phases(self) -> list[Tensor]:
        """Return the positions, of all examples, of every phase of the stride: no weight sees two of them."""
        step, n = self.step, self.step.positions
        places = torch.arange(n, device=self.weight.device)
        phase = torch.zeros_like(places)
        if not step.linear:
            width = step.in_shape[2]
            phase = (places // width % step.stride[0]) * step.stride[1] + places % width % step.stride[1]
        return [torch.cat([places[phase == p] + n * i for i in range(self.count)]) for p in phase.unique().tolist()]

    def _blocks(self, v: Tensor, blocks: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Apply one symmetric block for every phase, shared by the channels of a group, to rows (k, N, n)."""
        rows = self._channels(v)
        found = torch.empty_like(rows)
        for index, block in blocks:
            found[:, :, index] = rows[:, :, index] @ block
        return self._examples(found)

    def _channels(self, v: Tensor) -> Tensor:
        """Return (k, N, n) as (g, k · channels, N · p)."""
        k, groups, p = len(v), self.step.groups, self.step.positions
        return v.view(k, self.count, groups, self.per, p).permute(2, 0, 3, 1, 4).reshape(groups, k * self.per, -1)

    def _examples(self, u: Tensor) -> Tensor:
        """Undo :meth:`_channels`."""
        groups, p = self.step.groups, self.step.positions
        parts = u.view(groups, -1, self.per, self.count, p).permute(1, 3, 0, 2, 4)
        return parts.reshape(len(parts), self.count, -1)

    def _apply(self, v: Tensor) -> Tensor:
        return self.step.apply(v.flatten(0, 1), self.weight).view(len(v), self.count, -1)

    def _adjoint(self, u: Tensor) -> Tensor:
        return self.step.adjoint(u.flatten(0, 1), self.weight).view(len(u), self.count, -1)

    def product(self, v: Tensor) -> Tensor:
        """Return the matrix times rows (k, N, n)."""
        if self.going is not None and not self.going():
            raise NotApplicable(
                f"The time ended before the inputs of {self.step.name!r} were solved for all examples; allow more."
            )
        found = self._adjoint(self._apply(v) * self.weights)
        return found + self._blocks(v, self.grams) if self.shared else found

    def pull(self, forward: Tensor, gradient: Tensor) -> Tensor:
        """Return Kᵀ W u + Mᵀ w / τ² for rows u (k, N, m) and w (k, g, c, r)."""
        found = self._adjoint(forward * self.weights)
        if self.shared:
            rows = gradient.transpose(0, 1).flatten(1, 2) / self.noise**2
            found += self._examples(rows @ self.block)
        return found

    def change(self, value: Tensor, pulls: Tensor) -> Tensor:
        """Return the gradient's change (k, g, c, r) at inputs (N, n) for changes (k, N, m) of the output gradients."""
        step, outs = self.step, self.step.out_shape[0] // self.step.groups
        found = torch.zeros(len(pulls), *self.target.shape).to(value)
        if not self.shared:
            return found
        for i, own in enumerate(value):
            patches = step.patches(own, self.weight)  # (g, c t, L)
            maps = pulls[:, i].reshape(len(pulls), step.groups, outs, -1)
            kernel = (maps @ patches.mT).view(len(pulls), step.groups, outs, self.per, -1)
            found += kernel.transpose(2, 3).flatten(3)
        return found

    def left(self, forward: Tensor, gradient: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared residual of the weighted forward and of the gradient equations."""
        apart = (forward - self._apply(solved)).square() * self.weights
        own = gradient
        if self.shared:
            own = gradient - (self._channels(solved) @ self.block.mT).unflatten(1, (len(solved), -1)).transpose(0, 1)
        return apart.mean(), own.square().sum() / max(own.numel(), 1)

    def solve(self, rights: Tensor) -> Tensor:
        """Return the solutions for rows (k, N, n), as far as conjugate gradients come."""
        shape = self.count, self.step.inputs

        def product(v: Tensor) -> Tensor:
            return self.product(v.view(-1, *shape)).flatten(1)

        def precondition(v: Tensor) -> Tensor:
            v = v.view(-1, *shape)
            return (self._blocks(v, self.inverses) if self.shared else v / self.diagonal.reshape(shape)).flatten(1)

        found, _, _ = conjugate_gradients(product, rights.flatten(1), precondition, tolerance=_TOLERANCE, limit=_LIMIT)
        return found.view(-1, *shape)
