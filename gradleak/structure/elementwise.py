"""Activations: the functions that compute them, and their inverses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.structure.chain import Elementwise, Shape

__all__ = ["ACTIVATIONS", "Stop", "activation"]

Pointwise = Callable[[Tensor], Tensor]


class Stop(Exception):
    """Why the walk through the calls cannot pass one."""


def _inside(a: Tensor, low: float, high: float) -> Tensor:
    # Rounding may push a recovered value onto or over the end of the activation's range.
    margin = 4 * torch.finfo(a.dtype).tiny ** 0.5 if low == 0 and math.isinf(high) else torch.finfo(a.dtype).eps
    return a.clamp(low + margin if math.isfinite(low) else None, high - margin if math.isfinite(high) else None)


def _softplus_inverse(a: Tensor, beta: float) -> Tensor:
    scaled = _inside(a * beta, 0.0, math.inf)
    return (scaled + torch.log(-torch.expm1(-scaled))) / beta


def _elu(function: Pointwise, alpha: float, scale: float = 1.0, slope: float = 1.0) -> tuple[Pointwise, Pointwise]:
    """Return scale · (x above zero, alpha · (exp(slope · x) − 1) below) and its inverse."""

    def inverse(a: Tensor) -> Tensor:
        a = a / scale
        return torch.where(a > 0, a, torch.log1p(_inside(a.clamp(max=0) / alpha, -1.0, 1.0)) / slope)

    return function, inverse


def _leaky(slope: float | Tensor) -> tuple[Pointwise, Pointwise]:
    """Return the leaky ReLU and its inverse; a tensor holds the slopes of all channels."""
    slope = slope.detach() if isinstance(slope, Tensor) else slope
    if not bool(torch.as_tensor(slope > 0).all()):
        raise ValueError("it has a slope that is not positive")

    def of(x: Tensor) -> float | Tensor:
        return slope.to(x).view(-1, *[1] * (x.ndim - 2)) if isinstance(slope, Tensor) else slope

    return lambda x: torch.where(x > 0, x, x * of(x)), lambda a: torch.where(a > 0, a, a / of(a))


def _folded(function: Pointwise, low: float) -> tuple[Pointwise, Pointwise]:
    """Return a function that falls up to ``low`` and rises from there, and the inverse of the rising branch."""

    def inverse(a: Tensor) -> Tensor:
        below, above = torch.full_like(a, low), a.clamp_min(0) + 1
        for _ in range(60):
            middle = (below + above) / 2
            over = function(middle) > a
            below, above = torch.where(over, below, middle), torch.where(over, middle, above)
        return (below + above) / 2

    return function, inverse


_LOWEST = {"gelu": -0.7517915524667, "silu": -1.2784645427610, "mish": -1.1924406719870}
"""Where the functions that fall before they rise are least."""
_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
ACTIVATIONS: dict[str, Callable[..., tuple[Pointwise, Pointwise]]] = {
    "sigmoid": lambda: (torch.sigmoid, lambda a: torch.logit(_inside(a, 0.0, 1.0))),
    "tanh": lambda: (torch.tanh, lambda a: torch.atanh(_inside(a, -1.0, 1.0))),
    "relu": lambda: (F.relu, lambda a: a.clamp(min=0)),
    "relu6": lambda: (F.relu6, lambda a: a.clamp(0, 6)),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: (
        lambda x: F.hardtanh(x, min_val, max_val),
        lambda a: a.clamp(min_val, max_val),
    ),
    "hardsigmoid": lambda: (lambda x: (x / 6 + 0.5).clamp(0, 1), lambda a: 6 * a.clamp(0, 1) - 3),
    "leaky_relu": lambda negative_slope=0.01: _leaky(negative_slope),
    "prelu": _leaky,
    "elu": lambda alpha=1.0: _elu(lambda x: F.elu(x, alpha), alpha),
    "celu": lambda alpha=1.0: _elu(lambda x: F.celu(x, alpha), alpha, slope=1 / alpha),
    "selu": lambda: _elu(F.selu, *_SELU),
    "softplus": lambda beta=1.0, threshold=20.0: (
        lambda x: F.softplus(x, beta, threshold),
        lambda a: torch.where(a * beta > threshold, a, _softplus_inverse(a, beta)),
    ),
    "softsign": lambda: (F.softsign, lambda a: a / (1 - _inside(a, -1.0, 1.0).abs())),
    "log_sigmoid": lambda: (F.logsigmoid, lambda a: -_softplus_inverse(-a, 1.0)),
    "gelu": lambda approximate="none": _folded(lambda x: F.gelu(x, approximate=approximate), _LOWEST["gelu"]),
    "silu": lambda: _folded(F.silu, _LOWEST["silu"]),
    "mish": lambda: _folded(F.mish, _LOWEST["mish"]),
    "exp": lambda: (torch.exp, lambda a: torch.log(_inside(a, 0.0, math.inf))),
    "log": lambda: (torch.log, torch.exp),
    "log1p": lambda: (torch.log1p, torch.expm1),
    "sinh": lambda: (torch.sinh, torch.asinh),
    "asinh": lambda: (torch.asinh, torch.sinh),
}
"""By the name of torch's function: its options → the map, which increases, and its inverse."""
_CLIPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardsigmoid": (0.0, 1.0)}
"""Outputs at which they hide the input."""


def activation(name: str, key: str, args: Sequence[Any], options: Mapping[str, Any], shape: Shape) -> Elementwise:
    """Return the activation that torch's function ``key`` computes as a step, without its option ``inplace``."""
    make = ACTIVATIONS[key]
    try:
        function, inverse = make(*(a for a in args if not isinstance(a, bool)), **{
            k: v for k, v in options.items() if k != "inplace"
        })  # fmt: skip
    except (TypeError, ValueError) as reason:
        raise Stop(f"{name!r} ({key}) has no inverse: {reason}") from reason
    bounds = _CLIPS.get(key, (-math.inf, math.inf))
    if key == "hardtanh":
        low, high = function(torch.tensor([-math.inf, math.inf], dtype=torch.float64)).tolist()
        bounds = low, high
    return Elementwise(name, shape, shape, function, inverse, bounds, folds=key in _LOWEST)
