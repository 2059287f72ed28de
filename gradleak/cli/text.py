"""Language models from a folder: model, tokenizer and captured update, read and checked against each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.cli.request import DTYPES, Request, read_request
from gradleak.cli.subject import Subject, as_captured
from gradleak.data.tensors import float64_bytes, named, read_tensors
from gradleak.errors import InvalidInput, InvalidModel, InvalidUpdate, UnknownName, clean
from gradleak.integrations.huggingface import LanguageModel, Task, load_adapter, load_folder, sample
from gradleak.integrations.tokenizer import Tokenizer
from gradleak.models.loading import check_values
from gradleak.models.weights import load_weights
from gradleak.spaces import TokenSpace
from gradleak.training import Loss, parameters
from gradleak.types import Note, NoteKind

__all__ = ["read_language"]

_PREFIX = "hf:"
_DESCRIBED = ("input_shape", "table", "mean", "std", "classes", "model_arg", "data")
"""Options that say of other models what the folder of a language model says itself."""
_PADDING = 0.02
"""Share of rows without a token up to which a vocabulary counts as rounded up."""
_FEW = 64
"""Rows up to which it does so anyway."""
_WRITTEN = 64
"""Tokens of the sentences that the model itself writes, for a null guess."""
_LAYER = re.compile(r"(.*?)\.(\d+)\.")
"""What the name of a parameter in a numbered layer begins with."""


def read_language(asked: Mapping[str, Any]) -> tuple[Request, Subject, tuple[Loss, ...]]:
    """Return what to attack, with what, where ``--model hf:DIR`` names a language model.

    ``asked`` are the options of ``gradleak attack`` by name.

    Raises:
        InvalidInput: folder, adapter, tokenizer, update and options do not fit each other.
    """
    model, space = _load(asked)
    request = read_request(asked, space)
    subject = _subject(model, request)
    return request, subject, _losses(model, request, subject.outputs)


def _load(asked: Mapping[str, Any]) -> tuple[LanguageModel, TokenSpace]:
    o = SimpleNamespace(**asked)
    given = next((name for name in _DESCRIBED if getattr(o, name)), None)
    if given is not None or o.input_kind != "auto":
        option = f"--{(given or 'input_kind').replace('_', '-')}"
        raise InvalidInput(f"The folder of a language model says itself what {option} says; leave it out.")
    if o.mode not in ("as-is", "eval"):
        raise InvalidInput("Language models are simulated in evaluation mode, without dropout; leave out --mode.")
    if o.task is not None and o.task not in set(Task):
        raise UnknownName("task", o.task, [str(t) for t in Task])
    folder = Path(o.model.removeprefix(_PREFIX))
    model = load_folder(folder, o.task)
    tokenizer = Tokenizer(folder)
    _check_vocabulary(len(tokenizer), len(model.embeddings), folder)
    if o.lora is not None:
        model = load_adapter(model, o.lora)
    if o.weights is not None:
        stored = read_tensors(o.weights, limit=float64_bytes(model))
        weights, _ = named(stored, o.weights, parameters(model), model.state_dict())
        load_weights(model, weights, o.weights)
    check_values(model, o.model)
    dtype = DTYPES[o.dtype]
    # Half precision is exact in float32, where the forward map has second derivatives on every device.
    model = model.to(dtype or max([torch.float32, model.embeddings.dtype], key=lambda d: torch.finfo(d).bits))
    model = model.to(o.device)
    samples = None
    if o.truth is not None:
        generator = torch.Generator().manual_seed(o.seed)
        samples = sample(model, o.batch_size or 1, _WRITTEN, generator, tokenizer.mask)
    space = replace(
        model.space(words=tokenizer),
        excluded=tuple(range(len(tokenizer), len(model.embeddings))),
        special=tokenizer.special,
        samples=samples,
        masked=model.task is Task.MASKED,
    )
    return model, space


def _check_vocabulary(tokens: int, rows: int, folder: Path) -> None:
    """Refuse a tokenizer of another vocabulary; rows beyond it may only be there to round their number up."""
    if tokens > rows or rows - tokens > max(_FEW, _PADDING * rows):
        raise InvalidModel(
            f"The tokenizer in {str(folder)!r} has {tokens:,} tokens, but the model has {rows:,} embeddings, so it is "
            "that of another model; save both of one model there."
        )


def _losses(model: LanguageModel, request: Request, outputs: int) -> tuple[Loss, ...]:
    """Return the client's loss: that of the task, unless another one was stated for a classifier."""
    stated = request.loss
    if request.labels is not None and model.task is not Task.CLASSIFICATION:
        raise InvalidInput("--labels are classes of whole sentences, which this model does not tell; leave it out.")
    if stated.loss is None and stated.reduction == "mean" and not stated.smoothing and stated.weights is None:
        return (model.loss,)
    if model.task is not Task.CLASSIFICATION:
        raise InvalidInput(
            f"The loss of a {model.task} language model is its own, the mean over tokens; leave out what you say of it."
        )
    return stated.among(outputs)


def _subject(model: LanguageModel, request: Request) -> Subject:
    """Return model and captured update; what the update has nothing of was not trained, and is frozen."""
    stored = _own_names(read_tensors(request.update, limit=float64_bytes(model)), model)
    lacking = [name for name in parameters(model) if name not in stored]
    notes: tuple[Note, ...] = ()
    if lacking and all(name in parameters(model) for name in stored):
        _check_depth(stored, lacking)
        by_name = dict(model.named_parameters())
        for name in lacking:
            by_name[name].requires_grad_(False)
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        said = f"The update has nothing of {lacking[0]!r}{more}; the client was taken not to train these parameters."
        notes = (Note(said, NoteKind.ASSUMPTION),)
    update, captured, noted = as_captured(stored, request.update, model, request.kind)
    base = getattr(model.inner, "get_base_model", lambda: model.inner)()
    outputs = int(base.config.num_labels) if model.task is Task.CLASSIFICATION else 0
    name = clean(f"{request.model.spec} ({type(base).__name__}{', with LoRA' if base is not model.inner else ''})")
    return Subject(model, name, update, captured, outputs, True, (*notes, *noted))


def _own_names(stored: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors under the names of the model's parameters, each once.

    Tied parameters may come under each of their names, and those of adapters without the adapter's own.
    """
    own = parameters(model)
    first: dict[int, str] = {}
    alias = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    shortened = {name.replace(".default.", "."): name for name in own}
    if not any("lora_" in name for name in own) and any("lora_" in name for name in stored):
        raise InvalidUpdate("The update is one of a LoRA adapter; name the adapter's folder with --lora.")
    result: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        name = alias.get(name, shortened.get(name, name))
        result.setdefault(name, tensor)
    return result


def _check_depth(stored: Mapping[str, Tensor], lacking: Sequence[str]) -> None:
    """Refuse an update that ends before the last layers: it is that of a model with fewer of them.

    Who freezes layers freezes the early ones.
    """
    deepest: dict[str, int] = {}
    for name in stored:
        if layer := _LAYER.match(name):
            deepest[layer[1]] = max(int(layer[2]), deepest.get(layer[1], 0))
    for name in lacking:
        layer = _LAYER.match(name)
        if layer and int(layer[2]) > deepest.get(layer[1], int(layer[2])):
            raise InvalidUpdate(
                f"The update ends with layer {deepest[layer[1]]} and has nothing of {name!r}, as that of a model with "
                "fewer layers; give the folder of the model that the client trained."
            )
