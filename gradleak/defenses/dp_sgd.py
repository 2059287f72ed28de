"""Differentially private SGD."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gradleak.defenses.base import Defense
from gradleak.errors import InvalidInput
from gradleak.training import FedAvg, FedSGD, LocalTraining, PerExample

__all__ = ["DPSGD", "dp_sgd"]


@dataclass(frozen=True)
class DPSGD(Defense):
    """Clipping the gradient of every example by itself, and noise on their sum, in every local step.

    Source: Abadi et al. 2016, Algorithm 1, with the numbers of Opacus 1.6: the norm over all tensors together, noise of
    standard deviation noise_multiplier · max_grad_norm on the sum, division by the expected ``batch_size``. Which
    examples a step takes (Poisson sampling) is the batch that is handed over; :func:`gradleak.bounds.upper_bound`
    and :func:`gradleak.bounds.privacy_budget` take the sampling rate.
    """

    noise_multiplier: float
    max_grad_norm: float
    batch_size: int

    def __post_init__(self) -> None:
        self._rule(None)  # What cannot be used is refused here rather than in the first step.

    def wrap(self, training: LocalTraining, *, seed: int = 0) -> LocalTraining:
        """Return ``training`` whose gradients are clipped and noised; ``seed`` is of the noise.

        Raises:
            InvalidInput: a defense comes before it.
        """
        if not isinstance(training, (FedSGD, FedAvg)) or training.private is not None:
            raise InvalidInput(
                "DP-SGD changes the gradient of every local step, so it comes before other defenses; name it first."
            )
        return replace(training, private=self._rule(seed))

    def _rule(self, seed: int | None) -> PerExample:
        return PerExample(self.max_grad_norm, self.noise_multiplier, self.batch_size, seed)


def dp_sgd(noise_multiplier: float, max_grad_norm: float, batch_size: int) -> DPSGD:
    """Return DP-SGD as Opacus runs it: clip each example to ``max_grad_norm``, add noise, divide by ``batch_size``."""
    return DPSGD(noise_multiplier, max_grad_norm, batch_size)
