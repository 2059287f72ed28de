"""Reads the chain of operations off a model by running it once and recording every call of torch.

What a call is follows from what it does: layers and activations are known by the function that computes them, and every
other map is tried on random numbers. One that is linear is a linear map, whatever its name and wherever its constants
come from; names of model classes play no part, and assertions or lengths in ``forward`` are no obstacle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from gradleak.errors import NotApplicable
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed, Maximum, Shape, Step
from gradleak.structure.elementwise import ACTIVATIONS, Stop, activation
from gradleak.structure.probe import probe_inputs, run_quietly
from gradleak.training import output_tensors

__all__ = ["trace_chain"]

_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")
_POOLS = ("max_pool2d", "adaptive_max_pool2d")
_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda")
_FAR = 64.0
"""Spread of the random numbers: far beyond usual values, so that what clamps, rectifies or folds them shows."""
_EXACT = 1e-9
"""Relative deviation up to which float64 results agree."""


def trace_chain(model: nn.Module, shape: Shape, *, anchor: str | None = None) -> Chain:
    """Return the chain of ``model`` for inputs of ``shape``, back from its earliest linear layer with a trained bias.

    That layer sees one vector per example, so its weight gradient is an outer product, and input and output gradient
    follow from it exactly, whatever comes later in the model; without any such layer it leads back from the last layer,
    if the model ends with one. With ``anchor``, the name of a linear layer's weight, the
    chain leads back from that layer instead, bias or not.

    Raises:
        NotApplicable: the model does not run on such inputs, has no such layer, or does other things with other inputs.

    """
    recorded = _record(model, shape, 2)
    found, begin, end = _Reader(model, recorded).chain(anchor)
    again = _record(model, shape, 3, keep=(begin, end))
    params = {n: p.detach() for n, p in model.named_parameters()}
    same = len(again.calls) == len(recorded.calls) and begin in again.kept and end in again.kept
    if same:
        seen, ours = again.kept[end].flatten(1), found.forward(again.kept[begin], params)
        near = max(1e-3, 32 * torch.finfo(seen.dtype).eps) * float(seen.abs().max())
        same = ours.shape == seen.shape and float((ours - seen).abs().max()) <= near
    if not same:
        raise NotApplicable(
            "The model does not treat all inputs alike: its layers depend on values or on the number of examples, so "
            "they are no chain that could be solved; use matching."
        )
    return found


@final
@dataclass(frozen=True)
class _Ref:
    """Stands for a tensor that depends on the input: which output of which call; call 0 is the input itself."""

    call: int
    part: int


@final
@dataclass(frozen=True, eq=False)
class _Call:
    """One call of torch, with references in place of the tensors that depend on the model's input.

    Attributes:
        label: the module's path, or the function's name.
        kind: class of the module, "" outside of modules without parts.
        uses: the parameters that it takes, or that its constants are made of.
        out: shape of its output, None where that is no single tensor.

    """

    label: str
    kind: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    out: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def key(self) -> str:
        return _key(self.function)

    @cached_property
    def sources(self) -> list[_Ref]:
        return [a for a in tree_leaves((self.args, dict(self.kwargs))) if isinstance(a, _Ref)]

    @property
    def mutates(self) -> bool:
        raw = getattr(self.function, "__name__", "")
        inplace = raw.endswith("_") and not raw.endswith("__")
        return inplace or raw in ("__setitem__", "__set__") or bool(self.kwargs.get("inplace"))

    def run(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` in place of the only tensor that depends on the input."""

        def put(value: Any) -> Any:
            if isinstance(value, _Ref):
                return x.clone() if self.mutates else x
            if isinstance(value, Tensor):
                value = value.detach()
                return value.to(x.dtype) if value.is_floating_point() else value
            return value

        args, kwargs = tree_map(put, (self.args, dict(self.kwargs)))
        found = self.function(*args, **kwargs)
        if not isinstance(found, Tensor):
            raise TypeError("no single tensor")
        return found


def _key(function: Any) -> str:
    name = str(getattr(function, "__name__", function))
    # What is read off a tensor is named by the attribute (x.mT).
    return str(function.__self__.__name__) if name == "__get__" else name.strip("_")


