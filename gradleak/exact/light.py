"""The recursion without matrices: conjugate gradients per layer, and errors that travel as samples.

Where every step is a linear layer, a convolution or a strictly monotonic activation, each layer's least squares problem
is solved iteratively. Instead of a covariance, a few samples of the error go along: noise of the update's size passes
through the same solves as the values, and its mean square weighs the next layer's forward equations and is the
estimated error at the end. Weights are pooled over channels and the output gradients carry errors of their own, so the
result is not the best estimate (measured on float32 updates of LeNets: mostly five to thirty times the mean squared
error that :mod:`gradleak.exact.layers` reaches), but it comes in a fraction of the time and memory. Where it does
not converge, or estimates too large an error, the factors remain the way, and what was solved is where they start.

What makes it quick: a stride s splits a layer's input into s² phases, and every weight's gradient equation sees one
phase of one channel only. So the gradient equations are many small blocks, all channels sharing theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.exact.layers import Composite
from gradleak.solve.cholesky import cholesky, cholesky_solve
from gradleak.solve.conjugate_gradients import Image, Rows, conjugate_gradients
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed, convolve

__all__ = ["LightLayer", "LightResult", "solve_light"]

Tensors = Mapping[str, Tensor]

_SAMPLES = 4
"""Samples of the error; pooled over channels, that is dozens per position."""
_LOOSE = 0.1
"""Relative accuracy of the error samples, in energy."""
_INNER = 1e-5
"""Relative accuracy of one float32 solve, before the float64 residual is taken anew."""
_LEFT = 0.003
"""Share of the noise's energy that solving may leave."""
_OWN = 0.7
"""How far the first layer's weights go from equal ones (0) to the estimated ones (1)."""
_SHARPER = 3.0
"""Weight of the first layer's gradient equations: most of their noise lies in one direction per output channel, the
mean patch, along which all errors of the output gradient add up; what the others have is below the average."""
_ROUNDS = 10
_LIMIT = 600
_FEWER = 2048
"""Up to so many forward equations, fewer than half the unknowns, they are eliminated by a dense factor."""
_PAIRS = 1.0
"""Pairs of taps and positions, relative to the dense layer, up to which outputs are compared pair by pair."""
_STALL = 1e-20
"""Share of the first energy below which float64 itself may end the progress."""
_BLOCK = 1024
"""Largest block of the preconditioner."""


@final
@dataclass(frozen=True)
class LightLayer:
    """One layer's solve.

    Attributes:
        index: which step of the chain it is.
        step: the layer.
        value: its input (n,).
        rank: most that the gradient equations of one input channel can have as rank.
        condition: Rayleigh quotient of the error samples, against the scaled diagonal.
        spread: mean squared error of the layer's input, in units of the squared noise.
        iterations: of conjugate gradients.

    """

    index: int
    step: Affine
    value: Tensor
    rank: int
    condition: float
    spread: float
    iterations: int


@final
@dataclass(frozen=True, eq=False)
class LightResult:
    """The solved layers of a chain, from the last to the first.

    Attributes:
        value: the chain's input (n,), None where some layer could not be solved.
        layers: the layers that could.

    """

    value: Tensor | None
    layers: tuple[LightLayer, ...]


