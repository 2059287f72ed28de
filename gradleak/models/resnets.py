"""Residual networks for small images: the plain ones, and the smooth variant of Zhu et al. 2019."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import InvalidInput
from gradleak.models import building
from gradleak.models.building import Activation, Initialization, Norm, build, image_sides, positive

__all__ = ["BasicBlock", "PadShortcut", "ResNet", "dlg_resnet", "resnet18", "resnet20", "resnet32"]


@final
class PadShortcut(nn.Module):
    """Subsample by ``stride`` and pad with zero channels (He et al. 2016, Section 3.3, option A)."""

    def __init__(self, extra: int, stride: int) -> None:
        """Add ``extra`` channels."""
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + extra, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


@final
class BasicBlock(nn.Module):
    """Two 3×3 convolutions with normalization and a shortcut (He et al. 2016, Figure 2); nothing works in place."""

    def __init__(self, channels: int, planes: int, stride: int, *, act: str, norm_name: str, projection: bool) -> None:
        """Make a block from ``channels`` to ``planes``; ``projection`` chooses shortcut option B over A."""
        super().__init__()
        bias = norm_name == "none"
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = building.norm(norm_name, planes)
        self.act1 = building.activation(act)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=bias)
        self.bn2 = building.norm(norm_name, planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or channels != planes:
            if projection:
                conv = nn.Conv2d(channels, planes, 1, stride=stride, bias=bias)
                self.shortcut = nn.Sequential(conv, building.norm(norm_name, planes))
            else:
                self.shortcut = PadShortcut(planes - channels, stride)
        self.act2 = building.activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, planes, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        z: Tensor = self.act2(y)
        return z


@final
class ResNet(nn.Module):
    """A 3×3 stem without max-pooling, stages of basic blocks, average pooling, one linear head.

    Modules carry the usual names of small-image ResNets (``conv1``, ``bn1``, ``layer1.0.conv1``, …, ``shortcut.0``,
    ``linear``); ``bn`` stays the name when the normalization is another one.
    """

    def __init__(
        self,
        *,
        planes: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        classes: int,
        in_channels: int,
        act: str,
        norm_name: str,
        projection: bool,
        pooled: tuple[int, int] = (1, 1),
        pool: int | None = None,
    ) -> None:
        """Make the layers; ``pool`` is the side of the average pooling's window (None: global) to size ``pooled``."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes[0], 3, padding=1, bias=norm_name == "none")
        self.bn1 = building.norm(norm_name, planes[0])
        self.act1 = building.activation(act)
        channels = planes[0]
        self.stages: list[str] = []
        for number, (width, count, stride) in enumerate(zip(planes, blocks, strides, strict=True), start=1):
            layers: list[nn.Module] = []
            for index in range(count):
                step = stride if index == 0 else 1
                layers.append(BasicBlock(channels, width, step, act=act, norm_name=norm_name, projection=projection))
                channels = width
            self.stages.append(f"layer{number}")
            self.add_module(f"layer{number}", nn.Sequential(*layers))
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(1) if pool is None else nn.AvgPool2d(pool)
        self.linear = nn.Linear(channels * pooled[0] * pooled[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        y = self.act1(self.bn1(self.conv1(x)))
        for name in self.stages:
            y = getattr(self, name)(y)
        logits: Tensor = self.linear(self.pool(y).flatten(1))
        return logits


def resnet18(
    *,
    width: int = 64,
    classes: int = 100,
    in_channels: int = 3,
    activation: Activation = "relu",
    norm: Norm = "batch",
    init: Initialization = "default",
    seed: int | torch.Generator | None = None,
) -> ResNet:
    """Return ResNet-18 (He et al. 2016, Table 1) with the usual stem for 32×32 images, initialized.

    Four stages of two basic blocks with ``width`` · (1, 2, 4, 8) channels and projection shortcuts. Deviation from the
    ImageNet network: the stem is one 3×3 convolution of stride 1 and there is no max-pooling.

    Args:
        width: channels of the first stage.
        classes: number of classes.
        in_channels: channels of the image; any height and width fit.
        activation: name of the activation.
        norm: "batch", "group" or "none"; without normalization the convolutions have biases.
        init: "default" (PyTorch's), "he" or "dlg".
        seed: a seed or generator for the initialization; None draws from PyTorch's global generator.

    Raises:
        InvalidInput: a size is not positive.
        UnknownName: no activation, normalization or initialization of that name.
    """
    blocks, strides = [2, 2, 2, 2], [1, 2, 2, 2]
    return _network(width, blocks, strides, classes, in_channels, activation, norm, init, seed, projection=True)


def _network(
    width: int, blocks: Sequence[int], strides: Sequence[int], classes: int, in_channels: int, act: str, norm_name: str,
    init: str, seed: int | torch.Generator | None, **more: Any,
) -> ResNet:  # fmt: skip
    """Return an initialized network whose stages have ``width`` · (1, 2, 4, …) channels."""
    positive(width=width, classes=classes, in_channels=in_channels)
    planes = [width * 2**k for k in range(len(blocks))]
    return build(
        lambda: ResNet(
            planes=planes,
            blocks=blocks,
            strides=strides,
            classes=classes,
            in_channels=in_channels,
            act=act,
            norm_name=norm_name,
            **more,
        ),
        init,
        seed,
    )


def resnet20(
    *,
    width: int = 16,
    classes: int = 100,
    in_channels: int = 3,
    activation: Activation = "relu",
    norm: Norm = "batch",
    init: Initialization = "he",
    seed: int | torch.Generator | None = None,
) -> ResNet:
    """Return ResNet-20 for 32×32 images (He et al. 2016, Section 4.2), initialized.

    Three stages of three basic blocks with ``width`` · (1, 2, 4) channels and parameter-free shortcuts (option A).
    Deviation: the head's weights are initialized like the convolutions'. Arguments and errors as in :func:`resnet18`.
    """
    blocks, strides = [3, 3, 3], [1, 2, 2]
    return _network(width, blocks, strides, classes, in_channels, activation, norm, init, seed, projection=False)


def resnet32(
    *,
    width: int = 16,
    classes: int = 100,
    in_channels: int = 3,
    activation: Activation = "relu",
    norm: Norm = "batch",
    init: Initialization = "he",
    seed: int | torch.Generator | None = None,
) -> ResNet:
    """Return ResNet-32 for 32×32 images: :func:`resnet20` with five blocks in each stage."""
    blocks, strides = [5, 5, 5], [1, 2, 2]
    return _network(width, blocks, strides, classes, in_channels, activation, norm, init, seed, projection=False)


def dlg_resnet(
    *,
    depth: int = 20,
    width: int | None = None,
    classes: int = 100,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    pool: int = 4,
    activation: Activation = "sigmoid",
    norm: Norm = "batch",
    init: Initialization = "dlg",
    seed: int | torch.Generator | None = None,
) -> ResNet:
    """Return the ResNet variant of Zhu et al. 2019, Section 4.1: ReLU becomes sigmoid, strides are removed.

    The authors' code (``models/vision.py``) has the four-stage ResNets (64 to 512 channels, projection shortcuts,
    BatchNorm, every stride 1, 4×4 average pooling, weights and biases U(−0.5, 0.5)). It does not run as published: it
    calls ``F.Sigmoid``, which does not exist, its head expects the 4×4 maps of the strided network, and its
    initialization stumbles over convolutions without bias. Deviations: the head is sized to fit the larger maps, and
    absent biases are skipped. ``depth`` 18 is the code's ResNet-18; 20, 32, 44, 56, 110 are the three-stage networks
    of He et al. 2016, Section 4.2, changed in the same way (the paper speaks of ResNet-56).

    The first stage has ``width`` channels: 64 for depth 18, else 16. ``pool`` is the side of the average pooling's
    window in pixels. Other arguments as in :func:`resnet18`.

    Raises:
        InvalidInput: no such depth, or a size is not positive.
        UnknownName: no activation, normalization or initialization of that name.
    """
    height, wide = image_sides(image_size)
    positive(classes=classes, in_channels=in_channels, height=height, image_width=wide, pool=pool)
    if depth == 18:
        blocks, first = [2, 2, 2, 2], 64
    elif depth >= 8 and (depth - 2) % 6 == 0:
        blocks, first = [(depth - 2) // 6] * 3, 16
    else:
        raise InvalidInput(f"There is no residual network of depth {depth}; choose 18, or 6n + 2: 8, 14, 20, 32, 56.")
    width, strides, window = first if width is None else width, [1] * len(blocks), min(pool, height, wide)
    more = {"projection": True, "pooled": (height // window, wide // window), "pool": window}
    return _network(width, blocks, strides, classes, in_channels, activation, norm, init, seed, **more)
