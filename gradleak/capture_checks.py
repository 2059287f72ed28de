"""Slips of the capture that an update shows: whole weights for a difference, the wrong sign, a wrong scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidUpdate, NotApplicable
from gradleak.spaces import InputSpace
from gradleak.structure.head import Head, find_head
from gradleak.training import CrossEntropy, FedAvg, LocalTraining, Simulator, parameters
from gradleak.types import Note, NoteKind, Update, UpdateKind

__all__ = ["check_capture"]

_ALIKE, _SIZE = 0.95, 2.0
"""Cosine and ratio of norms from which on an update is taken for the weights. Gradients are nearly orthogonal to them
(|cos| < 0.1 in models of some hundred parameters); weights after training keep 0.99 and more."""
_ZERO = 1e-3
"""Share of the largest entry below which one says nothing of its sign."""
_CHANCE = 1e-4
"""Probability below which a pattern of signs is no accident."""
_ROOM = 1.05
"""Factor that rounding and light noise may add to a bound."""


def check_capture(
    model: nn.Module,
    update: Update,
    training: LocalTraining | None = None,
    batch_size: int | None = None,
    space: InputSpace | None = None,
) -> tuple[Note, ...]:
    """Return what is suspicious about a captured update, one sentence for each thing.

    The bias of the last layer tells the sign and bounds the scale of a cross-entropy's gradient: its entries are the
    mean of p − y, so they sum to zero, only classes of the batch have negative ones, and no batch has entries whose
    sizes sum to more than 2. Without ``space``, only the update as a whole is looked at; ``update`` fits ``model``.

    Raises:
        InvalidUpdate: the update is no update: it is the weights themselves, or has the opposite sign.
    """
    _check_no_weights(parameters(model), update)
    loss = None if training is None else training.undefended.loss
    if training is None or space is None or not isinstance(loss, CrossEntropy):
        return ()
    try:
        head = find_head(model, parameters(model), tuple(space.shape))
    except NotApplicable:  # It takes ids, say; an attack will tell.
        return ()
    gradient = _bias_gradient(head, model, update, training, batch_size)
    if gradient is None:
        return ()
    if not loss.label_smoothing:  # which pulls the classes that a batch lacks, too
        _check_sign(gradient, update.kind, batch_size)
    return _scale(gradient, loss, update.kind, batch_size)


def _check_no_weights(params: dict[str, Tensor], update: Update) -> None:
    inner = sum(float((params[k].double() * update.tensors[k].double()).sum()) for k in params)
    own, sent = (math.sqrt(sum(float(t[k].double().square().sum()) for k in params)) for t in (params, update.tensors))
    if own == 0 or sent == 0 or not 1 / _SIZE < sent / own < _SIZE or inner / (own * sent) < _ALIKE:
        return
    raise InvalidUpdate(
        f"The update points the way of the weights that were sent out (cosine {inner / (own * sent):.4f}) and is as "
        "large: it looks like the weights after training; subtract those that were sent out, and give the difference "
        "as a weight_delta."
    )


def _bias_gradient(
    head: Head | None, model: nn.Module, update: Update, training: LocalTraining, batch_size: int | None
) -> Tensor | None:
    """Return the gradient of the logits' bias (C,), float64, None where it cannot be read."""
    if head is None or head.bias_name is None or head.classes < 3 or head.bias_name not in update.tensors:
        return None
    simulator = Simulator(model, training)
    found = simulator.as_gradient(update, batch_size, names=[head.bias_name])
    plain = training.undefended
    if not found.scaled or (isinstance(plain, FedAvg) and getattr(plain.rule, "momentum", 0.0) > 0):
        return None
    gradient = found.tensors[head.bias_name].detach().double().flatten().cpu()
    return gradient if bool(torch.isfinite(gradient).all()) and bool(gradient.any()) else None


def _check_sign(gradient: Tensor, kind: UpdateKind, batch_size: int | None) -> None:
    large = gradient[gradient.abs() > _ZERO * gradient.abs().max()]
    count, positive, examples = len(large), int((large > 0).sum()), batch_size or 1
    # Of entries of random sign and size: the chance that they nearly sum to zero, and that so few are positive.
    balanced = 3 * abs(float(gradient.sum())) / float(gradient.abs().sum())
    accident = balanced * sum(math.comb(count, k) for k in range(min(examples, count) + 1)) / 2.0**count
    if positive > examples or count - positive <= examples or accident > _CHANCE:
        return
    remedy = (
        "a weight delta is after minus before; subtract the other way round"
        if kind is UpdateKind.WEIGHT_DELTA
        else "a gradient is what loss.backward() leaves in p.grad; multiply by −1, or, where it is a weight "
        "difference, say --kind weight_delta"
    )
    raise InvalidUpdate(
        f"The update has the opposite sign: training raises the biases of the batch's classes, {examples} at most of "
        f"{count}, and this update raises {count - positive}; {remedy}."
    )


def _scale(gradient: Tensor, loss: CrossEntropy, kind: UpdateKind, batch_size: int | None) -> tuple[Note, ...]:
    most = 2.0
    if loss.reduction == "sum":
        if batch_size is None:
            return ()
        most *= batch_size * max(loss.weight or (1.0,))
    size = float(gradient.abs().sum())
    if size <= _ROOM * most:
        return ()
    cause = (
        "the stated learning rate or number of local steps is too small, or the loss is summed (--reduction sum)"
        if kind is UpdateKind.WEIGHT_DELTA
        else "the loss is summed (--reduction sum), or a loss scale of mixed precision was not divided out"
    )
    return (
        Note(
            f"The update is at least {size / most:.3g} times larger than the stated training can make it: {cause}; "
            "state it as it was.",
            NoteKind.LIMIT,
        ),
    )
