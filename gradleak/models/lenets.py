"""The LeNet of Zhu et al. 2019."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from gradleak.models.building import Activation, Initialization, activation, build, image_sides, positive

__all__ = ["LeNet", "lenet"]


@final
class LeNet(nn.Module):
    """Three 5×5 convolutions (padding 2; strides 2, 2, 1), each with an activation, and one linear head.

    Parameter names are those of the authors' code (``body.0``, ``body.2``, ``body.4``, ``fc.0``), so that updates and
    weights captured with it fit.
    """

    def __init__(
        self, *, width: int, classes: int, in_channels: int, image_size: int | tuple[int, int], activation_name: str
    ) -> None:
        """Make the layers; :func:`lenet` is the way to an initialized model."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 5, padding=2, stride=2),
            activation(activation_name),
            nn.Conv2d(width, width, 5, padding=2, stride=2),
            activation(activation_name),
            nn.Conv2d(width, width, 5, padding=2, stride=1),
            activation(activation_name),
        )
        height, wide = ((side + 3) // 4 for side in image_sides(image_size))
        self.fc = nn.Sequential(nn.Linear(width * height * wide, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        logits: Tensor = self.fc(self.body(x).flatten(1))
        return logits


def lenet(
    *,
    width: int = 12,
    classes: int = 100,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    activation: Activation = "sigmoid",
    init: Initialization = "dlg",
    seed: int | torch.Generator | None = None,
) -> LeNet:
    """Return the LeNet that Zhu et al. 2019 (Deep Leakage from Gradients, Section 4.1) attack, initialized.

    The defaults are those of the authors' code: width 12, 100 classes, sigmoid, weights and biases U(−0.5, 0.5).
    ``width`` is the channels of each convolution, ``in_channels`` is 1 for MNIST, ``image_size`` is in pixels, and the
    head is sized to fit. Other arguments and errors as in :func:`gradleak.models.resnet18`.
    """
    height, wide = image_sides(image_size)
    positive(width=width, classes=classes, in_channels=in_channels, height=height, image_width=wide)
    return build(
        lambda: LeNet(
            width=width, classes=classes, in_channels=in_channels, image_size=image_size, activation_name=activation
        ),
        init,
        seed,
    )
