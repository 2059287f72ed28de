"""Cholesky factors of dense matrices: in place by LAPACK on a CPU, where PyTorch's take twice as long; else PyTorch's.

Only lower triangles are read and written; what lies above keeps what it had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Factor", "cholesky", "cholesky_solve"]

_SMALL = 256
"""Rows below which a copy costs nothing."""
_FEW = 4
"""Right-hand sides up to which one after another is quicker: LAPACK repacks the whole factor first (measured: 4 x)."""


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower factors of symmetric matrices (R, n, n), which are overwritten, and which (R,) are not positive."""
    if not _by_lapack(matrix):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return lower, failed != 0
    from scipy.linalg import lapack  # Not at the top: it takes as long to import as torch.

    decompose = lapack.spotrf if matrix.dtype == torch.float32 else lapack.dpotrf
    factor, info = decompose(matrix[0].numpy().T, lower=0, overwrite_a=1, clean=0)
    return torch.from_numpy(factor.T)[None], torch.tensor([info != 0])


def cholesky_solve(right: Tensor, lower: Tensor) -> Tensor:
    """Return the solutions (R, k, n) for rows ``right`` (R, k, n), from the factors of :func:`cholesky`."""
    if not _by_lapack(lower):
        return torch.cholesky_solve(right.mT, lower).mT
    from scipy.linalg import blas, lapack

    single, factor, rows = lower.dtype == torch.float32, lower[0].numpy().T, right[0].contiguous().numpy()
    if len(rows) > _FEW:
        solve = lapack.spotrs if single else lapack.dpotrs
        solved, _ = solve(factor, rows.T, lower=0)
        return torch.from_numpy(solved.T)[None]
    half = blas.strsv if single else blas.dtrsv
    found = [half(factor, half(factor, row, lower=0, trans=1), lower=0, trans=0) for row in rows]
    return torch.stack([torch.from_numpy(row) for row in found])[None]


def _by_lapack(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and len(matrix) == 1 and matrix.shape[-1] >= _SMALL


@final
@dataclass(frozen=True, eq=False)
class Factor:
    """A Cholesky factor of a symmetric positive semidefinite matrix, scaled and slightly shifted, to precondition with.

    Attributes:
        lower: of the scaled matrix, (n, n).
        scale: (n,) one over the root of the matrix' diagonal.
    """

    lower: Tensor
    scale: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Factor:
        """Return the factor of ``matrix`` (n, n), of which the lower triangle is read; the shift grows until it is."""
        diagonal = matrix.diagonal().double()
        scale = diagonal.clamp(min=float(diagonal.max()) * 1e-14 + 1e-300).rsqrt()
        narrow = scale.to(matrix)
        shift = 8 * torch.finfo(matrix.dtype).eps
        while shift <= 1:
            scaled = matrix * narrow
            scaled.mul_(narrow[:, None]).diagonal().fill_(1 + shift)
            lower, failed = cholesky(scaled[None])
            if not bool(failed) and bool(torch.isfinite(lower[0].diagonal()).all()):
                return cls(lower[0], scale)
            shift *= 30
        return cls(torch.eye(len(scale), dtype=matrix.dtype, device=matrix.device), scale)

    def solve(self, rows: Tensor) -> Tensor:
        """Return matrix⁻¹ · rows for rows (k, n), to the precision of the factor."""
        scaled = (rows * self.scale.to(rows)).to(self.lower)
        return cholesky_solve(scaled[None], self.lower[None])[0].to(rows) * self.scale.to(rows)
