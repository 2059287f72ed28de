"""Jacobians column by column, for functions of few variables and many values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp

from gradleak.clock import TimeSpent
from gradleak.solve.mapping import mapped

__all__ = ["jacobian"]

_COLUMNS, _NUMBERS = 64, 1e7
"""Columns, and numbers of them, up to which they are computed together."""


def jacobian(
    function: Callable[[Tensor], Tensor],
    z: Tensor,
    dtype: torch.dtype | None = None,
    *,
    going: Callable[[], bool] | None = None,
) -> Tensor:
    """Return the transposed Jacobian (n, m) of ``function`` at ``z`` (n,), column by column, in ``dtype``.

    Jᵀ u is linear in u, so its transpose is J: the function is linearized once, and only that transpose is vmapped.

    Raises:
        TimeSpent: ``going``, asked now and then, said no.
    """
    value, pull, *_ = vjp(function, z)
    push = vjp(lambda u: pull(u)[0], torch.zeros_like(value))[1]
    eye = torch.eye(len(z), dtype=z.dtype, device=z.device)

    def column(v: Tensor) -> Tensor:
        return push(v, retain_graph=True)[0]

    found = []
    with torch.no_grad():
        for rows in eye.split(max(1, min(_COLUMNS, int(_NUMBERS / len(value))))):
            found.append(mapped(column, rows).to(dtype or z.dtype))
            if going is not None and not going():
                raise TimeSpent
    return torch.cat(found)
