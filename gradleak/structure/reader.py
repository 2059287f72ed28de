"""Reading a model as a chain of operations off its traced graph.

What an operation is follows from the graph (``torch.fx``): which tensor enters, which parameters it multiplies, whether
the path branches. Names of model classes play no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradleak.errors import NotApplicable
from gradleak.structure.chain import Affine, Chain, Fixed, Shape, Step
from gradleak.structure.elementwise import (
    INVERSES,
    MODULES,
    OPTIONS,
    POSITIONS,
    Stop,
    activation,
    arithmetic,
    batch_norm,
)

__all__ = ["trace_chain"]


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
            except Stop as reason:
                stop = str(reason)
                break
        head = all(u.op == "output" for u in anchor_node.users)
        return Chain(shape, tuple(reversed(steps)), anchor, stop, head)

    def _anchor(self, wanted: str | None) -> tuple[fx.Node, Affine]:
        reasons: list[str] = []
        for node in self.graph.nodes:
            try:
                step = self._step(node)
            except Stop:
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
            raise Stop(f"{_label(node)} joins {max(len(tensors), 2)} paths")
        return tensors[0]

    def _step(self, node: fx.Node) -> Step:
        if node.op in ("placeholder", "output", "get_attr"):
            raise Stop(f"{_label(node)} is no operation")
        source = self._source(node)
        if node not in self.shapes or source not in self.shapes:
            raise Stop(f"{_label(node)} has no shape that can be told from the graph")
        if len([u for u in source.users if u.op != "call_function" or u.target is not getattr]) > 1 and not _shape_only(
            source, node
        ):
            others = ", ".join(_label(u) for u in source.users if u is not node)
            raise Stop(f"the path branches before {_label(node)} (it also feeds {others})")
        shapes = self.shapes[source], self.shapes[node]
        if node.op == "call_module":
            return self._module(str(node.target), self.modules[str(node.target)], *shapes)
        return self._function(node, *shapes)

    def _check_single(self, *names: str | None) -> None:
        for name in names:
            if name is not None and self.calls.get(name, 0) > 1:
                raise Stop(f"parameter {name!r} is used {self.calls[name]} times, so its gradient is a sum")

    def _module(self, name: str, module: nn.Module, source: Shape, target: Shape) -> Step:
        if isinstance(module, nn.Linear):
            return self._affine(name, module.weight, module.bias, source, target, linear=True)
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                raise Stop(f"convolution {name!r} pads by {module.padding_mode!r} instead of zeros")
            return self._affine(
                name, module.weight, module.bias, source, target, stride=module.stride, padding=module.padding,
                dilation=module.dilation, groups=module.groups,
            )  # fmt: skip
        if isinstance(module, _BatchNorm):
            return batch_norm(name, module, source)
        if isinstance(module, _DropoutNd):
            if module.training and module.p > 0:
                raise Stop(f"{name!r} is active dropout, whose mask is unknown")
            return Fixed(name, source, target, lambda x: x, True)
        if isinstance(module, nn.Identity | nn.Flatten | nn.Unflatten) or (
            isinstance(module, nn.Sequential) and len(module) == 0
        ):
            return Fixed(name, source, target, _reshape(target), True)
        if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.ZeroPad2d):
            return Fixed(name, source, target, module)
        options = {k: getattr(module, k) for k in OPTIONS if hasattr(module, k)}
        key = type(module).__name__.lower()
        if isinstance(module, tuple(MODULES)):
            return activation(name, key, options, source)
        raise Stop(f"{name!r} ({type(module).__name__}) has no inverse that is known here")

    def _affine(
        self, name: str, weight: Tensor, bias: Tensor | None, source: Shape, target: Shape, *,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, linear: bool = False,
    ) -> Affine:  # fmt: skip
        weight_name = self.names.get(id(weight))
        bias_name = None if bias is None else self.names.get(id(bias))
        if weight_name is None or (bias is not None and bias_name is None):
            raise Stop(f"the weights of {name!r} are no parameters of the model")
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
                raise Stop(f"{_label(node)} mixes the examples of a batch")
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
                raise Stop(f"{_label(node)} mixes the examples of a batch")
            if key == "pad" and float(call(torch.zeros(1, *source)).abs().sum()) != 0:
                raise Stop(f"{_label(node)} pads by something else than zeros")
            return Fixed(name, source, target, call)
        scalar = next((a for a in node.args if isinstance(a, int | float)), None)
        if scalar is not None and key in ("add", "sub", "mul", "truediv", "div") and len(node.args) == 2:
            return arithmetic(node, key, float(scalar), source)
        options = dict(node.kwargs)
        for option, value in zip(POSITIONS.get(key, ()), arguments, strict=False):
            options[option] = value
        if key in INVERSES and constants:
            return activation(name, key, options, source)
        raise Stop(f"{_label(node)} has no inverse that is known here")

    def _functional_affine(self, node: fx.Node, key: str, source: Shape, target: Shape) -> Affine:
        order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(order, node.args, strict=False)) | dict(node.kwargs)
        tensors = {}
        for part in ("weight", "bias"):
            value = given.get(part)
            if isinstance(value, fx.Node):
                if value.op != "get_attr":
                    raise Stop(f"the {part} of {_label(node)} is computed")
                tensors[part] = _attribute(self.model, str(value.target))
        if "weight" not in tensors:
            raise Stop(f"{_label(node)} has no weight that is a parameter")
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
