"""What a plausible input looks like, as a penalty on candidates (N, *shape)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Prior", "TotalVariation"]


class Prior(ABC):
    """A penalty on one candidate batch."""

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the weighted scalar penalty of ``inputs`` (N, *shape)."""


@dataclass(frozen=True)
class TotalVariation(Prior):
    """Anisotropic total variation: mean absolute difference of vertical and of horizontal neighbors.

    Source: Geiping et al. 2020, Equation 4 (Rudin, Osher, Fatemi 1992).

    Attributes:
        weight: multiplies the sum of the two means.

    """

    weight: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the penalty of images (N, C, H, W)."""
        down = (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().mean()
        right = (inputs[..., :, 1:] - inputs[..., :, :-1]).abs().mean()
        return self.weight * (down + right)
