"""Conjugate gradients, for several symmetric systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Rows", "conjugate_gradients"]

Rows = Callable[[Tensor], Tensor]
"""A linear map of rows (k, n)."""


def conjugate_gradients(
    product: Rows,
    right: Tensor,
    precondition: Rows,
    *,
    tolerance: float,
    limit: int,
    least: Tensor | float = 0.0,
    image: Callable[[Tensor, Tensor], Tensor] | None = None,
    going: Callable[[float], bool] | None = None,
) -> tuple[Tensor, int, bool]:
    """Solve k symmetric positive systems ``product(x) = right`` at once, rows (k, n).

    The energy of a residual r is rᵀ P r with the preconditioner P: an estimate of the squared error in the norm of the
    system. A row is done when its energy fell by ``tolerance``², or to ``least``.

    Args:
        product: of the system.
        right: (k, n).
        precondition: an approximate inverse, symmetric and positive.
        tolerance: relative accuracy, in the norm of the system.
        limit: iterations.
        least: energy that counts as zero, for all rows or (k, 1).
        image: (r, P r) → the product of the latter, where knowing r makes that cheaper: with A = B + N and P = B⁻¹ it
            is r + N P r. Products with directions then come from a recurrence.
        going: twice the fall of xᵀ A x / 2 − xᵀ right so far, summed over the rows → whether to go on; asked before
            every iteration.

    Returns:
        The solutions (k, n), the number of iterations, and whether every row is done.
    """
    x, residual = torch.zeros_like(right), right.clone()
    z = precondition(residual)
    direction, energy = z.clone(), (residual * z).sum(1, keepdim=True)
    share, moved = torch.zeros_like(energy), torch.zeros_like(right)
    goal = (tolerance**2 * energy).clamp(min=least)
    done, stuck, fallen = energy <= goal, torch.zeros_like(energy, dtype=torch.bool), torch.zeros_like(energy)
    for steps in range(limit):
        if bool((done | stuck).all()) or (going is not None and not going(float(fallen.sum()))):
            return x, steps, bool(done.all())
        moved = product(direction) if image is None else image(residual, z).addcmul_(share, moved)
        curvature = (direction * moved).sum(1, keepdim=True)
        stuck = stuck | ~(curvature > 0)
        length = torch.where(done | stuck, 0.0, energy / torch.where(stuck, 1.0, curvature))
        x.addcmul_(length, direction)
        residual.addcmul_(length, moved, value=-1)
        fallen = fallen + length * energy
        z = precondition(residual)
        new = (residual * z).sum(1, keepdim=True)
        share = new / torch.where(energy > 0, energy, 1.0)
        direction.mul_(share).add_(z)
        energy = new
        done = energy <= goal
    return x, limit, bool(done.all())
