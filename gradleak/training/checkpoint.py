"""Recomputation instead of storage, under ``torch.func`` as well as under plain autograd.

``torch.utils.checkpoint`` works through saved-tensor hooks, which ``torch.func`` refuses. Here a function keeps only
its arguments, and its derivative is computed by another such function: so nothing inside is stored at any order of
differentiation, also where ``torch.func.grad`` records a graph of its own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

__all__ = ["checkpoint"]

Function = Callable[..., tuple[Tensor, ...]]


def checkpoint(function: Function, *arguments: Tensor) -> tuple[Tensor, ...]:
    """Return ``function(*arguments)`` without storing what it computes on the way; the derivatives recompute it.

    The function is pure and returns a tuple of floating-point tensors. Tensors that are differentiated or vmapped must
    be arguments, not closed over; those with integers are constants.
    """
    result: tuple[Tensor, ...] = _Checkpoint.apply(function, *arguments)  # type: ignore[no-untyped-call]
    return result


class _Checkpoint(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Function, *arguments: Tensor) -> tuple[Tensor, ...]:
        # An output that is an argument would confuse autograd's bookkeeping of views.
        known = {id(a) for a in arguments}
        return tuple(o.clone() if id(o) in known else o for o in function(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        arguments = ctx.saved_tensors
        floating = [i for i, a in enumerate(arguments) if a.is_floating_point()]
        pulled = checkpoint(_pullback(ctx.function, len(arguments), floating), *arguments, *cotangents)
        result: list[Tensor | None] = [None] * (len(arguments) + 1)
        for i, value in zip(floating, pulled, strict=True):
            result[i + 1] = value
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        arguments = ctx.saved_tensors
        moving = [i for i, t in enumerate(tangents[1:]) if t is not None]
        # Under vmap either may be an expanded view, which forward mode cannot pair with the other.
        primals = tuple(arguments[i].clone() for i in moving)
        directions = tuple(tangents[i + 1].clone() for i in moving)
        return tuple(jvp(_restrict(ctx.function, arguments, moving), primals, directions)[1])


def _restrict(function: Function, arguments: tuple[Tensor, ...], free: list[int]) -> Function:
    def restricted(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(arguments)
        for i, value in zip(free, values, strict=True):
            full[i] = value
        return function(*full)

    return restricted


def _pullback(function: Function, count: int, free: list[int]) -> Function:
    def pullback(*values: Tensor) -> tuple[Tensor, ...]:
        arguments, cotangents = values[:count], values[count:]
        pull = vjp(_restrict(function, arguments, free), *(arguments[i] for i in free))[1]
        return tuple(pull(tuple(cotangents)))

    return pullback
