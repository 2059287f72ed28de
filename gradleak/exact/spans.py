"""The inputs of a linear layer span the rows of its gradient, Σ δ xᵀ (Petrov et al. 2024, DAGER, Section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Span", "find_span"]

_CLEAR = 0.5
"""Gap of a spectrum, in powers of ten, from which on what lies below it is rounding."""
_LAST = 4
"""Gaps at the end of a spectrum that must be wider than others."""
_SURE = 2.0
"""How wide, in powers of ten."""
_BULK = 16
"""Singular values by which noise is told."""
_PART = 0.7
"""Part of the gap, in powers of ten, that a vector inside must keep from what lies outside."""
_LEAST = 1e-5
"""Relative distance that always counts as inside: the forward pass is rounded, too."""


@dataclass(frozen=True, eq=False)
class Span:
    """The row space of a gradient.

    Attributes:
        outside: (d, d − r) orthonormal basis of what is orthogonal to it.
        rank: r, the number of independent inputs.
        gap: powers of ten between the last direction of the span and the first one of rounding.
        threshold: relative distance up to which a vector is inside: between the two, nearer to rounding.
    """

    outside: Tensor
    rank: int
    gap: float
    threshold: float

    def distance(self, x: Tensor, directions: int | None = None) -> Tensor:
        """Return the relative distances of ``x`` (..., d) to the span, (...).

        With ``directions`` less than the space has, the distance along that many random ones, which is never larger.
        """
        basis = self.outside.to(x)
        if directions is not None and directions < basis.shape[1]:
            draw = torch.Generator().manual_seed(0)
            mix = torch.randn(basis.shape[1], directions, generator=draw, dtype=torch.float64)
            basis = basis @ torch.linalg.qr(mix)[0].to(basis)
        return (x @ basis).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)


def find_span(gradient: Tensor, eps: float | None = None, loosest: float = 0.1) -> Span | None:
    """Return the row space of ``gradient`` (m, d), cut at the last wide gap of its spectrum, None without one.

    ``eps`` is the spacing of the number format that the gradient was rounded to; None takes that of its type.

    Deviation from the paper: its rank counts singular values above a fixed threshold, and its distances have fixed
    bounds; here both follow from the gap, so that they suit any number format and any scale. A spectrum without a gap
    of a factor of three is that of more tokens than directions, or of noise.
    """
    rows, width = gradient.shape
    most = min(rows, width)
    if most < 2 or not bool(gradient.any()):
        return None
    # Not through the Gram matrix, whose rounding would reach 1e-8.
    matrix = gradient.double()
    if rows > width:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, s, vh = torch.linalg.svd(matrix, full_matrices=True)
    logs = (s / s[0]).clamp_min(torch.finfo(torch.float64).eps).log10()
    gaps = logs[:-1] - logs[1:]
    # Rounding has a floor of its own: below it, gaps say nothing.
    spacing = eps or torch.finfo(gradient.dtype).eps
    gaps[logs[:-1] <= math.log10(0.1 * spacing)] = 0.0
    # The smallest singular values of square noise lie far apart.
    last = gaps[-_LAST:]
    gaps[-_LAST:] = torch.where(last >= _SURE, last, 0.0)
    # Few tokens may lie far apart themselves, so the last wide gap counts.
    wide = (gaps >= max(_CLEAR, 0.3 * float(gaps.max()))).nonzero().flatten()
    if len(wide) == 0:
        return None
    rank = int(wide[-1]) + 1
    gap, below = float(gaps[rank - 1]), logs[rank:]
    # What lies below the gap must be rounding, or as flat as noise; a gap between tokens is none.
    flat = len(below) > _BULK and float(below[0] - below[_BULK]) <= _CLEAR
    if float(below[0]) > math.log10(10 * spacing) and not flat:
        return None
    return Span(vh[rank:].T.contiguous(), rank, gap, min(max(10 ** (-_PART * gap), _LEAST), loosest))
