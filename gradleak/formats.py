"""Floating-point formats: how far numbers lie apart, and in which format an update really is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["FORMATS", "finest", "number_format", "storage_deviation"]

FORMATS = {torch.bfloat16: (7, -133), torch.float16: (10, -24), torch.float32: (23, -149), torch.float64: (52, -1074)}
"""Format → stored mantissa bits, exponent of the smallest subnormal number; from the coarsest on."""
_FIRST = 64
"""Numbers of each tensor that are looked at first: mostly they settle the format."""


def number_format(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the coarsest floating-point format that holds every number of an update.

    A float32 tensor whose numbers are all bfloat16 numbers was rounded to bfloat16, whatever its dtype says.
    """
    own = finest(tensors)
    flat = [t.detach().flatten() for t in tensors.values()]
    if sum(int(t.count_nonzero()) for t in flat) < 8:  # so few numbers can be short by chance
        return own
    for dtype, (bits, _) in FORMATS.items():
        parts = (part for length in (_FIRST, None) for part in (t[:length] for t in flat))
        if bits < FORMATS[own][0] and all(torch.equal(p.to(dtype).to(p.dtype), p) for p in parts):
            return dtype
    return own


def storage_deviation(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the standard deviation of rounding each number of ``tensor`` to ``dtype``: its spacing over √12."""
    bits, smallest = FORMATS[dtype]
    _, exponent = torch.frexp(tensor)
    unit = torch.where(tensor == 0, torch.full_like(exponent, smallest), exponent - 1 - bits).clamp(min=smallest)
    return torch.ldexp(torch.full_like(tensor, 12**-0.5), unit)


def finest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the finest format of the floating-point tensors; float32 if there are none."""
    known = [t.dtype for t in tensors.values() if t.dtype in FORMATS]
    return max(known, key=lambda d: FORMATS[d][0]) if known else torch.float32
