"""Values of any shape and range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics import assign, relative_error, scales
from gradleak.spaces.base import InputSpace, NullGuess

__all__ = ["TensorSpace"]

_LEVELS = (1e-1, 1e-2, 1e-3, 1e-5)
_PHRASES = (
    "The values do not agree.",
    "The values agree only roughly.",
    "The values agree to about a hundredth of their size.",
    "The values agree to about a thousandth of their size.",
    "The values agree to five digits.",
)


@dataclass(frozen=True)
class TensorSpace(InputSpace):
    """Plain numbers of any shape and range (rows of a table, sensor readings, features), decoded as they are."""

    shape: tuple[int, ...] = ()

    kind: ClassVar[str] = "tensor"
    reads: ClassVar[frozenset[str]] = frozenset({"inputs", "values"})
    quoted: ClassVar[tuple[str, ...]] = ("relative_error",)
    error_name: ClassVar[str] = "squared relative error"
    margin: ClassVar[float] = 0.25  # of squared errors: half the relative error

    def decode(self, candidates: Tensor) -> Tensor:
        """Return ``candidates`` unchanged."""
        return candidates

    def encode(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` unchanged."""
        return inputs

    def assign(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return the assignment in units of each position's usual size, so that no large column decides alone."""
        if guess.shape[1:] != truth.shape[1:]:
            raise InvalidInput(
                f"The reconstruction has examples of shape {tuple(guess.shape[1:])}, the truth of "
                f"{tuple(truth.shape[1:])}; score against the batch that was attacked."
            )
        sizes = scales(truth)
        return assign(guess / sizes, truth / sizes)

    def errors(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return the squared relative error of each example, (N,)."""
        return relative_error(guess, truth).square()

    def null_guesses(self, truth: Tensor, public: Tensor | None = None) -> tuple[NullGuess, ...]:
        """Return zeros, the mean of all private values, their mean at each position, and the mean of ``public``."""
        return (
            NullGuess("zeros", torch.zeros_like(truth)),
            NullGuess("the mean of all private values (oracle)", torch.full_like(truth, float(truth.mean())), True),
            NullGuess("the private batch's mean at each position (oracle)", truth.mean(0).expand_as(truth), True),
            *super().null_guesses(truth, public),
        )

    def better(self, guess: Tensor, truth: Tensor, public: Tensor | None = None) -> Tensor:
        """Return whether each example is clearly better than every null guess; zeros cannot be told from one."""
        return super().better(guess, truth, public) & bool(truth.any())

    def closeness(self, values: Mapping[str, float | None]) -> tuple[int, str]:
        """Return 1 up to a relative error of 1e-1, 2 up to 1e-2, 3 up to 1e-3, 4 up to 1e-5."""
        error = values.get("relative_error")
        level = 0 if error is None else sum(error <= limit for limit in _LEVELS)
        return level, _PHRASES[level]
