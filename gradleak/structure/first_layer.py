"""The linear layer that sees the flattened model input itself, found by running the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.structure.probe import linear_inputs, probe_inputs, run_quietly
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
    """

    module: str
    weight_name: str
    bias_name: str | None


def find_input_layer(model: nn.Module, params: Mapping[str, Tensor], shape: tuple[int, ...]) -> InputLayer | None:
    """Return the linear layer whose input is the flattened model input, found by running the model once, if any.

    A layer that runs twice, or whose weight serves another layer too, does not count: its gradient is a sum.
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
        raise
    for name, values in seen.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        weight = names.get(id(module.weight), "")
        uses = sum(p is module.weight for m in model.modules() for p in m.parameters(recurse=False))
        if weight not in params or uses > 1 or len(values) > 1 or not _is_flat(values[0], probe):
            continue
        bias = None if module.bias is None else names.get(id(module.bias))
        found.append(InputLayer(name, weight, bias if bias in params else None))
    return next((f for f in found if f.bias_name is not None), found[0] if found else None)


def sees_input(model: nn.Module, params: Mapping[str, Tensor], layer: InputLayer, inputs: Tensor) -> bool:
    """Tell whether the layer sees the model input at ``inputs`` (N, *shape) and around, where nothing limits it."""
    draw = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, inputs.shape, generator=draw) * 2 - 1).to(inputs)
    step = 1e-2 * signs * inputs.abs().clamp_min(float(inputs.abs().mean()) + 1e-30)
    around = torch.cat([inputs, inputs + step, inputs - step])
    seen = linear_inputs(model, params, around).get(layer.module, [])
    return len(seen) == 1 and _is_flat(seen[0], around)


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
