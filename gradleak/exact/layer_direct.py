"""The inputs of one layer from its gradient equations alone, where they are as many as the values of a channel.

The least squares' own residual tells the noise, and the inverse normal matrix what it does to each example. Where a
few outputs stand next to a ReLU's zero, their output gradients may be wrong; then their equations stand out and can be
left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.exact.layer_equations import LayerEquations, counts
from gradleak.solve.cholesky import cholesky

__all__ = ["LARGEST", "solve_directly"]

LARGEST = 4096
"""Values of one channel, of all examples, up to which the normal matrix is factorized."""
_ODD = 6.0
"""An output whose misfit exceeds this many medians is dropped."""


def solve_directly(
    equations: LayerEquations, slips: Tensor, noise: float, *, robust: bool = False
) -> tuple[Tensor, float] | None:
    """Return a layer's inputs (N, n) and their estimated root mean square error, of the worst example.

    Args:
        equations: of the layer; only those of its gradient are used.
        slips: (S, N, m) samples of the error of the gradients at the layer's outputs, which the matrix is made of.
        noise: relative noise of the gradient, below which the residual is luck.
        robust: leave out outputs whose equations do not fit the others.

    Returns:
        None where the gradient equations do not determine the inputs.
    """
    count, taps, rows = equations.count, equations.taps, equations.block.shape[1]
    own = counts(equations.step, equations.weight, count)
    if not equations.shared or own.rank < own.unknowns or own.unknowns > LARGEST:
        return None
    inverses, spread = torch.zeros_like(equations.block), []
    for g, (block, right) in enumerate(zip(equations.block, equations.target, strict=True)):
        kept = torch.ones(rows, dtype=torch.bool, device=right.device)
        while True:
            some, target = block[kept], right[:, kept]
            gram = some.T @ some
            scale = gram.diagonal().clamp_min(1e-300).rsqrt()
            factor, failed = cholesky((gram * scale * scale[:, None])[None])
            if bool(failed) or not bool(torch.isfinite(factor).all()):
                return None
            inverse = torch.cholesky_inverse(factor[0]) * scale * scale[:, None]
            rest = target - target @ some @ inverse @ some.T
            misfit = rest.square().view(len(right), -1, taps).mean((0, 2)).sqrt()  # of every output
            usual = max(float(misfit.median()), 4 * noise * float(target.square().mean().sqrt()))
            odd = (misfit > _ODD * usual).repeat_interleave(taps)
            left = int(kept.sum()) - int(odd.sum())
            if not robust or not bool(odd.any()) or left < max(1.25 * own.unknowns, 0.5 * rows):
                break
            kept[kept.nonzero().flatten()[odd]] = False
        variance = float(rest.square().sum()) / (max(len(some) - own.unknowns, 1) * len(right))
        variance = max(variance, float((0.25 * noise * right).square().mean()))
        inverses[g, kept] = some @ inverse
        spread.append(variance * inverse.diagonal().view(count, -1).mean(1))
    values = equations.examples(equations.target @ inverses)[0]
    # Gradients that are wrong at the outputs look like noise of the equations, in proportion to the inputs.
    errors = equations.change(values, slips).transpose(0, 1).flatten(1, 2) @ inverses
    felt = equations.examples(errors).square().mean((0, 2))
    return values, float((felt + torch.stack(spread).mean(0)).max().sqrt())
