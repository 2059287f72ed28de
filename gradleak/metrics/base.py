"""What every metric is: one number per example, never one per batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.errors import InvalidInput

__all__ = ["Metric"]


@final
@dataclass(frozen=True)
class Metric:
    """Compares each reconstructed example with the private one it is assigned to.

    Attributes:
        name: as it appears in results.
        unit: "dB", "" for pure numbers.
        higher_is_better: the direction.
        fn: (guess, truth), both (N, *shape) in float64 (labels, tokens: integers) → (N,) in float64.
        reads: "inputs" (any shape), "images" ((N, C, H, W) in [0, 1]), "values" (any shape and units, no images),
            "tokens" ((N, T) ids), "labels" ((N,) class indices), or what a space of your own calls it.
        meaning: one clause for a reader of the report.
    """

    name: str
    unit: str
    higher_is_better: bool
    fn: Callable[[Tensor, Tensor], Tensor]
    reads: str = "inputs"
    meaning: str = ""

    def __call__(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return one value per example, (N,) in float64 on the CPU; NaN where an example of ``guess`` is not finite.

        Raises:
            InvalidInput: the shapes differ or are not what the metric reads.
        """
        if guess.shape != truth.shape or truth.ndim == 0:
            raise InvalidInput(
                f"{self.name} compares equal shapes, not {tuple(guess.shape)} with {tuple(truth.shape)}; "
                "assign and decode the reconstruction first."
            )
        if self.reads == "images" and truth.ndim != 4:
            raise InvalidInput(f"{self.name} reads images (N, C, H, W), not {tuple(truth.shape)}; use mse instead.")
        if self.reads == "tokens":
            if truth.ndim != 2 or truth.is_floating_point() or guess.is_floating_point():
                raise InvalidInput(
                    f"{self.name} reads token ids (N, T), not {truth.dtype} of shape {tuple(truth.shape)}; "
                    "decode embeddings with TokenSpace.decode first."
                )
            return self.fn(guess.detach().cpu(), truth.detach().cpu()).double()
        if self.reads == "labels":
            if truth.ndim != 1:
                raise InvalidInput(f"{self.name} reads class indices (N,), not {tuple(truth.shape)}; take the argmax.")
            return self.fn(guess.detach().cpu(), truth.detach().cpu()).double()
        guess, truth = (t.detach().to("cpu", torch.float64) for t in (guess, truth))
        finite = torch.isfinite(guess.flatten(1)).all(1) if guess.ndim > 1 else torch.isfinite(guess)
        values = self.fn(torch.nan_to_num(guess, nan=0.0, posinf=0.0, neginf=0.0), truth)
        return torch.where(finite, values, torch.nan)
