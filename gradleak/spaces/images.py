"""Images in [0, 1], which the model sees normalized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.spaces.base import InputSpace

__all__ = ["ImageSpace"]


@dataclass(frozen=True)
class ImageSpace(InputSpace):
    """Images of shape (C, H, W) in [0, 1], which the model sees as (image − mean) / std per channel.

    Raises:
        InvalidInput: the shape is not (C, H, W), or mean and std do not fit it.

    """

    shape: tuple[int, ...] = (3, 32, 32)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InvalidInput(f"An image shape is (channels, height, width), not {self.shape}; pass three numbers.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) not in (1, self.shape[0]):
                raise InvalidInput(f"{name} has {len(values)} values for {self.shape[0]} channels; give one or each.")
        if any(s <= 0 for s in self.std):
            raise InvalidInput(f"std must be positive, not {self.std}; give the normalisation the client used.")

    @property
    def unit(self) -> float | None:
        """The size of a full range of gray levels."""
        return 1 / max(self.std or (1.0,))

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
        """Undo the normalisation and clamp to [0, 1]."""
        return self._images(candidates).clamp(0, 1)

    def show(self, candidates: Tensor) -> tuple[Tensor, str | None]:
        """Return images; where they leave [0, 1] by more than 1 %, rescaled to it, and a sentence that says so."""
        images = self._images(candidates)
        low, high = float(images.min()), float(images.max())
        if low >= -0.01 and high <= 1.01:
            return images.clamp(0, 1), None
        why = (
            f"The solved inputs run from {low:.2g} to {high:.2g}, but images run from 0 to 1: the client probably "
            "scales or normalizes them otherwise, so state its mean and std (command line: --mean, --std). They are "
            "shown rescaled."
        )
        return (images - low) / max(high - low, 1e-12), why

    def encode(self, inputs: Tensor) -> Tensor:
        """Normalise images in [0, 1]."""
        mean, std = self._stats(inputs)
        return (inputs - mean) / std

    def project(self, candidates: Tensor) -> Tensor:
        """Clip candidates to the normalised box of valid images."""
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
