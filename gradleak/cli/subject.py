"""What is attacked: the model that was sent out with its weights, and the update that was captured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradleak.cli.request import ModelChoice
from gradleak.data.tensors import float64_bytes, named, read_tensors
from gradleak.errors import (
    GradleakError,
    InvalidInput,
    InvalidModel,
    InvalidUpdate,
    NotApplicable,
    clean,
    is_memory,
    reason,
)  # fmt: skip
from gradleak.models.loading import check_values, load_sized
from gradleak.models.weights import load_weights, statistics, such
from gradleak.spaces import InputSpace
from gradleak.structure.patches import find_patch_layer
from gradleak.structure.probe import probe_inputs
from gradleak.training import Simulator, batch_statistics, check_reproducible, parameters
from gradleak.training.base import check_repeatable
from gradleak.types import Note, NoteKind, Update, UpdateKind

__all__ = ["Subject", "as_captured", "load_subject"]

_MOST_UNKNOWNS = 10**8
"""Values of a batch up to which an attack is tried: more do not fit into memory a few times over."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and an update that fit each other.

    Attributes:
        model: as the client ran it.
        name: how the user named it.
        captured: the number type in which it was captured.
        tokens: whether it takes ids that it looks up, which no option describes; attacks refuse it, and name the ids.
        notes: what was taken for granted while reading.

    """

    model: nn.Module
    name: str
    update: Update
    captured: torch.dtype
    outputs: int
    tokens: bool
    notes: tuple[Note, ...]


def load_subject(
    choice: ModelChoice, space: InputSpace, update: Path, kind: UpdateKind, batch_size: int | None
) -> Subject:
    """Build the model, read its weights and the update, and check that they fit each other and the inputs.

    The model is tried with ``batch_size`` examples, one if that is not known.

    Raises:
        InvalidInput: something does not fit, with the remedy.

    """
    model = _load_model(choice, space)
    notes: tuple[Note, ...] = ()
    limit = float64_bytes(model)
    dtype = choice.dtype
    if choice.weights is None:
        notes += (
            _taken("No weights were given: the values that the model factory sets were taken for those sent out."),
        )
        weights: Mapping[str, Tensor] = {}
    else:
        stored = read_tensors(choice.weights, limit=limit)
        weights, positional = named(stored, choice.weights, parameters(model), model.state_dict())
        if positional:
            notes += (
                _taken("The weights' arrays have no names; they were taken in the order of the model's parameters."),
            )
        floats = [v.dtype for v in weights.values() if v.is_floating_point()]
        # Half-precision weights are exact in float32, where the forward map has second derivatives on every device.
        if dtype is None and floats:
            dtype = max([torch.float32, *floats], key=lambda d: torch.finfo(d).bits)
    model = model if dtype is None else model.to(dtype=dtype)
    if choice.weights is not None:
        notes += load_weights(model, weights, choice.weights)
    check_values(model, choice.spec)
    if choice.mode == "batch":
        model = batch_statistics(model)
    elif choice.mode != "as-is":
        model.train(choice.mode == "train")
    model = model.to(choice.device)
    sent, captured, more = as_captured(read_tensors(update, limit=limit), update, model, kind)
    masks = batch_size not in (None, 1) or not _has_patches(model, space)
    check_reproducible(model, masks=masks)
    outputs, tokens = _try_out(model, choice, space, batch_size or 1, masks=masks)
    return Subject(model, _name(choice), sent, captured, outputs, tokens, notes + more)


def _name(choice: ModelChoice) -> str:
    options = ", ".join(f"{k}={v}" for k, v in choice.options.items())
    return clean(choice.spec + (f" ({options})" if options else ""))


def _taken(text: str) -> Note:
    return Note(text, NoteKind.ASSUMPTION)


def _load_model(choice: ModelChoice, space: InputSpace) -> nn.Module:
    model = load_sized(choice.spec, choice.options, tuple(space.shape), choice.classes)
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidModel(f"The model {choice.spec!r} has no trainable parameter, so there is nothing to attack.")
    return model


def as_captured(
    stored: dict[str, Tensor], path: Path, model: nn.Module, kind: UpdateKind
) -> tuple[Update, torch.dtype, tuple[Note, ...]]:
    """Return the tensors of a file as an update in the model's number type, the type they were captured in, and notes.

    Raises:
        InvalidInput: they are no update of ``model``.
    """
    shared, positional = named(stored, path, parameters(model), model.state_dict())
    notes: tuple[Note, ...] = ()
    if positional:
        notes += (_taken("The update's arrays have no names; they were taken in the order of the model's parameters."),)
    idle = [k for k in shared if k in statistics(model)]
    if idle:
        what = f"Left out of the update: {such(idle)}, which the client does not train but keeps as buffers."
        notes += (Note(what, NoteKind.METHOD),)
    like = next(p for p in model.parameters() if p.requires_grad)
    tensors = {k: v for k, v in shared.items() if k not in idle}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InvalidUpdate(
                f"{name!r} of {str(path)!r} holds {tensor.dtype} values, not floats; "
                "share the gradients or weight differences of the parameters only."
            )
    captured = next((v.dtype for v in tensors.values()), like.dtype)
    # Copied into memory of their own: views into a file lie at odd addresses, where sums may round differently.
    update = Update({k: v.clone().to(like.device, like.dtype) for k, v in tensors.items()}, kind)
    update.check(model)
    return update, captured, notes


def _has_patches(model: nn.Module, space: InputSpace) -> bool:
    """Tell whether the model embeds patches, whose gradients are read whatever masks dropout drew behind them."""
    with suppress(NotApplicable):
        buffers = Simulator(model).buffers(torch.float64)
        layer = find_patch_layer(model, parameters(model), tuple(space.shape), buffers)
        return layer is not None and bool(layer.held)
    return False


def _try_out(
    model: nn.Module, choice: ModelChoice, space: InputSpace, count: int, *, masks: bool = True
) -> tuple[int, bool]:
    """Check that the model takes such inputs and, where ``masks`` matter, is the same function every time.

    Returns:
        The number of its outputs, and whether it takes ids instead, which it looks up.

    """
    like = next(p for p in model.parameters() if p.requires_grad)
    if count * math.prod(space.shape) > _MOST_UNKNOWNS:
        raise InvalidInput(
            f"{count:,} inputs of shape {tuple(space.shape)} are more than {_MOST_UNKNOWNS:,} unknowns, which no "
            "attack here takes on; check --batch-size and --input-shape."
        )
    inputs, tokens = probe_inputs(tuple(space.shape), count, like), False
    outputs = _run(model, inputs)
    if isinstance(outputs, BaseException) and any(isinstance(m, nn.Embedding) for m in model.modules()):
        looked_up = _run(model, torch.zeros_like(inputs, dtype=torch.long))
        outputs, tokens = (outputs, False) if isinstance(looked_up, BaseException) else (looked_up, True)
    if isinstance(outputs, BaseException):
        raise InvalidInput(
            f"The model does not take {count} inputs of shape {tuple(space.shape)} ({reason(outputs)}); check "
            "--input-shape, and that the model runs on such a batch."
        ) from outputs
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != count or not outputs.is_floating_point():
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InvalidModel(
            f"The model returns {found}, where logits (examples, classes) are needed; wrap it so that it returns them."
        )
    if masks and not tokens:
        check_repeatable(model, inputs)
    if choice.classes is not None and outputs.shape[1] != choice.classes:
        raise InvalidInput(
            f"The model has {outputs.shape[1]} classes, not {choice.classes}; correct --classes or --model-arg."
        )
    return int(outputs.shape[1]), tokens


def _run(model: nn.Module, inputs: Tensor) -> object:
    """Return the model's outputs, or the error that its forward pass ended with; nothing of the run stays."""
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, {k: b.clone() for k, b in model.named_buffers()}, (inputs,))
    except (GradleakError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's forward pass, which may fail in any way
        if is_memory(error):
            raise
        return error
