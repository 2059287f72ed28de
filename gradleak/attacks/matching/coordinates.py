"""Coordinates in which a search takes its steps: other axes for the same inputs, or fewer unknowns than inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.spaces import ImageSpace, InputSpace

__all__ = ["Coordinates", "NaturalImages"]


class Coordinates(ABC):
    """A smooth map from coordinates to model inputs.

    A one-to-one map changes the way to a minimum and not the minimum. A map from fewer coordinates (a coarse grid, the
    latent variables of a generator) excludes all inputs that it cannot reach, which is a strong assumption about them.
    """

    def shape(self, space: InputSpace) -> tuple[int, ...]:
        """Return the shape of one example's coordinates; by default that of its inputs."""
        return tuple(space.shape)

    def start(self, count: int, space: InputSpace, generator: torch.Generator, std: float) -> Tensor:
        """Draw the coordinates (count, *shape) in which ``count`` examples start, in float64; by default normal."""
        return std * torch.randn(count, *self.shape(space), generator=generator, dtype=torch.float64)

    @abstractmethod
    def inputs(self, z: Tensor, space: InputSpace) -> Tensor:
        """Return the model inputs (N, *space.shape) at coordinates ``z`` (N, *shape)."""


@dataclass(frozen=True)
class NaturalImages(Coordinates):
    """Coordinates in which natural images are white: cosine coefficients in units of their usual size, about mid-gray.

    The amplitude of natural images falls as one over the spatial frequency (Field 1987), and most of their color is
    brightness; ``color`` is the size of the two opponent-color components relative to it. A search that measures its
    steps so finds what carries most of the picture first. Nothing is excluded, so nothing is assumed of the solution.
    Inputs that are no images are their own coordinates.
    """

    color: float = 0.3

    def start(self, count: int, space: InputSpace, generator: torch.Generator, std: float) -> Tensor:
        """Draw the start, about mid-gray for images; for other inputs, where their space starts."""
        if isinstance(space, ImageSpace):
            return super().start(count, space, generator, std)
        return space.start(count, generator, std)

    def inputs(self, z: Tensor, space: InputSpace) -> Tensor:
        """Return model inputs; unit-variance coordinates are images of unit variance about mid-gray."""
        if not isinstance(space, ImageSpace):
            return z
        channels, height, width = space.shape
        down, right = _cosines(height, z), _cosines(width, z)
        frequency = (torch.arange(height).double()[:, None].square() + torch.arange(width).double().square()).sqrt()
        amplitude = 1 / (1 + frequency)
        amplitude = (amplitude / amplitude.square().mean().sqrt()).to(z)
        images = down.T @ (z * amplitude) @ right
        if channels == 3:
            axes = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
            axes = axes / axes.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [self.color], [self.color]])
            images = (axes.T.to(z) @ images.flatten(2)).view_as(images)
        return space.encode(images + 0.5)


def _cosines(n: int, like: Tensor) -> Tensor:
    """Return the orthonormal cosine transform (DCT-II), one frequency a row."""
    place, frequency = torch.arange(n).double() + 0.5, torch.arange(n).double()
    matrix = (math.pi / n * frequency[:, None] * place).cos() * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)
