"""Sending signs only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense, straight_through
from gradleak.training import Tensors

__all__ = ["Sign", "sign"]


@dataclass(frozen=True)
class Sign(UpdateDefense):
    """Sending the sign of every coordinate (signSGD, Bernstein et al. 2018, Algorithm 1)."""

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return −1, 0 or 1 per coordinate; gradients pass straight through."""
        return {k: straight_through(t.detach().sign(), t) for k, t in tensors.items()}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``simulated`` with every coordinate of the wrong sign put to zero."""
        return {k: torch.where(simulated[k] * o > 0, simulated[k], 0.0).detach() for k, o in observed.items()}

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return infinity: a sign says nothing about the size."""
        return {k: torch.full_like(o, float("inf")) for k, o in observed.items()}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return that of ones everywhere."""
        return math.inf if coordinates is None else coordinates ** (1 / order)

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the coordinates of the wrong sign over the root mean square of their tensor, zero elsewhere.

        The division takes away the escape of shrinking everything to zero. Squared, this is a smooth hinge.
        """
        result = {}
        for name, o in observed.items():
            s = simulated[name]
            mean = s.square().mean()
            positive = mean > 0
            scale = torch.where(positive, torch.where(positive, mean, 1.0).rsqrt(), 1.0)
            result[name] = torch.where(s * o > 0, 0.0, s * scale)
        return result


def sign() -> Sign:
    """Return sending signs only as a defense."""
    return Sign()
