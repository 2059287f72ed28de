"""A function over a leading axis: together where its operations know batches, one after the other where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

__all__ = ["mapped"]


def mapped(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Return the stacked results of ``function`` for the entries along the first axis of all ``arguments``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A slow operation is slow in a loop, too.
            return vmap(function)(*arguments)
    except (RuntimeError, NotImplementedError):  # an operation that knows no batches of its own
        return torch.stack([function(*values) for values in zip(*arguments, strict=True)])
