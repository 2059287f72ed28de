"""How a round's gradients are computed: as written, from a traced graph, or compiled. The numbers agree to rounding.

What is traced or compiled is the *whole* gradient of the objective, all derivatives inside and all candidates along one
axis: a compiled model alone has no second derivatives. Nothing prepared is trusted before it has reproduced the
plain computation on the inputs it is about to be used on.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["BACKENDS", "agree", "can_compile", "compiled", "prepared", "remember", "traced"]

BACKENDS = ("eager", "trace", "compile")

Function = Callable[..., tuple[Tensor, Tensor]]
"""Tensors → objectives (A,) and gradients (A, D)."""

_KEPT = 16
_prepared: OrderedDict[Hashable, Function] = OrderedDict()
_lock = threading.Lock()
_COMPILERS = ("g++", "clang++", "c++")


def can_compile(device: torch.device) -> bool:
    """Tell whether what inductor needs is here: a C++ compiler, and Triton for a GPU."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name)
    return found and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


def traced(function: Function, arguments: Sequence[Tensor]) -> GraphModule:
    """Return ``function`` as a graph of elementary operations, for arguments of these shapes."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tracing warns about constants, which are meant to be constants here.
        graph = make_fx(function)(*arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def compiled(graph: GraphModule, arguments: Sequence[Tensor]) -> Function:
    """Return the compiled ``graph``, for arguments of these shapes."""
    # In channels-last order, grouped convolutions in float64 were read with the wrong strides (torch 2.13, CPU).
    options = {"layout_optimization": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: Function = torch._inductor.compile(graph, list(arguments), options=options)
        result(*arguments)
    return result


def agree(ours: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> bool:
    """Tell whether objectives and gradients agree row by row; gradients to 1e-9 relative in float64, 1e-4 in float32.

    Objectives may differ by ten times that: a sum over all weights rounds by its order. One below 0.01 is compared by a
    tenth of its root, since its terms are squares of small differences.
    """
    limit = {torch.float64: 1e-9, torch.float32: 1e-4}.get(plain[1].dtype, 1e-2)
    (value, gradient), (true, right) = ours, plain
    usual = torch.isfinite(true) & torch.isfinite(right).all(1)
    if not torch.equal(usual, torch.isfinite(value) & torch.isfinite(gradient).all(1)):
        return False
    true, right = true[usual], right[usual]
    near = (value[usual] - true).abs() <= 10 * limit * torch.maximum(true.abs(), 0.1 * true.abs().sqrt())
    close = (gradient[usual] - right).norm(dim=1) <= limit * right.norm(dim=1)
    return bool(near.all()) and bool(close.all())


def prepared(key: Hashable | None) -> Function | None:
    """Return what was remembered under ``key``."""
    with _lock:
        if key is None or key not in _prepared:
            return None
        _prepared.move_to_end(key)
        return _prepared[key]


def remember(key: Hashable | None, function: Function) -> None:
    """Keep ``function`` for later calls in this process; the oldest are forgotten."""
    if key is None:
        return
    with _lock:
        _prepared[key] = function
        _prepared.move_to_end(key)
        while len(_prepared) > _KEPT:
            _prepared.popitem(last=False)
