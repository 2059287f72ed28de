"""One layer of the recursion: the linear system for a layer's input, weighted by what is known how well.

Every equation is divided by its noise: a forward equation by the uncertainty that the recovered output carries (its
information matrix, propagated exactly), a gradient equation by the rounding of the gradient. Least squares with the
right weights loses nothing, so a float32 update is inverted to the floor that rounding leaves, and the information
matrix of the input follows as a by-product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.analytic.graph import Affine, Elementwise, Fixed

__all__ = [
    "Composite",
    "Curvature",
    "Factor",
    "Information",
    "Rows",
    "Solution",
    "conjugate_gradients",
    "factorize",
    "solve_layer",
]

Tensors = Mapping[str, Tensor]
Rows = Callable[[Tensor], Tensor]

_DOUBLE = 1024
"""Up to this many unknowns, a dense matrix is kept in float64; beyond, float32 preconditions a float64 solve."""


@final
@dataclass(frozen=True, eq=False)
class Composite:
    """Affine maps one after the other: a parameterized layer (first, optional), then parameter-free ones."""

    steps: tuple[Affine | Fixed | Elementwise, ...]
    params: Tensors

    def apply(self, v: Tensor) -> Tensor:
        """Return the linear part for rows v: (k, n) → (k, m)."""
        for step in self.steps:
            if isinstance(step, Affine):
                v = step.apply(v, self.params[step.weight_name].to(v))
            elif isinstance(step, Fixed):
                v = step.apply(v)
            else:
                v = v * self._slope(step, v)
        return v

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the adjoint for rows u: (k, m) → (k, n)."""
        for step in reversed(self.steps):
            if isinstance(step, Affine):
                u = step.adjoint(u, self.params[step.weight_name].to(u))
            elif isinstance(step, Fixed):
                u = step.adjoint(u)
            else:
                u = u * self._slope(step, u)
        return u

    def constant(self, like: Tensor) -> Tensor:
        """Return the value at zero, (m,)."""
        x = torch.zeros(1, *self.steps[0].in_shape, dtype=like.dtype, device=like.device)
        params = {k: p.to(like) for k, p in self.params.items()}
        for step in self.steps:
            x = step.forward(x, params)
        return x.flatten()

    @staticmethod
    def _slope(step: Elementwise, like: Tensor) -> Tensor:
        return step.derivatives(torch.zeros(step.inputs, dtype=like.dtype, device=like.device))[0]

    def sandwich(self, dense: Tensor) -> Tensor:
        """Return Kᵀ X K for a symmetric X (m, m)."""
        return self.adjoint(self.adjoint(dense).T.contiguous())


@final
@dataclass(frozen=True, eq=False)
class Information:
    """What is known about a vector: the inverse covariance of its recovered value, in units of the noise.

    Attributes:
        product: v (k, n) → information · v, in the precision of v.
        dense: the matrix itself (n, n), None where it would be too large.

    """

    product: Rows
    dense: Tensor | None

    @staticmethod
    def diagonal(values: Tensor) -> Information:
        """Return independent information ``values`` (n,)."""
        return Information(lambda v: v * values.to(v), torch.diag(values) if len(values) <= 16 * _DOUBLE else None)

    def scaled(self, slope: Tensor) -> Information:
        """Return D · information · D for the diagonal ``slope`` (n,)."""
        inner = self.product
        dense = self.dense
        if dense is not None:
            narrow = slope.to(dense)
            dense = dense * narrow * narrow[:, None]
        return Information(lambda v: inner(v * slope.to(v)) * slope.to(v), dense)


@final
@dataclass(frozen=True, eq=False)
class Factor:
    """A Cholesky factor of the symmetrically scaled, slightly shifted matrix, as a preconditioner."""

    lower: Tensor
    scale: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """Return matrix⁻¹ · rows for rows (k, n), to the precision of the factor."""
        right = (rows * self.scale).to(self.lower).T
        return torch.cholesky_solve(right, self.lower).T.to(rows) * self.scale


def factorize(matrix: Tensor) -> Factor:
    """Return the factor of a symmetric positive semidefinite ``matrix`` (n, n); it is overwritten."""
    diagonal = matrix.diagonal().double()
    scale = diagonal.clamp(min=float(diagonal.max()) * 1e-14 + 1e-300).rsqrt()
    narrow = scale.to(matrix)
    matrix.mul_(narrow).mul_(narrow[:, None])
    matrix.diagonal().add_(4 * torch.finfo(matrix.dtype).eps)
    shift = 4 * torch.finfo(matrix.dtype).eps
    for _ in range(8):
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            break
        matrix.diagonal().add_(9 * shift)
        shift *= 10
    return Factor(lower, scale)


