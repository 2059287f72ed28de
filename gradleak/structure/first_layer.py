"""The linear layer that sees the model input, at most scaled, shifted and moved about, found by running the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.structure.chain import Elementwise, Fixed
from gradleak.structure.probe import linear_inputs, probe_inputs, run_quietly
from gradleak.structure.reader import trace_chain
from gradleak.training import output_tensors

__all__ = ["InputLayer", "find_input_layer", "find_rectified_layer", "reached_units", "sees_input"]

_FAR = 64.0
"""Spread of the probe: far beyond usual inputs, so that what clamps, rectifies or folds them shows."""


@dataclass(frozen=True)
class InputLayer:
    """A linear layer that sees the flattened model input itself.

    Attributes:
        module: name of the layer, as in ``model.get_submodule``.
        weight_name: name of its weight among the parameters.
        bias_name: name of its bias, None where it has none that is trained.
        before: what scales, shifts and moves the values before the layer, from the model's input on.
    """

    module: str
    weight_name: str
    bias_name: str | None
    before: tuple[Elementwise | Fixed, ...] = field(default=(), compare=False)

    def sees(self, inputs: Tensor) -> Tensor:
        """Return what the layer sees of model inputs (N, *shape), (N, n)."""
        for step in self.before:
            inputs = step.forward(inputs, {})
        return inputs.flatten(1)

    def undo(self, rows: Tensor) -> Tensor:
        """Return the flattened model inputs (K, n) of which the layer sees ``rows`` (K, n)."""
        for step in reversed(self.before):
            if isinstance(step, Elementwise):
                rows = step.inverse(rows.view(-1, *step.in_shape)).flatten(1)
            else:
                rows = step.adjoint(rows)
        return rows


def find_input_layer(
    model: nn.Module, params: Mapping[str, Tensor], shape: tuple[int, ...], *, mapped: bool = False
) -> InputLayer | None:
    """Return the linear layer whose input is the flattened model input, found by running the model once, if any.

    A layer that runs twice, or whose weight serves another layer too, does not count: its gradient is a sum. If
    ``mapped``, the values may be scaled, shifted and moved about before it (normalization inside the model).
    """
    names = {id(p): k for k, p in model.named_parameters()}
    like = next(iter(params.values()))
    probe = _FAR * (probe_inputs(shape, 2, like) - 0.5)
    found: list[InputLayer] = []
    try:
        seen = linear_inputs(model, params, probe)
    except NotApplicable:
        if any(isinstance(m, nn.Embedding) for m in model.modules()):
            return None  # It looks its inputs up, so that no such probe is one.
        layer = _mapped(model, params, shape)  # It may assert what its inputs are.
        if layer is None:
            raise
        return layer if mapped or not layer.before else None
    for name, values in seen.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        weight = names.get(id(module.weight), "")
        uses = sum(p is module.weight for m in model.modules() for p in m.parameters(recurse=False))
        if weight not in params or uses > 1 or len(values) > 1 or not _is_flat(values[0], probe):
            continue
        bias = None if module.bias is None else names.get(id(module.bias))
        found.append(InputLayer(name, weight, bias if bias in params else None))
    plain = next((f for f in found if f.bias_name is not None), found[0] if found else None)
    return _mapped(model, params, shape) if plain is None and mapped else plain


def _mapped(model: nn.Module, params: Mapping[str, Tensor], shape: tuple[int, ...]) -> InputLayer | None:
    """Return the first linear layer before which values are only scaled, shifted and moved about, if there is one."""
    names = {id(p): k for k, p in model.named_parameters()}
    for name, module in model.named_modules():
        weight = names.get(id(module.weight), "") if isinstance(module, nn.Linear) else ""
        if weight not in params or params[weight].shape[1:].numel() != math.prod(shape):
            continue
        assert isinstance(module, nn.Linear)
        try:
            chain = trace_chain(model, shape, anchor=weight)
        except NotApplicable:
            continue
        if chain.stop is None and all(isinstance(s, Elementwise | Fixed) and _moves(s) for s in chain.steps):
            steps = [s for s in chain.steps if isinstance(s, Elementwise) or (isinstance(s, Fixed) and not s.reorders)]
            bias = None if module.bias is None else names.get(id(module.bias))
            return InputLayer(name, weight, bias if bias in params else None, tuple(steps))
    return None


def _moves(step: Elementwise | Fixed) -> bool:
    """Tell whether a step scales and shifts every value, or only moves them about."""
    if isinstance(step, Elementwise):
        return step.affine
    if step.inputs != step.outputs:
        return False
    probe = torch.rand(2, step.inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return step.reorders or torch.allclose(step.adjoint(step.apply(probe)), probe)


def sees_input(model: nn.Module, params: Mapping[str, Tensor], layer: InputLayer, inputs: Tensor) -> bool:
    """Tell whether the layer sees the model input at ``inputs`` (N, *shape) and around, where nothing limits it."""
    draw = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, inputs.shape, generator=draw) * 2 - 1).to(inputs)
    step = 1e-2 * signs * inputs.abs().clamp_min(float(inputs.abs().mean()) + 1e-30)
    around = torch.cat([inputs, inputs + step, inputs - step])
    try:
        seen = linear_inputs(model, params, around).get(layer.module, [])
    except NotApplicable:  # What it asserts of its inputs may just hold here.
        around = inputs
        seen = linear_inputs(model, params, around).get(layer.module, [])
    if len(seen) != 1 or seen[0].numel() != around.numel():
        return False
    wanted = layer.sees(around)
    return torch.allclose(seen[0].flatten(1), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def find_rectified_layer(
    model: nn.Module, params: Mapping[str, Tensor], layer: InputLayer, shape: tuple[int, ...]
) -> str | None:
    """Return the weight of a linear layer that sees max(z, 0) of the outputs z of ``layer``, None if none does."""
    names = {id(p): k for k, p in model.named_parameters()}
    probe = _FAR * (probe_inputs(shape, 2, next(iter(params.values()))) - 0.5)
    bias = None if layer.bias_name is None else params[layer.bias_name]
    wanted = torch.nn.functional.linear(probe.flatten(1), params[layer.weight_name], bias).clamp_min(0)
    for name, values in linear_inputs(model, params, probe).items():
        weight = names.get(id(model.get_submodule(name).weight), "")
        uses = sum(p is model.get_submodule(name).weight for m in model.modules() for p in m.parameters(recurse=False))
        same = len(values) == 1 and values[0].shape == wanted.shape
        if same and weight in params and uses == 1 and torch.allclose(values[0], wanted, rtol=1e-4, atol=1e-4):
            return weight
    return None


def reached_units(model: nn.Module, params: Mapping[str, Tensor], layer: InputLayer, inputs: Tensor) -> Tensor:
    """Return which outputs (N, m) of ``layer`` the model's own outputs depend on at ``inputs`` (N, *shape), nearby."""
    kept: list[Tensor] = []

    def cut(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.get_submodule(layer.module).register_forward_hook(cut)
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            outputs = output_tensors(run_quietly(model, params, inputs))
            total = sum((o * torch.randn(o.shape, generator=draw, dtype=torch.float64).to(o)).sum() for o in outputs)
            (slopes,) = torch.autograd.grad(torch.as_tensor(total), kept[-1])
    finally:
        handle.remove()
    return slopes != 0


def _is_flat(value: Tensor, inputs: Tensor) -> bool:
    return value.ndim == 2 and value.numel() == inputs.numel() and torch.equal(value, inputs.flatten(1))
