"""Networks that people federate, at the size of 32 x 32 images; nothing here but torch, for two environments."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a convolution whose output joins its input (Huang et al. 2017, Equation 2)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + growth, H, W)."""
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], 1)


def densenet(growth: int = 12, layers: int = 4) -> nn.Module:
    """Return a DenseNet of three blocks (Huang et al. 2017, Section 3, without bottlenecks)."""
    channels, parts = 2 * growth, [nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range(layers):
            parts.append(DenseLayer(channels, growth))
            channels += growth
        if block < 2:
            half = channels // 2
            parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, half, 1, bias=False), nn.AvgPool2d(2)]
            channels = half
    parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(channels, CLASSES))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, linear bottleneck (Sandler et al. 2018, Table 1)."""

    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        parts: list[nn.Module] = []
        if expand > 1:
            parts = [nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        parts += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.body = nn.Sequential(*parts, nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def mobilenet() -> nn.Module:
    """Return a small MobileNetV2 (Sandler et al. 2018, Table 2): width 0.5, the first strides left out for 32 x 32."""
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    channels = 16
    for expand, out, repeats, stride in ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 2, 2), (6, 32, 2, 2), (6, 48, 1, 1)):
        for i in range(repeats):
            parts.append(Inverted(channels, out, stride if i == 0 else 1, expand))
            channels = out
    parts += [nn.Conv2d(channels, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, CLASSES))


class Normalize(nn.Module):
    """LayerNorm over the channels of (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized maps."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, LayerNorm, and two 1 x 1 convolutions with GELU between them (Liu et al. 2022, Figure 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Normalize(channels),
            nn.Conv2d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv2d(4 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y: Tensor = self.body(x)
        return x + y


def convnext() -> nn.Module:
    """Return a small ConvNeXt (Liu et al. 2022): a stem of 2 x 2 patches, two stages of two blocks, 32 and 64 wide."""
    stages = [ConvNeXtBlock(32), ConvNeXtBlock(32), Normalize(32), nn.Conv2d(32, 64, 2, 2)]
    stages += [ConvNeXtBlock(64), ConvNeXtBlock(64)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(64, eps=1e-6), nn.Linear(64, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 32, 2, 2), Normalize(32), *stages, *head)


def network(name: str, seed: int) -> nn.Module:
    """Return a network by name, with PyTorch's own initialization or, for the ResNets, that of ``gradleak.models``."""
    if name.startswith("resnet"):
        from gradleak import models

        found: nn.Module = getattr(models, name)(classes=CLASSES, seed=seed)
        return found
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {"densenet": densenet, "mobilenet": mobilenet, "convnext": convnext}[name]()
