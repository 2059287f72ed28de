"""Keeping some tensors of an update."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["Exclusion", "exclude_vars"]


@dataclass(frozen=True)
class Exclusion(UpdateDefense):
    """Not sending the tensors whose names a regular expression is found in (NVFlare 2.9, ``ExcludeVars``).

    What is not sent stands in the update as zeros, which say nothing to an attacker who knows of the defense; NVFlare
    leaves the tensors out.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InvalidInput(f"{self.pattern!r} is no regular expression ({error}); correct it.") from error

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the tensors, zeros in place of the excluded ones.

        Raises:
            InvalidInput: every tensor is excluded.
        """
        if all(self._kept(k) is False for k in tensors):
            raise InvalidInput(f"{self.pattern!r} excludes all tensors; give a narrower pattern.")
        return {k: t if self._kept(k) else torch.zeros_like(t) for k, t in tensors.items()}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed``, the simulated tensors in place of the excluded ones."""
        return {k: o if self._kept(k) else simulated[k] for k, o in observed.items()}

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return infinity for what was excluded, 0 elsewhere."""
        return {k: torch.full_like(o, 0.0 if self._kept(k) else math.inf) for k, o in observed.items()}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return ``norm``: zeros make nothing larger."""
        return norm

    def _kept(self, name: str) -> bool:
        return not self.pattern or re.search(self.pattern, name) is None


def exclude_vars(pattern: str) -> Exclusion:
    """Return keeping the tensors whose names ``pattern`` (a regular expression) is found in, as NVFlare does."""
    return Exclusion(pattern)
