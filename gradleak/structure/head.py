"""The classification head of a model, found by running the model instead of by names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.structure.probe import probe_inputs, run_quietly

__all__ = ["Head", "features_and_logits", "find_head"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Head:
    """The last linear layer of a model, whose output is the model's output: logits = features · weightᵀ + bias.

    Attributes:
        module: name of the layer, as in ``model.get_submodule``.
        weight_name: name of its weight among the parameters.
        bias_name: name of its bias, None where it has none.
        weight: (C, d).
        bias: (C,), None where it has none.
        shared: the weight also serves another purpose (tied embedding, or the layer runs more than once), so its
            gradient is not the head's alone.
    """

    module: str
    weight_name: str
    bias_name: str | None
    weight: Tensor
    bias: Tensor | None
    shared: bool = False

    @property
    def classes(self) -> int:
        """Number of outputs C."""
        return int(self.weight.shape[0])

    @property
    def width(self) -> int:
        """Number of features d."""
        return int(self.weight.shape[1])

    def gradients(self, tensors: Tensors, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
        """Return the head's part of an update: weight (C, d) and bias (C,), in ``dtype``."""
        weight = tensors[self.weight_name].detach().reshape(self.classes, -1).to(dtype)
        return weight, None if self.bias_name is None else tensors[self.bias_name].detach().to(dtype)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (..., C) of ``features`` (..., d), in their precision."""
        out = features @ self.weight.to(features).T
        return out if self.bias is None else out + self.bias.to(features)


def find_head(model: nn.Module, params: Tensors, shape: tuple[int, ...]) -> Head | None:
    """Return the linear layer (or 1×1 convolution on a single pixel) whose output is the model's output, if any.

    The model is run once on dummy inputs in its own mode and left as it was: no buffer, hook or generator changes.

    Args:
        model: a module from a batch of inputs to logits (N, C).
        params: its trainable parameters by name.
        shape: shape of one input, without the batch axis.

    Returns:
        None if the output is not that of a linear layer, or the layer's weight is not among ``params``.
    """
    names = {id(p): k for k, p in model.named_parameters()}
    uses: dict[str, int] = {}
    owners = [(k, m, q) for k, m in model.named_modules() for q in m.parameters(recurse=False)]
    for _, _, q in owners:
        uses[names[id(q)]] = uses.get(names[id(q)], 0) + 1
    layers = {
        k: (names[id(m.weight)], names.get(id(m.bias)) if m.bias is not None else None)
        for k, m in model.named_modules()
        if (isinstance(m, nn.Linear) or _is_pointwise(m)) and id(m.weight) in names
    }
    calls: dict[str, list[tuple[int, Tensor]]] = {}

    def keep(name: str, output: Tensor) -> None:
        calls.setdefault(name, []).append((output.data_ptr(), output.detach().clone()))

    handles = [model.get_submodule(k).register_forward_hook(lambda _m, _i, o, name=k: keep(name, o)) for k in layers]
    like = next(iter(params.values()))
    probe = probe_inputs(shape, 2, like)
    try:
        output = run_quietly(model, params, probe)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor) or output.ndim != 2:
        return None
    for name, outputs in calls.items():
        pointer, value = outputs[-1]
        same = pointer == output.data_ptr() and value.numel() == output.numel()
        if not same or not torch.equal(value.reshape(output.shape), output):
            continue
        weight_name, bias_name = layers[name]
        if weight_name not in params:
            return None
        weight = params[weight_name].detach()
        # A bias the client keeps frozen is part of the function but not of the update.
        module = model.get_submodule(name)
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
        return Head(
            name,
            weight_name,
            bias_name if bias_name in params else None,
            weight.reshape(weight.shape[0], -1),
            params[bias_name].detach() if bias_name is not None and bias_name in params else bias,
            uses[weight_name] > 1 or len(outputs) > 1,
        )
    return None


def features_and_logits(model: nn.Module, params: Tensors, inputs: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return the head's inputs (N, d) and the logits (N, C) of ``inputs``; differentiable, traceable by torch.func."""
    seen: list[Tensor] = []
    handle = model.get_submodule(head.module).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    try:
        logits = run_quietly(model, params, inputs)
    finally:
        handle.remove()
    return seen[-1].flatten(1), logits


def _is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(module.kernel_size) == {1} and module.groups == 1
    )
