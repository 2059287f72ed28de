"""What a result is compared with: the private batch, granted labels, and public images for the null guesses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradleak.data import load_images, read_batch, read_rows
from gradleak.errors import InvalidInput
from gradleak.files import read_file
from gradleak.spaces import ImageSpace, InputSpace, TableSpace, TokenSpace
from gradleak.training import TargetKind
from gradleak.types import Batch

__all__ = ["granted_labels", "public_images", "read_truth"]

_PUBLIC = 256
"""Public images that are read for the null guesses."""


def granted_labels(labels: Sequence[float], kind: TargetKind, outputs: int) -> Tensor:
    """Return the labels that the attacker is told: class indices (N,), or targets (N, 1) of a single output.

    Raises:
        InvalidInput: they are no labels of such outputs.
    """
    if kind is TargetKind.CLASSES:
        return _classes(torch.tensor(list(labels), dtype=torch.float64), outputs, "--labels")
    if outputs > 1:
        raise InvalidInput("--labels holds one number per example, but the loss takes several; leave it out.")
    if kind is TargetKind.BINARY and not all(0 <= v <= 1 for v in labels):
        raise InvalidInput("--labels of a binary cross-entropy lie in [0, 1]; correct them.")
    return torch.tensor(list(labels), dtype=torch.float64)[:, None]


def read_truth(
    path: Path, space: InputSpace, count: int, told: Tensor | None, kinds: Sequence[TargetKind], outputs: int
) -> Batch:
    """Return the decoded private batch; unknown labels are −1, which no class equals.

    The file is an ``.npz`` or ``.safetensors`` with ``inputs`` and perhaps ``labels``, a picture, of a table a CSV file
    in people's words, or of text one sentence a line; ``told`` are the labels that the attacker was told, and ``kinds``
    says how labels may look.

    Raises:
        InvalidInput: the file holds no such batch.
    """
    labels: Tensor | None
    if isinstance(space, TableSpace):
        inputs, labels = read_rows(path, space, count=count)
    elif isinstance(space, TokenSpace):
        inputs, labels = _sentences(path, space, count), None
    else:
        inputs, labels = read_batch(path, tuple(space.shape), count=count)
    if isinstance(space, ImageSpace) and not bool(((inputs >= 0) & (inputs <= 1)).all()):
        raise InvalidInput(
            f"{str(path)!r} has values from {float(inputs.min()):.4g} to {float(inputs.max()):.4g}, outside "
            "[0, 1]; undo its normalization (and tell it with --mean and --std), divide bytes by 255, or say that they "
            "are no images with --input-kind tensor."
        )
    labels = told if labels is None else labels
    if labels is None:
        return Batch(inputs, torch.full((count,), -1))
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape == (count, outputs) and TargetKind.CLASSES not in kinds:
        return Batch(inputs, torch.full((count,), -1))  # several targets each, which are no classes to recover
    if labels.shape != (count,):
        raise InvalidInput(f"The labels in {str(path)!r} must be one number for each example; save them so.")
    whole = bool((labels == labels.round()).all()) if labels.is_floating_point() else True
    if TargetKind.CLASSES in kinds:
        return Batch(inputs, _classes(labels, outputs, str(path)))
    if TargetKind.BINARY in kinds and whole and bool(((labels == 0) | (labels == 1)).all()):
        return Batch(inputs, labels.long())
    return Batch(inputs, labels.double())


def _sentences(path: Path, space: TokenSpace, count: int) -> Tensor:
    """Return the ids (N, T) of the sentences in a text file, filled up with −1."""
    assert not isinstance(space.words, Sequence)  # a tokenizer: the command line describes no sentences without one
    try:
        text = read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{str(path)!r} is not text in UTF-8; write one sentence a line into it.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != count:
        raise InvalidInput(
            f"{str(path)!r} has {len(lines)} sentences for a batch of {count}; write each into a line of its own."
        )
    rows = [torch.tensor(list(space.words.encode(line, space.length))) for line in lines]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def public_images(spec: str, space: InputSpace) -> Tensor:
    """Return public images (M, C, H, W) in [0, 1]: all of a source, or a random selection; of a table, all rows.

    Raises:
        InvalidInput: the inputs are neither images nor rows, or there is no such source.
    """
    if isinstance(space, TableSpace):
        return read_rows(spec, space)[0]
    if not isinstance(space, ImageSpace):
        raise InvalidInput("--data holds images; leave it out for other inputs.")
    images = load_images(spec, shape=(space.shape[0], space.shape[1], space.shape[2])).inputs
    if len(images) <= _PUBLIC:
        return images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_PUBLIC]]


def _classes(labels: Tensor, classes: int, source: str) -> Tensor:
    """Return class indices, all of which the model has."""
    for value in labels.tolist():
        if value != int(value) or not 0 <= value < classes:
            raise InvalidInput(f"{source} names class {value:g}, but classes run from 0 to {classes - 1}; correct it.")
    return labels.long()
