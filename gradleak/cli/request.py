"""What ``gradleak attack`` was asked to do: every option parsed, checked by itself and against the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gradleak.audit.factories import ChosenAttack, build_attack, build_defense, find_loss
from gradleak.data import read_schema
from gradleak.defenses import Defense
from gradleak.errors import InvalidInput, UnknownName
from gradleak.models import parse_options
from gradleak.models.loading import Option
from gradleak.spaces import ImageSpace, InputSpace, TensorSpace
from gradleak.training import SGD, Adam, FedAvg, FedSGD, LocalTraining, Loss, Optimizer
from gradleak.training.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, as_loss
from gradleak.types import Note, UpdateKind

__all__ = ["DTYPES", "ModelChoice", "Request", "StatedLoss", "read_request"]

DTYPES = {"as-is": None, "float32": torch.float32, "float64": torch.float64}
_MOST_STEPS = 10_000
"""Local steps up to which the unrolled map can be simulated at all: each is a forward and a backward pass."""
_ADAMW_DECAY = 0.01
"""The weight decay that ``torch.optim.AdamW`` has where none is given."""


_LOCAL = ("lr", "optimizer", "momentum", "weight_decay", "local_epochs", "local_batch_size", "local_steps")
"""Options that describe local training."""


@dataclass(frozen=True)
class ModelChoice:
    """The model that was sent out: how to build it, its weights, mode, number type and device."""

    spec: str
    options: Mapping[str, Option]
    weights: Path | None
    classes: int | None
    mode: str
    dtype: torch.dtype | None
    device: torch.device


@dataclass(frozen=True)
class StatedLoss:
    """The client's loss as far as it was stated.

    Attributes:
        loss: the loss, None where it follows from the number of the model's outputs.
        weights: one weight per class.
    """

    loss: Loss | None
    reduction: str = "mean"
    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None

    def among(self, outputs: int) -> tuple[Loss, ...]:
        """Return the losses that a client may have had whose model has so many outputs, likeliest first.

        Several outputs are classes of a softmax cross-entropy unless something else was stated. Over one output that
        would be constant: binary cross-entropy and squared error are the two that such models are trained with.

        Raises:
            InvalidInput: the weights are not one per output, or cross-entropy was stated for one output.
        """
        loss = self.loss
        if loss is None and outputs > 1:
            loss = CrossEntropy(self.reduction, self.smoothing, self.weights)
        if loss is None:
            if self.smoothing or self.weights:
                raise InvalidInput(
                    "--label-smoothing and --class-weights take a stated loss where the model has one output; give "
                    "--loss bce, or leave them out."
                )
            return (BinaryCrossEntropy(self.reduction), MeanSquaredError(self.reduction))
        if isinstance(loss, CrossEntropy):
            if outputs == 1:
                raise InvalidInput(
                    "The model has one output, over which softmax cross-entropy is constant; give --loss bce or "
                    "--loss mse."
                )
            if loss.weight is not None and len(loss.weight) != outputs:
                raise InvalidInput(
                    f"--class-weights has {len(loss.weight)} values, but the model has {outputs} outputs; give one "
                    "for each."
                )
        return (loss,)


@dataclass(frozen=True, eq=False)
class Request:
    """What to attack, with what, how long, and where the result goes."""

    model: ModelChoice
    update: Path
    kind: UpdateKind
    space: InputSpace
    batch_size: int | None
    loss: StatedLoss
    local: FedAvg | None
    defense: Defense | None
    labels: tuple[float, ...] | None
    attack: ChosenAttack
    seed: int
    truth: Path | None
    data: str | None
    out: Path
    command: str
    notes: tuple[Note, ...] = ()

    def training(self, loss: Loss, examples: int) -> LocalTraining:
        """Return the client's forward map of a batch of so many examples with this loss, under its defenses.

        Raises:
            InvalidInput: it has too many local steps to be simulated.
        """
        plain: LocalTraining = FedSGD(loss) if self.local is None else replace(self.local, loss=loss)
        if isinstance(plain, FedAvg) and plain.count(examples) > _MOST_STEPS:
            raise InvalidInput(
                f"{plain.count(examples):,} local steps cannot be simulated, {_MOST_STEPS:,} at most; check "
                "--local-epochs, --local-steps and --local-batch-size."
            )
        return plain if self.defense is None else self.defense.wrap(plain)


def read_request(asked: Mapping[str, Any], space: InputSpace | None = None) -> Request:
    """Return what the options ask for: those of ``gradleak attack`` by name, each parsed by itself already.

    ``space`` is what the model takes, where its folder says that and not the options.

    Raises:
        InvalidInput: two options contradict each other, or one names something that does not exist.
    """
    o = SimpleNamespace(**asked)
    model_options, dtype = parse_options(o.model_arg or ()), DTYPES[o.dtype]
    return Request(
        model=ModelChoice(o.model, model_options, o.weights, o.classes, o.mode, dtype, _device(o.device)),
        update=o.update,
        kind=UpdateKind(o.kind),
        space=space or _space(o.input_kind, o.input_shape, o.mean or (), o.std or (), o.table),
        batch_size=o.batch_size,
        loss=_loss(o.loss, o.reduction, o.label_smoothing, o.class_weights),
        local=_local(o.kind, {k: getattr(o, k) for k in _LOCAL}),
        defense=build_defense(o.defense or ()),
        labels=_labels(o.labels, o.batch_size),
        attack=build_attack(o.attack, parse_options(o.attack_option or ()), o.budget),
        seed=o.seed,
        truth=o.truth,
        data=o.data,
        out=o.out.absolute(),
        command=o.command,
        notes=o.notes,
    )


def _space(
    kind: str, shape: tuple[int, ...] | None, mean: tuple[float, ...], std: tuple[float, ...], table: Path | None
) -> InputSpace:
    if table is not None:
        if shape is not None or mean or std or kind != "auto":
            raise InvalidInput("--table describes the inputs; leave out --input-shape, --input-kind, --mean and --std.")
        return read_schema(table)
    if shape is None:
        raise InvalidInput("The inputs are not described; give --input-shape, or --table for rows of a table.")
    if kind == "auto":
        kind = "image" if len(shape) == 3 else "tensor"
    if kind == "image":
        if len(shape) != 3:
            raise InvalidInput("--input-kind image needs an --input-shape of three sizes, C,H,W; give it so.")
        return ImageSpace(tuple(shape), mean=tuple(mean), std=tuple(std))
    if mean or std:
        raise InvalidInput("--mean and --std are for images; leave them out, or give --input-shape as C,H,W.")
    return TensorSpace(tuple(shape))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnknownName("device", name, ["cpu", "cuda"]) from None
    if device.type not in ("cpu", "cuda"):
        raise UnknownName("device", name, ["cpu", "cuda"])
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InvalidInput(f"There is no CUDA device {name!r} here; use --device cpu.")
    return device


def _loss(name: str | None, reduction: str, smoothing: float | None, weights: tuple[float, ...] | None) -> StatedLoss:
    if weights is not None and min(weights) <= 0:
        raise InvalidInput(f"--class-weights has {min(weights):g}, but weights are above 0; correct it.")
    if smoothing is not None and not 0 <= smoothing < 1:
        raise InvalidInput(f"--label-smoothing {smoothing:g} is not in [0, 1); correct it.")
    if smoothing and name not in (None, "cross-entropy"):
        raise InvalidInput("--label-smoothing belongs to --loss cross-entropy; leave it out.")
    if weights is not None and name not in (None, "cross-entropy", "bce"):
        raise InvalidInput("--class-weights belongs to --loss cross-entropy and bce; leave it out.")
    found: Loss | None
    if name is None:
        found = None
    elif ":" in name:
        if reduction != "mean":
            raise InvalidInput("--reduction is part of your own loss; leave it out.")
        found = as_loss(find_loss(name))
    elif name == "cross-entropy":
        found = CrossEntropy(reduction, smoothing or 0.0, weights)
    elif name == "bce":
        if weights is not None and len(weights) != 1:
            raise InvalidInput(
                "With --loss bce, --class-weights is one number, the weight of the positive targets; give one."
            )
        found = BinaryCrossEntropy(reduction, 1.0 if weights is None else weights[0])
    elif name == "mse":
        found = MeanSquaredError(reduction)
    else:
        raise UnknownName("loss", name, ["cross-entropy", "bce", "mse", "module:callable"])
    return StatedLoss(found, reduction, smoothing or 0.0, weights)


def _local(kind: str, stated: Mapping[str, Any]) -> FedAvg | None:
    if kind != UpdateKind.WEIGHT_DELTA.value:
        given = next((name for name in _LOCAL if stated[name] is not None), None)
        if given is not None:
            option = f"--{given.replace('_', '-')}"
            raise InvalidInput(f"{option} describes local training; give it with --kind weight_delta only.")
        return None
    lr, optimizer, momentum, weight_decay, epochs, batch_size, steps = (stated[name] for name in _LOCAL)
    if lr is None:
        raise InvalidInput("A weight delta depends on the client's learning rate; give it with --lr.")
    if epochs is not None and steps is not None:
        raise InvalidInput("--local-epochs and --local-steps both say how long the client trained; give one of them.")
    rule = _optimizer(optimizer or "sgd", lr, momentum, weight_decay)
    if rule == SGD(lr):
        return FedAvg(lr, epochs or 1, batch_size, steps=steps)
    return FedAvg(None, epochs or 1, batch_size, rule, steps)


def _optimizer(name: str, lr: float, momentum: float | None, weight_decay: float | None) -> Optimizer:
    if name == "sgd":
        return SGD(lr, momentum or 0.0, weight_decay or 0.0)
    if momentum is not None:
        raise InvalidInput(f"--momentum belongs to --optimizer sgd, not to {name}; leave it out.")
    if name == "adam":
        return Adam(lr, weight_decay=weight_decay or 0.0)
    return Adam(lr, weight_decay=_ADAMW_DECAY if weight_decay is None else weight_decay, decoupled=True)


def _labels(labels: tuple[float, ...] | None, batch_size: int | None) -> tuple[float, ...] | None:
    if labels is not None and batch_size is not None and len(labels) != batch_size:
        raise InvalidInput(f"--labels names {len(labels)} labels for {batch_size} examples; give one for each.")
    return labels
