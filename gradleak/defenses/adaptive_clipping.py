"""Bounding the norm of updates by a limit that follows them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gradleak.defenses.clipping import Clipping
from gradleak.errors import InvalidInput

__all__ = ["AdaptiveClipping", "adaptive_clip"]


@dataclass(frozen=True)
class AdaptiveClipping(Clipping):
    """Clipping whose norm the server moves after every round (Andrew et al. 2021, Algorithm 1; Flower 1.41).

    A client clips by the norm that the server sent and answers whether it had to; so the server, who is the attacker,
    knows the norm of every round. ``quantile`` is the share of clients that shall stay below it, ``rate`` how fast it
    moves.
    """

    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.quantile <= 1 and self.rate > 0):
            raise InvalidInput(
                f"Adaptive clipping cannot use quantile={self.quantile} and rate={self.rate}; give a quantile in "
                "[0, 1] and a rate above 0."
            )

    def after(self, clipped: float) -> AdaptiveClipping:
        """Return the clipping of the next round, after a share ``clipped`` of the clients answered that they had to.

        Flower counts these, not those that stayed below as in the paper, so there the norm falls where many clip.
        """
        return replace(self, norm=self.norm * math.exp(-self.rate * (clipped - self.quantile)))


def adaptive_clip(norm: float, *, quantile: float = 0.5, rate: float = 0.2) -> AdaptiveClipping:
    """Return clipping of the whole update to ``norm``, which follows the updates from round to round."""
    return AdaptiveClipping(norm, quantile, rate)
