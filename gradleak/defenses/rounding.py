"""Rounding to 16-bit floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense, straight_through
from gradleak.errors import InvalidInput
from gradleak.formats import FORMATS
from gradleak.training import Tensors

__all__ = ["Rounding", "bfloat16", "half_precision"]


@dataclass(frozen=True)
class Rounding(UpdateDefense):
    """Rounding to the nearest number of a 16-bit format; tensors keep their own dtype (Zhu et al. 2019, Section 5.1).

    The format is ``torch.float16`` (11 significant bits, 6e-8 … 65504) or ``torch.bfloat16`` (8 bits, float32's range).
    Numbers beyond it become infinite, as they do on a real client; such an update is refused further on.
    """

    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise InvalidInput(f"Rounding knows no {self.dtype}; use torch.float16 or torch.bfloat16.")

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the rounded tensors; gradients pass straight through."""
        return {k: straight_through(t.detach().to(self.dtype).to(t.dtype), t) for k, t in tensors.items()}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the nearest update that rounds to ``observed``."""
        return {k: simulated[k].detach().clamp(*self._cell(o)) for k, o in observed.items()}

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return the width of the cell over √12: errors of rounding are uniform."""
        cells = {k: self._cell(o) for k, o in observed.items()}
        return {k: (high - low) / 12**0.5 for k, (low, high) in cells.items()}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return twice the norm: a number of half the smallest one becomes that."""
        return 2 * norm

    def _cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bits, smallest = FORMATS[self.dtype]
        mantissa, exponent = torch.frexp(x)
        unit = exponent - 1 - bits  # exponent of the distance to the next number away from zero
        # Below a power of two numbers lie twice as dense.
        inward = torch.where(mantissa.abs() == 0.5, unit - 1, unit)
        out, inn = (torch.ldexp(torch.full_like(x, 0.5), e.clamp(min=smallest)) for e in (unit, inward))
        zero, positive = x == 0, x > 0
        return x - torch.where(positive, inn, out), x + torch.where(positive | zero, out, inn)


def half_precision() -> Rounding:
    """Return rounding to float16 as a defense ("FP-16" of Zhu et al. 2019)."""
    return Rounding(torch.float16)


def bfloat16() -> Rounding:
    """Return rounding to bfloat16 as a defense."""
    return Rounding(torch.bfloat16)
