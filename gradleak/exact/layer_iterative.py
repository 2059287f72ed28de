"""The inputs of one layer from all its equations, by conjugate gradients, with an error that is estimated along.

Every equation is divided by its own deviation: an output behind a saturated activation costs nothing but its own
equation. Together,

    Σ_i ‖(K a_i − z_i) / σ_i‖² + ‖Σ_i M(δ_i) a_i − G‖² / τ²,

is a least-squares problem over all channels and examples, solved without matrices of its size: blocks that all
channels share precondition it. Two questions go along. *Does every direction show?* A random vector is recovered from
its own image; what no equation touches is missing then. *How large is the error?* Samples of the noise pass through the
same solve: of the outputs, of the output gradients, and of the gradient's rounding. They travel on as what is known of
the next layer's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.errors import NotApplicable
from gradleak.exact.layer_equations import LayerEquations
from gradleak.solve.cholesky import cholesky, cholesky_solve
from gradleak.solve.conjugate_gradients import Rows, conjugate_gradients

__all__ = ["MISSING", "SAMPLES", "Going", "Known", "Solved", "solve_layer"]

Going = Callable[[], bool]
"""Asked often where work is long: whether to go on."""
SAMPLES = 4
"""Samples of the error; pooled over the channels, they say dozens of times how well a position is known."""
_LEFT = 1e-3
"""Energy that solving may leave per value, in units of the noise. Measured on LeNets, the mean squared error is a third
larger at three times as much."""
MISSING = 1e-3
"""Root mean square of what may be missing of the random vector."""
_LIMIT = 1500
"""Conjugate gradient steps."""
_BLOCK = 4096
"""Largest block of the gradient equations that is factorized."""
_FEWER = 2048
"""Up to so many outputs, fewer than half the unknowns, forward equations are eliminated by a dense factor."""


@final
@dataclass(frozen=True, eq=False)
class Known:
    """What is known about the values z of a tensor inside the model, for all examples.

    Attributes:
        values: (N, m).
        weights: (N, m) one over their variance, zero where nothing is known.
        errors: (S, N, m) samples of their error.
        pull: (N, m) gradients of the loss with respect to them.
        slips: (S, N, m) samples of the error of ``pull``, which belong to those of the values.
    """

    values: Tensor
    weights: Tensor
    errors: Tensor
    pull: Tensor
    slips: Tensor

    @classmethod
    def plain(cls, values: Tensor, pull: Tensor, deviation: float, draw: torch.Generator) -> Known:
        """Return ``values`` with independent errors of one standard ``deviation``, and an exact ``pull``."""
        deviation = max(deviation, 1e-150)
        errors = deviation * torch.randn((SAMPLES, *values.shape), generator=draw, dtype=torch.float64).to(values)
        return cls(values, torch.full_like(values, deviation**-2), errors, pull, torch.zeros_like(errors))

    @property
    def deviation(self) -> float:
        """Estimated root mean square error of the worst example."""
        return float(self.errors.square().mean((0, 2)).max().sqrt())

    def before(self, values: Tensor, slope: Tensor, bend: Tensor) -> Known:
        """Return what is then known before an activation, whose inputs are ``values``, with its two derivatives."""
        errors = torch.where(slope != 0, self.errors / slope, 0.0)
        return Known(
            values,
            self.weights * slope.square(),
            errors,
            self.pull * slope,
            self.slips * slope + self.pull * bend * errors,
        )


@final
@dataclass(frozen=True, eq=False)
class Solved:
    """Inputs of a layer, for all examples.

    Attributes:
        known: about them.
        complete: whether every direction shows in the equations, but for ``unseen`` values.
        unseen: (N, n) values that occur in none of them; they are zero, and so is their weight.
        iterations: of conjugate gradients.
        precondition: an approximate inverse of the normal matrix, for rows (k, N · n).
    """

    known: Known
    complete: bool
    unseen: Tensor
    iterations: int
    precondition: Rows


def solve_layer(
    equations: LayerEquations,
    known: Known,
    noise: float,
    draw: torch.Generator,
    *,
    doubt: float,
    accuracy: float,
    going: Going | None = None,
) -> Solved:
    """Return the inputs of a layer.

    Args:
        equations: of the layer.
        known: about its outputs, behind the maps of ``equations``.
        noise: relative noise of the gradient.
        draw: draws the samples.
        doubt: share of the output gradients' own error that counts as noise of the gradient equations.
        accuracy: of the error samples, relative, in the norm of the system: directions that hardly show come last.
        going: whether to go on, asked in every iteration.

    Raises:
        NotApplicable: ``going`` said no.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(known.values)

    size = float(equations.target.square().mean().sqrt()) if equations.shared else 1.0
    off = float((known.slips.square().mean() / known.pull.square().mean().clamp_min(1e-300)).sqrt())
    system = _Weighted(equations, known.weights, max(max(noise, doubt * off) * size, 1e-300), going)
    seen = (known.values - equations.maps.constant(known.values))[None]
    probe = normal(1, *system.shape)
    rights = torch.cat([system.pull(seen, equations.target[None]), system.product(probe)])
    (value, echo), taken = system.solve(rights)
    drawn = noise * size * normal(len(known.errors), *equations.target.shape)
    drawn = drawn - equations.change(value, known.slips)
    errors, more = system.solve(system.pull(known.errors, drawn), accuracy)
    value = value.masked_fill(system.unseen, 0.0)
    missing = torch.where(system.unseen, 0.0, echo - probe[0]).square().mean()
    scale = 1.0
    if bool(known.slips.any()):
        # Noise is as large as the fit says: it leaves the same share of the samples' noise and of the update's.
        ours, seen_left = (
            system.left(known.errors, drawn, errors),
            system.left(seen, equations.target[None], value[None]),
        )
        scale = max([1.0, *(float(b / a) for a, b in zip(ours, seen_left, strict=True) if float(a) > 0)])
    step, size = equations.step, float(value.square().mean().sqrt())
    errors = errors * scale**0.5 + size * (echo - probe[0])  # What the iterations did not reach is not known.
    # Channels share their gradient equations, so the error depends on the position most.
    pooled = errors.square().mean(0).view(equations.count, step.channels, -1)
    if not step.linear:
        pooled = pooled.mean(1, keepdim=True).expand(-1, step.channels, -1)
    pulls = equations.adjoint(torch.cat([known.pull[None], known.slips]))
    weights = torch.where(system.unseen, 0.0, 1 / pooled.flatten(1).clamp_min(1e-300))
    found = Known(value, weights, errors.masked_fill(system.unseen, 0.0), pulls[0], pulls[1:])
    return Solved(found, float(missing) <= MISSING**2, system.unseen, taken + more, system.inverse)


