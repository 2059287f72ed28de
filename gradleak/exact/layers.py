"""One layer of the recursion: the linear system for a layer's input, weighted by what is known how well.

Every equation is divided by its noise: a forward equation by the uncertainty that the recovered output carries (its
information matrix, propagated exactly), a gradient equation by the rounding of the gradient. Least squares with the
right weights loses nothing, so a float32 update is inverted to the floor that rounding leaves, and the information
matrix of the input follows as a by-product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.errors import ResourceLimit
from gradleak.solve.cholesky import cholesky, cholesky_solve
from gradleak.solve.conjugate_gradients import Rows, conjugate_gradients
from gradleak.structure.chain import Affine, Elementwise, Fixed

__all__ = [
    "LARGEST",
    "MEMORY",
    "Composite",
    "Factor",
    "Information",
    "Rows",
    "Solution",
    "add_gradient_equations",
    "afford",
    "factorize",
    "precision",
    "quotient",
    "solve_layer",
]

Tensors = Mapping[str, Tensor]

LARGEST = 12_000
"""Up to this many unknowns, a dense matrix is made to precondition with; beyond, the diagonal has to do."""

MEMORY = 4 * 2**30
"""Bytes that the matrices of one layer may take together."""

_DOUBLE = 512
"""Up to this many unknowns that matrix is float64; beyond, float32 preconditions the float64 solve as well."""

_TILE = 256
"""Rows and columns of a block that is transposed in the cache."""

_CHUNK = 128
"""Rows that pass a layer together: few enough to stay in the cache."""

_APART = 16
"""Numbers between such rows."""


def precision(size: int) -> torch.dtype:
    """Return the precision of a dense matrix of ``size`` unknowns."""
    return torch.float64 if size <= _DOUBLE else torch.float32


def afford(name: str, *shapes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check that matrices of ``shapes``, held at once, stay within :data:`MEMORY`.

    Raises:
        ResourceLimit: they do not.

    """
    needed = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    if needed > MEMORY:
        raise ResourceLimit(
            f"Solving for the input of {name!r} takes matrices of {needed / 2**30:.1f} GiB, more than the "
            f"{MEMORY / 2**30:.0f} GiB allowed; use matching, which needs no matrices."
        )


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

    def sandwich(self, dense: Tensor, slope: Tensor | None = None) -> Tensor:
        """Return Kᵀ D X D K for a symmetric X (m, m) and the diagonal D = ``slope`` (m,)."""
        size, known = self.steps[0].inputs, len(dense)
        afford(self.steps[0].name, (known, known), (size, known), (size, size), dtype=dense.dtype)
        first = torch.empty(size, known, dtype=dense.dtype, device=dense.device)
        narrow = None if slope is None else slope.to(dense)
        # Rows a power of two apart share few cache lines, and transposing them takes several times as long.
        apart = torch.empty(_CHUNK, size + _APART, dtype=dense.dtype, device=dense.device)
        for start in range(0, len(dense), _CHUNK):
            rows = dense[start : start + _CHUNK]
            if narrow is not None:
                rows = rows * narrow * narrow[start : start + _CHUNK, None]
            passed = apart[: len(rows), :size].copy_(self.adjoint(rows))
            first[:, start : start + _CHUNK] = passed.T
        return self.adjoint(first)


