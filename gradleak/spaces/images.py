"""Images in [0, 1], which the model sees normalized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics import mse
from gradleak.spaces.base import InputSpace, NullGuess

__all__ = ["HALF_GRAY", "ImageSpace"]

HALF_GRAY = 54.15
"""PSNR in dB at which the root-mean-square error is half a gray level of an 8-bit screen, −20·log10(0.5 / 255)."""
_HARD_TO_SEE = 30.0
_RECOGNIZABLE = 20.0
_COARSE = 15.0
# A blurred or constant picture of the right brightness may pass 20 dB, but never this structural similarity.
_SSIM = 0.4

_PHRASES = (
    "A person would not recognize it.",
    "Coarse shapes and colors came back; a person would hardly recognize it.",
    "A person would recognize it, with visible errors.",
    "Differences are hard to see: a person would recognize it at once.",
    "The difference is smaller than half a gray level of a screen: to a person the two are the same picture.",
)


@dataclass(frozen=True)
class ImageSpace(InputSpace):
    """Images of shape (C, H, W) in [0, 1], which the model sees as (image − mean) / std per channel.

    Raises:
        InvalidInput: the shape is not (C, H, W), or mean and std do not fit it.
    """

    shape: tuple[int, ...] = (3, 32, 32)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    kind: ClassVar[str] = "image"
    noun: ClassVar[str] = "image"
    nouns: ClassVar[str] = "images"
    display: ClassVar[Literal["pictures", "numbers", "text", "table"]] = "pictures"
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "images"})
    quoted: ClassVar[tuple[str, ...]] = ("mse", "psnr", "ssim")
    error_name: ClassVar[str] = "MSE"

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InvalidInput(f"An image shape is (channels, height, width), not {self.shape}; pass three numbers.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) not in (1, self.shape[0]):
                raise InvalidInput(f"{name} has {len(values)} values for {self.shape[0]} channels; give one or each.")
        if any(s <= 0 for s in self.std):
            raise InvalidInput(f"std must be positive, not {self.std}; give the normalization the client used.")

    @property
    def unit(self) -> float | None:
        """The range from black to white, in model-input units."""
        return 1 / max(self.std or (1.0,))

    @property
    def normalization(self) -> str:
        """Mean and standard deviation, in words."""
        if not self.mean and not self.std:
            return ""
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean or (0.0,), self.std or (1.0,)))
        return f"normalized with mean {mean} and std {std}"

    def neutral(self) -> Tensor:
        """Return mid-gray."""
        return self.encode(torch.full(self.shape, 0.5, dtype=torch.float64))

    def _stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean or (0.0,), dtype=like.dtype, device=like.device).view(-1, 1, 1)
        std = torch.tensor(self.std or (1.0,), dtype=like.dtype, device=like.device).view(-1, 1, 1)
        return mean, std

    def _images(self, candidates: Tensor) -> Tensor:
        mean, std = self._stats(candidates)
        return candidates * std + mean

    def decode(self, candidates: Tensor) -> Tensor:
        """Undo the normalization and clamp to [0, 1]."""
        return self._images(candidates).clamp(0, 1)

    def show(self, candidates: Tensor) -> tuple[Tensor, str | None]:
        """Return images; where they leave [0, 1] by more than 1 %, rescaled to it, and a sentence that says so."""
        images = self._images(candidates)
        low, high = float(images.min()), float(images.max())
        if low >= -0.01 and high <= 1.01:
            return images.clamp(0, 1), None
        why = (
            f"The solved inputs run from {low:.2g} to {high:.2g}, but images run from 0 to 1: the client probably "
            "scales or normalizes them otherwise, so state its mean and std (command line: --mean, --std), or they are "
            "no images, which TensorSpace describes (--input-kind tensor). They are shown rescaled."
        )
        return (images - low) / max(high - low, 1e-12), why

    def encode(self, inputs: Tensor) -> Tensor:
        """Normalize images in [0, 1]."""
        mean, std = self._stats(inputs)
        return (inputs - mean) / std

    def project(self, candidates: Tensor) -> Tensor:
        """Clip candidates to the normalized box of valid images."""
        mean, std = self._stats(candidates)
        return torch.minimum(torch.maximum(candidates, -mean / std), (1 - mean) / std)

    def check(self, inputs: Tensor) -> None:
        """Check that ``inputs`` are images in [0, 1] after normalization is undone, up to rounding."""
        super().check(inputs)
        images = self._images(inputs.double())
        rounding = 4 * torch.finfo(inputs.dtype).eps if inputs.is_floating_point() else 0.0
        slack = max(1e-5, rounding)
        if not bool(((images >= -slack) & (images <= 1 + slack)).all()):
            normalized = " after normalization is undone" if self.mean or self.std else ""
            raise InvalidInput(
                f"The inputs have values from {float(images.min()):.4g} to {float(images.max()):.4g}{normalized}, "
                "outside the [0, 1] of images; divide bytes by 255, describe normalized images with "
                "space=ImageSpace(shape, mean=..., std=...), and other data with space=TensorSpace(shape)."
            )

    def errors(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return the mean squared error of each image, (N,)."""
        return mse(guess, truth)

    def null_guesses(self, truth: Tensor, public: Tensor | None = None) -> tuple[NullGuess, ...]:
        """Return mid-gray, a flat image of the batch's mean brightness, and the mean of ``public`` images."""
        flat = torch.full_like(truth, float(truth.mean()))
        return (
            NullGuess("the same flat gray 0.5 for every example", torch.full_like(truth, 0.5)),
            NullGuess("a flat gray of the private images' mean brightness (oracle)", flat, oracle=True),
            *super().null_guesses(truth, public),
        )

    def closeness(self, values: Mapping[str, float | None]) -> tuple[int, str]:
        """Return 1 from 15 dB on, 2 from 20 dB and SSIM 0.4 on (or 30 dB), 3 from 30 dB on, 4 from 54 dB on.

        These are rules of thumb of the field, not properties of people; the report says so.
        """
        psnr, ssim = values.get("psnr"), values.get("ssim")
        if psnr is None:
            return 0, _PHRASES[0]
        recognizable = _RECOGNIZABLE if ssim is None or ssim >= _SSIM else _HARD_TO_SEE
        level = sum(psnr >= limit for limit in (_COARSE, recognizable, _HARD_TO_SEE, HALF_GRAY))
        return level, _PHRASES[level]
