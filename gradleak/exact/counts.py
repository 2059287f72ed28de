"""How often each class follows each known input of the last layer: integers that its gradient determines.

The gradient of a decoder or a classification head is Σ_t (m_t p_t − c_t) h_tᵀ / n over the distinct inputs h_t of the
batch, of which m_t are alike, with c_tv of them labeled v, and n predictions in all. Where the h_t are independent,
the vectors in front of them follow by least squares; classes that follow nowhere give m_t / n, the others c_tv.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["label_counts", "multiplicities", "output_gradients"]

_WHOLE = 0.1
"""Distance from whole numbers within which counts are read."""
_LIKELY = 256
"""Classes by whose gradients, most of which no label touches, shares are told."""


def output_gradients(inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient (n, V) at a layer's outputs for its inputs (n, d), from its weight's ``gradient`` (V, d)."""
    solve = torch.linalg.pinv(inputs.double().T, rtol=1e-12)  # (n, d)
    parts = [solve @ part.double().T for part in gradient.split(4096)]
    return torch.cat(parts, 1)


def multiplicities(shares: Tensor, slopes: Tensor) -> Tensor:
    """Return m_t / n, (n,), from probabilities ``shares`` (n, V) and output gradients ``slopes`` (n, V)."""
    top = shares.topk(min(_LIKELY, shares.shape[1]), dim=1).indices
    return (slopes.gather(1, top) / shares.gather(1, top)).median(1).values


def label_counts(shares: Tensor, slopes: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Return how many of ``size`` examples each input stands for, (n,), and their classes' counts (n, C).

    For few classes, each of which may be some label: the smallest number m_t for which m_t p_t − n slope_t is whole.
    None where there is none.
    """
    many = torch.arange(1, size + 1, device=shares.device)[:, None, None] * shares - size * slopes  # (m, n, C)
    whole = many.round()
    fits = ((many - whole).abs().amax(2) <= _WHOLE) & (whole.amin(2) >= 0)
    fits &= whole.sum(2) == torch.arange(1, size + 1, device=shares.device)[:, None]
    if not bool(fits.any(0).all()):
        return None
    best = fits.int().argmax(0)
    return best + 1, whole.gather(0, best[None, :, None].expand(1, -1, shares.shape[1]))[0].long()
