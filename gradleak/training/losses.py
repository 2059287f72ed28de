"""Losses: the user's own, with what an attacker must know of each: how its targets look.

A new loss is a callable (outputs, targets) → scalar. One that has a property ``targets`` tells how its targets look;
of others it is guessed from the outputs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import InvalidInput

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Loss",
    "MeanSquaredError",
    "TargetKind",
    "as_loss",
    "class_axis",
    "harden",
    "relax",
    "soft_labels",
    "target_kind",
]


class Loss(Protocol):
    """A differentiable loss: (outputs, targets) → scalar tensor."""

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the scalar loss."""
        ...


class TargetKind(enum.StrEnum):
    """How the targets of a loss look."""

    CLASSES = "classes"
    """Class indices (N, ...), or probabilities along axis 1, (N, C, ...)."""
    BINARY = "binary"
    """Every output has a probability of its own."""
    VALUES = "values"
    """Real numbers of the outputs' shape."""


def _check_reduction(name: str, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise InvalidInput(f"{name} has no reduction={reduction!r}; use 'mean' or 'sum'.")


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy along axis 1, for class indices (N, ...) or probabilities (N, C, ...); nats.

    Attributes:
        reduction: "mean" or "sum" over examples (and places).
        label_smoothing: share of every target spread over all classes, in [0, 1).
        weight: one positive weight per class, which the mean is divided by, too; None for equal ones.
    """

    reduction: str = "mean"
    label_smoothing: float = 0.0
    weight: tuple[float, ...] | None = None

    targets = TargetKind.CLASSES

    def __post_init__(self) -> None:
        _check_reduction("CrossEntropy", self.reduction)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InvalidInput(
                f"CrossEntropy has no label_smoothing={self.label_smoothing}; use a smoothing in [0, 1)."
            )
        if self.weight is not None:
            object.__setattr__(self, "weight", tuple(float(w) for w in self.weight))
            if not all(0.0 <= w < float("inf") for w in self.weight) or not any(self.weight):
                raise InvalidInput("Class weights are finite numbers of at least 0 and not all 0; correct weight=.")

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the cross-entropy of logits ``outputs`` (N, C, ...) in nats.

        Deviation from torch: probabilities of one class give what its index gives, also with class weights.
        """
        weight = None if self.weight is None else outputs.new_tensor(self.weight)
        if not targets.is_floating_point():
            return F.cross_entropy(
                outputs, targets, weight, reduction=self.reduction, label_smoothing=self.label_smoothing
            )
        # Written out: torch's own probability branch has no double backward with respect to the targets.
        smooth = targets * (1 - self.label_smoothing) + self.label_smoothing / outputs.shape[1]
        counts = targets
        if weight is not None:
            weight = weight.view(-1, *(1,) * (outputs.ndim - 2))
            smooth, counts = smooth * weight, targets * weight
        total = -(smooth * torch.log_softmax(outputs, 1)).sum()
        if self.reduction == "sum":
            return total
        return total / (counts.sum() if weight is not None else outputs.numel() // outputs.shape[1])


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Sigmoid cross-entropy of each output by itself: one output, or several labels at once; nats.

    ``reduction`` is "mean" or "sum" over all outputs, ``pos_weight`` the weight of the positive targets, one for all
    outputs.
    """

    reduction: str = "mean"
    pos_weight: float = 1.0

    targets = TargetKind.BINARY

    def __post_init__(self) -> None:
        _check_reduction("BinaryCrossEntropy", self.reduction)
        if not 0.0 < self.pos_weight < float("inf"):
            raise InvalidInput(f"pos_weight is a finite number above 0, not {self.pos_weight}; correct it.")

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the loss of logits ``outputs`` for targets in [0, 1] of the same shape ((N,) for one output)."""
        t = _like_outputs(targets, outputs)
        # Written out: differentiable as often as needed, in the targets, too.
        losses = (1 - t) * F.softplus(outputs) + self.pos_weight * t * F.softplus(-outputs)
        return losses.mean() if self.reduction == "mean" else losses.sum()


@dataclass(frozen=True)
class MeanSquaredError:
    """Squared error; ``reduction`` is "mean" or "sum" over all outputs."""

    reduction: str = "mean"

    targets = TargetKind.VALUES

    def __post_init__(self) -> None:
        _check_reduction("MeanSquaredError", self.reduction)

    def __call__(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Return the squared error of ``outputs`` for targets of the same shape ((N,) for one output)."""
        errors = (outputs - _like_outputs(targets, outputs)) ** 2
        return errors.mean() if self.reduction == "mean" else errors.sum()


def _like_outputs(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return targets (N,) of a single output as (N, 1), in the outputs' number type."""
    if targets.ndim == outputs.ndim - 1 and outputs.shape[-1] == 1:
        targets = targets[..., None]
    return targets.to(outputs.dtype)


_FUNCTIONS: dict[Callable[..., Any], Callable[[], Loss]] = {
    F.cross_entropy: CrossEntropy,
    F.mse_loss: MeanSquaredError,
    F.binary_cross_entropy_with_logits: BinaryCrossEntropy,
}


def as_loss(loss: Any) -> Loss:
    """Return gradleak's form of a loss of torch (function or module), or ``loss`` itself.

    Raises:
        InvalidInput: ``loss`` cannot be called, or is a loss of torch with an option that has no such form.
    """
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.ignore_index >= 0:
            raise InvalidInput("nn.CrossEntropyLoss(ignore_index=…) is not known here; pass a function of your own.")
        weight = None if loss.weight is None else tuple(float(w) for w in loss.weight)
        return CrossEntropy(loss.reduction, loss.label_smoothing, weight)
    if isinstance(loss, nn.MSELoss):
        return MeanSquaredError(loss.reduction)
    if isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is None:
        positive = 1.0 if loss.pos_weight is None else loss.pos_weight
        if not isinstance(positive, Tensor) or positive.numel() == 1:
            return BinaryCrossEntropy(loss.reduction, float(positive))
    try:
        known = _FUNCTIONS.get(loss)
    except TypeError:  # not hashable
        known = None
    if known is not None:
        return known()
    if not callable(loss):
        raise InvalidInput(
            f"A loss is a function (outputs, targets) → scalar, not a {type(loss).__name__}; pass for example "
            "gl.CrossEntropy()."
        )
    return loss


def target_kind(loss: Loss, outputs: Tensor) -> TargetKind:
    """Return how the targets of ``loss`` look: what it says itself, else classes where there are two outputs."""
    told = getattr(loss, "targets", None)
    if isinstance(told, TargetKind):
        return told
    return TargetKind.CLASSES if outputs.ndim >= 2 and outputs.shape[1] > 1 else TargetKind.VALUES


def class_axis(loss: Loss) -> int:
    """Return the axis of the outputs along which ``loss`` has its classes: 1, unless it says ``class_axis``."""
    return int(getattr(loss, "class_axis", 1))


def relax(kind: TargetKind, z: Tensor, axis: int = 1) -> Tensor:
    """Return targets (N, ...) of unconstrained numbers ``z`` of the outputs' shape, classes along ``axis``."""
    if kind is TargetKind.CLASSES:
        return z.softmax(axis)
    return z.sigmoid() if kind is TargetKind.BINARY else z


def harden(kind: TargetKind, targets: Tensor, axis: int = 1) -> Tensor:
    """Return relaxed targets as people write them: class indices, zeros and ones, or the numbers themselves."""
    if kind is TargetKind.CLASSES:
        return targets.argmax(axis)
    return (targets > 0.5).to(targets.dtype) if kind is TargetKind.BINARY else targets


def soft_labels(labels: Tensor, classes: int, dtype: torch.dtype, axis: int = 1) -> Tensor:
    """Return labels as probabilities along ``axis``: one-hot for class indices, unchanged for probabilities."""
    if labels.is_floating_point():
        return labels.to(dtype)
    return F.one_hot(labels, classes).movedim(-1, axis).to(dtype)
