"""Bounding the norm of an update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["Clipping", "clip"]


@dataclass(frozen=True)
class Clipping(UpdateDefense):
    """Scaling the whole update to at most a given Euclidean norm (Abadi et al. 2016, per update, not per example).

    ``norm`` is the largest one over all tensors together, in the update's units.
    """

    norm: float

    def __post_init__(self) -> None:
        if not 0 < self.norm < float("inf"):
            raise InvalidInput(f"Clipping cannot use norm={self.norm}; give a finite number above 0.")

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return min(1, norm / ‖tensors‖) × ``tensors``."""
        square = _inner(tensors, tensors)
        over = square > self.norm**2
        factor = torch.where(over, self.norm * torch.where(over, square, 1.0).rsqrt(), 1.0)
        return {k: factor * t for k, t in tensors.items()}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed`` scaled back up as far as fits ``simulated`` best, where it was clipped at all."""
        square = _inner(observed, observed)
        factor = (_inner(simulated, observed) / torch.where(square > 0, square, 1.0)).clamp(min=1.0)
        factor = torch.where(self._clipped(square), factor, 1.0).detach()
        return {k: factor * o for k, o in observed.items()}

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return zero: only a common factor is lost."""
        return {k: torch.zeros_like(o) for k, o in observed.items()}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return the limit, times √coordinates for the sum of magnitudes."""
        if order == 2:
            return min(norm, self.norm)
        return norm if coordinates is None else min(norm, math.sqrt(coordinates) * self.norm)

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return a · ``simulated`` − ``observed`` with the clipping factor a in [0, 1] that fits best.

        Unlike the distance to the ray of updates that explain ``observed``, this does not favor small updates.
        """
        square = _inner(simulated, simulated)
        positive = square > 0
        fit = _inner(simulated, observed) / torch.where(positive, square, 1.0)
        factor = torch.where(positive, fit, 1.0).clamp(0.0, 1.0)
        factor = torch.where(self._clipped(_inner(observed, observed)), factor, 1.0)
        return {k: factor * simulated[k] - o for k, o in observed.items()}

    def _clipped(self, square: Tensor) -> Tensor:
        slack = 1e3 * torch.finfo(square.dtype).eps  # rounding of a sum over all coordinates
        return square >= self.norm**2 * (1 - slack)


def _inner(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(a[k] * b[k]).sum() for k in b]).sum()


def clip(norm: float) -> Clipping:
    """Return clipping of the whole update to Euclidean norm ``norm`` as a defense."""
    return Clipping(norm)