@final
class _Recorder(TorchFunctionMode):
    """Keeps the calls that depend on the model's input."""

    def __init__(self, model: nn.Module, inputs: Tensor, keep: Sequence[int]) -> None:
        super().__init__()
        self.calls = [_Call("the model's input", "", torch.Tensor, out=tuple(inputs.shape), dtype=inputs.dtype)]
        self.refs = WeakTensorKeyDictionary()
        self.refs[inputs] = _Ref(0, 0)
        self.origins = WeakTensorKeyDictionary()
        for name, parameter in model.named_parameters():
            self.origins[parameter] = (name,)
        self.keep, self.kept = keep, {0: inputs}
        self.modules = {id(m): (n, type(m).__name__) for n, m in model.named_modules() if n and not any(m.children())}
        self.inside: list[tuple[str, str]] = []
        self.outputs: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        marked, options = tree_map(self._mark, (args, kwargs))
        found = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        uses = tuple(n for t in given for n in self.origins.get(t, ()))
        label, kind = self.inside[-1] if self.inside else (_key(func), "")
        call = _Call(label, kind, func, marked, options, uses)
        tensors = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        if not call.sources or self._asks_only(call):
            for tensor in tensors if uses else ():
                self.origins[tensor] = uses
            return found
        single = args[0] if call.mutates and found is None else found  # What was written into is changed from here on.
        if isinstance(single, Tensor):
            tensors, call = [single], replace(call, out=tuple(single.shape), dtype=single.dtype)
            if len(self.calls) in self.keep:
                self.kept[len(self.calls)] = single.clone()
        if not tensors:
            return found
        for part, tensor in enumerate(tensors):
            self.refs[tensor] = _Ref(len(self.calls), part)
        self.calls.append(call)
        return found

    def _mark(self, value: Any) -> Any:
        return self.refs.get(value, value) if isinstance(value, Tensor) else value

    @staticmethod
    def _asks_only(call: _Call) -> bool:
        """Whether a constant takes only its form from what depends on the input."""
        like = call.key in _CASTS or call.key.endswith("_as")
        return (
            call.key.endswith("_like") or call.key.startswith("new_") or (like and not isinstance(call.args[0], _Ref))
        )

    def enter(self, module: nn.Module, _args: Any) -> None:
        if id(module) in self.modules:
            self.inside.append(self.modules[id(module)])

    def leave(self, module: nn.Module, _args: Any, _out: Any) -> None:
        if id(module) in self.modules:
            self.inside.pop()


def _record(model: nn.Module, shape: Shape, count: int, keep: Sequence[int] = ()) -> _Recorder:
    inputs = probe_inputs(tuple(shape), count, next(model.parameters(), torch.zeros(())))
    recorder = _Recorder(model, inputs, keep)
    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(recorder.enter), module.register_forward_hook(recorder.leave)]
    try:
        with torch.no_grad(), recorder:
            found = run_quietly(model, dict(model.named_parameters()), inputs)
    finally:
        for handle in handles:
            handle.remove()
    recorder.outputs = [recorder.refs[t].call for t in output_tensors(found) if t in recorder.refs]
    return recorder


