"""A linear layer's gradient for one example, read as the outer product that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.errors import NotApplicable

__all__ = ["OuterProduct", "read_outer_product"]


@final
@dataclass(frozen=True, eq=False)
class OuterProduct:
    """A linear layer's gradient, read as δ hᵀ and δ.

    Attributes:
        features: h (d,), the layer's exact input.
        delta: δ (C,), the gradient at its output.
        noise: relative root mean square deviation from an outer product: the rounding of the update.
    """

    features: Tensor
    delta: Tensor
    noise: float


def read_outer_product(weight: Tensor, bias: Tensor) -> OuterProduct:
    """Return input and output gradient of a linear layer that saw one vector, from its gradients (C, d) and (C,).

    Every row k gives h = ∂W_k / ∂b_k. Rounding is relative, so all rows count alike; other noise is seen and makes
    large rows count more.

    Raises:
        NotApplicable: the gradient is zero, or no outer product (more than one example, noise, pruning).
    """
    weight, bias = weight.double(), bias.double()
    top = bias.abs().max()
    if not bool(top > 0):
        raise NotApplicable("The bias gradient where the recursion starts is zero, so the update says nothing there.")
    rows = bias.abs() > 1e-4 * top
    ratios = weight[rows] / bias[rows, None]
    features = ratios.mean(0)
    scale = features.square().mean().sqrt().clamp(min=1e-300)
    used = features.abs() > 1e-3 * scale
    relative = (ratios - features)[:, used] / features[used]
    noise = float(relative.square().mean().sqrt()) if relative.numel() else 0.0
    fitted = bias @ weight / bias.square().sum()
    mismatch = float((weight - torch.outer(bias, fitted)).norm() / weight.norm().clamp(min=1e-300))
    if noise > 4 * mismatch:
        # The noise is not that of rounding: small rows are worse, so rows count by their size.
        features, noise = fitted, mismatch
    if mismatch > 1e-2:
        raise NotApplicable(
            f"The gradient of the linear layer is no outer product (relative distance {mismatch:.1e}), so the update "
            "comes from more than one example or step, or was noised or pruned; disaggregate it, or use matching."
        )
    return OuterProduct(features, bias, max(noise, 2.0**-53))
