"""The normal matrix JᵀJ of a chain of layers at one input, put together layer by layer from the features back.

Behind a layer, the normal matrix X of everything that comes later is known with respect to the layer's output. With
respect to its input it is KᵀXK plus that of the layer's own gradient equations, (M + N H K)ᵀ(M + N H K): the weight
gradient changes by M with the input and by N with the output gradient, which changes by H with the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradleak.errors import ResourceLimit
from gradleak.exact.chain_map import ChainMap
from gradleak.exact.layer_equations import Composite
from gradleak.solve.cholesky import Factor
from gradleak.solve.conjugate_gradients import Rows
from gradleak.structure.chain import Affine, Elementwise, Fixed

__all__ = ["LARGEST", "MEMORY", "factorize", "normal_matrix"]

LARGEST = 12_000
"""Values of a layer's input up to which its matrix is made."""
MEMORY = 4 * 2**30
"""Bytes that the matrices of one layer may take together."""
_DOUBLE = 512
"""Up to this many rows a matrix is float64; beyond, float32 preconditions float64 steps as well, in half the time."""
_MATERIAL = 1024
"""Up to this many values a Hessian is made into a matrix; beyond, it stays a product."""
_CHUNK = 128
"""Rows that pass a layer together: few enough to stay in the cache."""
_APART = 16
"""Numbers between such rows: a power of two apart they share few cache lines, and transposing takes several times."""


def factorize(whole: ChainMap, x: Tensor) -> Factor:
    """Return the factor of the normal matrix of ``whole`` at the input ``x`` (n,).

    Raises:
        ResourceLimit: the matrices of a layer do not fit in memory.

    """
    return Factor.of(normal_matrix(whole, x))


def normal_matrix(whole: ChainMap, x: Tensor) -> Tensor:
    """Return JᵀJ (n, n) of ``whole`` at ``x`` (n,), without its few bias equations.

    Raises:
        ResourceLimit: the matrices of a layer do not fit in memory.

    """
    largest = max(whole.steps, key=lambda s: s.inputs)
    if largest.inputs > LARGEST:
        raise ResourceLimit(
            f"Solving all layers together factorizes a matrix of {largest.inputs} rows for {largest.name!r}, more than "
            f"{LARGEST}; use matching, which needs no matrices."
        )
    point = whole.at(x.detach().double().view(whole.shape))
    matrix = torch.diag(whole.feature_scale.square()).to(precision(len(whole.feature_scale)))
    hessian: Rows = torch.zeros_like
    for index in range(len(whole.steps) - 1, -1, -1):
        step, delta = whole.steps[index], point.deltas[index]
        if isinstance(step, Elementwise):
            slope, bend = point.slopes[index]
            narrow = slope.to(matrix)
            matrix = (matrix * narrow).mul_(narrow[:, None])
            hessian = _bent(hessian, slope, bend * delta[0])
        elif isinstance(step, Affine) or (isinstance(step, Fixed) and not step.reorders):
            composite = Composite((step,), whole.params)
            matrix = matrix.to(precision(step.inputs))
            if isinstance(step, Affine) and step.weight_name in whole.scales:
                matrix = _through(matrix, step, whole, delta[0], point.patches[index], hessian)
            else:
                matrix = _sandwich(composite, matrix)
            hessian = _between(composite, hessian)
            if step.inputs <= _MATERIAL and index > 0:
                hessian = _material(hessian(torch.eye(step.inputs).to(matrix)))
    return matrix


def precision(size: int) -> torch.dtype:
    """Return the precision of a matrix of ``size`` rows."""
    return torch.float64 if size <= _DOUBLE else torch.float32