@final
class _Reader:
    """Makes steps of recorded calls."""

    def __init__(self, model: nn.Module, recorded: _Recorder) -> None:
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.trained = {n for n, p in model.named_parameters() if p.requires_grad}
        self.calls, self.outputs = recorded.calls, recorded.outputs
        self.users: list[list[int]] = [[] for _ in self.calls]
        self.uses: dict[str, int] = {}
        live = set(self.outputs) | {i for i, c in enumerate(self.calls) if c.mutates}
        for index in range(len(self.calls) - 1, 0, -1):
            if index not in live:
                continue
            call = self.calls[index]
            for source in {s.call for s in call.sources}:
                live.add(source)
                self.users[source].append(index)
            for name in call.uses:
                self.uses[name] = self.uses.get(name, 0) + 1
        self.live = live

    def chain(self, wanted: str | None) -> tuple[Chain, int, int]:
        """Return the chain, the call whose output it begins with, and the one that the anchor sees."""
        index, anchor = self._anchor(wanted)
        end = begin = self._source(index)
        steps: list[Step] = []
        stop = None
        try:
            while begin != 0:
                before = self._source(begin)
                steps[:0] = self._steps(begin, before)
                begin = before
        except Stop as reason:
            stop = str(reason)
        shape = self.calls[0].out
        assert shape is not None
        return Chain(shape[1:], tuple(steps), anchor, stop, self._head(index)), begin, end

    def _head(self, index: int) -> bool:
        """Whether the output of a call is the model's."""
        return bool(self.outputs) and all(self._same(o, index) for o in self.outputs)

    def _same(self, index: int, wanted: int) -> bool:
        """Whether the output of a call is that of another, at most shaped anew."""
        while index > wanted and len(self.calls[index].sources) == 1:
            before = self.calls[index].sources[0].call
            try:
                if not all(isinstance(s, Fixed) and s.reorders for s in self._steps(index, before)):
                    return False
            except Stop:
                return False
            index = before
        return index == wanted

    def _anchor(self, wanted: str | None) -> tuple[int, Affine]:
        reasons: list[str] = []
        last: tuple[int, Affine] | None = None
        for index, call in enumerate(self.calls):
            if call.key != "linear" or index not in self.live:
                continue
            try:
                before = self._source(index)
                step = self._layer(call, *self._shapes(before, index))
            except Stop:
                continue
            if step is None or (wanted is not None and step.weight_name != wanted):
                continue
            if len(step.in_shape) != 1:
                reasons.append(f"{step.name!r} sees several vectors per example")
            elif len(self.users[before]) > 1:
                reasons.append(f"the input of {step.name!r} is used elsewhere, too")
            elif wanted is None and (step.bias_name is None or step.bias_name not in self.trained):
                reasons.append(f"{step.name!r} has no bias that is trained")
                last = (index, step)
            else:
                return index, step
        if last is not None and self._head(last[0]):
            return last
        why = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise NotApplicable(
            f"The model has no linear layer with bias that sees one vector per example{why}, "
            "so no features can be read off exactly; use matching."
        )

    def _source(self, index: int) -> int:
        call = self.calls[index]
        if len(call.sources) != 1:
            raise Stop(f"{call.label!r} joins {max(len(call.sources), 2)} paths")
        return call.sources[0].call

    def _shapes(self, before: int, index: int) -> tuple[Shape, Shape]:
        source, call = self.calls[before], self.calls[index]
        for one in (source, call):
            if one.out is None:
                raise Stop(f"{one.label!r} ({one.kind or one.key}) has several outputs")
        assert source.out is not None
        assert call.out is not None
        if source.out[:1] != (2,) or call.out[:1] != (2,):
            raise Stop(f"{call.label!r} mixes the examples of a batch")
        return source.out[1:], call.out[1:]

    def _steps(self, index: int, before: int) -> list[Step]:
        call, shapes = self.calls[index], self._shapes(before, index)
        if len(self.users[before]) > 1:
            others = ", ".join(repr(self.calls[u].label) for u in self.users[before] if u != index)
            raise Stop(f"the path branches before {call.label!r} (it also feeds {others})")
        if call.key in _CASTS and call.dtype == self.calls[before].dtype:
            return []
        layer = self._layer(call, *shapes) if call.key in _LAYERS else None
        if layer is not None:
            return [layer] if not layer.linear or len(shapes[0]) == 1 else _per_vector(layer)
        if call.key in ACTIVATIONS:
            return [activation(call.label, call.key, call.args[1:], call.kwargs, shapes[0])]
        if call.key in _POOLS:
            return [_maximum(call, *shapes)]
        return _linear(call, *shapes)

    def _layer(self, call: _Call, source: Shape, target: Shape) -> Affine | None:
        """Return a layer whose weight and bias are parameters, None for others."""
        order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(order, call.args, strict=False)) | dict(call.kwargs)
        names: dict[str, str | None] = {}
        for part in ("weight", "bias"):
            names[part] = self.names.get(id(given.get(part)))
            if names[part] is None and given.get(part) is not None:
                return None
        for name in names.values():
            if name is not None and self.uses.get(name, 0) > 1:
                raise Stop(f"parameter {name!r} is used {self.uses[name]} times, so its gradient is a sum")
        options: dict[str, Any] = {k: given[k] for k in order[3:] if k in given}
        return _affine(call, names, given["weight"], source, target, **options)


def _per_vector(layer: Affine) -> list[Step]:
    """Return a linear layer of several vectors per example as a convolution of one tap, between two transpositions."""
    name, (width, out) = layer.name, (layer.in_shape[-1], layer.out_shape[-1])
    count, target = math.prod(layer.in_shape[:-1]), layer.out_shape
    return [
        Fixed(name, layer.in_shape, (width, count), lambda x: x.reshape(len(x), count, width).mT),
        replace(
            layer,
            in_shape=(width, count),
            out_shape=(out, count),
            taps=(1,),
            stride=(1,),
            padding=((0, 0),),
            dilation=(1,),
        ),
        Fixed(name, (out, count), target, lambda x: x.mT.reshape(len(x), *target)),
    ]


