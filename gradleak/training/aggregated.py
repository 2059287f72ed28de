"""Several clients of whom only the mean is seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput
from gradleak.training.base import LocalTraining, Tensors
from gradleak.training.losses import Loss
from gradleak.types import UpdateKind

__all__ = ["Aggregated"]


@dataclass(frozen=True)
class Aggregated(LocalTraining):
    """The mean of the updates of ``clients`` clients, which have equal numbers of consecutive examples of the batch."""

    inner: LocalTraining
    clients: int

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise InvalidInput(f"There cannot be {self.clients} clients; give at least one.")

    @property
    def loss(self) -> Loss:  # type: ignore[override]
        """The loss of every client."""
        return self.inner.loss

    @property
    def kind(self) -> UpdateKind:  # type: ignore[override]
        """The kind of every client's update."""
        return self.inner.kind

    @property
    def undefended(self) -> LocalTraining:
        """One client's training without any defense: what an attacker believes who takes the mean for one client's."""
        return self.inner.undefended

    @property
    def simulated(self) -> LocalTraining:
        """The whole of it: what every client does to its update cannot be told apart in the mean."""
        known = self.inner.known()
        return self if known is self.inner else replace(self, inner=known)

    def known(self, *, order: bool = False) -> Aggregated:
        """Return the map without the clients' seeds."""
        return replace(self, inner=self.inner.known(order=order))

    def reseed(self, seed: int) -> Aggregated:
        """Return the map with fresh noise and shuffling."""
        return replace(self, inner=self.inner.reseed(seed))

    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean of the clients' updates, by name, and the buffers of the last client."""
        if len(inputs) % self.clients:
            raise InvalidInput(
                f"{len(inputs)} examples do not make {self.clients} clients of equal size; give a multiple of that."
            )
        size = len(inputs) // self.clients
        parts, after = [], dict(buffers or {})
        for number in range(self.clients):
            mine = slice(number * size, (number + 1) * size)
            client = self.inner.reseed(1_009 * number + seed) if (seed := _seed(self.inner)) is not None else self.inner
            sent, after = client.run(model, params, inputs[mine], labels[mine], buffers)
            parts.append(sent)
        return {k: torch.stack([p[k] for p in parts]).mean(0) for k in parts[0]}, after

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return that of one client over √clients: their noise is independent."""
        return {k: d / self.clients**0.5 for k, d in self.inner.deviation(observed).items()}


def _seed(training: LocalTraining) -> int | None:
    """Return the seed of a client's randomness, None where it has none."""
    while True:
        found = getattr(training, "seed", None)
        if found is None:
            found = getattr(getattr(training, "private", None), "seed", None)
        if found is not None or not hasattr(training, "inner"):
            return found
        training = training.inner
