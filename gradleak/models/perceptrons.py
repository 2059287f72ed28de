"""The multilayer perceptron, as for tables and small images."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from gradleak.models.building import Activation, Initialization, activation, build, image_sides, positive

__all__ = ["Perceptron", "perceptron"]


@final
class Perceptron(nn.Module):
    """Linear layers of one width with an activation after each (``body``), and a linear head (``head``)."""

    def __init__(self, *, inputs: int, width: int, depth: int, classes: int, activation_name: str) -> None:
        """Make the layers; :func:`perceptron` is the way to an initialized model."""
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for number in range(depth):
            layers += [nn.Linear(width if number else inputs, width), activation(activation_name)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W), which are flattened."""
        logits: Tensor = self.head(self.body(x))
        return logits


def perceptron(
    *,
    width: int = 256,
    depth: int = 2,
    classes: int = 100,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    activation: Activation = "relu",
    init: Initialization = "default",
    seed: int | torch.Generator | None = None,
) -> Perceptron:
    """Return an initialized multilayer perceptron.

    It has ``depth`` hidden layers of ``width`` units. An ``image_size`` of (1, F) with one channel is a table's row of
    F columns. Other arguments and errors as in :func:`gradleak.models.resnet18`.
    """
    height, wide = image_sides(image_size)
    positive(width=width, depth=depth, classes=classes, in_channels=in_channels, height=height, image_width=wide)
    return build(
        lambda: Perceptron(
            inputs=in_channels * height * wide, width=width, depth=depth, classes=classes, activation_name=activation
        ),
        init,
        seed,
    )
