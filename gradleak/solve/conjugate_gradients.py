"""Conjugate gradients, for one or several symmetric systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Image", "Rows", "conjugate_gradients"]

Rows = Callable[[Tensor], Tensor]
Image = Callable[[Tensor, Tensor], Tensor]


def conjugate_gradients(
    product: Rows,
    right: Tensor,
    precondition: Rows,
    *,
    tolerance: float,
    limit: int,
    ready: Tensor | None = None,
    image: Image | None = None,
    going: Callable[[float], bool] | None = None,
) -> tuple[Tensor, int, bool]:
    """Solve k symmetric systems ``product(x) = right`` at once, rows (k, n); stop by the energy of the error.

    ``ready`` is ``precondition(right)`` where the caller has it already. ``image`` is (r, ``precondition(r)``) → the
    product of the latter, where knowing r makes that cheaper; products with directions then come from a recurrence.
    ``going`` is asked before every iteration of a single system: xᵀ right − xᵀ A x / 2 is half of its argument.

    Returns the solutions, the number of iterations, and whether each energy fell by ``tolerance``².
    """
    if len(right) == 1:
        return _single(product, right, precondition, tolerance**2, limit, ready, image, going)
    x = torch.zeros_like(right)
    residual = right.clone()
    z = precondition(residual) if ready is None else ready
    direction = z.clone()
    energy = (residual * z).sum(1)
    first = energy.clone()
    done = first <= 0
    steps, share, moved = 0, torch.zeros_like(energy), torch.zeros_like(right)
    while steps < limit and not bool(done.all()):
        moved = product(direction) if image is None else image(residual, z).addcmul_(share[:, None], moved)
        curvature = (direction * moved).sum(1)
        good = (curvature > 0) & ~done
        step = torch.where(good, energy / curvature.where(good, torch.ones_like(curvature)), torch.zeros_like(energy))
        x = x + step[:, None] * direction
        residual = residual - step[:, None] * moved
        z = precondition(residual)
        new = (residual * z).sum(1)
        share = new / energy.where(energy > 0, torch.ones_like(energy))
        direction = z + share[:, None] * direction
        energy = new
        steps += 1
        done = done | ~good | (energy <= tolerance**2 * first)
    return x, steps, bool((energy <= tolerance**2 * first).all())


def _single(
    product: Rows,
    right: Tensor,
    precondition: Rows,
    left: float,
    limit: int,
    ready: Tensor | None,
    image: Image | None,
    going: Callable[[float], bool] | None,
) -> tuple[Tensor, int, bool]:
    """Solve one system: numbers instead of masks save a fifth of an iteration where systems are small."""
    x, residual = torch.zeros_like(right), right.clone()
    z = precondition(residual) if ready is None else ready
    direction = z.clone()
    energy = first = float(residual.flatten() @ z.flatten())
    steps, share, moved, fallen = 0, 0.0, torch.zeros_like(right), 0.0
    while steps < limit and energy > left * first and energy > 0:
        if going is not None and not going(fallen):
            break
        moved = product(direction) if image is None else image(residual, z).add_(moved, alpha=share)
        curvature = float(direction.flatten() @ moved.flatten())
        steps += 1
        if not curvature > 0:
            break
        x.add_(direction, alpha=energy / curvature)
        fallen += energy * energy / curvature
        residual.sub_(moved, alpha=energy / curvature)
        z = precondition(residual)
        new = float(residual.flatten() @ z.flatten())
        share = new / energy
        direction.mul_(share).add_(z)
        energy = new
    return x, steps, energy <= left * first