def conjugate_gradients(
    product: Rows, right: Tensor, precondition: Rows, *, tolerance: float, limit: int
) -> tuple[Tensor, int, bool]:
    """Solve k symmetric systems ``product(x) = right`` at once, rows (k, n); stop by the energy of the error.

    Returns the solutions, the number of iterations, and whether each energy fell by ``tolerance``².
    """
    x = torch.zeros_like(right)
    residual = right.clone()
    z = precondition(residual)
    direction = z.clone()
    energy = (residual * z).sum(1)
    first = energy.clone()
    done = first <= 0
    steps = 0
    while steps < limit and not bool(done.all()):
        image = product(direction)
        curvature = (direction * image).sum(1)
        good = (curvature > 0) & ~done
        step = torch.where(good, energy / curvature.where(good, torch.ones_like(curvature)), torch.zeros_like(energy))
        x = x + step[:, None] * direction
        residual = residual - step[:, None] * image
        z = precondition(residual)
        new = (residual * z).sum(1)
        direction = z + (new / energy.where(energy > 0, torch.ones_like(energy)))[:, None] * direction
        energy = new
        steps += 1
        done = done | ~good | (energy <= tolerance**2 * first)
    return x, steps, bool((energy <= tolerance**2 * first).all())


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """The input of a layer.

    Attributes:
        value: (n,).
        information: of ``value``, forward and gradient equations together.
        delta: gradient at the layer's input, (n,).
        condition: smallest Rayleigh quotient found, relative to the mean of the (scaled) spectrum.
        spread: mean variance of ``value`` in units of the squared noise.
        iterations: of conjugate gradients.
        rows: gradient equations of one input channel, with their numerical rank where it is cheap to know.

    """

    value: Tensor
    information: Information
    delta: Tensor
    condition: float
    spread: float
    iterations: int
    rows: tuple[int, int]


