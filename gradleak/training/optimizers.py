"""Optimizers as pure functions: the arithmetic of ``torch.optim``, differentiable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

__all__ = ["SGD", "Adam", "Optimizer"]

State = Mapping[str, Mapping[str, Tensor]]
"""Slot name → parameter name → tensor."""


class Optimizer(ABC):
    """A rule that turns gradients into changes of the parameters."""

    lr: float

    @abstractmethod
    def start(self, params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the state before the first step."""

    @abstractmethod
    def step(
        self, index: int, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: State
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Return what to add to ``params`` in step ``index`` (from 0), and the next state."""


def _check(lr: float, weight_decay: float) -> None:
    if not lr > 0 or not weight_decay >= 0:
        raise InvalidInput(
            f"An optimizer cannot use lr={lr} with weight_decay={weight_decay}; take lr > 0 and weight_decay >= 0."
        )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent as ``torch.optim.SGD`` computes it (dampening 0).

    Attributes:
        lr: step size.
        momentum: in [0, 1).
        weight_decay: multiple of the parameters added to the gradient.
        nesterov: Nesterov momentum; needs momentum > 0.
    """

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)
        if not 0 <= self.momentum < 1 or (self.nesterov and self.momentum == 0):
            raise InvalidInput(
                f"SGD has no momentum={self.momentum} with nesterov={self.nesterov}; "
                "take momentum in [0, 1), and above 0 for Nesterov."
            )

    def start(self, params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return zero momentum, or nothing where there is none."""
        return {"momentum": {k: torch.zeros_like(p) for k, p in params.items()}} if self.momentum else {}

    def step(
        self, index: int, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: State
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Return −lr × (momentum-averaged) gradient."""
        g = dict(gradients)
        if self.weight_decay:
            g = {k: v + self.weight_decay * params[k] for k, v in g.items()}
        if not self.momentum:
            return {k: -self.lr * v for k, v in g.items()}, {}
        m = {k: self.momentum * state["momentum"][k] + v for k, v in g.items()}
        used = {k: v + self.momentum * m[k] for k, v in g.items()} if self.nesterov else m
        return {k: -self.lr * v for k, v in used.items()}, {"momentum": m}


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, Algorithm 1) as ``torch.optim.Adam`` computes it; AdamW with ``decoupled``.

    Its update is invertible only above ``eps``: a first step is g / (|g| + eps), almost the sign of the gradient.

    Attributes:
        lr: step size.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: multiple of the parameters added to the gradient, or, decoupled, to the step.
        decoupled: decay the weights beside the adaptive step (Loshchilov and Hutter 2019).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas) or not self.eps > 0:
            raise InvalidInput(
                f"Adam has no betas={self.betas} with eps={self.eps}; take two betas in [0, 1) and eps > 0."
            )

    def start(self, params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return zero moments."""
        return {slot: {k: torch.zeros_like(p) for k, p in params.items()} for slot in ("first", "second")}

    def step(
        self, index: int, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: State
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Return −lr × corrected first moment / (root of the corrected second moment + eps)."""
        (b1, b2), count = self.betas, index + 1
        g = dict(gradients)
        if self.weight_decay and not self.decoupled:
            g = {k: v + self.weight_decay * params[k] for k, v in g.items()}
        first = {k: b1 * state["first"][k] + (1 - b1) * v for k, v in g.items()}
        second = {k: b2 * state["second"][k] + (1 - b2) * v * v for k, v in g.items()}
        size, root = self.lr / (1 - b1**count), (1 - b2**count) ** 0.5
        change = {k: -size * first[k] / (_root(second[k]) / root + self.eps) for k in g}
        if self.weight_decay and self.decoupled:
            change = {k: v - self.lr * self.weight_decay * params[k] for k, v in change.items()}
        return change, {"first": first, "second": second}


def _root(x: Tensor) -> Tensor:
    # The root has an infinite slope at 0 (a weight without gradient), which would turn into NaN: take 0 there.
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
