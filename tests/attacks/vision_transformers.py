"""Vision transformers in the layouts that people federate, at small size; timm and torchvision are not needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, PATCH, WIDTH, CLASSES = 16, 4, 48, 10
SHAPE, COUNT = (3, SIZE, SIZE), (SIZE // PATCH) ** 2


class Block(nn.Module):
    """timm's block: one matrix for queries, keys and values, norm first."""

    def __init__(self, width: int = WIDTH, heads: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.proj_drop, self.mlp_drop = nn.Dropout(drop), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        x = x + self.proj_drop(self.proj(y.transpose(1, 2).reshape(n, t, d)))
        return x + self.mlp_drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Timm(nn.Module):
    """timm's VisionTransformer: ``patch_embed.proj``, ``cls_token``, ``pos_embed``, ``pos_drop``, ``blocks``, ``head``.

    ``place`` says where positions are: "all" tokens have one, "patches" only (``no_embed_class``), a "table" that is
    looked up, a "map" that is added to the convolution's output, or "fixed" sines. ``pool`` is "token" or "avg".
    """

    def __init__(
        self, place: str = "all", pool: str = "token", drop: float = 0.0, width: int = WIDTH, depth: int = 2
    ) -> None:
        super().__init__()
        self.place, self.pool = place, pool
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH), "norm": nn.Identity()})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        count = COUNT + (place == "all")
        if place == "table":
            self.table = nn.Embedding(2 * COUNT, width)
        elif place == "map":
            self.pos_embed = nn.Parameter(torch.zeros(1, width, SIZE // PATCH, SIZE // PATCH))
        elif place == "fixed":
            angle = torch.arange(COUNT)[:, None] / 10 ** (4 * torch.arange(width) / width)
            self.register_buffer("pos_embed", angle.sin()[None])
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, count, width))
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.Sequential(*(Block(width, drop=drop) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patch_embed["proj"](x)
        z = (z + self.pos_embed if self.place == "map" else z).flatten(2).transpose(1, 2)
        if self.place == "table":
            z = z + self.table(torch.arange(COUNT, device=x.device))
        elif self.place in ("patches", "fixed"):
            z = z + self.pos_embed
        z = torch.cat([self.cls_token.expand(len(z), -1, -1), z], 1)
        z = self.norm(self.blocks(self.pos_drop(z + self.pos_embed if self.place == "all" else z)))
        return self.head(z[:, 0] if self.pool == "token" else z[:, 1:].mean(1))


class TorchvisionBlock(nn.Module):
    """torchvision's EncoderBlock."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, 4, dropout=drop, batch_first=True)
        self.dropout = nn.Dropout(drop)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(drop), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(drop)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class Torchvision(nn.Module):
    """torchvision's vit_b_16: ``conv_proj``, ``class_token``, ``encoder.pos_embedding``, ``heads``."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.empty(1, COUNT + 1, WIDTH).normal_(std=0.02))
        self.encoder.dropout = nn.Dropout(drop)
        self.encoder.layers = nn.Sequential(OrderedDict((f"encoder_layer_{i}", TorchvisionBlock(drop)) for i in (0, 1)))
        self.encoder.ln = nn.LayerNorm(WIDTH)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(WIDTH, CLASSES)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv_proj(x).reshape(len(x), WIDTH, -1).permute(0, 2, 1)
        z = torch.cat([self.class_token.expand(len(x), -1, -1), z], 1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(self.encoder.dropout(z)))[:, 0])


class Own(nn.Module):
    """A model of the user's own: normalization inside, patches cut by hand, a linear layer, mean pooling."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1))
        self.embed = nn.Linear(3 * PATCH**2, WIDTH, bias=bias)
        self.where = nn.Parameter(torch.zeros(COUNT, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (N, 3, H, W, p, p)
        x = x.permute(0, 3, 2, 4, 5, 1).reshape(len(x), COUNT, -1)
        return self.out(self.blocks(self.embed(x) + self.where).mean(1))


class Logits(nn.Module):
    """A Hugging Face classifier that returns its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(pixel_values=x).logits
        return logits


def hugging_face(name: str, drop: float = 0.0, **options: Any) -> nn.Module:
    """Return ``ViTForImageClassification`` or ``DeiTForImageClassification`` at small size, without a download."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=CLASSES,
        hidden_dropout_prob=drop,
        attention_probs_dropout_prob=drop,
        **options,
    )
    return Logits(getattr(transformers, f"{name}ForImageClassification")(config))


def build(make: Callable[[], nn.Module], seed: int = 0, *, trained: bool = True) -> nn.Module:
    """Return a model of seeded weights; ``trained`` moves what starts at zero a little, as one round does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        if trained:
            for p in model.parameters():
                p.data += 0.02 * torch.randn_like(p)
    return model
