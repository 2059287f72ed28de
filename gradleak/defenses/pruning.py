"""Sending only the largest coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["Pruning", "prune", "top_k"]


@dataclass(frozen=True)
class Pruning(UpdateDefense):
    """Setting the smallest magnitudes to zero (gradient compression; Zhu et al. 2019, Section 5.2, Lin et al. 2018).

    A share ``ratio`` in [0, 1) of the coordinates becomes zero; at least one survives per tensor, or in all if they are
    ranked ``globally``, all tensors together.
    """

    ratio: float
    globally: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise InvalidInput(f"Pruning cannot drop a share of {self.ratio}; give a ratio in [0, 1).")

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the pruned tensors; gradients pass through the kept coordinates."""
        if not self.globally:
            return {k: t * self._mask(t.detach().flatten()).view(t.shape) for k, t in tensors.items()}
        mask = self._mask(torch.cat([t.detach().flatten() for t in tensors.values()]))
        parts = mask.split([t.numel() for t in tensors.values()])
        return {k: t * m.view(t.shape) for (k, t), m in zip(tensors.items(), parts, strict=True)}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed`` where it was sent, and elsewhere the nearest number no larger than any that was sent."""
        bounds = self._bounds(observed)
        return {
            k: torch.where(o != 0, o, simulated[k].detach().clamp(-bounds[k], bounds[k])) for k, o in observed.items()
        }

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return 0 where a coordinate was sent, elsewhere that of a uniform number no larger than any that was sent."""
        bounds = self._bounds(observed)
        return {k: torch.where(o != 0, 0.0, bounds[k] / 3**0.5) for k, o in observed.items()}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return ``norm``: zeros make nothing larger."""
        return norm

    def _bounds(self, observed: Tensors) -> dict[str, Tensor]:
        smallest = {k: torch.where(o != 0, o.abs(), float("inf")).amin() for k, o in observed.items()}
        if self.globally:
            smallest = dict.fromkeys(smallest, torch.stack(list(smallest.values())).amin())
        # Where nothing was sent, nothing but zeros was pruned.
        return {k: torch.where(torch.isinf(b), 0.0, b) for k, b in smallest.items()}

    def _mask(self, flat: Tensor) -> Tensor:
        kept = max(1, flat.numel() - int(self.ratio * flat.numel()))
        chosen = flat.abs().topk(kept).indices
        return torch.zeros_like(flat).scatter(0, chosen, 1.0)


def prune(ratio: float, *, globally: bool = False) -> Pruning:
    """Return magnitude pruning as a defense: the share ``ratio`` of the coordinates becomes zero."""
    return Pruning(ratio, globally)


def top_k(share: float, *, globally: bool = False) -> Pruning:
    """Return top-k sparsification as a defense: only the share ``share`` of largest coordinates is sent, in (0, 1]."""
    return Pruning(1 - share, globally)
