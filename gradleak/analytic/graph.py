"""A model as the chain of operations between its input and its first linear layer, read off the traced graph.

What an operation is follows from the graph (``torch.fx``): which tensor enters, which parameters it multiplies, whether
the path branches. Names of model classes play no part. Every step knows its forward map and what inversion needs of it:
the adjoint of a linear map, the inverse and derivative of an activation, the systems of equations of a convolution.
"""

from __future__ import annotations

import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradleak.errors import NotApplicable

__all__ = ["Affine", "Chain", "Elementwise", "Fixed", "Step", "convolve", "trace_chain"]

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...]

_CHUNK = 128
"""Rows that pass a layer together: few enough to stay in the cache."""

_FEW = 8
"""Up to this many rows PyTorch's own adjoint is quicker."""


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
    """A linear layer or a 2-d convolution; a linear layer is a convolution of one position.

    Attributes:
        weight_name: the weight among the model's parameters.
        bias_name: the bias, None where there is none.
        stride: steps of the kernel along height and width.
        padding: zeros added at (top, bottom, left, right).
        dilation: spacing of the kernel's taps.
        groups: number of separate channel groups.
        linear: whether the model computes it as a linear layer.

    """

    weight_name: str = ""
    bias_name: str | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    linear: bool = False

    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return W x + b."""
        weight = params[self.weight_name]
        bias = None if self.bias_name is None else params[self.bias_name]
        if self.linear:
            return F.linear(x, weight, bias)
        return self._conv(x, weight, bias)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        top, bottom, left, right = self.padding
        pad: int | tuple[int, int] = (top, left)
        if (top, left) != (bottom, right):
            x, pad = F.pad(x, (left, right, top, bottom)), 0
        return F.conv2d(x, weight, bias, self.stride, pad, self.dilation, self.groups)

    def apply(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return K v for rows v: (k, n) → (k, m)."""
        if self.linear:
            return v @ weight.T
        return self._conv(v.reshape(-1, *self.in_shape), weight).flatten(1)

    def adjoint(self, u: Tensor, weight: Tensor) -> Tensor:
        """Return Kᵀ u for rows u: (k, m) → (k, n)."""
        if self.linear:
            return u @ weight
        u = u.reshape(-1, *self.out_shape)
        if len(u) <= _FEW:
            top, bottom, left, right = self.padding
            channels, height, width = self.in_shape
            x = u.new_zeros(()).expand(len(u), channels, height + top + bottom, width + left + right)
            options = (self.stride, (0, 0), self.dilation, False, (0, 0), self.groups, (True, False, False))
            full = torch.ops.aten.convolution_backward(u, x, weight, None, *options)[0]
            return full[:, :, top : top + height, left : left + width].flatten(1)
        # Convolving phase by phase beats a transposed convolution, and small chunks stay in the cache.
        kernel, pads = self._phases(weight)
        out = torch.empty(len(u), self.inputs, dtype=u.dtype, device=u.device)
        for start in range(0, len(u), _CHUNK):
            self._scatter(u[start : start + _CHUNK], kernel, pads, out[start : start + _CHUNK])
        return out

    def _phases(self, weight: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Return the adjoint's kernels, one per position modulo the stride, and how to pad for them.

        With input position i = s·q + a and tap t = a + p − s·d (in units of the dilation), the adjoint is
        x[s·q + a] = Σ_d w[t] u[q + d]: a plain convolution for each of the s phases a.
        """
        pads: list[int] = []
        taps: list[Tensor] = []
        for axis, before in ((0, self.padding[0]), (1, self.padding[2])):
            stride, spread, size = self.stride[axis], self.dilation[axis], weight.shape[2 + axis]
            reach = spread * (size - 1)
            low = -((reach - before) // stride)
            high = (stride - 1 + before) // stride
            phase = torch.arange(stride)[:, None] + before - stride * torch.arange(low, high + 1)
            valid = (phase >= 0) & (phase <= reach) & (phase % spread == 0)
            taps.append(torch.where(valid, phase // spread, size))  # the last index is a zero tap
            quotient = -(-self.in_shape[1 + axis] // stride)
            pads = [-low, quotient + high - self.out_shape[1 + axis], *pads]
        padded = F.pad(weight, (0, 1, 0, 1))
        (sh, dh), (sw, dw) = taps[0].shape, taps[1].shape
        kernel = padded[:, :, taps[0].flatten()][..., taps[1].flatten()]
        outs, ins = weight.shape[0] // self.groups, weight.shape[1]
        kernel = kernel.reshape(self.groups, outs, ins, sh, dh, sw, dw).permute(0, 2, 3, 5, 1, 4, 6)
        return kernel.reshape(self.groups * ins * sh * sw, outs, dh, dw), (pads[0], pads[1], pads[2], pads[3])

    def _scatter(self, u: Tensor, kernel: Tensor, pads: tuple[int, int, int, int], out: Tensor) -> None:
        phases = convolve(u, kernel, pads, self.groups)
        (sh, sw), (channels, height, width) = self.stride, self.in_shape
        high, wide = phases.shape[2:]
        phases = phases.view(-1, channels, sh, sw, high, wide)
        fits = (sh * high, sw * wide) == (height, width)
        whole = (out if fits else out.new_empty(len(out), phases[0].numel())).view(-1, channels, high, sh, wide, sw)
        # One phase after another: a single permuted copy takes twice as long.
        for a, b in itertools.product(range(sh), range(sw)):
            whole[:, :, :, a, :, b] = phases[:, :, a, b]
        if not fits:
            whole = whole.view(-1, channels, sh * high, sw * wide)
            out.view(-1, channels, height, width).copy_(whole[:, :, :height, :width])

    @property
    def positions(self) -> int:
        """Number of values of one input channel."""
        return 1 if self.linear else self.in_shape[1] * self.in_shape[2]

    @property
    def channels(self) -> int:
        """Number of input channels; every value of a linear layer's input is a channel of its own."""
        return self.in_shape[0]

    def gradient_block(self, delta: Tensor, weight: Tensor) -> Tensor:
        """Return M, (groups, r, p): the weight gradient of one input channel is M times that channel's p values.

        M depends on the output gradient ``delta`` (m,) only, so all channels of a group share it; the r rows are
        (output channel, tap).
        """
        if self.linear:
            return delta.reshape(1, -1, 1)
        top, bottom, left, right = self.padding
        (_, height, width), (outs, high, wide) = self.in_shape, self.out_shape
        (down, across), (sh, sw), (dh, dw) = weight.shape[2:], self.stride, self.dilation
        size = (outs, down, across, height + top + bottom, width + left + right)
        spread = torch.zeros(size, dtype=delta.dtype, device=delta.device)
        maps = delta.reshape(outs, high, wide)
        for i in range(down):
            for j in range(across):
                rows = slice(i * dh, i * dh + (high - 1) * sh + 1, sh)
                columns = slice(j * dw, j * dw + (wide - 1) * sw + 1, sw)
                spread[:, i, j, rows, columns] = maps
        inside = spread[..., top : top + height, left : left + width]
        return inside.reshape(self.groups, -1, self.positions)

    def patches(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the input values under every tap, (groups, channels per group · taps, output positions)."""
        if self.linear:
            return x.reshape(1, -1, 1)
        top, bottom, left, right = self.padding
        padded = F.pad(x.reshape(1, *self.in_shape), (left, right, top, bottom))
        columns = F.unfold(padded, tuple(weight.shape[2:]), self.dilation, 0, self.stride)[0]
        wanted = self.out_shape[1] * self.out_shape[2]
        return columns[:, :wanted].reshape(self.groups, -1, wanted)

    def folded(self, columns: Tensor, weight: Tensor) -> Tensor:
        """Return the transpose of :meth:`patches`, (1, n)."""
        if self.linear:
            return columns.view(1, -1)
        top, bottom, left, right = self.padding
        _, height, width = self.in_shape
        size = (height + top + bottom, width + left + right)
        rows = columns.reshape(1, -1, columns.shape[-1])
        full = F.fold(rows, size, tuple(weight.shape[2:]), self.dilation, 0, self.stride)
        return full[:, :, top : top + height, left : left + width].reshape(1, -1)


def convolve(x: Tensor, kernel: Tensor, pads: tuple[int, int, int, int], groups: int = 1) -> Tensor:
    """Return the convolution with zeros added (or, if negative, lines cut) at (left, right, top, bottom)."""
    left, right, top, bottom = pads
    if len(x) == groups == 1 and x.dtype == torch.float32 and max(kernel.shape[2:]) > 3 and x.device.type == "cpu":
        # PyTorch would change the layout of so little for its optimized kernels, which takes longer than to convolve.
        padded, taps = F.pad(x, pads), (kernel.shape[2], kernel.shape[3])
        sizes = (padded.shape[2] - taps[0] + 1, padded.shape[3] - taps[1] + 1)
        return (kernel.flatten(1) @ F.unfold(padded, taps)).view(1, -1, *sizes)
    if (left, top) == (right, bottom) and min(pads) >= 0:
        return F.conv2d(x, kernel, padding=(top, left), groups=groups)
    return F.conv2d(F.pad(x, pads), kernel, groups=groups)


@final
@dataclass(frozen=True, eq=False)
class Elementwise(Step):
    """An activation or a per-value affine map (BatchNorm in evaluation mode).

    Attributes:
        function: the map, (B, *in_shape) → (B, *in_shape).
        inverse: its inverse, NaN-free on the closed range; values outside the range are moved into it.
        rectifies: whether outputs of zero say only that the input was not positive (ReLU).
        affine: whether the map is scale · x + shift.

    """

    function: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    inverse: Callable[[Tensor], Tensor] = field(default=lambda a: a)
    rectifies: bool = False
    affine: bool = False

    def forward(self, x: Tensor, params: Tensors) -> Tensor:
        """Return φ(x)."""
        return self.function(x)

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


def trace_chain(model: nn.Module, shape: Shape, *, anchor: str | None = None) -> Chain:
    """Return the chain of ``model`` for inputs of ``shape``, back from its earliest linear layer with bias.

    That layer sees one vector per example, so its weight gradient is an outer product, and input and output gradient
    follow from it exactly, whatever comes later in the model. With ``anchor``, the name of a linear layer's weight, the
    chain leads back from that layer instead, bias or not.

    Raises:
        NotApplicable: the model cannot be traced, or has no such layer.

    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise NotApplicable(
            f"The graph of this model cannot be traced ({type(error).__name__}: {_first_line(error)}); "
            "use matching, which needs no graph."
        ) from error
    reader = _Reader(model, graph, tuple(shape))
    return reader.chain(anchor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0]


class _Stop(Exception):
    """Why the walk cannot pass a node."""


@final
class _Reader:
    """Reads steps off a traced graph; shapes come from running single steps on zeros."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shape: Shape) -> None:
        self.model, self.graph = model, graph
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.modules = dict(model.named_modules())
        self.calls: dict[str, int] = {}
        for node in graph.nodes:
            for name in self._parameter_names(node):
                self.calls[name] = self.calls.get(name, 0) + 1
        self.shapes = self._propagate(shape)

    def _parameter_names(self, node: fx.Node) -> list[str]:
        if node.op == "call_module":
            return [self.names[id(p)] for p in self.modules[str(node.target)].parameters() if id(p) in self.names]
        if node.op == "get_attr":
            value = _attribute(self.model, str(node.target))
            return [self.names[id(value)]] if id(value) in self.names else []
        return []

    def _propagate(self, shape: Shape) -> dict[fx.Node, Shape]:
        # Meta tensors: shapes only, no arithmetic, and no buffer of the model changes.
        example = torch.zeros(1, *shape, dtype=next(self.model.parameters()).dtype, device="meta")
        shapes: dict[fx.Node, Shape] = {}
        values: dict[fx.Node, Any] = {}
        state = {
            n: torch.empty_like(t, device="meta")
            for n, t in (*self.model.named_parameters(), *self.model.named_buffers())
        }
        for node in self.graph.nodes:
            try:
                values[node] = self._evaluate(node, values, example, state)
            except Exception:  # noqa: BLE001 - a node whose shape is unknown is simply not passed
                continue
            if isinstance(values[node], Tensor):
                shapes[node] = tuple(values[node].shape[1:])
        return shapes

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Any], example: Tensor, state: dict[str, Tensor]) -> Any:
        def get(value: Any) -> Any:
            return fx.node.map_arg(value, lambda n: values[n])

        if node.op == "placeholder":
            return example
        if node.op == "get_attr":
            return state.get(str(node.target), _attribute(self.model, str(node.target)))
        if node.op == "call_module":
            prefix = f"{node.target}."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            return torch.func.functional_call(self.modules[str(node.target)], own, get(node.args), get(node.kwargs))
        if node.op == "call_function":
            return node.target(*get(node.args), **get(node.kwargs))  # type: ignore[operator]
        if node.op == "call_method":
            first, *rest = get(node.args)
            return getattr(first, str(node.target))(*rest, **get(node.kwargs))
        return None

    def chain(self, wanted: str | None = None) -> Chain:
        shape = next(self.shapes[n] for n in self.graph.nodes if n.op == "placeholder")
        anchor_node, anchor = self._anchor(wanted)
        steps: list[Step] = []
        node, stop = anchor_node, None
        while True:
            try:
                node = self._source(node)
                if node.op == "placeholder":
                    break
                steps.append(self._step(node))
            except _Stop as reason:
                stop = str(reason)
                break
        head = all(u.op == "output" for u in anchor_node.users)
        return Chain(shape, tuple(reversed(steps)), anchor, stop, head)

    def _anchor(self, wanted: str | None) -> tuple[fx.Node, Affine]:
        reasons: list[str] = []
        for node in self.graph.nodes:
            try:
                step = self._step(node)
            except _Stop:
                continue
            if not (isinstance(step, Affine) and step.linear):
                continue
            if wanted is not None and step.weight_name != wanted:
                continue
            if step.bias_name is None and wanted is None:
                reasons.append(f"{step.name!r} has no bias")
            elif len(step.in_shape) != 1:
                reasons.append(f"{step.name!r} sees several vectors per example")
            elif len(self._source(node).users) > 1:
                reasons.append(f"the input of {step.name!r} is used elsewhere, too")
            else:
                return node, step
        why = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise NotApplicable(
            f"The model has no linear layer with bias that sees one vector per example{why}, "
            "so no features can be read off exactly; use matching."
        )

    def _source(self, node: fx.Node) -> fx.Node:
        tensors = [n for n in node.all_input_nodes if n.op != "get_attr" and n in self.shapes]
        if len(set(tensors)) != 1 or sum(a is tensors[0] for a in node.args) > 1:
            raise _Stop(f"{_label(node)} joins {max(len(tensors), 2)} paths")
        return tensors[0]

    def _step(self, node: fx.Node) -> Step:
        if node.op in ("placeholder", "output", "get_attr"):
            raise _Stop(f"{_label(node)} is no operation")
        source = self._source(node)
        if node not in self.shapes or source not in self.shapes:
            raise _Stop(f"{_label(node)} has no shape that can be told from the graph")
        if len([u for u in source.users if u.op != "call_function" or u.target is not getattr]) > 1 and not _shape_only(
            source, node
        ):
            others = ", ".join(_label(u) for u in source.users if u is not node)
            raise _Stop(f"the path branches before {_label(node)} (it also feeds {others})")
        shapes = self.shapes[source], self.shapes[node]
        if node.op == "call_module":
            return self._module(str(node.target), self.modules[str(node.target)], *shapes)
        return self._function(node, *shapes)

    def _check_single(self, *names: str | None) -> None:
        for name in names:
            if name is not None and self.calls.get(name, 0) > 1:
                raise _Stop(f"parameter {name!r} is used {self.calls[name]} times, so its gradient is a sum")

    def _module(self, name: str, module: nn.Module, source: Shape, target: Shape) -> Step:
        if isinstance(module, nn.Linear):
            return self._affine(name, module.weight, module.bias, source, target, linear=True)
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                raise _Stop(f"convolution {name!r} pads by {module.padding_mode!r} instead of zeros")
            return self._affine(
                name, module.weight, module.bias, source, target, stride=module.stride, padding=module.padding,
                dilation=module.dilation, groups=module.groups,
            )  # fmt: skip
        if isinstance(module, _BatchNorm):
            return _batch_norm(name, module, source)
        if isinstance(module, _DropoutNd):
            if module.training and module.p > 0:
                raise _Stop(f"{name!r} is active dropout, whose mask is unknown")
            return Fixed(name, source, target, lambda x: x, True)
        if isinstance(module, nn.Identity | nn.Flatten | nn.Unflatten) or (
            isinstance(module, nn.Sequential) and len(module) == 0
        ):
            return Fixed(name, source, target, _reshape(target), True)
        if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.ZeroPad2d):
            return Fixed(name, source, target, module)
        options = {k: getattr(module, k) for k in _OPTIONS if hasattr(module, k)}
        key = type(module).__name__.lower()
        if isinstance(module, tuple(_ACTIVATION_MODULES)):
            return _activation(name, key, options, source)
        raise _Stop(f"{name!r} ({type(module).__name__}) has no inverse that is known here")

    def _affine(
        self, name: str, weight: Tensor, bias: Tensor | None, source: Shape, target: Shape, *,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, linear: bool = False,
    ) -> Affine:  # fmt: skip
        weight_name = self.names.get(id(weight))
        bias_name = None if bias is None else self.names.get(id(bias))
        if weight_name is None or (bias is not None and bias_name is None):
            raise _Stop(f"the weights of {name!r} are no parameters of the model")
        self._check_single(weight_name, bias_name)
        step, spread = _pair(stride), _pair(dilation)
        if padding == "valid":
            padding = 0
        if padding == "same":
            total = [spread[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
            pads = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
        else:
            high, wide = _pair(padding)
            pads = (high, high, wide, wide)
        return Affine(name, source, target, weight_name, bias_name, step, pads, spread, groups, linear)

    def _function(self, node: fx.Node, source: Shape, target: Shape) -> Step:
        name = node.name
        key = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        key = str(key).rstrip("_")
        arguments = list(node.args[1:])
        if key in ("flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"):
            if math.prod(source) != math.prod(target):
                raise _Stop(f"{_label(node)} mixes the examples of a batch")
            return Fixed(name, source, target, _reshape(target), True)
        if key == "dropout" and node.kwargs.get("training", arguments[1] if len(arguments) > 1 else True) is False:
            return Fixed(name, source, target, lambda x: x, True)
        if key in ("conv2d", "linear"):
            return self._functional_affine(node, key, source, target)
        constants = all(not isinstance(a, fx.Node) for a in arguments) and not any(
            isinstance(v, fx.Node) for v in node.kwargs.values()
        )
        if key in ("avg_pool2d", "adaptive_avg_pool2d", "mean", "pad") and constants:
            call = _bind(node)
            if key == "mean" and call(torch.zeros(2, *source)).shape != (2, *target):
                raise _Stop(f"{_label(node)} mixes the examples of a batch")
            if key == "pad" and float(call(torch.zeros(1, *source)).abs().sum()) != 0:
                raise _Stop(f"{_label(node)} pads by something else than zeros")
            return Fixed(name, source, target, call)
        scalar = next((a for a in node.args if isinstance(a, int | float)), None)
        if scalar is not None and key in ("add", "sub", "mul", "truediv", "div") and len(node.args) == 2:
            return _arithmetic(node, key, float(scalar), source)
        options = dict(node.kwargs)
        for option, value in zip(_POSITIONS.get(key, ()), arguments, strict=False):
            options[option] = value
        if key in _INVERSES and constants:
            return _activation(name, key, options, source)
        raise _Stop(f"{_label(node)} has no inverse that is known here")

    def _functional_affine(self, node: fx.Node, key: str, source: Shape, target: Shape) -> Affine:
        order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(order, node.args, strict=False)) | dict(node.kwargs)
        tensors = {}
        for part in ("weight", "bias"):
            value = given.get(part)
            if isinstance(value, fx.Node):
                if value.op != "get_attr":
                    raise _Stop(f"the {part} of {_label(node)} is computed")
                tensors[part] = _attribute(self.model, str(value.target))
        if "weight" not in tensors:
            raise _Stop(f"{_label(node)} has no weight that is a parameter")
        options: dict[str, Any] = {k: given[k] for k in order[3:] if k in given}
        return self._affine(
            node.name, tensors["weight"], tensors.get("bias"), source, target, linear=key == "linear", **options
        )


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _label(node: fx.Node) -> str:
    return f"'{node.target}'" if node.op == "call_module" else f"'{node.name}'"


def _shape_only(source: fx.Node, node: fx.Node) -> bool:
    # x.view(x.size(0), -1): asking for a shape is no second path.
    return all(u is node or (u.op == "call_method" and u.target in ("size", "dim")) for u in source.users)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _reshape(target: Shape) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(x.shape[0], *target)


def _bind(node: fx.Node) -> Callable[[Tensor], Tensor]:
    rest, options = node.args[1:], dict(node.kwargs)
    if node.op == "call_method":
        return lambda x: getattr(x, str(node.target))(*rest, **options)
    call: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    return lambda x: call(x, *rest, **options)


def _arithmetic(node: fx.Node, key: str, value: float, shape: Shape) -> Elementwise:
    calls: dict[str, Callable[[Any, Any], Tensor]]
    calls = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
    call: Callable[[Any, Any], Tensor] = calls.get(key, operator.truediv)
    left = isinstance(node.args[0], fx.Node)
    if key in ("truediv", "div") and not left:
        raise _Stop(f"{_label(node)} divides by what is sought")

    def function(x: Tensor) -> Tensor:
        return call(x, value) if left else call(value, x)

    shift = float(function(torch.tensor(0.0, dtype=torch.float64)))
    scale = float(function(torch.tensor(1.0, dtype=torch.float64))) - shift
    if scale == 0:
        raise _Stop(f"{_label(node)} multiplies by zero")
    return Elementwise(node.name, shape, shape, function, lambda a: (a - shift) / scale, affine=True)


def _batch_norm(name: str, module: _BatchNorm, shape: Shape) -> Elementwise:
    if module.training or module.running_mean is None or module.running_var is None:
        raise _Stop(f"{name!r} is BatchNorm with batch statistics, which mix all values of a channel")
    ones = (-1, *[1] * (len(shape) - 1))
    scale = torch.rsqrt(module.running_var.detach().double() + module.eps)
    scale = scale if module.weight is None else scale * module.weight.detach().double()
    shift = -module.running_mean.detach().double() * scale
    shift = shift if module.bias is None else shift + module.bias.detach().double()
    if bool((scale == 0).any()):
        raise _Stop(f"{name!r} multiplies a channel by zero")
    scale, shift = scale.reshape(ones), shift.reshape(ones)
    return Elementwise(
        name,
        shape,
        shape,
        lambda x: x * scale.to(x) + shift.to(x),
        lambda a: (a - shift.to(a)) / scale.to(a),
        affine=True,
    )


_OPTIONS = ("negative_slope", "alpha", "beta", "threshold")
_POSITIONS = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "softplus": ("beta", "threshold")}
_ACTIVATION_MODULES = (
    nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Softplus, nn.Softsign, nn.LogSigmoid,
)  # fmt: skip


def _inside(a: Tensor, low: float, high: float) -> Tensor:
    # Rounding may push a recovered value onto or over the end of the activation's range.
    margin = 4 * torch.finfo(a.dtype).tiny ** 0.5 if low == 0 and math.isinf(high) else torch.finfo(a.dtype).eps
    return a.clamp(low + margin if math.isfinite(low) else None, high - margin if math.isfinite(high) else None)


def _softplus_inverse(a: Tensor, beta: float) -> Tensor:
    scaled = _inside(a * beta, 0.0, math.inf)
    return (scaled + torch.log(-torch.expm1(-scaled))) / beta


def _elu_inverse(a: Tensor, alpha: float, scale: float = 1.0) -> Tensor:
    a = a / scale
    return torch.where(a > 0, a, torch.log1p(_inside(a.clamp(max=0) / alpha, -1.0, 1.0)))


_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
_INVERSES: dict[str, Callable[..., tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = {
    "sigmoid": lambda: (torch.sigmoid, lambda a: torch.logit(_inside(a, 0.0, 1.0))),
    "tanh": lambda: (torch.tanh, lambda a: torch.atanh(_inside(a, -1.0, 1.0))),
    "relu": lambda: (F.relu, lambda a: a.clamp(min=0)),
    "leakyrelu": lambda negative_slope=0.01: (
        lambda x: F.leaky_relu(x, negative_slope),
        lambda a: torch.where(a > 0, a, a / negative_slope),
    ),
    "elu": lambda alpha=1.0: (lambda x: F.elu(x, alpha), lambda a: _elu_inverse(a, alpha)),
    "selu": lambda: (F.selu, lambda a: _elu_inverse(a, *_SELU)),
    "softplus": lambda beta=1.0, threshold=20.0: (
        lambda x: F.softplus(x, beta, threshold),
        lambda a: torch.where(a * beta > threshold, a, _softplus_inverse(a, beta)),
    ),
    "softsign": lambda: (F.softsign, lambda a: a / (1 - _inside(a, -1.0, 1.0).abs())),
    "logsigmoid": lambda: (F.logsigmoid, lambda a: -_softplus_inverse(-a, 1.0)),
}
_INVERSES["leaky_relu"] = _INVERSES["leakyrelu"]
_ACCEPTED = {
    "leakyrelu": ("negative_slope",),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "softplus": ("beta", "threshold"),
}


def _activation(name: str, key: str, options: Mapping[str, Any], shape: Shape) -> Elementwise:
    chosen = {k: float(v) for k, v in options.items() if k in _ACCEPTED.get(key, ())}
    if key in ("leakyrelu", "leaky_relu") and chosen.get("negative_slope", 0.01) <= 0:
        raise _Stop(f"{name!r} is a leaky ReLU whose slope is not positive")
    function, inverse = _INVERSES[key](**chosen)
    return Elementwise(name, shape, shape, function, inverse, key == "relu")