def _affine(
    call: _Call, names: dict[str, str | None], weight: Tensor, source: Shape, target: Shape, *,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Affine:  # fmt: skip
    taps = tuple(weight.shape[2:])

    def each(value: Any) -> Shape:
        return tuple(int(v) for v in value) if len(tuple(value)) == len(taps) else (int(value[0]),) * len(taps)

    stride, dilation = (each([v] if isinstance(v, int) else v) for v in (stride, dilation))
    if padding == "same":
        total = [d * (n - 1) for d, n in zip(dilation, taps, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = 0 if padding == "valid" else padding
        pads = tuple((p, p) for p in each([padding] if isinstance(padding, int) else padding))
    assert names["weight"] is not None
    return Affine(call.label, source, target, names["weight"], names["bias"], taps, stride, pads, dilation, groups)


def _maximum(call: _Call, source: Shape, target: Shape) -> Maximum:
    """Return max-pooling as a step; which values an output sees is told by a row, or a column, of ones at a time."""
    if len(source) != 3 or len(target) != 3:
        _refuse(call)
    (_, high, wide), (_, down, across) = source, target
    rows = call.run(torch.eye(high)[:, None, :, None].expand(-1, 1, -1, wide).contiguous())[:, 0, :, 0].T > 0
    columns = call.run(torch.eye(wide)[:, None, None, :].expand(-1, 1, high, -1).contiguous())[:, 0, 0, :].T > 0
    tall, broad = _members(rows), _members(columns)
    places = tall[:, None, :, None] * wide + broad[None, :, None, :]
    seen = (tall >= 0)[:, None, :, None] & (broad >= 0)[None, :, None, :]
    windows = torch.where(seen, places, -1).reshape(down * across, -1)
    return Maximum(call.label, source, target, call.run, windows)


def _members(mask: Tensor) -> Tensor:
    """Return the positions of the true values of every row, padded with −1."""
    first = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return torch.where(mask.gather(1, first), first, -1)


def _linear(call: _Call, source: Shape, target: Shape) -> list[Step]:
    """Return the steps of a map that random numbers show to be linear, up to a constant, for each example alone."""
    draw = torch.Generator().manual_seed(0)
    u, v = _FAR * torch.randn(2, 1, *source, generator=draw, dtype=torch.float64)
    third = 2 * u - v
    try:
        first, second, last = (call.run(torch.cat(pair)) for pair in ((u, v), (v, third), (third, torch.zeros_like(u))))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        _refuse(call)
    size = max(float(first.abs().max()), 1.0) if first.numel() and not first.is_complex() else math.nan

    def apart(a: Tensor, b: Tensor) -> bool:
        return not float((a - b).abs().max()) <= _EXACT * size  # NaN is apart.

    zero = last[1:]
    mixed = apart(first[1:], second[:1]) or apart(second[1:], last[:1])
    if mixed or apart(second[1:], 2 * first[:1] - first[1:]) or apart(zero, zero.nan_to_num()):
        _refuse(call, mixed=mixed)
    name = call.label
    if first.numel() == u.numel() * 2 and torch.equal(first.flatten(), torch.cat([u, v]).flatten()):
        return [Fixed(name, source, target, lambda x: x.reshape(x.shape[0], *target), True)]
    if source == target:
        scale = call.run(torch.ones(2, *source, dtype=torch.float64))[:1] - zero
        if not apart(first[:1], scale * u + zero):
            return [_scaled(name, scale, zero, source)]
    function = _each(call, torch.cat([u, v, third]), torch.cat([first, second[1:]]))
    if not bool(zero.any()):
        return [Fixed(name, source, target, function)]
    return [
        Fixed(name, source, target, lambda x: function(x) - zero.to(x)),
        _scaled(name, torch.ones_like(zero), zero, target),
    ]


def _scaled(name: str, scale: Tensor, shift: Tensor, shape: Shape) -> Elementwise:
    if bool((scale == 0).any()):
        raise Stop(f"{name!r} multiplies by zero")
    return Elementwise(
        name,
        shape,
        shape,
        lambda x: x * scale.to(x) + shift.to(x),
        lambda a: (a - shift.to(a)) / scale.to(a),
        affine=True,
    )


def _each(call: _Call, inputs: Tensor, wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the call as a function of any number of examples; it may hold constants for two of them."""
    try:
        if torch.allclose(call.run(inputs), wanted):
            return call.run
    except (RuntimeError, TypeError, ValueError, IndexError):
        pass
    return torch.vmap(lambda x: call.run(torch.stack([x, x]))[0])


def _refuse(call: _Call, *, mixed: bool = False) -> NoReturn:
    if call.key == "batch_norm":
        raise Stop(f"{call.label!r} is BatchNorm with batch statistics, which mix all values of a channel")
    if "dropout" in call.key:
        raise Stop(f"{call.label!r} is active dropout, whose mask is unknown")
    if mixed:
        raise Stop(f"{call.label!r} mixes the examples of a batch, or treats them differently")
    raise Stop(f"{call.label!r} ({call.kind or call.key}) has no inverse that is known here")
