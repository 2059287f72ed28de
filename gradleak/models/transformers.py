"""The vision transformer of Dosovitskiy et al., ICLR 2021."""

from __future__ import annotations

from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import InvalidInput
from gradleak.models.building import Activation, Initialization, activation, build, image_sides, positive

__all__ = ["VisionTransformer", "vision_transformer"]


class _Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut (Section 3.1, Equations 2 and 3)."""

    def __init__(self, width: int, heads: int, dropout: float, activation_name: str) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = activation(activation_name)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        x = x + self.drop1(self.proj(y.transpose(1, 2).reshape(n, t, d)))
        return x + self.drop2(self.fc2(self.act(self.fc1(self.norm2(x)))))


@final
class VisionTransformer(nn.Module):
    """Patches (``patch``) and positions (``positions``), blocks, a norm, and a linear head on class token or mean."""

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        pool: str,
        dropout: float,
        activation_name: str,
    ) -> None:
        """Make the layers; :func:`vision_transformer` is the way to an initialized model."""
        super().__init__()
        self.pool = pool
        self.patch = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, grid[0] * grid[1] + 1, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout, activation_name) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        z = self.patch(x).flatten(2).transpose(1, 2)
        z = torch.cat([self.token.expand(z.shape[0], -1, -1), z], 1) + self.positions
        z = self.norm(self.blocks(self.drop(z)))
        logits: Tensor = self.head(z[:, 0] if self.pool == "token" else z[:, 1:].mean(1))
        return logits


def vision_transformer(
    *,
    patch: int = 16,
    width: int = 768,
    depth: int = 12,
    heads: int | None = None,
    classes: int = 1000,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 224,
    pool: Literal["token", "mean"] = "token",
    dropout: float = 0.0,
    activation: Activation = "gelu",
    init: Initialization = "default",
    seed: int | torch.Generator | None = None,
) -> VisionTransformer:
    """Return an initialized vision transformer; the defaults are ViT-Base/16 (Table 1).

    A head has 64 values unless ``heads`` says how many there are. Tokens and positions are drawn from N(0, 0.02²).
    ``dropout`` is active in training mode. Other arguments and errors as in :func:`gradleak.models.resnet18`.
    """
    height, wide = image_sides(image_size)
    heads = max(1, width // 64) if heads is None else heads
    positive(patch=patch, width=width, heads=heads, classes=classes, in_channels=in_channels, depth=depth)
    positive(height=height, image_width=wide)
    if height % patch or wide % patch or width % heads or pool not in ("token", "mean") or not 0 <= dropout < 1:
        raise InvalidInput(
            f"A vision transformer cannot cut {height} × {wide} pixels into patches of {patch}, or {width} values into "
            f"{heads} heads, with pool={pool!r} and dropout={dropout}; pass sizes that divide, 'token' or 'mean', and "
            "a rate below 1."
        )
    return build(
        lambda: VisionTransformer(
            grid=(height // patch, wide // patch),
            channels=in_channels,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            classes=classes,
            pool=pool,
            dropout=dropout,
            activation_name=activation,
        ),
        init,
        seed,
    )
