"""Activations and per-value maps: their inverses, and how they are read off a graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradleak.structure.chain import Elementwise, Shape

__all__ = ["INVERSES", "MODULES", "OPTIONS", "POSITIONS", "Stop", "activation", "arithmetic", "batch_norm"]


class Stop(Exception):
    """Why the walk through the graph cannot pass a node."""


def arithmetic(node: fx.Node, key: str, value: float, shape: Shape) -> Elementwise:
    """Return the step of an addition, multiplication or division by the number ``value``."""
    calls: dict[str, Callable[[Any, Any], Tensor]]
    calls = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
    call: Callable[[Any, Any], Tensor] = calls.get(key, operator.truediv)
    left = isinstance(node.args[0], fx.Node)
    if key in ("truediv", "div") and not left:
        raise Stop(f"{node.name!r} divides by what is sought")

    def function(x: Tensor) -> Tensor:
        return call(x, value) if left else call(value, x)

    shift = float(function(torch.tensor(0.0, dtype=torch.float64)))
    scale = float(function(torch.tensor(1.0, dtype=torch.float64))) - shift
    if scale == 0:
        raise Stop(f"{node.name!r} multiplies by zero")
    return Elementwise(node.name, shape, shape, function, lambda a: (a - shift) / scale, affine=True)


def batch_norm(name: str, module: _BatchNorm, shape: Shape) -> Elementwise:
    """Return BatchNorm with running statistics as a per-value map."""
    if module.training or module.running_mean is None or module.running_var is None:
        raise Stop(f"{name!r} is BatchNorm with batch statistics, which mix all values of a channel")
    ones = (-1, *[1] * (len(shape) - 1))
    scale = torch.rsqrt(module.running_var.detach().double() + module.eps)
    scale = scale if module.weight is None else scale * module.weight.detach().double()
    shift = -module.running_mean.detach().double() * scale
    shift = shift if module.bias is None else shift + module.bias.detach().double()
    if bool((scale == 0).any()):
        raise Stop(f"{name!r} multiplies a channel by zero")
    scale, shift = scale.reshape(ones), shift.reshape(ones)
    return Elementwise(
        name,
        shape,
        shape,
        lambda x: x * scale.to(x) + shift.to(x),
        lambda a: (a - shift.to(a)) / scale.to(a),
        affine=True,
    )


OPTIONS = ("negative_slope", "alpha", "beta", "threshold")
POSITIONS = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "softplus": ("beta", "threshold")}
MODULES = (
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
INVERSES: dict[str, Callable[..., tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = {
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
INVERSES["leaky_relu"] = INVERSES["leakyrelu"]
_ACCEPTED = {
    "leakyrelu": ("negative_slope",),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "softplus": ("beta", "threshold"),
}


def activation(name: str, key: str, options: Mapping[str, Any], shape: Shape) -> Elementwise:
    """Return the activation named ``key`` as a step."""
    chosen = {k: float(v) for k, v in options.items() if k in _ACCEPTED.get(key, ())}
    if key in ("leakyrelu", "leaky_relu") and chosen.get("negative_slope", 0.01) <= 0:
        raise Stop(f"{name!r} is a leaky ReLU whose slope is not positive")
    function, inverse = INVERSES[key](**chosen)
    return Elementwise(name, shape, shape, function, inverse, key == "relu")
