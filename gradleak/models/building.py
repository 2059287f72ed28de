"""What all model families share: named activations, normalizations and initializations, and private randomness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradleak.errors import InvalidInput, UnknownName

__all__ = ["Activation", "Initialization", "Norm", "activation", "build", "image_sides", "norm", "positive"]

Model = TypeVar("Model", bound=nn.Module)

Activation = Literal["sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "silu", "gelu", "identity"]
Norm = Literal["batch", "group", "none"]
Initialization = Literal["default", "dlg", "he"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}

_TOKEN = 0.02
"""Deviation of tokens and positions, which are no layers (Dosovitskiy et al. 2021, in their code)."""


def activation(name: str) -> nn.Module:
    """Return a new activation module; none works in place, since double backward and vmap need its input.

    Raises:
        UnknownName: there is no activation of that name.

    """
    if name not in _ACTIVATIONS:
        raise UnknownName("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]()


def norm(name: str, channels: int) -> nn.Module:
    """Return a new normalization module for ``channels`` channels.

    "group" has groups of 16 channels (Wu & He 2018, Section 4.1, Table 3), or one group where that does not divide
    ``channels``; "none" is the identity.

    Raises:
        UnknownName: there is no normalization of that name.

    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)
    if name == "none":
        return nn.Identity()
    raise UnknownName("normalization", name, ("batch", "group", "none"))


def image_sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or two."""
    return (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))


def positive(**sizes: int) -> None:
    """Check that every named size is a positive whole number.

    Raises:
        InvalidInput: with the first one that is not.

    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"A model cannot have {name}={value!r}; pass a whole number of at least 1.")


def build(make: Callable[[], Model], init: str, seed: int | torch.Generator | None) -> Model:
    """Return ``make()`` with every parameter drawn from a private generator.

    The module is made on the meta device, so that PyTorch's own constructors draw nothing: with a seed or a generator
    the global random state is untouched.

    Args:
        make: makes the module; it may hold linear, convolution and normalization layers.
        init: "default" (PyTorch's: weights and biases U(±1/√fan_in)), "dlg" (every weight and bias U(−0.5, 0.5),
            normalization layers included, as in the code of Zhu et al. 2019), or "he" (weights N(0, 2/fan_in), biases
            zero; He et al. 2015, Section 2.2, Equation 10).
        seed: an integer seeds a new generator; None draws from PyTorch's global one, as its own layers do.

    Raises:
        UnknownName: there is no initialization of that name.

    """
    if init not in ("default", "dlg", "he"):
        raise UnknownName("initialization", init, ("default", "dlg", "he"))
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for module in model.modules():
            if not type(module).__module__.startswith("torch.nn"):
                for value in module.parameters(recurse=False):  # tokens and positions
                    if init == "dlg":
                        value.uniform_(-0.5, 0.5, generator=generator)
                    else:
                        value.normal_(0, _TOKEN, generator=generator)
            if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()  # running statistics as well
                if init != "dlg":
                    continue
            if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm | nn.GroupNorm | nn.LayerNorm):
                _draw(module, init, generator)
    return model


def _draw(module: nn.Module, init: str, generator: torch.Generator | None) -> None:
    weight, values = module.weight, [v for v in (module.weight, module.bias) if isinstance(v, Tensor)]
    assert isinstance(weight, Tensor)
    if init == "he":
        for value in values[1:]:
            value.zero_()
        weight.normal_(0, math.sqrt(2 / weight[0].numel()), generator=generator)
        return
    bound = 0.5 if init == "dlg" else 1 / math.sqrt(weight[0].numel())
    for value in values:
        value.uniform_(-bound, bound, generator=generator)