@final
class _Weighted:
    """The normal matrix Kᵀ W K + Mᵀ M / τ² of a layer's equations, for rows (k, N, n)."""

    def __init__(self, equations: LayerEquations, weights: Tensor, tau: float, going: Going | None) -> None:
        self.equations, self.weights, self.tau, self.going = equations, weights, tau, going
        self.shape = equations.count, equations.step.inputs
        diagonal = equations.maps.squares(weights)  # of Kᵀ W K, (N, n)
        pooled = diagonal.view(equations.count, equations.step.groups, equations.per, -1)
        pooled = pooled.mean(2).transpose(0, 1).reshape(equations.step.groups, -1)  # (g, N p)
        own = (equations.block / tau).square().sum(1)
        touched = equations.examples(own[:, None].expand(-1, equations.per, -1))[0]
        self.unseen = (diagonal == 0) & (touched == 0)  # Such as a corner that no maximum was taken at.
        self.gram: Tensor | None = None
        self.image: Callable[[Tensor, Tensor], Tensor] | None = None
        if equations.shared and own.shape[1] <= _BLOCK * math.prod(equations.step.stride):
            parts = equations.split(equations.block / tau)
            self.gram = parts.mT @ parts
        floor = 1e-12 * (pooled + own).mean() + 1e-300
        outputs = weights.numel()
        inverse: Rows | None = None
        if self.gram is not None and 2 * outputs <= diagonal.numel() and outputs <= _FEWER:
            inverse = self._eliminated(self.gram, 1e-4 * own.mean())
        if self.gram is not None and inverse is None:
            inverse = self._shared(self.gram, equations.split((pooled + floor)[:, None])[:, :, 0])
        if inverse is None:
            whole = (diagonal + touched + floor).flatten()
            inverse = lambda r: r / whole  # noqa: E731
        self.inverse = inverse

    def _shared(self, gram: Tensor, added: Tensor) -> Rows:
        """Return the inverse with ``added`` (g, f, q), pooled over channels, in place of the forward equations."""
        added = torch.where(added > 0, added, 1.0)  # Zeros were added where phases are of different size.
        spread = self.equations.join(added[:, :, None].expand(-1, -1, self.equations.per, -1).contiguous())
        whole = self.equations.examples(spread).flatten()
        # The gradient equations need not be multiplied with where the inverse has just been.
        self.image = lambda r, z: self._forward(z.view(-1, *self.shape)).flatten(1).addcmul_(z, whole, value=-1).add_(r)
        blocks = torch.cholesky_inverse(torch.linalg.cholesky_ex(gram + torch.diag_embed(added))[0])
        return lambda r: self._apply(r.view(-1, *self.shape), blocks).flatten(1)

    def _eliminated(self, gram: Tensor, shift: Tensor) -> Rows | None:
        """Return the inverse with all equations but for a small ``shift``, None where that fails.

        With B the gradient equations' inverse, that is B − B Kᵀ (K B Kᵀ + W⁻¹)⁻¹ K B.
        """
        equations = self.equations
        exact, singular = torch.linalg.inv_ex(gram + shift * torch.eye(gram.shape[-1]).to(gram))
        if bool(singular.any()):
            return None
        blocks = exact.float()  # It only preconditions.
        eye = torch.eye(self.weights.numel()).to(blocks).view(-1, *self.weights.shape)
        inner = equations.apply(self._apply(equations.adjoint(eye), blocks)).flatten(1)
        flat = self.weights.flatten()
        inner.diagonal().add_((1 / flat.clamp_min(1e-12 * float(flat.max()))).float())
        factor, failed = cholesky(inner[None])
        if bool(failed):
            return None

        def inverse(r: Tensor) -> Tensor:
            level = r.abs().max().clamp_min(1e-300)
            first = self._apply((r / level).float().view(-1, *self.shape), blocks)
            inside = cholesky_solve(equations.apply(first).flatten(1)[None], factor)[0].contiguous()
            second = self._apply(equations.adjoint(inside.view(len(r), *self.weights.shape)), blocks)
            return (first - second).flatten(1).to(r) * level

        return inverse

    def _apply(self, v: Tensor, blocks: Tensor) -> Tensor:
        """Apply symmetric blocks (g, f, q, q) for every phase, shared by the channels of a group, to rows (k, N, n)."""
        parts = self.equations.split(self.equations.channels(v)) @ blocks
        return self.equations.examples(self.equations.join(parts))

    def _forward(self, v: Tensor) -> Tensor:
        """Return Kᵀ W K v."""
        if self.going is not None and not self.going():
            raise NotApplicable(
                f"The time ended before the inputs of {self.equations.step.name!r} were solved; allow more."
            )
        return self.equations.adjoint(self.equations.apply(v) * self.weights)

    def product(self, v: Tensor) -> Tensor:
        """Return the matrix times rows."""
        found = self._forward(v)
        if self.gram is not None:
            return found + self._apply(v, self.gram)
        return found + self.equations.gradient_adjoint(self.equations.gradient(v)) / self.tau**2

    def pull(self, forward: Tensor, gradient: Tensor) -> Tensor:
        """Return Kᵀ W u + Mᵀ w / τ² for rows u (k, N, m) and gradients w (k, g, c, r)."""
        return self.equations.adjoint(forward * self.weights) + self.equations.gradient_adjoint(gradient) / self.tau**2

    def left(self, forward: Tensor, gradient: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared residual of the weighted forward and of the gradient equations."""
        apart = (forward - self.equations.apply(solved)).square() * self.weights
        own = gradient - self.equations.gradient(solved)
        return apart.mean(), own.square().sum() / max(own.numel(), 1)

    def solve(self, rights: Tensor, tolerance: float = 0.0) -> tuple[Tensor, int]:
        """Return the solutions for rows and the iterations that they took, to ``tolerance`` or far below the noise."""
        found, steps, _ = conjugate_gradients(
            lambda v: self.product(v.view(-1, *self.shape)).flatten(1),
            rights.flatten(1),
            self.inverse,
            image=self.image,
            tolerance=tolerance,
            limit=_LIMIT,
            least=_LEFT * rights[0].numel(),
        )
        return found.view_as(rights), steps
