"""Showing the server only what several clients sent together."""

from __future__ import annotations

from dataclasses import dataclass

from gradleak.defenses.base import Defense
from gradleak.errors import InvalidInput
from gradleak.training import Aggregated, LocalTraining

__all__ = ["SecureAggregation", "secure_aggregation"]


@dataclass(frozen=True)
class SecureAggregation(Defense):
    """Secure aggregation of ``clients`` clients (Bonawitz et al. 2017): the server sees their mean and no part of it.

    The batch is that of all clients, one after another with equal numbers of examples; its size is what the attacker
    searches for. The protocol itself, dropouts and a server that hands out crafted models are not simulated.
    """

    clients: int

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise InvalidInput(f"Secure aggregation cannot have {self.clients} clients; give at least one.")

    def wrap(self, training: LocalTraining, *, seed: int = 0) -> Aggregated:
        """Return the mean over clients that each run ``training``, with noise of their own."""
        return Aggregated(training, self.clients)


def secure_aggregation(clients: int) -> SecureAggregation:
    """Return secure aggregation over ``clients`` clients of equal size as a defense."""
    return SecureAggregation(clients)
