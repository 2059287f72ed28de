"""Exact inputs of a linear layer from its gradient.

A linear layer z = W x + b has the gradients ``∂W = Σ_i δ_i x_iᵀ`` and ``∂b = Σ_i δ_i``, so one example's input is
``∂W / ∂b`` in every row (Phong et al. 2018, Section III; Geiping et al. 2020, Proposition 3.1). In a batch it still is
in the rows that a single example reaches, which ReLU makes common in small batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradleak.errors import NotApplicable

__all__ = [
    "agreement",
    "input_scale",
    "invert_linear",
    "outer_product_misfit",
    "sharp_scale",
    "single_example_inputs",
    "untouched",
    "untouched_input",
]


def agreement(dtype: torch.dtype) -> float:
    """Return the relative distance at which numbers of this format count as equal: rounding accumulates."""
    rounding = torch.finfo(dtype).eps
    return min(1e3 * rounding, max(2 * rounding, 1e-3))


def invert_linear(dw: Tensor, db: Tensor) -> Tensor:
    """Return the input of a linear layer from the gradient of one example, by least squares over all rows.

    The result does not change when both gradients are scaled: losses, learning rates and deltas need no care. It is
    computed in float64.

    Args:
        dw: (..., m, n) weight gradient.
        db: (..., m) bias gradient.

    Returns:
        (..., n).

    Raises:
        NotApplicable: the bias gradient is zero, so nothing of the input reaches the loss.
    """
    dw, db = dw.double(), db.double()
    power = db.square().sum(-1)
    if bool((power == 0).any()):
        raise NotApplicable(
            "The bias gradient of the linear layer is zero, so it shows nothing of its input; "
            "attack another update, taken before the example is fitted."
        )
    return torch.einsum("...mn,...m->...n", dw, db) / power[..., None]


def outer_product_misfit(dw: Tensor, db: Tensor, inputs: Tensor) -> float:
    """Return the relative distance of ``dw`` (m, n) from the outer product of ``db`` (m,) and ``inputs`` (n,)."""
    dw = dw.double()
    return float((db.double()[:, None] * inputs - dw).norm() / dw.norm().clamp_min(1e-300))


def untouched(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return which numbers of an update a filter left alone that zeroes small ones and limits large ones, None without.

    Random numbers hardly tie, so a largest magnitude that several have is a limit.
    """
    sizes = {k: t.detach().abs() for k, t in tensors.items()}
    top = max(float(t.max()) for t in sizes.values() if t.numel())
    limited = sum(int((t == top).sum()) for t in sizes.values())
    if limited < _TIES:
        return None
    return {k: (t > 0) & (t < top) for k, t in sizes.items()}


_TIES = 8
"""Numbers of the largest magnitude from which on it is taken for a limit."""


def untouched_input(dw: Tensor, db: Tensor, kept_w: Tensor, kept_b: Tensor) -> tuple[Tensor, float, Tensor] | None:
    """Return a linear layer's input from what a filter left alone of one example's gradient, medians over the rows.

    Args:
        dw: (m, n) weight gradient.
        db: (m,) bias gradient.
        kept_w: (m, n) which of its entries are untouched.
        kept_b: (m,) the same.

    Returns:
        The input (n,), the relative distance of the untouched entries from the outer product, and (n,) the largest
        magnitude of values of which every entry was zeroed, 0 for the others. None where fewer than two rows are left,
        or every entry of some value was limited.
    """
    dw, db, rows, known = dw.double(), db.double().clone(), kept_b.clone(), -1
    while int(rows.sum()) > known:  # A row whose bias was changed follows from its weights where others show the input.
        known = int(rows.sum())
        fitted, seen = _fitted(dw, db, kept_w & rows[:, None])
        common = kept_w & seen & ~rows[:, None]
        power = torch.where(common, fitted.square(), 0.0).sum(1)
        found = (common.sum(1) >= _SHARED) & (power > 0)
        db[found] = (torch.where(common, dw * fitted, 0.0).sum(1) / power.clamp_min(1e-300))[found]
        rows |= found
    kept = kept_w & rows[:, None]
    limited = ((dw != 0) & ~kept_w).any(0)
    if known < 2 or bool((~seen & limited).any()) or int(kept.sum()) < 2 * dw.shape[1]:
        return None
    ratios = torch.where(kept, dw / db[:, None], math.nan)
    median = ratios.nanmedian(0).values.nan_to_num()
    misfit = float((torch.where(kept, dw - db[:, None] * median, 0.0)).norm() / dw[kept].norm())
    return fitted, misfit, (~seen).double() * dw[kept].abs().min() / db[rows].abs().max()


