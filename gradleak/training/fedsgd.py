"""One gradient: the update of synchronous distributed training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gradleak.training.base import LocalTraining, Tensors, gradient
from gradleak.training.losses import CrossEntropy, Loss, as_loss
from gradleak.training.private import PerExample
from gradleak.types import UpdateKind

__all__ = ["FedSGD"]


@dataclass(frozen=True)
class FedSGD(LocalTraining):
    """One gradient of the loss over the whole batch (McMahan et al. 2017, Section 2: FedSGD).

    ``loss`` is any differentiable (outputs, targets) → scalar; ``private`` clips and noises as DP-SGD does.
    """

    loss: Loss = field(default_factory=CrossEntropy)
    private: PerExample | None = None

    kind = UpdateKind.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", as_loss(self.loss))

    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return ∂loss/∂params by name, and the buffers after the forward pass."""
        if self.private is not None:
            found = self.private.gradient(model, self.loss, params, inputs, labels, buffers, 0)
            return found, dict(buffers or {})
        return gradient(model, self.loss, params, inputs, labels, buffers)

    @property
    def undefended(self) -> FedSGD:
        """The plain gradient."""
        return self if self.private is None else replace(self, private=None)

    @property
    def simulated(self) -> FedSGD:
        """Itself: examples are clipped before their gradients are summed."""
        return self.known()

    def known(self, *, order: bool = False) -> FedSGD:
        """Return the map without the seed of its noise."""
        if self.private is None or self.private.seed is None:
            return self
        return replace(self, private=replace(self.private, seed=None))

    def reseed(self, seed: int) -> FedSGD:
        """Return the map with fresh noise, where there is any."""
        return self if self.private is None else replace(self, private=replace(self.private, seed=seed))

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return the standard deviation of the noise per coordinate."""
        size = 0.0 if self.private is None else self.private.deviation(self.loss)
        return {k: torch.full_like(o, size) for k, o in observed.items()}
