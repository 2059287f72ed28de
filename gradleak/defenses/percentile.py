"""The percentile filter that NVFlare ships."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["PercentilePrivacy", "percentile_privacy"]

_ROUNDED = 1e-6
"""By how much the limit may have been rounded, relative: updates are stored in float32."""


@dataclass(frozen=True)
class PercentilePrivacy(UpdateDefense):
    """Zeroing the smallest magnitudes of all tensors together and limiting the rest to ±gamma, without noise.

    What ``nvflare.app_common.filters.PercentilePrivacy`` (2.9) does to weight differences (Shokri & Shmatikov 2015,
    Section 5): magnitudes below the ``percentile`` (0 … 100, interpolated linearly) become zero. The client divides by
    its number of local ``steps`` before and multiplies afterwards, where it reports one, so the limit is gamma · steps.
    Scalars pass. A filter without noise is no differential privacy, whatever the numbers.
    """

    percentile: float = 10.0
    gamma: float = 0.01
    steps: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.percentile <= 100 and 0 < self.gamma < math.inf and self.steps >= 1):
            raise InvalidInput(
                f"The percentile filter cannot use percentile={self.percentile}, gamma={self.gamma} and "
                f"steps={self.steps}; give 0 to 100, a limit above 0 and at least one step."
            )

    @property
    def _limit(self) -> float:
        return self.gamma * self.steps

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the filtered tensors; gradients pass where a number was left alone."""
        sizes = torch.cat([t.detach().abs().flatten() for t in tensors.values()]).sort().values
        place = self.percentile / 100 * (len(sizes) - 1)
        low = math.floor(place)
        cutoff = torch.lerp(sizes[low], sizes[min(low + 1, len(sizes) - 1)], place - low)
        return {
            k: t if t.ndim == 0 else torch.where(t.abs() < cutoff, 0.0, t).clamp(-self._limit, self._limit)
            for k, t in tensors.items()
        }

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed`` where it was left alone, and elsewhere the nearest number that the filter changes so."""
        most = self._hidden(observed)
        explained = {}
        for name, o in observed.items():
            s = simulated[name].detach()
            beyond = o.sign() * (s * o.sign()).clamp_min(self._limit)
            explained[name] = torch.where(self._at(o), beyond, torch.where(o == 0, s.clamp(-most, most), o))
        return {k: o if o.ndim == 0 else explained[k] for k, o in observed.items()}

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return 0 for what was left alone, infinity at the limit, and for zeros that of a uniform number below."""
        most = self._hidden(observed)
        return {
            k: torch.zeros_like(o)
            if o.ndim == 0
            else torch.where(self._at(o), math.inf, torch.where(o == 0, most / 3**0.5, 0.0)).to(o)
            for k, o in observed.items()
        }

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return the limit of one coordinate times the number of them, or its root."""
        return norm if coordinates is None else min(norm, self._limit * coordinates ** (1 / order))

    def _at(self, observed: Tensor) -> Tensor:
        return observed.abs() >= self._limit * (1 - _ROUNDED)

    def _hidden(self, observed: Tensors) -> Tensor:
        """Return below which magnitude all zeroed numbers lie: infinite where everything that was sent was limited."""
        inside = [torch.where((o == 0) | self._at(o), math.inf, o.abs()).amin() for o in observed.values() if o.ndim]
        return torch.stack(inside).amin()


def percentile_privacy(*, percentile: float = 10.0, gamma: float = 0.01, steps: int = 1) -> PercentilePrivacy:
    """Return NVFlare's percentile filter: the smallest ``percentile`` percent become zero, the rest at most gamma.

    ``steps`` is the number of local steps that the client reports to the filter, by which it multiplies the limit.
    """
    return PercentilePrivacy(percentile, gamma, steps)
