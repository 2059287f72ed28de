"""A model as the chain of operations between its input and a linear layer.

Every step knows its forward map and what inversion needs of it:
the adjoint of a linear map, the inverse and derivative of an activation, the systems of equations of a convolution.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Affine", "Chain", "Elementwise", "Fixed", "Maximum", "Shape", "Step"]

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...]

_CHUNK = 128
"""Rows that pass a layer together: few enough to stay in the cache."""

_TIED = 1e-9
"""Difference of two values, relative to the largest, up to which they are one."""

_FEW = 8
"""Up to this many rows PyTorch's own adjoint is quicker."""

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True, eq=False)
class Step(ABC):
    """One operation on a single example.

    Attributes:
        name: the module's path, or the function's name.
        in_shape: shape of its input, without the batch axis.
        out_shape: shape of its output, without the batch axis.

    """

    name: str
    in_shape: Shape
    out_shape: Shape

    @abstractmethod
    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return the output (B, *out_shape) for ``x`` (B, *in_shape) and parameters by name."""

    @property
    def inputs(self) -> int:
        """Number of values of one input."""
        return math.prod(self.in_shape)

    @property
    def outputs(self) -> int:
        """Number of values of one output."""
        return math.prod(self.out_shape)


@final
@dataclass(frozen=True, eq=False)
class Affine(Step):
    """A convolution along any number of axes; a linear layer is one along none, of one position.

    Attributes:
        weight_name: the weight among the model's parameters.
        bias_name: the bias, None where there is none.
        taps: size of the kernel along every axis.
        stride: steps of the kernel along every axis.
        padding: zeros added (before, after) along every axis.
        dilation: spacing of the kernel's taps along every axis.
        groups: number of separate channel groups.

    """

    weight_name: str = ""
    bias_name: str | None = None
    taps: Shape = ()
    stride: Shape = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: Shape = ()
    groups: int = 1

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return not self.taps

    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return W x + b."""
        bias = None if self.bias_name is None else params[self.bias_name]
        return self._map(x, params[self.weight_name], bias)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.linear:
            return F.linear(x, weight, bias)
        pads: Shape = tuple(before for before, _ in self.padding)
        if any(before != after for before, after in self.padding):
            x, pads = F.pad(x, self._pads), (0,) * len(pads)
        convolve = _CONVOLUTIONS[len(self.taps) - 1]
        return convolve(x, self.kernel(weight), bias, self.stride, pads, self.dilation, self.groups)

    def kernel(self, weight: Tensor) -> Tensor:
        """Return the weight in the form that torch's convolutions take; a view."""
        return weight.reshape(*weight.shape[:2], *self.taps)

    @property
    def _pads(self) -> list[int]:
        """The padding in the form that torch takes, last axis first."""
        return [p for pair in reversed(self.padding) for p in pair]

    @property
    def _padded(self) -> Shape:
        """Size of the padded input along every axis."""
        return tuple(n + sum(pair) for n, pair in zip(self.in_shape[1:], self.padding, strict=True))

    def _inside(self, x: Tensor) -> Tensor:
        """Return padded values (..., *padded) without the padding."""
        for axis, (n, (before, _)) in enumerate(zip(self.in_shape[1:], self.padding, strict=True)):
            x = x.narrow(axis - len(self.padding), before, n)
        return x

    def _under(self, tap: Shape, padded: Tensor) -> Tensor:
        """Return the padded values (..., *padded) that lie under a tap at all output positions; a view."""
        each = zip(tap, self.dilation, self.stride, self.out_shape[1:], strict=True)
        places: tuple[Any, ...] = (..., *(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, s, n in each))
        return padded[places]

    def apply(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return K v for rows v: (k, n) → (k, m)."""
        return self._map(v.reshape(-1, *self.in_shape), weight).flatten(1)

    def adjoint(self, u: Tensor, weight: Tensor) -> Tensor:
        """Return Kᵀ u for rows u: (k, m) → (k, n)."""
        if self.linear:
            return u @ weight
        u, axes = u.reshape(-1, *self.out_shape), len(self.taps)
        if len(u) <= _FEW:
            like, zeros = u.new_zeros(()).expand(len(u), self.channels, *self._padded), (0,) * axes
            options = (self.stride, zeros, self.dilation, False, zeros, self.groups, (True, False, False))
            full = torch.ops.aten.convolution_backward(u, like, self.kernel(weight), None, *options)[0]
            return self._inside(full).flatten(1)
        # Convolving phase by phase beats a transposed convolution, and small chunks stay in the cache.
        kernel, pads = self._phases(weight)
        found = u.new_empty(len(u), *self.in_shape)
        for rows, target in zip(u.split(_CHUNK), found.split(_CHUNK), strict=True):
            phases = _CONVOLUTIONS[axes - 1](F.pad(rows, pads), kernel, groups=self.groups)
            phases = phases.view(len(rows), -1, *self.stride, *phases.shape[2:])
            # One phase after another: a single permuted copy takes twice as long.
            for phase in itertools.product(*map(range, self.stride)):
                steps: Any = (..., *(slice(a, None, s) for a, s in zip(phase, self.stride, strict=True)))
                part = target[steps]
                crop: Any = (slice(None), slice(None), *phase, *map(slice, part.shape[2:]))
                part.copy_(phases[crop])
        return found.flatten(1)

    def weight_gradient(self, u: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """Return the weight's gradient for output gradients u (k, m) and inputs v (k, n), summed over the rows."""
        if self.linear:
            return u.T @ v
        x, zeros = F.pad(v.reshape(-1, *self.in_shape), self._pads), (0,) * len(self.taps)
        options = (self.stride, zeros, self.dilation, False, zeros, self.groups, (False, True, False))
        u = u.reshape(-1, *self.out_shape)
        found: Tensor = torch.ops.aten.convolution_backward(u, x, self.kernel(weight), None, *options)[1]
        return found.view(weight.shape)

    def _phases(self, weight: Tensor) -> tuple[Tensor, list[int]]:
        """Return the adjoint's kernels, one per position modulo the stride, and how to pad for them.

        With input position i = s·q + a and tap t = a + p − s·d (in units of the dilation), the adjoint is
        x[s·q + a] = Σ_d w[t] u[q + d]: a plain convolution for each of the s phases a.
        """
        pads: list[int] = []
        shape: list[int] = []
        kernel = F.pad(self.kernel(weight), (0, 1) * len(self.taps))  # The last tap is zero.
        for axis, (stride, spread, size) in enumerate(zip(self.stride, self.dilation, self.taps, strict=True)):
            before, reach = self.padding[axis][0], spread * (size - 1)
            low = -((reach - before) // stride)
            high = (stride - 1 + before) // stride
            phase = torch.arange(stride)[:, None] + before - stride * torch.arange(low, high + 1)
            valid = (phase >= 0) & (phase <= reach) & (phase % spread == 0)
            taps = torch.where(valid, phase // spread, size)
            kernel = kernel.index_select(2 + axis, taps.flatten().to(weight.device))
            shape += taps.shape
            pads = [-low, -(-self.in_shape[1 + axis] // stride) + high - self.out_shape[1 + axis], *pads]
        kernel = kernel.reshape(self.groups, -1, weight.shape[1], *shape)
        kernel = kernel.permute(0, 2, *range(3, kernel.ndim, 2), 1, *range(4, kernel.ndim, 2))
        return kernel.reshape(-1, weight.shape[0] // self.groups, *shape[1::2]), pads

    @property
    def positions(self) -> int:
        """Number of values of one input channel."""
        return math.prod(self.in_shape[1:])

    @property
    def channels(self) -> int:
        """Number of input channels; every value of a linear layer's input is a channel of its own."""
        return self.in_shape[0]

    def gradient_block(self, delta: Tensor) -> Tensor:
        """Return M, (groups, r, p): the weight gradient of one input channel is M times that channel's p values.

        M depends on the output gradient ``delta`` (m,) only, so all channels of a group share it; the r rows are
        (output channel, tap).
        """
        spread = delta.new_zeros(*self.taps, self.out_shape[0], *self._padded)
        for tap in itertools.product(*map(range, self.taps)):
            self._under(tap, spread[tap]).copy_(delta.reshape(self.out_shape))
        spread = spread.movedim(len(self.taps), 0)
        return self._inside(spread).reshape(self.groups, -1, self.positions)

    def patches(self, x: Tensor) -> Tensor:
        """Return the input values under every tap, (groups, channels per group · taps, output positions)."""
        padded, axes = F.pad(x.reshape(self.in_shape), self._pads), len(self.taps)
        for axis, (n, d, s) in enumerate(zip(self.taps, self.dilation, self.stride, strict=True)):
            padded = padded.unfold(1 + axis, d * (n - 1) + 1, s)[..., ::d]
        order = (0, *range(1 + axes, 1 + 2 * axes), *range(1, 1 + axes))
        return padded.permute(order).reshape(self.groups, -1, math.prod(self.out_shape[1:]))

    def folded(self, columns: Tensor) -> Tensor:
        """Return the transpose of :meth:`patches`, (1, n)."""
        columns = columns.view(self.channels, *self.taps, *self.out_shape[1:]).movedim(0, len(self.taps))
        full = columns.new_zeros(self.channels, *self._padded)
        for tap in itertools.product(*map(range, self.taps)):
            self._under(tap, full).add_(columns[tap])
        return self._inside(full).reshape(1, -1)


@final
@dataclass(frozen=True, eq=False)
class Elementwise(Step):
    """An activation or a per-value affine map (BatchNorm in evaluation mode).

    Attributes:
        function: the map, (B, *in_shape) → (B, *in_shape), increasing unless it is affine or folds.
        inverse: its inverse, NaN-free on the closed range; values outside the range are moved into it.
        bounds: outputs there say only that the input lies there or beyond (ReLU: zero and infinity).
        affine: whether the map is scale · x + shift.
        folds: whether it falls before it rises (GELU); ``inverse`` is then that of the rising branch.

    """

    function: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    inverse: Callable[[Tensor], Tensor] = field(default=lambda a: a)
    bounds: tuple[float, float] = (-math.inf, math.inf)
    affine: bool = False
    folds: bool = False

    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return φ(x)."""
        return self.function(x)

    @property
    def clips(self) -> bool:
        """Whether outputs at a bound hide the input."""
        return any(map(math.isfinite, self.bounds))

    @property
    def inner(self) -> float:
        """The slope between the bounds, for an activation that has them."""
        low, high = self.bounds
        middle = high - 1 if math.isinf(low) else low + 1 if math.isinf(high) else (low + high) / 2
        inside = self.inverse(torch.full((1, *self.in_shape), middle, dtype=torch.float64))
        return float(self.derivatives(inside.flatten())[0][0])

    def derivatives(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Return φ′ and φ″ at flat ``pre`` (n,)."""
        with torch.enable_grad():
            x = pre.detach().reshape(1, *self.in_shape).requires_grad_()
            (first,) = torch.autograd.grad(self.function(x).sum(), x, create_graph=True)
            if not first.requires_grad:
                return first.flatten(), torch.zeros_like(pre)
            (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
        return first.detach().flatten(), torch.zeros_like(pre) if second is None else second.flatten()


@final
@dataclass(frozen=True, eq=False)
class Fixed(Step):
    """A linear map without parameters: average pooling, zero padding, reshaping.

    Attributes:
        function: the map, (B, *in_shape) → (B, *out_shape).
        reorders: whether it only reshapes, so that flat values stay where they are.

    """

    function: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    reorders: bool = False

    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return T x."""
        return self.function(x)

    def apply(self, v: Tensor) -> Tensor:
        """Return T v for rows v: (k, n) → (k, m)."""
        return v if self.reorders else self.function(v.reshape(-1, *self.in_shape)).flatten(1)

    def adjoint(self, u: Tensor) -> Tensor:
        """Return Tᵀ u for rows u: (k, m) → (k, n)."""
        if self.reorders:
            return u
        with torch.enable_grad():
            x = torch.zeros(u.shape[0], *self.in_shape, dtype=u.dtype, device=u.device, requires_grad=True)
            (back,) = torch.autograd.grad(self.function(x), x, u.reshape(-1, *self.out_shape))
        return back.flatten(1)


@final
@dataclass(frozen=True, eq=False)
class Maximum(Step):
    """Max-pooling: every output is the largest value of its window.

    Attributes:
        function: the map, (B, *in_shape) → (B, *out_shape).
        windows: (q, k) positions of one channel that each of its outputs sees; −1 is padding.

    """

    function: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    windows: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return the largest values."""
        return self.function(x)

    def largest(self, u: Tensor, former: Tensor | None = None) -> Tensor:
        """Return which position each output takes its value from, (N, channels, q), for inputs u (N, n).

        Where the ``former`` one is as large down to rounding, it stays: equal values are one.
        """
        planes = u.view(len(u), self.in_shape[0], -1)
        values = F.pad(planes, (0, 1), value=-math.inf)[..., self.windows]
        top, index = values.max(3)
        places = self.windows.expand_as(values).gather(3, index[..., None])[..., 0]
        if former is None:
            return places
        tied = planes.gather(2, former) >= top - _TIED * u.abs().max()
        return torch.where(tied, former, places)

    def chosen(self, places: Tensor) -> Fixed:
        """Return the linear map that takes the value at ``places`` (N, channels, q) for each of N examples in turn."""

        def take(x: Tensor) -> Tensor:
            rows = places if len(x) % len(places) == 0 else places[:1]
            index = rows.repeat(len(x) // len(rows), 1, 1)
            return x.flatten(2).gather(2, index).view(-1, *self.out_shape)

        return Fixed(self.name, self.in_shape, self.out_shape, take)


@final
@dataclass(frozen=True, eq=False)
class Chain:
    """The steps that lead to a linear layer with bias whose gradient shows its input exactly.

    Attributes:
        shape: shape of the model's input, without the batch axis.
        steps: from the earliest step that inversion reaches to the step before the anchor.
        anchor: the linear layer, where the recursion starts.
        stop: None where ``steps`` begin at the model's input; otherwise why they begin later.
        head: whether the anchor's output is the model's output.

    """

    shape: Shape
    steps: tuple[Step, ...]
    anchor: Affine
    stop: str | None
    head: bool

    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return the anchor's input, (B, d)."""
        for step in self.steps:
            x = step.forward(x, params)
        return x
