"""Additive noise on every coordinate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.defenses.base import UpdateDefense
from gradleak.errors import InvalidInput
from gradleak.training import Tensors

__all__ = ["GaussianNoise", "LaplacianNoise", "gaussian_noise", "laplacian_noise"]


@dataclass(frozen=True)
class GaussianNoise(UpdateDefense):
    """Gaussian noise on every coordinate, in the update's own units (Zhu et al. 2019, Section 5.1: 1e-4 … 1e-1).

    ``sigma`` is its standard deviation. No privacy guarantee comes with it: sensitivity is not bounded.
    """

    sigma: float

    def __post_init__(self) -> None:
        _check("sigma", self.sigma)

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``tensors`` with noise, or unchanged without a generator."""
        if generator is None:
            return dict(tensors)
        return {k: t + self.sigma * _normal(t, generator) for k, t in tensors.items()}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed``: under equal noise on all coordinates least squares is the likelihood."""
        return {k: observed[k] for k in observed}

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return sigma everywhere."""
        return {k: torch.full_like(o, self.sigma) for k, o in observed.items()}


@dataclass(frozen=True)
class LaplacianNoise(UpdateDefense):
    """Laplacian noise on every coordinate, in the update's own units (Zhu et al. 2019, Section 5.1).

    ``scale`` is b of the density exp(−|z| / b) / 2b; the standard deviation is √2 b.
    """

    scale: float

    def __post_init__(self) -> None:
        _check("scale", self.scale)

    def transform(self, tensors: Tensors, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``tensors`` with noise, or unchanged without a generator."""
        if generator is None:
            return dict(tensors)
        return {k: t + self.scale * _laplace(t, generator) for k, t in tensors.items()}

    def explain(self, simulated: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Return ``observed``."""
        return {k: observed[k] for k in observed}

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return √2 times the scale everywhere."""
        return {k: torch.full_like(o, 2**0.5 * self.scale) for k, o in observed.items()}


def gaussian_noise(sigma: float) -> GaussianNoise:
    """Return Gaussian noise of standard deviation ``sigma`` (update's units) as a defense."""
    return GaussianNoise(sigma)


def laplacian_noise(scale: float) -> LaplacianNoise:
    """Return Laplacian noise of scale b = ``scale`` (update's units) as a defense."""
    return LaplacianNoise(scale)


def _check(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise InvalidInput(f"Noise cannot have {name}={value}; give a finite number of at least 0.")


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _laplace(like: Tensor, generator: torch.Generator) -> Tensor:
    # The difference of two exponential variables.
    drawn = torch.empty((2, *like.shape), dtype=like.dtype, device=like.device).exponential_(generator=generator)
    return drawn[0] - drawn[1]