def solve_light(
    chain: Chain,
    params: Tensors,
    seen: Tensors,
    features: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    noise: float,
    seed: int,
    refine: Callable[[int, Tensor, Rows], Tensor],
) -> LightResult | None:
    """Return the input of ``chain`` for ``features``, layer by layer, or None where this way does not serve.

    Args:
        chain: reaches the model's input.
        params: float64 parameters by name.
        seen: float64 gradients by name.
        features: (d,), the chain's output.
        delta: (C,), the gradient at the output of the linear layer behind.
        weight: (C, d), of that layer.
        noise: relative noise of the update.
        seed: of the error samples.
        refine: (index of a step, its input (n,), approximate inverse for rows) → a better input, for the layers in
            between: each weighs the next one's gradient equations by an output gradient that depends on its input.

    """
    if chain.stop is not None or not all(_suits(step, seen) for step in chain.steps):
        return None
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(features)

    value, slips = features, (delta * normal(_SAMPLES, len(delta))) @ weight
    delta = delta @ weight
    size = features.abs().clamp(min=float(0.05 * features.square().mean().sqrt()) + 1e-300)
    variance, errors = size.square(), size * normal(_SAMPLES, len(features))
    layers: list[LightLayer] = []
    first = next((i for i, s in enumerate(chain.steps) if isinstance(s, Affine)), 0)
    for index in range(len(chain.steps) - 1, -1, -1):
        step = chain.steps[index]
        if isinstance(step, Elementwise):
            value = step.inverse(value.reshape(1, *step.in_shape)).flatten()
            slope, bend = step.derivatives(value)
            if not bool((slope.abs() > 0).all()):
                return LightResult(None, tuple(layers))
            errors, variance = errors / slope, variance / slope.square()
            slips, delta = slips * slope + delta * bend * errors, delta * slope
        elif isinstance(step, Affine):
            if index == first:
                # Not all the way to weights of their own: hardly a worse estimate, in fewer iterations.
                variance = variance**_OWN * variance.median() ** (1 - _OWN)
            sharper = _SHARPER if index == first else 1.0
            system = _System(step, params, delta, seen[step.weight_name], variance, sharper)
            precondition = system.preconditioner()
            # Layers in between are refined by what the later ones say, which takes the gradient's own errors out.
            felt = slips if index == first else torch.zeros_like(slips)
            found = (
                None if precondition is None else system.solve(index, value, errors, felt, precondition, normal, noise)
            )
            if found is None or precondition is None:
                return LightResult(None, tuple(layers))
            layer, errors = found
            value = layer.value
            if index > first:
                value = refine(index, value, _outside(system, precondition))
            layers.append(replace(layer, value=value))
            # Channels share their gradient equations, so the error depends on the position most.
            pooled = errors.square().mean(0).reshape(step.channels, -1)
            variance = (pooled if step.linear else pooled.mean(0).expand_as(pooled)).flatten()
            delta, slips = (step.adjoint(v, params[step.weight_name]) for v in (delta[None], slips))
            delta = delta[0]
    return LightResult(value, tuple(layers))


def _outside(system: _System, precondition: _Preconditioner) -> Rows:
    return lambda v: system.join(precondition.inverse(system.split(v.float()))).to(v)


def _suits(step: object, seen: Tensors) -> bool:
    if isinstance(step, Affine):
        gradient = seen.get(step.weight_name)
        if not step.linear and (step.in_shape[1] % step.stride[0] or step.in_shape[2] % step.stride[1]):
            return False
        return step.groups == 1 and gradient is not None and bool((gradient != 0).any())
    if isinstance(step, Elementwise):
        return not step.rectifies
    return isinstance(step, Fixed) and step.reorders


@final
@dataclass(frozen=True, eq=False)
class _Preconditioner:
    """An approximate inverse P of a matrix A in float32, for rows.

    Attributes:
        inverse: r → P r.
        image: (r, P r) → A P r, None where the product with A is as cheap. With A = B + N and P = B⁻¹ it is
            r + N P r: the part of A that P inverts need not be multiplied with at all.

    """

    inverse: Rows
    image: Image | None = None


