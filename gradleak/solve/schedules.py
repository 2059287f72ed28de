"""How a step size changes along a run; a new schedule is a class of a few lines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

__all__ = ["Constant", "CosineDecay", "Schedule", "StepDecay"]


class Schedule(ABC):
    """A factor of the step size, as a function of how much of the run is over.

    It is told the share and not the number of the round, so that a run with a time budget goes through the whole
    schedule in fewer rounds instead of being cut off while its steps are still large.
    """

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress``, 0 at the start and 1 at the end."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same step size throughout."""

    def __call__(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class StepDecay(Schedule):
    """A step size that falls by a factor at given points; the default is Geiping et al. 2020, Section 5.1.

    Attributes:
        at: where it falls, each a share of the run.
        factor: by which it is multiplied there.
    """

    at: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8)
    factor: float = 0.1

    def __call__(self, progress: float) -> float:
        """Return ``factor`` to the power of the number of points passed."""
        return float(self.factor ** sum(progress >= point for point in self.at))


@dataclass(frozen=True)
class CosineDecay(Schedule):
    """A step size that falls along half a cosine (Loshchilov and Hutter 2017, Equation 5, without restarts).

    Attributes:
        floor: what is left of it at the end.
    """

    floor: float = 0.0

    def __call__(self, progress: float) -> float:
        """Return the factor between 1 and ``floor``."""
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
