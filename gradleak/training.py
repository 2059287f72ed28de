"""The forward map: local training as a differentiable function of the private batch.

The client runs it, the attacker inverts it, a defense wraps it. It is written once, with ``torch.func``, so that it
can be differentiated, vmapped over restarts and observations, and compiled as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradleak.errors import InvalidInput, InvalidModel
from gradleak.types import Batch, Update, UpdateKind

__all__ = ["CrossEntropy", "FedSGD", "LocalTraining", "Loss", "check_reproducible", "parameters", "soft_labels"]

Tensors = Mapping[str, Tensor]


class Loss(Protocol):
    """A differentiable loss: (outputs, targets) → scalar tensor."""

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the scalar loss."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy for class indices (N,) or probabilities (N, C); nats.

    Attributes:
        reduction: "mean" or "sum" over examples.
        label_smoothing: share of every target spread over all classes, in [0, 1).

    """

    reduction: str = "mean"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum") or not 0.0 <= self.label_smoothing < 1.0:
            raise InvalidInput(
                f"CrossEntropy has no reduction={self.reduction!r} with label_smoothing={self.label_smoothing}; "
                "use 'mean' or 'sum' and a smoothing in [0, 1)."
            )

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the cross-entropy of logits ``outputs`` (N, C) in nats."""
        if not targets.is_floating_point():
            return F.cross_entropy(outputs, targets, reduction=self.reduction, label_smoothing=self.label_smoothing)
        # Written out: torch's own probability branch has no double backward with respect to the targets.
        smooth = targets * (1 - self.label_smoothing) + self.label_smoothing / outputs.shape[-1]
        losses = -(smooth * torch.log_softmax(outputs, -1)).sum(-1)
        return losses.mean() if self.reduction == "mean" else losses.sum()


def soft_labels(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels as probabilities, shape (N, C): one-hot for class indices, unchanged for probabilities."""
    if labels.is_floating_point():
        return labels.to(dtype)
    return F.one_hot(labels, classes).to(dtype)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters of ``model`` by name, detached; tied parameters appear once."""
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def check_reproducible(model: nn.Module) -> None:
    """Check that the model computes the same function for the attacker as for the client.

    Raises:
        InvalidModel: a dropout layer is active, or BatchNorm uses (and changes) batch statistics.

    """
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise InvalidModel(
                f"Module {name!r} is active dropout, whose random mask the attacker cannot reproduce; "
                "put the model into evaluation mode with model.eval() (command line: --mode eval)."
            )
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            raise InvalidModel(
                f"Module {name!r} is BatchNorm in training mode, whose running statistics an attack would change; "
                "put the model into evaluation mode with model.eval() (command line: --mode eval)."
            )


class LocalTraining(ABC):
    """What a client does with its batch between receiving a model and sending an update.

    ``tensors`` is the map itself: pure, differentiable with respect to inputs and soft labels, and traceable by
    ``torch.func``. Calling the object runs it on a :class:`~gradleak.types.Batch` and returns an ``Update``.
    """

    loss: Loss

    @property
    @abstractmethod
    def kind(self) -> UpdateKind:
        """What the returned numbers mean."""

    @abstractmethod
    def tensors(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, *, buffers: Tensors | None = None
    ) -> dict[str, Tensor]:
        """Return the update's tensors by name; pure and differentiable in ``inputs`` and floating ``labels``.

        Args:
            model: supplies the computation and every parameter and buffer not overridden.
            params: the trainable parameters, by name; each may carry vmapped or traced values.
            inputs: (N, *shape).
            labels: (N,) class indices or (N, C) probabilities.
            buffers: buffer values to use instead of the model's own.

        """

    def __call__(self, model: nn.Module, batch: Batch, *, params: Tensors | None = None) -> Update:
        """Run local training on ``batch`` and return the update, detached; ``model`` is left untouched."""
        params = parameters(model) if params is None else params
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        tensors = self.tensors(model, params, batch.inputs, batch.labels, buffers=buffers)
        changed = any(m.training and isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules())
        return Update({k: v.detach() for k, v in tensors.items()}, self.kind, buffers if changed else None)


@dataclass(frozen=True)
class FedSGD(LocalTraining):
    """One gradient of the loss over the whole batch (McMahan et al. 2017, Section 2: FedSGD).

    Attributes:
        loss: any differentiable (outputs, targets) → scalar.

    """

    loss: Loss = field(default_factory=CrossEntropy)

    @property
    def kind(self) -> UpdateKind:
        """A gradient."""
        return UpdateKind.GRADIENT

    def tensors(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, *, buffers: Tensors | None = None
    ) -> dict[str, Tensor]:
        """Return ∂loss/∂params by name."""

        def loss(p: Tensors) -> Tensor:
            # Fused attention has no double backward: only the math kernel can be inverted.
            with sdpa_kernel(SDPBackend.MATH):
                outputs = functional_call(model, {**p, **(buffers or {})}, (inputs,))
            return self.loss(outputs, labels)

        return dict(grad(loss)(dict(params)))