def _afford(name: str, *shapes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check that matrices of ``shapes``, held at once, stay within :data:`MEMORY`."""
    needed = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    if needed > MEMORY:
        raise ResourceLimit(
            f"Solving for the input of {name!r} takes matrices of {needed / 2**30:.1f} GiB, more than the "
            f"{MEMORY / 2**30:.0f} GiB allowed; use matching, which needs no matrices."
        )


def _sandwich(composite: Composite, matrix: Tensor) -> Tensor:
    """Return KᵀXK for a symmetric X (m, m)."""
    first = composite.steps[0]
    size, known = first.inputs, len(matrix)
    _afford(first.name, (known, known), (size, known), (size, size), dtype=matrix.dtype)
    half = matrix.new_empty(size, known)
    apart = matrix.new_empty(_CHUNK, size + _APART)
    for start in range(0, known, _CHUNK):
        rows = matrix[start : start + _CHUNK]
        half[:, start : start + _CHUNK] = apart[: len(rows), :size].copy_(composite.adjoint(rows)).T
    return composite.adjoint(half)


def _through(matrix: Tensor, layer: Affine, whole: ChainMap, delta: Tensor, patches: Tensor, hessian: Rows) -> Tensor:
    """Return KᵀXK + (M + N H K)ᵀ(M + N H K), (n, n), for X = ``matrix`` (m, m).

    Args:
        matrix: with respect to the layer's output.
        layer: the layer.
        whole: the map, for the layer's weight and the scale of its gradient.
        delta: gradient at the layer's output, (m,).
        patches: input values under every tap, (groups, channels · taps, positions).
        hessian: rows u (k, m) → H u.

    """
    composite = Composite((layer,), whole.params)
    weight, scale = whole.params[layer.weight_name].to(matrix), whole.scales[layer.weight_name]
    block, patches = layer.gradient_block(delta * scale).to(matrix), (patches * scale).to(matrix)
    groups, per, size, m, n = layer.groups, layer.channels // layer.groups, layer.positions, layer.outputs, layer.inputs
    outs, length = layer.out_shape[0] // groups, patches.shape[-1]
    taps, blocks = patches.shape[1] // per, block.view(groups, outs, -1, size)
    if weight.numel() <= m:  # Few equations: row by row.
        _afford(layer.name, (weight.numel(), m), (weight.numel(), n), (n, n), dtype=matrix.dtype)
        rows = matrix.new_zeros(groups, outs, per * taps, groups, outs, length)
        rows.diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2).copy_(patches.permute(1, 2, 0)[..., None])
        rows = layer.adjoint(hessian(rows.view(-1, m)), weight).view(groups, outs, per, taps, groups, per, size)
        for g in range(groups):
            for c in range(per):
                rows[g, :, c, :, g, c] += blocks[g]
        rows = rows.view(-1, n)
        return _sandwich(composite, matrix).addmm_(rows.T, rows)
    _afford(layer.name, (m, m), (m, m), (weight.numel(), m), (n, m), (n, n), (n, n), dtype=matrix.dtype)
    gram = patches.mT @ patches  # Nᵀ N, the same for every output channel.
    maps = hessian(torch.eye(m).to(matrix)).view(groups, outs, length, m)
    square = maps.view(m, m).T @ (gram[:, None] @ maps).view(m, m)  # H Nᵀ N H
    both = (patches[:, None] @ maps).view(groups, outs, per, taps, m)
    cross = layer.adjoint(torch.einsum("gotp,goctm->gcpm", blocks, both).reshape(n, m), weight)  # Mᵀ N H K
    found = _sandwich(composite, matrix + square).add_(cross).add_(cross.T)
    own = found.view(layer.channels, size, layer.channels, size).diagonal(dim1=0, dim2=2)
    own += (block.mT @ block).repeat_interleave(per, 0).permute(1, 2, 0)  # MᵀM, of one channel each
    return found


def _bent(hessian: Rows, slope: Tensor, bend: Tensor) -> Rows:
    """Return the Hessian before an activation: D H D + diag(φ″ ∂a)."""
    return lambda rows: hessian(rows * slope.to(rows)).mul_(slope.to(rows)).addcmul_(rows, bend.to(rows))


def _between(composite: Composite, hessian: Rows) -> Rows:
    return lambda rows: composite.adjoint(hessian(composite.apply(rows)))


def _material(matrix: Tensor) -> Rows:
    return lambda rows: rows @ matrix.to(rows)
