"""One defense after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import Defense, UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import LocalTraining, Tensors

__all__ = ["Composition", "InTurn", "compose"]


@dataclass(frozen=True)
class Composition(UpdateDefense):
    """One or more defenses in the order in which they are applied, drawing from one generator.

    A defense-aware attacker simulates all but the last and explains the observation by the last.
    """

    defenses: tuple[UpdateDefense, ...]

    def __post_init__(self) -> None:
        if not self.defenses:
            raise InvalidInput("A composition of no defenses does nothing; give at least one.")

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``tensors`` after all defenses in turn."""
        for defense in self.defenses:
            tensors = defense.transform(tensors, generator)
        return dict(tensors)

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return what the last defense explains, after the ones before it."""
        return self.defenses[-1].explain(self._before_last(simulated), observed)

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return the root of the sum of squares over the defenses, each as if it had sent ``observed``."""
        each = [d.deviation(observed) for d in self.defenses]
        return {k: torch.stack([e[k] for e in each]).square().sum(0).sqrt() for k in observed}

    def largest(self, norm: float, order: int, coordinates: int | None) -> float:
        """Return what the defenses let through, one after another."""
        for defense in self.defenses:
            norm = defense.largest(norm, order, coordinates)
        return norm

    def residual(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the residual of the last defense, after the ones before it."""
        return self.defenses[-1].residual(self._before_last(simulated), observed)

    def centered(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return the residual of the last defense with the centers of its spreads, after the ones before it."""
        return self.defenses[-1].centered(self._before_last(simulated), observed)

    def _before_last(self, tensors: Tensors) -> Tensors:
        for defense in self.defenses[:-1]:
            tensors = defense.transform(tensors)
        return tensors


@dataclass(frozen=True)
class InTurn(Defense):
    """Defenses of any kind, each wrapped around the ones before it: DP-SGD first, aggregation last."""

    defenses: tuple[Defense, ...]

    def wrap(self, training: LocalTraining, *, seed: int = 0) -> LocalTraining:
        """Return ``training`` under all of them; each gets a seed of its own."""
        for number, defense in enumerate(self.defenses):
            training = defense.wrap(training, seed=seed + 1_000_003 * number)
        return training


def compose(*defenses: UpdateDefense) -> Composition:
    """Return the defenses one after another, the first one first."""
    return Composition(defenses)
