"""A private batch from one file, to score reconstructions against."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from gradleak.data.archives import is_npz
from gradleak.data.images import is_picture, load_images
from gradleak.data.tensors import read_tensors
from gradleak.errors import InvalidFile, InvalidInput
from gradleak.files import read_file

__all__ = ["read_batch"]

_EXAMPLES = 1024
"""Examples that a file may hold where their number is not known, for the memory that reading it may take."""


def read_batch(path: str | Path, shape: tuple[int, ...], *, count: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the inputs and the labels, if there are any, that a file holds.

    Args:
        path: a ``.safetensors``, ``.npz`` or ``.pt`` file with ``inputs`` and, if known, ``labels``; an ``.npz`` file
            of images as :func:`gradleak.data.load_images` takes it; or one picture, which is resized to ``shape``.
        shape: of one input, without the batch axis. Bytes (uint8) are divided by 255 where it is that of an image.
        count: number of examples that there must be; any if None.

    Returns:
        Inputs (N, *shape), float64, finite; and labels (N, …) as they are stored, integers as int64, or None.

    Raises:
        InvalidFile: the file is absent, damaged, pickled, far too large, or has no ``inputs``.
        InvalidInput: the inputs have another shape, number or type, or are not finite.
    """
    path = Path(path)
    if is_picture(path):
        if len(shape) != 3:
            raise InvalidInput(
                f"{str(path)!r} is a picture, but the inputs have shape {shape}; name a file of tensors."
            )
        inputs: Tensor = load_images(path, shape=(shape[0], shape[1], shape[2]), dtype=torch.float64).inputs
        labels = None
    else:
        inputs, labels = _stored(path, shape, count)
    _check(path, inputs, labels, shape, count)
    if inputs.dtype == torch.uint8 and len(shape) == 3:
        inputs = inputs.double() / 255
    inputs = inputs.double()
    if not bool(torch.isfinite(inputs).all()):
        raise InvalidInput(f"{str(path)!r} has NaN or infinite values; save the private inputs again.")
    integers = labels is not None and not labels.is_floating_point()
    return inputs, labels.long() if labels is not None and integers else labels


def _stored(path: Path, shape: tuple[int, ...], count: int | None) -> tuple[Tensor, Tensor | None]:
    # Inputs and labels in float64; labels are as long as the inputs at most, or a number each.
    tensors = read_tensors(path, limit=16 * (math.prod(shape) + 1) * (_EXAMPLES if count is None else count))
    if "inputs" in tensors:
        return tensors["inputs"], tensors.get("labels")
    if is_npz(read_file(path)):
        images = load_images(path, dtype=torch.float64)
        return images.inputs, images.labels
    raise InvalidFile(f"{str(path)!r} has no tensor named 'inputs'; name them inputs and labels.")


def _check(path: Path, inputs: Tensor, labels: Tensor | None, shape: tuple[int, ...], count: int | None) -> None:
    if inputs.ndim == 0 or tuple(inputs.shape[1:]) != tuple(shape) or inputs.numel() == 0:
        raise InvalidInput(
            f"{str(path)!r} has inputs of shape {tuple(inputs.shape)}, but (examples, "
            f"{', '.join(map(str, shape))}) is needed; score against the batch that was attacked."
        )
    if count is not None and len(inputs) != count:
        raise InvalidInput(
            f"{str(path)!r} has {len(inputs)} examples, but the batch has {count}; "
            "score against the batch that was attacked."
        )
    if labels is not None and (labels.ndim == 0 or len(labels) != len(inputs)):
        raise InvalidInput(f"The labels in {str(path)!r} must be one for each example; store as many as inputs.")
