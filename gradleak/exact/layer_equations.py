"""The linear equations for the inputs of one layer, for N examples.

With known outputs z_i and known gradients δ_i at the outputs, the inputs a_i of a layer K obey

    K a_i = z_i              (forward equations, one for every output of every example),
    Σ_i M(δ_i) a_i = G       (gradient equations, one for every weight).

The matrix M(δ) depends on the output gradient only, and all input channels of a group share it: for a convolution with
O output channels and T taps, O · T equations for the N · p values of a channel (p positions). With a stride s, every
tap sees one of s² phases of the positions, so the matrix falls into s² blocks.

Sources: forward and gradient equations for one example, R-GAP (Zhu & Blaschko, ICLR 2021, Section 3); for
convolutions, R-CONV (arXiv 2406.04227). Deviation: N examples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.structure.chain import Affine, Elementwise, Fixed, Shape

__all__ = ["Composite", "Counts", "LayerEquations", "counts"]

Tensors = Mapping[str, Tensor]

_NUMBERS = 1 << 25
"""Numbers of the matrix M up to which gradient equations are used: 256 MiB."""


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

    def squares(self, u: Tensor) -> Tensor:
        """Return how much rows u (k, m) ≥ 0 weigh every input, (k, n): exact for one step, else nearly."""
        for step in reversed(self.steps):
            if isinstance(step, Affine):
                u = step.adjoint(u, self.params[step.weight_name].square())
            elif isinstance(step, Fixed):
                u = step.adjoint(u)
            else:
                u = u * self._slope(step, u).square()
        return u

    def constant(self, like: Tensor) -> Tensor:
        """Return the value at zero, (m,)."""
        x = like.new_zeros(1, *self.steps[0].in_shape)
        for step in self.steps:
            x = step.forward(x, self.params)
        return x.flatten()

    @staticmethod
    def _slope(step: Elementwise, like: Tensor) -> Tensor:
        return step.derivatives(like.new_zeros(step.inputs))[0]


@final
@dataclass(frozen=True)
class Counts:
    """How many gradient equations the values of one input channel share, for all examples.

    Attributes:
        rows: equations.
        rank: the most that their rank can be.
        unknowns: values.

    """

    rows: int
    rank: int
    unknowns: int


def counts(step: Affine, weight: Tensor, examples: int) -> Counts:
    """Count the gradient equations of one input channel, phase by phase."""
    outs = weight.shape[0] // step.groups
    axes = []
    for size, n, stride, (before, _), dilation in zip(
        step.in_shape[1:], step.taps, step.stride, step.padding, step.dilation, strict=True
    ):
        taps = [(t * dilation - before) % stride for t in range(n)]
        axes.append([(taps.count(a), len(range(a, size, stride))) for a in range(stride)])
    phases = [
        [math.prod(part) for part in zip((outs, examples), *each, strict=True)] for each in itertools.product(*axes)
    ]
    return Counts(sum(r for r, _ in phases), sum(map(min, phases)), sum(v for _, v in phases))


@final
class LayerEquations:
    """The equations for the inputs of one layer.

    Inputs are rows (k, N, n), outputs rows (k, N, m), gradients rows (k, groups, channels, equations).

    Attributes:
        step: the layer.
        maps: the layer and the maps without parameters between it and the known outputs.
        behind: the latter alone.
        pull: (N, ·) gradients of the loss with respect to the layer's own outputs.
        block: M for all examples, (groups, equations, N · p); no equations where the gradient is not shared.
        target: G, (groups, channels, equations).

    """

    def __init__(self, maps: Composite, gradient: Tensor | None, pull: Tensor) -> None:
        """Put them together for gradients ``pull`` (N, m) with respect to the outputs of ``maps``."""
        step = maps.steps[0]
        assert isinstance(step, Affine)
        self.step, self.maps, self.behind = step, maps, Composite(maps.steps[1:], maps.params)
        self.pull, self.weight = self.behind.adjoint(pull), maps.params[step.weight_name]
        self.count, self.per = len(pull), step.channels // step.groups
        self.outs, self.taps = len(self.weight) // step.groups, math.prod(step.taps)
        rows, size = self.outs * self.taps, self.count * step.positions
        self.block, self.target = pull.new_zeros(step.groups, 0, size), pull.new_zeros(step.groups, self.per, 0)
        if gradient is not None and step.groups * rows * size <= _NUMBERS and bool((gradient != 0).any()):
            self.block = torch.cat([step.gradient_block(row) for row in self.pull], 2)
            self.target = self._equations(gradient.to(pull)[None])[0]

    @property
    def shared(self) -> bool:
        """Whether there are gradient equations."""
        return self.block.shape[1] > 0

    def _equations(self, gradients: Tensor) -> Tensor:
        """Return weight gradients (k, *weight) in the order of the equations, (k, g, c, r)."""
        parts = gradients.reshape(len(gradients), self.step.groups, self.outs, self.per, self.taps)
        return parts.transpose(2, 3).flatten(3)

    def split(self, u: Tensor) -> Tensor:
        """Return values by channel (g, k, N · p) by phase of the stride, (g, f, k, q): no weight sees two of them.

        Where a stride does not divide the plane, zeros are added.
        """
        sizes, strides, phase = self._planes
        pads = [p for n, s, q in zip(sizes, strides, phase, strict=True) for p in (s * q - n, 0)]
        u = F.pad(u.view(*u.shape[:2], self.count, *sizes), pads[::-1])
        both = [n for pair in zip(phase, strides, strict=True) for n in pair]
        axes = range(3, 3 + 2 * len(sizes), 2)
        parts = u.view(*u.shape[:3], *both).permute(0, *(a + 1 for a in axes), 1, 2, *axes)
        return parts.reshape(len(u), math.prod(strides), u.shape[1], -1)

    def join(self, u: Tensor) -> Tensor:
        """Undo :meth:`split`."""
        sizes, strides, phase = self._planes
        d = len(sizes)
        parts = u.view(len(u), *strides, -1, self.count, *phase)
        parts = parts.permute(0, 1 + d, 2 + d, *(a for i in range(d) for a in (3 + d + i, 1 + i)))
        whole = parts.reshape(*parts.shape[:3], *(s * q for s, q in zip(strides, phase, strict=True)))
        for axis, n in enumerate(sizes):
            whole = whole.narrow(3 + axis, 0, n)
        return whole.reshape(*parts.shape[:2], -1)

    @property
    def _planes(self) -> tuple[Shape, Shape, Shape]:
        """Size of a channel, stride, and size of a phase along every axis."""
        sizes, strides = self.step.in_shape[1:], self.step.stride
        return sizes, strides, tuple(-(-n // s) for n, s in zip(sizes, strides, strict=True))

    def channels(self, v: Tensor) -> Tensor:
        """Return inputs (k, N, n) as (g, k · channels, N · p)."""
        k, groups, p = len(v), self.step.groups, self.step.positions
        return v.view(k, self.count, groups, self.per, p).permute(2, 0, 3, 1, 4).reshape(groups, k * self.per, -1)

    def examples(self, u: Tensor) -> Tensor:
        """Undo :meth:`channels`."""
        parts = u.view(self.step.groups, -1, self.per, self.count, self.step.positions).permute(1, 3, 0, 2, 4)
        return parts.reshape(len(parts), self.count, -1)

    def apply(self, v: Tensor) -> Tensor:
        """Return K v."""
        return self.maps.apply(v.flatten(0, 1)).view(len(v), self.count, -1)

    def adjoint(self, u: Tensor) -> Tensor:
        """Return Kᵀ u."""
        return self.maps.adjoint(u.flatten(0, 1)).view(len(u), self.count, -1)

    def gradient(self, v: Tensor) -> Tensor:
        """Return Σ_i M(δ_i) v_i."""
        return (self.channels(v) @ self.block.mT).unflatten(1, (len(v), -1)).transpose(0, 1)

    def gradient_adjoint(self, w: Tensor) -> Tensor:
        """Return M(δ_i)ᵀ w for every example i."""
        return self.examples(w.transpose(0, 1).flatten(1, 2) @ self.block)

    def change(self, values: Tensor, pulls: Tensor) -> Tensor:
        """Return the gradient's change at inputs (N, n) for changes (k, N, m) of the output gradients."""
        if not self.shared:
            return pulls.new_zeros(len(pulls), *self.target.shape)
        patches = torch.cat([self.step.patches(own) for own in values], 2)  # (g, c · t, N · L)
        maps = self.behind.adjoint(pulls.flatten(0, 1)).view(*pulls.shape[:2], self.step.groups, self.outs, -1)
        return self._equations(maps.permute(0, 2, 3, 1, 4).flatten(3) @ patches.mT)
