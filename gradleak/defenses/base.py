"""What every defense is: a wrapper of the forward map.

The client runs the wrapped map. An attacker who knows the defense inverts the wrapped map, without the client's noise;
one who does not know it inverts ``.undefended``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.training import LocalTraining, Loss, Tensors
from gradleak.types import UpdateKind

__all__ = ["Defended", "Defense", "UpdateDefense", "straight_through"]


class Defense(ABC):
    """Something a client does so that its update tells less."""

    @abstractmethod
    def wrap(self, training: LocalTraining, *, seed: int = 0) -> LocalTraining:
        """Return ``training`` under this defense; ``seed`` is the client's own, for noise."""


class UpdateDefense(Defense):
    """A defense that changes the finished update and nothing before it."""

    def wrap(self, training: LocalTraining, *, seed: int = 0) -> Defended:
        """Return ``training`` with its update transformed."""
        return Defended(training, self, seed)

    @abstractmethod
    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what is sent instead of ``tensors``; pure, differentiable where rounding lets gradients straight on.

        ``generator`` draws the noise; None stands for the noise at its mean, which is what an attacker simulates.
        """

    @abstractmethod
    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the update nearest to ``simulated`` that this defense turns into ``observed`` (noise at its mean).

        ``simulated`` − ``explain(simulated, observed)`` is what a defense-aware attacker drives to zero: rounding
        leaves a cell in which all updates explain the observation, pruning an interval, clipping a ray.
        """

    @abstractmethod
    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return how far, as a standard deviation per coordinate, what was sent may lie from the update before.

        Least squares weighted by its inverse is the best linear estimate. 0 where nothing is lost (but a common
        factor), infinite where the value says nothing.
        """

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return the largest norm of what is sent for updates of at most this norm; infinite where nothing limits it.

        ``order`` is 1 or 2, ``coordinates`` the number of all numbers of an update, None if it is not known.
        """
        return math.inf

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return what a defense-aware attacker drives to zero; the true batch reaches zero, or the noise.

        ``simulated`` is an update before this defense, ``observed`` what was sent.
        """
        explained = self.explain(simulated, observed)
        return {k: simulated[k] - explained[k] for k in observed}

    def centered(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the residual with the center of a spread in place of the nearest number that explains ``observed``."""
        spread, told = self.deviation(observed), self.residual(simulated, observed)
        return {
            k: torch.where((d > 0) & torch.isfinite(d), simulated[k] - observed[k], told[k]) for k, d in spread.items()
        }


@dataclass(frozen=True)
class Defended(LocalTraining):
    """Local training, itself possibly defended, whose update passes through a defense before it leaves the client.

    ``seed`` is of the client's noise; equal seeds give equal noise, so reseed for every update. None (all an attacker
    has) puts the noise at its mean.
    """

    inner: LocalTraining
    defense: UpdateDefense
    seed: int | None = 0

    @property
    def loss(self) -> Loss:  # type: ignore[override]
        """The loss of the training inside."""
        return self.inner.loss

    @property
    def kind(self) -> UpdateKind:  # type: ignore[override]
        """The kind of the training inside."""
        return self.inner.kind

    @property
    def undefended(self) -> LocalTraining:
        """The training without any defense."""
        return self.inner.undefended

    @property
    def simulated(self) -> LocalTraining:
        """What an attacker simulates who knows the defenses: those of the finished update are left to ``residual``."""
        return self.inner.simulated

    def known(self, *, order: bool = False) -> Defended:
        """Return the defended map without the client's seeds."""
        return Defended(self.inner.known(order=order), self.defense, None)

    def reseed(self, seed: int) -> Defended:
        """Return the map with fresh noise; defenses inside get seeds of their own."""
        return replace(self, inner=self.inner.reseed(seed + 1_000_003), seed=seed)

    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the transformed update, by name, and the buffers after training."""
        tensors, after = self.inner.run(model, params, inputs, labels, buffers)
        generator = None
        if self.seed is not None:
            device = next(iter(tensors.values())).device
            generator = torch.Generator(device).manual_seed(self.seed)
        return self.defense.transform(tensors, generator), after

    def distort(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return what all defenses together make of an undefended update, with the noise at its mean."""
        return self.defense.transform(self.inner.distort(tensors))

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return what a defense-aware attacker drives to zero; ``simulated`` is the undefended simulation."""
        return self.defense.residual(self.inner.distort(simulated), observed)

    def centered(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the residual with the centers of the last defense's spreads."""
        return self.defense.centered(self.inner.distort(simulated), observed)

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return the standard deviation per coordinate that all defenses together leave."""
        inner, own = self.inner.deviation(observed), self.defense.deviation(observed)
        return {k: torch.hypot(inner[k], own[k]) for k in observed}


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, source: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, cotangent

    @staticmethod
    def jvp(ctx: Any, value: Tensor | None, source: Tensor) -> Tensor:
        return source.clone()


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """Return exactly ``value``, with the derivative of ``source`` (Bengio et al. 2013, straight-through estimator)."""
    result: Tensor = _StraightThrough.apply(value.detach(), source)  # type: ignore[no-untyped-call]
    return result
