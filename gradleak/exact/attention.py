"""Which tokens attended to each other, from the gradients of an attention layer's queries and keys.

A layer's weight gradient is Σ_i δ_i x_iᵀ over the tokens, so that known inputs x_i give the δ_i. At the queries
δ_i = Σ_j s_ij k_j, and at the keys δ_j = Σ_i s_ij q_i, in every head, with j and i running over one sentence: the few
tokens whose keys (queries) make up δ_i in all heads together are the sentence of token i. This step is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["companions", "marginals"]

_ENOUGH = 3e-4
"""Share of a gradient left unexplained at which the tokens that make it up are complete."""
_OWN = 1e-4
"""Share of a token's key that must lie beside those that were chosen for it to be another one."""
_DETERMINED = 1e-2
"""How far a combination of tokens may lie outside what the gradient determines, relative to its norm."""


def marginals(x: Tensor, rank: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return how gradients (o, d) give weighted sums of their tokens' δ, and which of these sums are determined.

    Args:
        x: (N, d) inputs, among them all true ones.
        rank: of the gradient.
        weights: (M, N) of the sums.

    Returns:
        (d, M), by which a gradient is multiplied for the sums (o, M); and (M,).
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    inside = weights @ u
    missed = (weights - inside @ u.T).norm(dim=1) / weights.norm(dim=1).clamp_min(1e-300)
    return (inside / s @ vh).T, missed <= _DETERMINED


def companions(deltas: list[Tensor], others: list[Tensor], positions: Tensor, most: int) -> tuple[list[int], float]:
    """Return the tokens whose keys make up one token's ``deltas``, and the share that they leave unexplained.

    Greedy, over all heads at once, with one token at each position: the next token is the one that explains the most
    beside those that were chosen (orthogonal least squares, Chen et al. 1989).

    Args:
        deltas: (H, dh) for each side.
        others: (H, N, dh) for each side.
        positions: (N,) of the candidates.
        most: tokens of a sentence, at most.
    """
    rest = torch.cat([d / d.norm().clamp_min(1e-300) for d in deltas])
    atoms = torch.cat(others)
    lengths = atoms.norm(dim=2)
    free = torch.ones(len(positions), dtype=torch.bool, device=positions.device)
    chosen: list[int] = []
    size, left = float(rest.norm()), 1.0
    while left > _ENOUGH and len(chosen) < min(most, atoms.shape[2] - 1) and bool(free.any()):
        beside = atoms.norm(dim=2)
        score = torch.einsum("hnd,hd->hn", atoms, rest).square() / beside.square().clamp_min(1e-300)
        score = torch.where(beside > _OWN * lengths, score, 0.0).sum(0).masked_fill(~free, -1.0)
        chosen.append(int(score.argmax()))
        free &= positions != positions[chosen[-1]]
        axis = atoms[:, chosen[-1]]
        axis = axis / axis.norm(dim=1, keepdim=True).clamp_min(1e-300)
        rest = rest - (rest * axis).sum(1, keepdim=True) * axis
        atoms = atoms - torch.einsum("hnd,hd->hn", atoms, axis)[..., None] * axis[:, None]
        left = float(rest.norm()) / size
    return chosen, left