def _fitted(dw: Tensor, db: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input (n,) that explains the kept entries best, zero where there are none, and where there are."""
    power = torch.where(kept, db[:, None].square(), 0.0).sum(0)
    return torch.where(kept, dw * db[:, None], 0.0).sum(0) / power.clamp_min(1e-300), kept.any(0)


_SHARED = 3
"""Values that a row must share with others before its factor is taken from them."""


def single_example_inputs(dw: Tensor, db: Tensor, *, tolerance: float | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return inputs that two or more rows agree on, each of which a single example of the batch may have.

    Rows whose unit only one example activates all show the ratio ``∂W_j / ∂b_j = x_i``; rows that mix examples show
    different mixtures each, unless the examples' gradients at the layer's output are parallel.

    Args:
        dw: (m, n) weight gradient.
        db: (m,) bias gradient.
        tolerance: relative distance up to which two rows agree; by default :func:`agreement` of the update's format.

    Returns:
        (K, n) inputs, most rows first, and for each of them the indices of the rows behind it.
    """
    tolerance = agreement(dw.dtype) if tolerance is None else tolerance
    dw, db = dw.double(), db.double()
    active = (db.abs() > 1e-6 * db.abs().max()).nonzero().flatten()
    weights, ratios = db[active].abs(), dw[active] / db[active, None]
    if len(ratios) == 0:
        return ratios, []
    size = ratios.norm(dim=1)
    near = torch.cdist(ratios, ratios, compute_mode="donot_use_mm_for_euclid_dist") <= tolerance * torch.maximum(
        size[:, None], size
    )
    found, rows = [], []
    free = torch.ones(len(ratios), dtype=torch.bool, device=dw.device)
    while True:
        agree = (near & free & free[:, None]).sum(1)
        best = int(agree.argmax())
        if int(agree[best]) < 2:
            break
        group = near[best] & free
        # The largest bias gradients carry the least relative rounding.
        found.append((weights[group, None] * ratios[group]).sum(0) / weights[group].sum())
        rows.append(active[group])
        free &= ~group
    return torch.stack(found) if found else ratios[:0], rows


def input_scale(mismatch: Callable[[float], float], *, tolerance: float, plain: bool = True) -> float | None:
    """Return the factor t at which an input that is known up to a factor fits the rest of an update, None if none does.

    A layer's weight and bias may carry factors of their own (clipping per tensor, step sizes per group), and then their
    ratio is the input times an unknown factor. Later layers, or the loss, see the input through biases, so only one
    factor fits them.

    Args:
        mismatch: t → how far the rest of the update is from what t times the input gives, 0 where it fits; it must not
            depend on any layer's own factor.
        tolerance: mismatch up to which it fits.
        plain: whether 1 is taken where it fits, as factors of their own are rare.
    """
    if plain and mismatch(1.0) <= tolerance:
        # Where every factor fits, the scale does not show.
        return 1.0 if max(mismatch(0.5), mismatch(2.0)) > 10 * tolerance else None
    grid = [10 ** (k / 12) for k in range(-36, 37)]
    values = [mismatch(t) for t in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:  # Golden section.
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if mismatch(math.exp(left)) < mismatch(math.exp(right)):
            high = right
        else:
            low = left
    found = math.exp((low + high) / 2)
    return found if mismatch(found) <= tolerance < max(mismatch(0.5 * found), mismatch(2 * found)) / 10 else None


def sharp_scale(mismatch: Callable[[float], float], *, tolerance: float, rounding: float) -> float | None:
    """Return the factor of :func:`input_scale` where no factor is likely beforehand, None if it does not show sharply.

    A mismatch as small as ``rounding`` may leave only a share of 1e-4 of it open.
    """
    found = input_scale(mismatch, tolerance=tolerance, plain=False)
    if found is None:
        return None
    near = min(mismatch(found * (1 + _SHARP)), mismatch(found * (1 - _SHARP)))
    return found if near > 4 * max(mismatch(found), rounding) else None


_SHARP = 1e-4
"""Relative error up to which a scale must show."""
