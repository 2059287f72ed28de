"""Exact inputs of a linear layer from its gradient.

A linear layer z = W x + b has the gradients ``∂W = Σ_i δ_i x_iᵀ`` and ``∂b = Σ_i δ_i``, so one example's input is
``∂W / ∂b`` in every row (Phong et al. 2018, Section III; Geiping et al. 2020, Proposition 3.1). In a batch it still is
in the rows that a single example reaches, which ReLU makes common in small batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import NotApplicable

__all__ = ["agreement", "invert_linear", "single_example_inputs"]


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


def single_example_inputs(dw: Tensor, db: Tensor, *, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Return inputs that two or more rows agree on, each the input of a single example of the batch.

    Rows whose unit only one example activates all show the ratio ``∂W_j / ∂b_j = x_i``; rows that mix examples show
    different mixtures each. So agreement of several rows is evidence that does not need the truth.

    Args:
        dw: (m, n) weight gradient.
        db: (m,) bias gradient.
        tolerance: relative distance up to which two rows agree; by default :func:`agreement` of the update's format.

    Returns:
        (K, n) inputs, most rows first, and (K,) the number of rows behind each.

    """
    tolerance = agreement(dw.dtype) if tolerance is None else tolerance
    dw, db = dw.double(), db.double()
    active = db.abs() > 1e-6 * db.abs().max()
    weights, ratios = db[active].abs(), dw[active] / db[active, None]
    if len(ratios) == 0:
        return ratios, torch.zeros(0, dtype=torch.long, device=dw.device)
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
        rows.append(int(group.sum()))
        free &= ~group
    inputs = torch.stack(found) if found else ratios[:0]
    return inputs, torch.tensor(rows, dtype=torch.long, device=dw.device)
