"""A linear layer's gradient for one example, read as the outer product that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.errors import NotApplicable
from gradleak.exact.first_layer import agreement, sharp_scale

__all__ = ["OuterProduct", "read_head", "read_outer_product"]


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


def read_head(gradient: Tensor, weight: Tensor, bias: Tensor | None) -> OuterProduct:
    """Return input and output gradient of a last layer without a trained bias, for one example's cross-entropy.

    The gradient shows both up to a factor. δ is p − y, and p = softmax(W h + b) has that direction for one size of h.

    Args:
        gradient: (C, d) of the weight, up to a factor.
        weight: (C, d).
        bias: (C,) which is not trained, None where there is none.

    Raises:
        NotApplicable: the gradient is zero or no outer product, or no size of h gives it.
    """
    refusal = NotApplicable(
        "The last layer has no bias that is trained, and its gradient is not that of one example's cross-entropy with "
        "a size that shows; use matching."
    )
    if not bool(gradient.any()):
        raise refusal
    dtype, gradient, weight = gradient.dtype, gradient.double(), weight.double()
    left, size, right = torch.linalg.svd(gradient, full_matrices=False)
    u = left[:, 0] if int((left[:, 0] < 0).sum()) == 1 else -left[:, 0]
    noise = float(size[1:].norm() / size[0])
    if int((u < 0).sum()) != 1 or len(u) < 3 or noise > 1e-2:
        raise refusal
    target = torch.zeros_like(u)
    target[u.argmin()] = 1.0
    for h in (right[0] * len(right[0]) ** 0.5, -right[0] * len(right[0]) ** 0.5):

        def mismatch(t: float, h: Tensor = h) -> float:
            delta = torch.softmax(t * (weight @ h) + (0.0 if bias is None else bias.double()), 0) - target
            return float((delta / delta.norm().clamp_min(1e-300) - u).norm())

        found = sharp_scale(
            mismatch, tolerance=max(agreement(dtype), 4 * noise), rounding=float(torch.finfo(dtype).eps)
        )
        if found is not None:
            features = found * h
            return OuterProduct(features, gradient @ features / features.square().sum(), max(noise, 2.0**-53))
    raise refusal