@final
@dataclass(frozen=True, eq=False)
class Information:
    """What is known about a vector: the inverse covariance D X D of its recovered value, in units of the noise.

    Attributes:
        product: v (k, n) → D X D v, in the precision of v.
        dense: X (n, n), exact or good enough to precondition, None where it would be too large.
        slope: D (n,), None for ones.

    """

    product: Rows
    dense: Tensor | None
    slope: Tensor | None = None

    @staticmethod
    def diagonal(values: Tensor) -> Information:
        """Return independent information ``values`` (n,)."""
        dense = torch.diag(values.to(precision(len(values)))) if len(values) <= LARGEST else None
        return Information(lambda v: v * values.to(v), dense)

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return D X D as a matrix of its own."""
        assert self.dense is not None
        return self.weigh(self.dense.to(dtype or self.dense.dtype, copy=True))

    def weigh(self, matrix: Tensor) -> Tensor:
        """Return D X D for X = ``matrix`` (n, n), which is overwritten."""
        if self.slope is not None:
            narrow = self.slope.to(matrix)
            matrix.mul_(narrow).mul_(narrow[:, None])
        return matrix

    def scaled(self, slope: Tensor) -> Information:
        """Return the information about what comes before an activation with derivative ``slope`` (n,)."""
        inner = self.product
        both = slope if self.slope is None else slope * self.slope
        return Information(lambda v: inner(v * slope.to(v)) * slope.to(v), self.dense, both)

    def behind(self, composite: Composite) -> Information:
        """Return the information about the input of ``composite``."""
        inner = self.product
        dense = None if self.dense is None else composite.sandwich(self.dense, self.slope)
        return Information(lambda v: composite.adjoint(inner(composite.apply(v))), dense)


@final
@dataclass(frozen=True, eq=False)
class Factor:
    """A Cholesky factor of the symmetrically scaled, slightly shifted matrix, as a preconditioner."""

    lower: Tensor
    scale: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """Return matrix⁻¹ · rows for rows (k, n), to the precision of the factor."""
        scaled = (rows * self.scale).to(self.lower)
        return cholesky_solve(scaled[None], self.lower[None])[0].to(rows) * self.scale


def factorize(build: Callable[[], Tensor]) -> Factor:
    """Return the factor of the symmetric positive semidefinite matrix (n, n) that ``build`` makes.

    Only its lower triangle is read, and it is overwritten: on a CPU the factorization happens in place, which for
    thousands of unknowns takes half the time of PyTorch's. A matrix too close to singular is built again and shifted.
    """
    shift = 0.0
    while True:
        matrix = build()
        diagonal = matrix.diagonal().double()
        scale = diagonal.clamp(min=float(diagonal.max()) * 1e-14 + 1e-300).rsqrt()
        narrow = scale.to(matrix)
        for start in range(0, len(matrix), _CHUNK):  # While in the cache, and no further than what is read.
            end = start + _CHUNK
            matrix[start:end, :end].mul_(narrow[:end]).mul_(narrow[start:end, None])
        shift = shift * 30 or 8 * torch.finfo(matrix.dtype).eps
        matrix.diagonal().fill_(1 + shift)
        lower, failed = cholesky(matrix[None])
        if not bool(failed):
            return Factor(lower[0], scale)
        if shift > 1:
            return Factor(torch.eye(len(scale), dtype=matrix.dtype, device=matrix.device), scale)


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """The input of a layer.

    Attributes:
        value: (n,).
        forward: Kᵀ D X D K, what the forward equations alone tell (n, n), None where it would be too large.
        product: v (k, n) → normal matrix · v.
        condition: smallest Rayleigh quotient found, relative to the scaled diagonal.
        spread: mean variance of ``value`` in units of the squared noise.
        iterations: of conjugate gradients.
        rank: of the gradient equations of one input channel.

    """

    value: Tensor
    forward: Tensor | None
    product: Rows
    condition: float
    spread: float
    iterations: int
    rank: int


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
        noise: relative noise of the equations; the solve is accurate below it.
        probe: (n,) signs, for the estimates of condition and spread.

    """
    weight = composite.params[layer.weight_name]
    size = layer.positions
    afford(layer.name, (weight[:, 0].numel(), size), (2 * layer.groups, size, size), dtype=torch.float64)
    block = layer.gradient_block(delta, weight)
    groups, per = layer.groups, layer.channels // layer.groups
    trust = _trust(gradient)
    gram = (block.mT @ block) * trust

    def product(v: Tensor) -> Tensor:
        forward = composite.adjoint(information.product(composite.apply(v)))
        own = (v.reshape(-1, groups, per, layer.positions) @ gram.to(v)).reshape(len(v), -1)
        return forward + own

    right = composite.adjoint(information.product((target - composite.constant(target))[None]))
    if gradient is not None:
        rows = gradient.reshape(groups, layer.out_shape[0] // groups, per, -1).transpose(1, 2).flatten(2)
        right = right + trust * (rows @ block).reshape(1, -1)

    forward = None
    diagonal = gram.diagonal(dim1=1, dim2=2)[:, None].expand(groups, per, -1).flatten()
    if information.dense is not None and layer.inputs <= LARGEST:
        dtype = precision(layer.inputs)
        forward = composite.sandwich(information.dense.to(dtype), information.slope)
        diagonal = diagonal + forward.diagonal()
    least = float(diagonal.max()) * 1e-14 + 1e-300
    unseen, scale = bool((diagonal < least).any()), diagonal.clamp(min=least).rsqrt()
    tolerance = min(max(0.1 * noise, 1e-14), 1e-7)
    probed = (probe / scale)[None]
    if forward is None:
        both, iterations, _ = conjugate_gradients(
            product, torch.cat([right, probed]), lambda r: r * scale.square(), tolerance=tolerance, limit=600
        )
        value, response = both
    else:
        kept = forward

        def build() -> Tensor:
            matrix = kept.clone()
            _add_blocks(matrix, gram.to(matrix), layer)
            return matrix

        factor = factorize(build)
        solved, iterations, _ = conjugate_gradients(product, right, factor.solve, tolerance=tolerance, limit=60)
        value, response = solved[0], factor.solve(probed)[0]
    condition = quotient(product, response, scale)
    if forward is not None and condition < 1e3 * torch.finfo(forward.dtype).eps:
        # Too small for the factor's precision to tell: ask the exact product.
        exact, _, _ = conjugate_gradients(product, probed, factor.solve, tolerance=1e-10, limit=60)
        response = exact[0]
        condition = quotient(product, response, scale)
    spread = float((response / scale * probe).sum() / len(probe)) * float(scale.square().mean())
    if unseen:  # No equation touches some value, which the factor's unit diagonal would hide.
        condition = 0.0
    return Solution(value, forward, product, condition, spread, iterations, _rank(gram, block.shape[1]))


def quotient(product: Rows, v: Tensor, scale: Tensor) -> float:
    """Return the Rayleigh quotient of the scaled matrix at the scaled vector."""
    return float((v * product(v[None])[0]).sum() / (v / scale).square().sum().clamp(min=1e-300))


def _trust(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else 1.0 / max(float(gradient.square().mean()), 1e-300)


def _rank(gram: Tensor, rows: int) -> int:
    # Eigenvalues of more than a few hundred positions cost more than the solve they would describe.
    if gram.shape[-1] > 256:
        return min(rows, gram.shape[-1])
    values = torch.linalg.eigvalsh(gram)
    return int((values > values[..., -1:] * 1e-12).sum(-1).min())


def _add_blocks(matrix: Tensor, gram: Tensor, layer: Affine) -> None:
    per, size = layer.channels // layer.groups, layer.positions
    blocks = matrix.view(layer.channels, size, layer.channels, size).diagonal(dim1=0, dim2=2)  # (p, p, channels)
    blocks += gram.repeat_interleave(per, 0).permute(1, 2, 0)


def add_gradient_equations(
    forward: Tensor | None,
    layer: Affine,
    weight: Tensor,
    value: Tensor,
    delta: Tensor,
    hessian: Rows,
    gradient: Tensor | None,
    *,
    lower_only: bool,
    inner: Tensor | None = None,
    diagonal: Tensor | None = None,
) -> Tensor:
    """Return ``forward`` + (M + N H K)ᵀ (M + N H K), the normal matrix of everything from this layer on; in place.

    M v is the weight gradient's change with the layer's input, N u its change with the output gradient, and H says how
    the output gradient changes with the output.

    Args:
        forward: (n, n), overwritten; None where ``inner`` says it, which takes more gradients than outputs.
        layer: the layer.
        weight: its weight.
        value: its input (n,).
        delta: the gradient at its output (m,).
        hessian: rows u (k, m) → H u.
        gradient: its weight gradient, None where it is not shared.
        lower_only: whether the lower triangle of the result is enough.
        inner: X (m, m), for ``forward`` = Kᵀ X K, which then passes the layer together with the rest.
        diagonal: that of H (m,), where H has nothing else.

    """
    if gradient is None:
        assert forward is not None
        return forward
    given = inner if forward is None else forward
    assert given is not None
    dtype = given.dtype
    root = _trust(gradient) ** 0.5
    block = (layer.gradient_block(delta, weight) * root).to(dtype)  # (g, o·t, p)
    patches = layer.patches(value, weight).to(dtype) * root  # (g, c·t, L)
    kernel = weight.to(dtype)
    groups, per = layer.groups, layer.channels // layer.groups
    outs, length, size = layer.out_shape[0] // groups, patches.shape[-1], layer.positions
    taps, m, n = patches.shape[1] // per, layer.outputs, layer.inputs
    shared = (groups * outs * taps, size)
    if forward is not None and gradient.numel() <= m:
        afford(layer.name, shared, (gradient.numel(), m), (gradient.numel(), n), (n, n), dtype=dtype)
        spread = torch.zeros(groups, outs, per * taps, groups, outs, length).to(forward)
        spread.diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2).copy_(patches.permute(1, 2, 0)[..., None])
        whole = layer.adjoint(hessian(spread.reshape(-1, m)), kernel)
        whole = whole.reshape(groups, outs, per, taps, groups, per, size)
        blocks = block.reshape(groups, outs, taps, size)
        for g in range(groups):
            for c in range(per):
                whole[g, :, c, :, g, c] += blocks[g]
        return _add_square(forward, whole.reshape(-1, layer.inputs), lower_only=lower_only)
    afford(layer.name, shared, (m, m), (gradient.numel(), m), (m, m), (n, m), (n, m), (n, n), (n, n), dtype=dtype)
    gram, blocks = patches.mT @ patches, block.reshape(groups, outs, taps, size)
    if diagonal is None:
        dense = hessian(torch.eye(m).to(patches))
        maps = dense.reshape(groups, outs, length, m)
        q = torch.einsum("gkl,golm->gokm", patches, maps).reshape(groups, outs, per, taps, m)
        cross = torch.einsum("gotp,goctm->gcpm", blocks, q)
        square = dense.T @ (gram[:, None] @ maps).reshape(m, m)
    else:
        curve = diagonal.to(patches).reshape(groups, outs, 1, length)
        small = torch.einsum("gotp,gctl->gcpol", blocks, patches.reshape(groups, per, taps, length))
        small *= curve.reshape(groups, 1, 1, outs, length)
        cross, square = small.new_zeros(groups, per, size, groups, outs, length), gram.new_zeros(m, m)
        cross.diagonal(dim1=0, dim2=3).copy_(small.permute(1, 2, 3, 4, 0))
        own = (gram[:, None] * curve * curve.mT).flatten(0, 1)
        square.view(groups * outs, length, -1, length).diagonal(dim1=0, dim2=2).copy_(own.permute(1, 2, 0))
    square.mul_(0.5)  # X + Xᵀ is the square
    if inner is not None:
        square.add_(inner, alpha=0.5)
    left = cross.reshape(-1, m).contiguous()
    _add_transposed(left, layer.adjoint(square.T.contiguous(), kernel))
    half = layer.adjoint(left, kernel)
    _symmetrize(half)
    _add_blocks(half, block.mT @ block, layer)
    return half if forward is None else forward.add_(half)


def _add_transposed(matrix: Tensor, other: Tensor) -> None:
    """Add ``other`` (m, n) to ``matrix`` (n, m), block by block: transposing the whole takes several times as long."""
    for i in range(0, len(matrix), _TILE):
        for j in range(0, len(other), _TILE):
            matrix[i : i + _TILE, j : j + _TILE] += other[j : j + _TILE, i : i + _TILE].T


def _symmetrize(matrix: Tensor) -> None:
    """Replace X (n, n) by X + Xᵀ, block by block."""
    starts = range(0, len(matrix), _TILE)
    for i in starts:
        for j in range(0, i + 1, _TILE):
            low, high = matrix[i : i + _TILE, j : j + _TILE], matrix[j : j + _TILE, i : i + _TILE]
            both = low + high.T
            low.copy_(both)
            high.copy_(both.T)


def _add_square(matrix: Tensor, rows: Tensor, *, lower_only: bool) -> Tensor:
    """Add rowsᵀ rows to ``matrix``, or to its lower triangle."""
    if not lower_only or matrix.device.type != "cpu":
        return matrix.addmm_(rows.T, rows)
    from scipy.linalg import blas

    add = blas.ssyrk if matrix.dtype == torch.float32 else blas.dsyrk
    return torch.from_numpy(add(1.0, rows.contiguous().numpy().T, 1.0, matrix.numpy().T, lower=0, overwrite_c=1).T)
