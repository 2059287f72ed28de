"""Exact patches of one image from the gradient of a vision transformer's embedding.

Every token is z_t = E u_t + e + p_t, with the patch u_t and a learned position embedding p_t. So ∂L/∂p_t is the
gradient δ_t at token t, whatever follows, and ∂L/∂E = Σ_t δ_t u_tᵀ is linear in the patches: T unknown patches, d
equations for each of their n values (APRIL, Lu et al., CVPR 2022, Section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PatchSolution", "solve_patches", "span_misfit"]


@dataclass(frozen=True, eq=False)
class PatchSolution:
    """The patches (T, n) of least squares, float64, of least norm where they are not determined.

    Attributes:
        misfit: relative distance of the weight gradient from what they explain.
        rank: of the token gradients; all patches are determined where it is T.
        spare: equations that are left for each of the n values.
        error: root mean square error of a patch value that noise of the misfit's size causes.
    """

    patches: Tensor
    misfit: float
    rank: int
    spare: int
    error: float


def solve_patches(tokens: Tensor, weight: Tensor, *, rounding: float) -> PatchSolution:
    """Return the patches that explain a patch embedding's gradient.

    Args:
        tokens: (T, d) gradients δ_t.
        weight: (d, n) gradient of the embedding's weight.
        rounding: relative rounding of these numbers, down to which singular values count.
    """
    tokens, weight = tokens.double(), weight.double()
    count, width = tokens.shape
    left, values, right = torch.linalg.svd(tokens, full_matrices=False)
    kept = values > rounding * values[0]
    rank = int(kept.sum())
    inverse = torch.where(kept, 1 / values.clamp_min(1e-300), 0.0)
    patches = (left * inverse) @ (right @ weight)
    rest = float((weight - tokens.T @ patches).square().sum())
    spare = width - rank
    deviation = (rest / (spare * weight.shape[1])) ** 0.5 if spare else 0.0
    misfit = (rest / max(float(weight.square().sum()), 1e-300)) ** 0.5
    return PatchSolution(patches, misfit, rank, spare, deviation * float(inverse.square().sum() / count) ** 0.5)


def span_misfit(gradient: Tensor, inputs: Tensor) -> float:
    """Return the share of a linear layer's weight gradient (m, d) outside the span of its inputs (k, d).

    The gradient is a sum of outer products with these inputs, whatever the gradients at its outputs are.
    """
    gradient = gradient.double()
    basis = torch.linalg.qr(inputs.double().T)[0]
    return float((gradient - (gradient @ basis) @ basis.T).norm() / gradient.norm().clamp_min(1e-300))
