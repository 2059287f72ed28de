"""A case of a plan, built: its model, its clients, the rounds before the attacked one, and what training reaches."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.audit.factories import build_defense, find_loss
from gradleak.audit.plan import Case, Fault, Training, Utility
from gradleak.audit.pools import Pool, load_pool
from gradleak.data import float64_bytes, read_tensors
from gradleak.data.tensors import named
from gradleak.errors import GradleakError, InvalidModel, UnknownName, blaming_the_model, reason
from gradleak.models.loading import check_values, load_sized
from gradleak.models.weights import load_weights
from gradleak.training import (
    SGD,
    Adam,
    BinaryCrossEntropy,
    CrossEntropy,
    FedAvg,
    FedSGD,
    LocalTraining,
    Loss,
    MeanSquaredError,
    TargetKind,
    batch_statistics,
    check_reproducible,
    parameters,
    target_kind,
)
from gradleak.training.base import check_repeatable
from gradleak.types import Batch, UpdateKind

__all__ = ["Federation", "build", "tensors_hash"]

_LOSSES = ("cross-entropy", "bce", "mse")
_LR = 0.1
"""The server's step along a mean gradient where none is stated."""
_ADAMW_DECAY = 0.01
"""The weight decay of ``torch.optim.AdamW`` where none is given."""
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Federation:
    """A case, ready to run.

    Attributes:
        model: as it is before the first round, in the clients' mode.
        training: the clients' forward map under the case's filters.
        outputs: of the model for one example.
    """

    case: Case
    pool: Pool
    model: nn.Module
    training: LocalTraining
    outputs: int

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 of the model's class and of all its tensors before the first round."""
        return tensors_hash(self.model)

    @property
    def kind(self) -> TargetKind:
        """How the labels look."""
        return target_kind(self.training.loss, torch.zeros(1, self.outputs))

    def batch(self, side: Batch, count: int, seed: int) -> tuple[Batch, Batch]:
        """Return ``count`` examples drawn by ``seed``: decoded with their classes, and as the model takes them."""
        order = torch.randperm(len(side), generator=torch.Generator().manual_seed(seed))[:count]
        return (chosen := Batch(side.inputs[order], side.labels[order])), self.encoded(chosen)

    def encoded(self, batch: Batch) -> Batch:
        """Return decoded examples as the model and the loss take them."""
        like = next(p for p in self.model.parameters() if p.requires_grad)
        inputs, labels = self.pool.space.encode(batch.inputs).to(like), batch.labels.to(like.device)
        return Batch(inputs, labels if self.kind is TargetKind.CLASSES else labels.to(like.dtype)[:, None])

    @lru_cache(maxsize=8)  # noqa: B019 - federations are few, and as long-lived as the process
    def at(self, stage: int) -> nn.Module:
        """Return the model after ``stage`` rounds of the case's own federation, filters included."""
        if stage == 0:
            return self.model
        return self.train(self.case.utility or Utility(), stage, 0, self.training)

    def train(self, plan: Utility, rounds: int, seed: int, training: LocalTraining) -> nn.Module:
        """Return the model after so many rounds, in each of which the server averages some clients' updates."""
        model, step = copy.deepcopy(self.model), plan.lr
        gradients = training.kind is UpdateKind.GRADIENT
        step = (-_LR if step is None else -step) if gradients else (1.0 if step is None else step)
        params: dict[str, Tensor] = parameters(model)
        for number in range(rounds):
            total: dict[str, Tensor] = {}
            for client in range(plan.clients):
                own = (seed * 1_000_003 + number) * 1009 + client
                _, batch = self.batch(self.pool.train, min(plan.batch_size, len(self.pool.train)), own)
                sent = training.reseed(own)(model, batch, params=params).tensors
                total = {k: total[k] + v if total else v for k, v in sent.items()}
            params = {k: p + step / plan.clients * total[k] for k, p in params.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in params:
                    parameter.copy_(params[name])
        return model

    def quality(self, model: nn.Module) -> tuple[str, float]:
        """Return what is measured on held-out examples, and its value: accuracy, or minus the loss."""
        batch, right, loss = self.encoded(self.pool.test), 0.0, 0.0
        with torch.no_grad():
            for start in range(0, len(batch), _CHUNK):
                inputs, labels = batch.inputs[start : start + _CHUNK], batch.labels[start : start + _CHUNK]
                outputs = functional_call(model, {k: b.clone() for k, b in model.named_buffers()}, (inputs,))
                loss += float(self.training.loss(outputs, labels)) * len(inputs)
                if self.kind is not TargetKind.VALUES:
                    guess = outputs.argmax(1) if self.kind is TargetKind.CLASSES else outputs > 0
                    right += float((guess == labels).sum())
        if self.kind is TargetKind.VALUES:
            return "minus the loss on held-out examples", -loss / len(batch)
        return "accuracy on held-out examples", right / len(batch)


@lru_cache(maxsize=8)
def build(case: Case) -> Federation:
    """Return the federation of ``case``, tried on one batch.

    Raises:
        Fault: something of it cannot run, with the key that is to blame.
    """
    pool = load_pool(case)
    with _blamed("model"):
        model = _model(case, pool)
    with _blamed("training.loss"):
        outputs = _outputs(model, pool)
        loss = _loss(case.training, outputs)
    with _blamed("training"):
        plain = _training(case.training, loss)
    training = plain
    for spec in case.filters:
        with _blamed("filters", spec):
            defense = build_defense([spec])
            assert defense is not None
    defense = build_defense(case.filters)
    training = plain if defense is None else defense.wrap(plain)
    federation = Federation(case, pool, model, training, outputs)
    largest = max(case.batch_sizes)
    if largest > len(pool.test):
        raise Fault(
            f"There are {len(pool.test)} examples to attack, fewer than {largest}; take smaller batches.", "batch_sizes"
        )
    if federation.kind is TargetKind.CLASSES and pool.classes > outputs:
        raise Fault(
            f"The data have {pool.classes} classes, the model {outputs} outputs; correct classes or model_arg.", "model"
        )
    if outputs > 1 and federation.kind is not TargetKind.CLASSES:
        raise Fault(
            "The plan's data have one class for each example; use loss = 'cross-entropy', or one output.",
            "training.loss",
        )
    with _blamed("model"):
        _try_out(federation)
    return federation


@contextmanager
def _blamed(key: str, value: str = "") -> Iterator[None]:
    try:
        yield
    except Fault:
        raise
    except GradleakError as error:
        raise Fault(str(error), key, value) from error


def _model(case: Case, pool: Pool) -> nn.Module:
    # Factories without a seed of their own draw from the global generator, which stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = load_sized(case.model, dict(case.model_arg), tuple(pool.space.shape), pool.classes)
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidModel(
            f"The model {case.model!r} has no trainable parameter, so there is nothing to share; train it."
        )
    if case.weights is not None:
        with _blamed("weights"):
            stored = read_tensors(case.weights, limit=float64_bytes(model))
            load_weights(model, named(stored, case.weights, parameters(model), model.state_dict())[0], case.weights)
    check_values(model, case.model)
    if case.mode == "batch":
        return batch_statistics(model)
    return model if case.mode == "as-is" else model.train(case.mode == "train")


def _outputs(model: nn.Module, pool: Pool) -> int:
    like = next(p for p in model.parameters() if p.requires_grad)
    inputs = pool.space.encode(pool.test.inputs[:2]).to(like)
    try:
        check_reproducible(model)
        check_repeatable(model, inputs)
        with torch.no_grad():
            outputs = functional_call(model, {k: b.clone() for k, b in model.named_buffers()}, (inputs,))
    except GradleakError as error:
        raise Fault(str(error), "model") from error
    except Exception as error:
        raise Fault(f"The model does not take the data ({reason(error)}); correct model or data.", "model") from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(inputs):
        raise Fault("The model must return logits (examples, classes); wrap it so that it returns them.", "model")
    return int(outputs.shape[1])


def _loss(told: Training, outputs: int) -> Loss:
    name = told.loss or ("cross-entropy" if outputs > 1 else "bce")
    if ":" in name:
        return find_loss(name)
    if name == "cross-entropy":
        return CrossEntropy(told.reduction, told.label_smoothing, told.class_weights or None)
    if name == "bce":
        return BinaryCrossEntropy(told.reduction, told.class_weights[0] if told.class_weights else 1.0)
    if name == "mse":
        return MeanSquaredError(told.reduction)
    raise UnknownName("loss", name, [*_LOSSES, "module:callable"])


def _training(told: Training, loss: Loss) -> LocalTraining:
    if told.lr is None:
        local = (told.local_epochs, told.local_steps, told.local_batch_size)
        if told.optimizer != "sgd" or told.momentum or told.weight_decay or any(v is not None for v in local):
            raise Fault("Local steps need a step size; give lr, or leave them out for one gradient.", "training.lr")
        return FedSGD(loss)
    if told.optimizer == "sgd":
        rule: SGD | Adam = SGD(told.lr, told.momentum, told.weight_decay)
    else:
        decay = told.weight_decay or (_ADAMW_DECAY if told.optimizer == "adamw" else 0.0)
        rule = Adam(told.lr, weight_decay=decay, decoupled=told.optimizer == "adamw")
    lr, optimizer = (told.lr, None) if rule == SGD(told.lr) else (None, rule)
    return FedAvg(lr, told.local_epochs or 1, told.local_batch_size, optimizer, told.local_steps, loss=loss)


def _try_out(federation: Federation) -> None:
    """Check that the client can be run at all.

    Raises:
        InvalidModel: it cannot, with what the model or the loss said.
    """
    _, batch = federation.batch(federation.pool.test, min(2, len(federation.pool.test)), 0)
    remedy = "forward pass and loss must be differentiable operations of PyTorch."
    with blaming_the_model("The client cannot be run", remedy):
        federation.training(federation.model, batch).check(federation.model)


def tensors_hash(model: nn.Module) -> str:
    """Return the SHA-256 of a model's class and of all its parameters and buffers, by name."""
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
