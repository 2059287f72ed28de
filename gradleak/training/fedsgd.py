"""One gradient: the update of synchronous distributed training."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from gradleak.training.base import LocalTraining, Tensors, gradient
from gradleak.training.losses import CrossEntropy, Loss, as_loss
from gradleak.types import UpdateKind

__all__ = ["FedSGD"]


@dataclass(frozen=True)
class FedSGD(LocalTraining):
    """One gradient of the loss over the whole batch (McMahan et al. 2017, Section 2: FedSGD).

    ``loss`` is any differentiable (outputs, targets) → scalar.
    """

    loss: Loss = field(default_factory=CrossEntropy)

    kind = UpdateKind.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", as_loss(self.loss))

    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return ∂loss/∂params by name, and the buffers after the forward pass."""
        return gradient(model, self.loss, params, inputs, labels, buffers)
