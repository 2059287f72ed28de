"""Bounding every number of an update by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["Clamping", "clamp"]

_ROUNDED = 1e-6
"""By how much the bound may have been rounded, relative: updates are stored in float32."""


@dataclass(frozen=True)
class Clamping(UpdateDefense):
    """Limiting every coordinate to [−bound, bound], in the update's units (Shokri & Shmatikov 2015, Section 5.2).

    After pruning, it is the percentile filter of NVFlare: ``compose(prune(0.1, globally=True), clamp(0.01))``.
    """

    bound: float

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf"):
            raise InvalidInput(f"Clamping cannot use bound={self.bound}; give a finite number above 0.")

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the limited tensors."""
        return {k: t.clamp(-self.bound, self.bound) for k, t in tensors.items()}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed`` where it is within the bound, and at it the simulated number if that is beyond."""
        return {
            k: torch.where(self._at(o), o.sign() * (simulated[k].detach() * o.sign()).clamp_min(self.bound), o)
            for k, o in observed.items()
        }

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return 0 within the bound, and infinity at it: the number may be anything beyond."""
        return {k: torch.where(self._at(o), float("inf"), 0.0).to(o) for k, o in observed.items()}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return the limit of one coordinate times the number of them, or its root."""
        return norm if coordinates is None else min(norm, self.bound * coordinates ** (1 / order))

    def _at(self, observed: Tensor) -> Tensor:
        return observed.abs() >= self.bound * (1 - _ROUNDED)


def clamp(bound: float) -> Clamping:
    """Return limiting every coordinate to [−bound, bound] as a defense."""
    return Clamping(bound)
