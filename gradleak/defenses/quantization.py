"""Uniform quantization to a few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense, straight_through
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["Quantization", "int8"]


@dataclass(frozen=True)
class Quantization(UpdateDefense):
    """Symmetric uniform quantization of each tensor: round(x / s) · s with s = max|x| / (2^(bits−1) − 1).

    Bits are 2 … 16, the sign included. Rounding is to nearest, ties to even; zero is a level; the scale of every tensor
    travels with it. Zhu et al. 2019 ("8 bit") do not state their scheme.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InvalidInput(f"Quantization cannot use {self.bits} bits; give 2 to 16.")

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the quantized tensors; gradients pass straight through."""
        result = {}
        for name, t in tensors.items():
            scale = self._scale(t.detach())
            levels = (t.detach() / torch.where(scale > 0, scale, 1.0)).round()
            result[name] = straight_through(levels * scale, t)
        return result

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the nearest update within half a level of ``observed`` and no larger than its largest coordinate."""
        result = {}
        for name, o in observed.items():
            half, most = self._scale(o) / 2, o.abs().amax()
            largest = o.abs() > most - half
            # The largest coordinate sets the scale, so it is known to the last digit if it is the only one up there.
            half = torch.where(largest & (largest.sum() == 1), 0.0, half)
            result[name] = simulated[name].detach().clamp(torch.maximum(o - half, -most), torch.minimum(o + half, most))
        return result

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return the distance of levels over √12: errors of rounding are uniform."""
        return {k: (self._scale(o) / 12**0.5).expand_as(o).clone() for k, o in observed.items()}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return twice the norm: a number of half a level becomes one level."""
        return 2 * norm

    def _scale(self, x: Tensor) -> Tensor:
        return x.abs().amax() / (2 ** (self.bits - 1) - 1)


def int8() -> Quantization:
    """Return symmetric 8-bit quantization of each tensor as a defense."""
    return Quantization(8)
