"""What one example looks like to the attacker: shape, value range, and how a candidate is decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

__all__ = ["InputSpace"]


class InputSpace(ABC):
    """The space of one input: candidates are what the model sees, decoded inputs are what a person sees."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one candidate, without the batch axis."""

    @property
    def unit(self) -> float | None:
        """Typical size of one model-input value, for tolerances; None where only the values themselves tell."""
        return None

    def neutral(self) -> Tensor:
        """Return the model input (*shape), float64, that says least: where a solver starts that needs one point."""
        return torch.zeros(self.shape, dtype=torch.float64)

    @abstractmethod
    def decode(self, candidates: Tensor) -> Tensor:
        """Return what a person sees of ``candidates`` (..., *shape)."""

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Return the model inputs of decoded ``inputs`` (..., *shape)."""

    def show(self, candidates: Tensor) -> tuple[Tensor, str | None]:
        """Return decoded inputs that were solved exactly, and a sentence where they cannot be inputs of this space."""
        return self.decode(candidates), None

    def project(self, candidates: Tensor) -> Tensor:
        """Return the nearest valid candidates."""
        return candidates

    def check(self, inputs: Tensor) -> None:
        """Check that model inputs (N, *shape) lie in this space, so that decoding them loses nothing.

        Raises:
            InvalidInput: they have another shape, or values that no candidate has.

        """
        if tuple(inputs.shape[1:]) != tuple(self.shape):
            raise InvalidInput(
                f"The inputs have shape {tuple(inputs.shape[1:])}, those of the space {tuple(self.shape)}; pass a "
                "space of the inputs' shape."
            )