def solve_layer(
    layer: Affine,
    composite: Composite,
    target: Tensor,
    information: Information,
    delta: Tensor,
    gradient: Tensor | None,
    *,
    noise: float,
    probe: Tensor,
) -> Solution:
    """Solve { composite(x) = target, weight gradient(x, delta) = gradient } for x by weighted least squares.

    Args:
        layer: the parameterized layer, the first of ``composite``.
        composite: the layer and the parameter-free maps behind it.
        target: recovered output of ``composite``, (m,).
        information: of ``target``.
        delta: gradient at the layer's own output.
        gradient: the layer's weight gradient, None where it is not shared.
        noise: relative noise of the equations; the solve is accurate far below it.
        probe: (n,) signs, for the estimate of the spread.

    """
    weight = composite.params[layer.weight_name]
    block = layer.gradient_block(delta, weight)
    gram = block.mT @ block
    groups, per = layer.groups, layer.channels // layer.groups
    trust = 0.0 if gradient is None else 1.0 / max(float(gradient.square().mean()), 1e-300)
    gram = gram * trust

    def product(v: Tensor) -> Tensor:
        forward = composite.adjoint(information.product(composite.apply(v)))
        own = (v.reshape(-1, groups, per, layer.positions) @ gram.to(v)).reshape(len(v), -1)
        return forward + own

    right = composite.adjoint(information.product((target - composite.constant(target))[None]))
    if gradient is not None:
        rows = gradient.reshape(groups, layer.out_shape[0] // groups, per, -1).transpose(1, 2).flatten(2)
        right = right + trust * (rows @ block).reshape(1, -1)

    dense = _dense(composite, information.dense, gram, layer) if information.dense is not None else None
    if dense is not None:
        factor = factorize(dense.clone())
        precondition: Rows = factor.solve
        scale = factor.scale
    else:
        diagonal = gram.diagonal(dim1=1, dim2=2)[:, None].expand(groups, per, -1).flatten()
        scale = (diagonal + diagonal.mean()).rsqrt()
        precondition = lambda r: r * scale.square()  # noqa: E731
    tolerance = min(max(1e-3 * noise, 1e-14), 1e-8)
    both = torch.cat([right, (probe / scale)[None]])
    solved, iterations, _ = conjugate_gradients(
        product, both, precondition, tolerance=tolerance, limit=60 if dense is not None else 600
    )
    value, response = solved[0], solved[1]
    scaled = response / scale
    condition = float((response * product(response[None])[0]).sum() / scaled.square().sum().clamp(min=1e-300))
    spread = float((response / scale * probe).sum() / len(probe)) * float(scale.square().mean())
    return Solution(
        value, Information(product, dense), composite_delta(layer, delta, weight), condition, spread, iterations,
        (block.shape[1], _rank(gram)),
    )  # fmt: skip


def composite_delta(layer: Affine, delta: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient at the layer's input, (n,)."""
    return layer.adjoint(delta[None], weight)[0]


def _rank(gram: Tensor) -> int:
    # Eigenvalues of more than a few hundred positions cost more than the solve they would describe.
    if gram.shape[-1] > 256:
        return -1
    values = torch.linalg.eigvalsh(gram)
    return int((values > values[..., -1:] * 1e-12).sum(-1).min())


def _dense(composite: Composite, information: Tensor, gram: Tensor, layer: Affine) -> Tensor:
    unknowns = layer.inputs
    dtype = torch.float64 if unknowns <= _DOUBLE else torch.float32
    matrix = composite.sandwich(information.to(dtype))
    _add_blocks(matrix, gram.to(dtype), layer)
    return matrix


def _add_blocks(matrix: Tensor, gram: Tensor, layer: Affine) -> None:
    per, size = layer.channels // layer.groups, layer.positions
    blocks = matrix.view(layer.channels, size, layer.channels, size).diagonal(dim1=0, dim2=2)  # (p, p, channels)
    blocks += gram.repeat_interleave(per, 0).permute(1, 2, 0)


@final
@dataclass(frozen=True, eq=False)
class Curvature:
    """Dense information and Hessian (of the loss with respect to a vector inside the network) at known activations.

    Attributes:
        information: (n, n), every equation of the layers behind, linearized in the vector.
        hessian: (n, n), how the gradient at the vector changes with the vector.
        delta: (n,), the gradient at the vector.

    """

    information: Tensor
    hessian: Tensor | None
    delta: Tensor

    def through(self, slope: Tensor, bend: Tensor) -> Curvature:
        """Step back through an activation with first and second derivative (n,)."""
        narrow = slope.to(self.information)
        both = narrow * narrow[:, None]
        hessian = torch.zeros_like(self.information) if self.hessian is None else self.hessian * both
        hessian.diagonal().add_((bend * self.delta).to(hessian))
        return Curvature(self.information * both, hessian, self.delta * slope)

    def behind(self, composite: Composite) -> Curvature:
        """Step back through parameter-free maps."""
        dtype = torch.float64 if composite.steps[0].inputs <= _DOUBLE else torch.float32
        hessian = None if self.hessian is None else composite.sandwich(self.hessian.to(dtype))
        return Curvature(
            composite.sandwich(self.information.to(dtype)), hessian, composite.adjoint(self.delta[None])[0]
        )

    def before(
        self, layer: Affine, value: Tensor, gradient: Tensor | None, params: Tensors, *, last: bool
    ) -> Curvature:
        """Step back through ``layer`` whose input is ``value``; ``last`` leaves the Hessian out."""
        weight = params[layer.weight_name]
        alone = Composite((layer,), params)
        dtype = torch.float64 if max(layer.inputs, layer.outputs) <= _DOUBLE else torch.float32
        information, delta = self.information.to(dtype), self.delta
        hessian = None if self.hessian is None else self.hessian.to(dtype)
        if gradient is None:
            matrix = alone.sandwich(information)
        else:
            trust = 1.0 / max(float(gradient.square().mean()), 1e-300)
            block = (layer.gradient_block(delta, weight) * trust**0.5).to(dtype)
            matrix = self._joint(layer, alone, value, block, information, hessian, trust**0.5, dtype)
        back = None if last or hessian is None else alone.sandwich(hessian)
        return Curvature(matrix, back, composite_delta(layer, delta, weight))

    def _joint(
        self, layer: Affine, alone: Composite, value: Tensor, block: Tensor, information: Tensor,
        hessian: Tensor | None, root: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Return Kᵀ I K + (M + N H K)ᵀ (M + N H K), where N maps output gradients to weight gradients."""
        gram = block.mT @ block
        if hessian is None:
            matrix = alone.sandwich(information)
            _add_blocks(matrix, gram, layer)
            return matrix
        weight = alone.params[layer.weight_name]
        patches = layer.patches(value, weight).to(dtype) * root  # (g, c·t, L)
        groups, per = layer.groups, layer.channels // layer.groups
        outs, length = layer.out_shape[0] // groups, patches.shape[-1]
        m = layer.outputs
        # Q = N H: (g, o, c·t, m)
        q = torch.einsum("gkl,golm->gokm", patches, hessian.reshape(groups, outs, length, m))
        taps = patches.shape[1] // per
        if q.numel() // m <= m:
            whole = alone.adjoint(q.reshape(-1, m)).reshape(groups, outs, per, taps, groups, per, layer.positions)
            spread = block.reshape(groups, outs, taps, layer.positions)
            for g in range(groups):
                for c in range(per):
                    whole[g, :, c, :, g, c] += spread[g]
            whole = whole.reshape(-1, layer.inputs)
            return alone.sandwich(information).add_(whole.T @ whole)
        flat = q.reshape(-1, m)
        half = 0.5 * (information + flat.T @ flat)
        # Mᵀ Q per input channel: (g, c, p, m)
        cross = torch.einsum(
            "gotp,goctm->gcpm", block.reshape(groups, outs, taps, -1), q.reshape(groups, outs, per, taps, m)
        )
        left = alone.adjoint(half).T + cross.reshape(-1, m)  # (n, m)
        product = alone.adjoint(left.contiguous())
        matrix = product + product.T
        _add_blocks(matrix, gram, layer)
        return matrix