class _System:
    """Kᵀ D K + Mᵀ M of one layer, D the weights of the forward equations, M the gradient equations'."""

    def __init__(
        self, step: Affine, params: Tensors, delta: Tensor, gradient: Tensor, variance: Tensor, sharper: float = 1.0
    ) -> None:
        self.step, self.params, self.gradient = step, params, gradient
        self.weight = params[step.weight_name]
        self.inverse_variance = 1 / variance
        self.trust = sharper / float(gradient.square().mean())
        self.block = step.gradient_block(delta, self.weight)[0]  # (r, p)
        self.phases = (1, 1) if step.linear else step.stride
        self.count = self.phases[0] * self.phases[1]
        self.plane = (1, 1) if step.linear else (step.in_shape[1] // step.stride[0], step.in_shape[2] // step.stride[1])
        parts = self.split(self.block).view(len(self.block), self.count, -1).transpose(0, 1)  # (f, r, q)
        self.gram = parts.mT @ parts * self.trust
        self.rank = sum(min(int((p != 0).any(1).sum()), p.shape[1]) for p in parts)

    def split(self, v: Tensor) -> Tensor:
        """Return rows (k, n) in the order in which this class computes: (k, phases, c, q) instead of (k, c, h, w)."""
        high, wide = self.phases
        if high * wide == 1:
            return v
        _, height, width = self.step.in_shape
        parts = v.reshape(len(v), -1, height // high, high, width // wide, wide)
        return parts.permute(0, 3, 5, 1, 2, 4).reshape(len(v), -1)

    def join(self, v: Tensor) -> Tensor:
        """Undo :meth:`split`."""
        high, wide = self.phases
        if high * wide == 1:
            return v
        _, height, width = self.step.in_shape
        parts = v.reshape(len(v), high, wide, -1, height // high, width // wide)
        return parts.permute(0, 3, 4, 1, 5, 2).reshape(len(v), -1)

    def blocks(self, v: Tensor, blocks: Tensor) -> Tensor:
        """Apply one symmetric block per phase (f, q, q) to rows (k, n)."""
        count, size = blocks.shape[:2]
        if len(v) == 1:
            return (v.view(count, -1, size) @ blocks).view(1, -1)
        parts = v.reshape(len(v), count, -1, size).transpose(0, 1).flatten(1, 2)
        return (parts @ blocks).unflatten(1, (len(v), -1)).transpose(0, 1).reshape(v.shape)

    def _kernel(self, dtype: torch.dtype) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Return the layer on split inputs, where each phase is a channel of its own and the stride is one.

        That is the kernel (outputs, phases · channels, taps down, taps across) and how to pad an input for it.
        """
        step = self.step
        kernel, (left, _, top, _) = step._phases(self.weight.to(dtype))
        kernel = kernel.unflatten(0, (-1, self.count)).transpose(0, 1).flatten(0, 1).transpose(0, 1).flip(2, 3)
        (down, across), (rows, columns) = kernel.shape[2:], self.plane
        # What the adjoint pads before and behind, the map itself pads behind and before.
        before, behind = across - 1 - left, step.out_shape[2] - columns + left
        above, below = down - 1 - top, step.out_shape[1] - rows + top
        return kernel.contiguous(), (before, behind, above, below)

    def _convolutions(self, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """Return K and Kᵀ on split rows."""
        step = self.step
        if step.linear:
            weight = self.weight.to(dtype)
            return (lambda v: v @ weight.T), (lambda u: u @ weight)
        forward, (before, behind, above, below) = self._kernel(dtype)
        backward = forward.transpose(0, 1).flip(2, 3).contiguous()
        down, across = forward.shape[2:]
        pads = (across - 1 - before, across - 1 - behind, down - 1 - above, down - 1 - below)

        def apply(v: Tensor) -> Tensor:
            return convolve(v.reshape(len(v), -1, *self.plane), forward, (before, behind, above, below)).flatten(1)

        def adjoint(u: Tensor) -> Tensor:
            return convolve(u.reshape(len(u), *step.out_shape), backward, pads).flatten(1)

        return apply, adjoint

    def around(self, blocks: Tensor) -> Tensor:
        """Return K B Kᵀ (m, m) for one symmetric block per phase (f, q, q), which all channels share.

        Two outputs meet in B once for each pair of taps, so the weights can be summed over channels first.
        """
        step, outputs = self.step, self.step.outputs
        if step.linear:
            weight = self.weight.to(blocks)
            return weight @ weight.T * blocks[0]
        kernel, pads = self._kernel(blocks.dtype)
        outs, _, down, across = kernel.shape
        if self.count * (down * across * outputs // outs) ** 2 > _PAIRS * outputs * step.inputs:
            apply, adjoint = self._convolutions(blocks.dtype)
            return apply(self.blocks(adjoint(torch.eye(outputs).to(blocks)), blocks))
        padded = F.pad(blocks.view(self.count, *self.plane, *self.plane), pads + pads)
        seen = padded.unfold(1, down, 1).unfold(2, across, 1).unfold(3, down, 1).unfold(4, across, 1)
        pairs = seen.permute(0, 5, 6, 7, 8, 1, 2, 3, 4).reshape(self.count * (down * across) ** 2, -1)
        taps = kernel.unflatten(1, (self.count, -1)).flatten(3)  # (o, f, c, t)
        weights = torch.einsum("ofct,pfcu->opftu", taps, taps).flatten(0, 1).flatten(1)
        return (weights @ pairs).view(outs, outs, outputs // outs, -1).transpose(1, 2).reshape(outputs, outputs)

    def product(self, dtype: torch.dtype) -> Rows:
        """Return the whole matrix as a product for split rows."""
        inner, gram = self.inverse_variance.to(dtype), self.gram.to(dtype)
        apply, adjoint = self._convolutions(dtype)
        return lambda v: adjoint(apply(v) * inner) + self.blocks(v, gram)

    def pull(self, forward: Tensor, gradient: Tensor) -> Tensor:
        """Return Kᵀ D u + Mᵀ w for rows u (k, m) and gradients w (k, *weight)."""
        channels = self.step.channels
        rows = gradient.reshape(len(gradient), self.step.out_shape[0], channels, -1).transpose(1, 2).flatten(2)
        own = (rows @ self.block).flatten(1) * self.trust
        return self.split(self.step.adjoint(forward * self.inverse_variance, self.weight) + own)

    def diagonal(self) -> Tensor:
        """Return the diagonal of Kᵀ D K, (n,)."""
        return self.split(self.step.adjoint(self.inverse_variance[None], self.weight.square()))[0]

    def preconditioner(self) -> _Preconditioner | None:
        """Return an approximate inverse, None where its blocks would be too large or are singular."""
        size, forward = self.gram.shape[-1], self.diagonal()
        if size > _BLOCK:
            return None
        if 2 * self.step.outputs <= self.step.inputs and self.step.outputs <= _FEWER:
            shift = 1e-4 * float(self.gram.diagonal(dim1=1, dim2=2).mean())
            exact, singular = torch.linalg.inv_ex(self.gram + shift * torch.eye(size).to(self.gram))
            if bool(singular.any()):
                return None
            inverse = exact.float()

            apply, adjoint = self._convolutions(torch.float32)
            inner = self.around(inverse)
            inner.diagonal().add_((1 / self.inverse_variance).float())
            factor, failed = cholesky(inner[None])
            if bool(failed):
                return None

            def eliminated(v: Tensor) -> Tensor:
                first = self.blocks(v, inverse)
                inside = cholesky_solve(apply(first)[None], factor)[0]
                return first - self.blocks(adjoint(inside.contiguous()), inverse)

            return _Preconditioner(eliminated)
        # Blocks that all channels share stay in the cache, and serve as well as blocks of their own.
        own = forward.reshape(self.count, self.step.channels, size).mean(1)
        own += 1e-6 * (self.gram.diagonal(dim1=1, dim2=2) + own).mean(1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex((self.gram + torch.diag_embed(own)).float())
        if bool(failed.any()):
            return None
        whole = torch.cholesky_inverse(factor)
        added = own.float()[:, None].expand(-1, self.step.channels, -1).reshape(1, -1)
        inner = self.inverse_variance.float()
        apply, adjoint = self._convolutions(torch.float32)

        def image(r: Tensor, z: Tensor) -> Tensor:
            return adjoint(apply(z) * inner).addcmul_(added, z, value=-1).add_(r)

        return _Preconditioner(lambda v: self.blocks(v, whole), image)

    def solve(
        self,
        index: int,
        value: Tensor,
        errors: Tensor,
        slips: Tensor,
        precondition: _Preconditioner,
        normal: Callable[..., Tensor],
        noise: float,
    ) -> tuple[LightLayer, Tensor] | None:
        """Return the solved layer and samples of its input's error (k, n); None without convergence."""
        step, scale = self.step, self.gradient.square().mean().sqrt()
        constant = Composite((step,), self.params).constant(value)
        narrow, wide = self.product(torch.float32), self.product(torch.float64)
        right = self.pull((value - constant)[None], self.gradient[None])
        x, total = torch.zeros_like(right), 0
        energy, first, done = math.inf, 0.0, True
        for _ in range(_ROUNDS):
            residual = right - wide(x)
            level = max(float(residual.abs().max()), 1e-300)
            rest = float((residual * precondition.inverse((residual / level).float()).double()).sum()) * level
            goal = _LEFT * noise**2 * step.inputs
            if rest <= goal or not done:
                break
            if not rest < 0.25 * energy:
                if rest > _STALL * first:
                    return None
                break
            energy, first = rest, max(first, rest)
            more, taken, done = _solve(narrow, residual, precondition, max(_INNER, 0.2 * math.sqrt(goal / rest)))
            x, total = x + more, total + taken
        else:
            return None
        # An error of the output gradient is one of the gradient equations, in proportion to the input.
        patches = step.patches(self.join(x)[0], self.weight)[0]
        drawn = scale * normal(len(errors), *self.gradient.shape)
        drawn = drawn - (slips.view(len(slips), step.out_shape[0], -1) @ patches.T).view_as(drawn)
        samples, steps, well = _solve(narrow, self.pull(errors, drawn), precondition, _LOOSE)
        if not (done and well) or not bool(torch.isfinite(x).all() & torch.isfinite(samples).all()):
            return None
        quadratic = float((samples * wide(samples)).sum())
        own = self.gram.diagonal(dim1=1, dim2=2)[:, None].expand(-1, step.channels, -1)
        whole = self.diagonal() + own.flatten()
        if bool((whole <= 1e-14 * whole.max()).any()):
            return None  # No equation touches some value.
        condition = quadratic / max(float((samples.square() * whole).sum()), 1e-300)
        spread = float(samples.square().mean())
        layer = LightLayer(index, step, self.join(x)[0], self.rank, condition, spread, steps + total)
        return layer, self.join(samples)


def _solve(product: Rows, right: Tensor, precondition: _Preconditioner, tolerance: float) -> tuple[Tensor, int, bool]:
    """Solve in float32 and return in float64; energies fall by ``tolerance``²."""
    level = right.abs().amax(1, keepdim=True).clamp(min=1e-300)
    x, steps, done = conjugate_gradients(
        product,
        (right / level).float(),
        precondition.inverse,
        tolerance=tolerance,
        limit=_LIMIT,
        image=precondition.image,
    )
    return x.double() * level, steps, done
