"""The linear layer that sees the flattened model input itself, found by running the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.structure.probe import probe_inputs, run_quietly

__all__ = ["InputLayer", "find_input_layer"]


@dataclass(frozen=True)
class InputLayer:
    """A linear layer that sees the flattened model input itself.

    Attributes:
        weight_name: name of its weight among the parameters.
        bias_name: name of its bias, None where it has none.

    """

    weight_name: str
    bias_name: str | None


def find_input_layer(model: nn.Module, params: Mapping[str, Tensor], shape: tuple[int, ...]) -> InputLayer | None:
    """Return the linear layer whose input is the flattened model input, found by running the model once, if any."""
    names = {id(p): k for k, p in model.named_parameters()}
    like = next(iter(params.values()))
    # Far beyond the usual range, so that a layer behind a clamp, a rectifier or an absolute value is not taken for one.
    probe = 64 * (probe_inputs(shape, 2, like) - 0.5)
    found: list[str] = []
    handles = []

    def look(name: str, value: Tensor) -> None:
        if value.ndim == 2 and value.numel() == probe.numel() and torch.equal(value, probe.flatten(1)):
            found.append(name)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and names.get(id(module.weight)) in params:
            handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: look(name, args[0])))
    try:
        run_quietly(model, params, probe)
    finally:
        for handle in handles:
            handle.remove()
    layers = [model.get_submodule(name) for name in found]
    with_bias = [m for m in layers if isinstance(m, nn.Linear) and m.bias is not None]
    for module in (*with_bias, *layers):
        if isinstance(module, nn.Linear):
            bias = names.get(id(module.bias)) if module.bias is not None else None
            return InputLayer(names[id(module.weight)], bias if bias in params else None)
    return None
