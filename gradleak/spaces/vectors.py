"""Values of any shape and range."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradleak.spaces.base import InputSpace

__all__ = ["TensorSpace"]


@dataclass(frozen=True)
class TensorSpace(InputSpace):
    """Unstructured inputs of any shape and range (tabular rows, features), decoded as they are."""

    shape: tuple[int, ...] = ()

    def decode(self, candidates: Tensor) -> Tensor:
        """Return ``candidates`` unchanged."""
        return candidates

    def encode(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` unchanged."""
        return inputs
