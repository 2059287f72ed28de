"""The last digits of a separated batch: features freed from the noisy row space, and errors by linearized noise.

:mod:`gradleak.exact.features` looks for the features in the row space of the seen gradient. Where two examples
of one class have nearly equal logit gradients, that space itself is off in the direction of their difference, and
forcing the features into it costs more than the rounding of the gradient would. Here they may leave it, H = A V + Z:

- Z enters the logits only through the weight's rows outside V, W⊥ = W (I − VᵀV), and only its rows along the badly
  determined combinations Q of examples matter (eigenvectors of D Ω² Dᵀ with small eigenvalues). That part, Q τ V_w with
  V_w a basis of the rows of W⊥, is solved together with A by Levenberg–Marquardt with geodesic acceleration.
- The rest of Z is linear: the least-squares solution of the columns outside V.

The solution's sensitivity to noise of the measured size, drawn a few dozen times, gives every example's error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.exact.mixing import ROUNDED, MixingEquations
from gradleak.solve.cholesky import cholesky, cholesky_solve

__all__ = ["LARGEST", "Refined", "refine"]

LARGEST = 3600
"""Unknowns up to which the joint system is solved."""
_DRAWS = 64


@dataclass(frozen=True, eq=False)
class Refined:
    """Features with their own errors.

    Attributes:
        features: (B, d') in scaled columns.
        draws: (S, B, d') changes of them under noise as large as what the fit leaves.
        objective: sum of squares that is left in the equations of A and τ.
        iterations: Levenberg–Marquardt iterations.
    """

    features: Tensor
    draws: Tensor
    objective: float
    iterations: int


@dataclass(frozen=True, eq=False)
class _State:
    """Everything that follows from the features: probabilities p, Ω d, coordinates A, residuals inside and outside."""

    features: Tensor
    p: Tensor
    d: Tensor
    mixing: Tensor
    inside: Tensor
    outside: Tensor

    @property
    def objective(self) -> float:
        return float(self.inside.square().sum() + self.outside.square().sum())


@dataclass(frozen=True, eq=False)
class _Linear:
    """One linearization: unknowns (A, τ), scaled to a unit diagonal."""

    normal: Tensor
    diagonal: Tensor
    combinations: Tensor  # Q (B, q)
    m: Tensor
    moved: Tensor  # (q r, C (B + 1)) what τ does inside


def refine(system: MixingEquations, mixing: Tensor, iterations: int = 40) -> Refined | None:
    """Return features that need not lie in the row space, from the coordinates (B, B) of ones that do.

    Args:
        system: the scaled equations.
        mixing: a solution of them.
        iterations: at most so many.

    Returns:
        None where the joint system would be too large, or does not settle.
    """
    left = system.weight - (system.weight @ system.rows.T) @ system.rows
    _, s, vh = torch.linalg.svd(left, full_matrices=False)
    extra = vh[s > 1e-8 * s[0].clamp_min(1e-300)]
    state = _state(system, mixing @ system.basis)
    damping, calm, iteration = 1e-6, 0, 0
    linear = _linearize(system, state, extra)
    while linear is not None and calm < 3 and iteration < iterations:
        iteration += 1
        trial, damping = _step(system, state, linear, extra, damping)
        if trial is None:
            break
        # A gain far below the variance of one equation is no information.
        unit = float(trial.inside.square().mean())
        calm = calm + 1 if state.objective - trial.objective < 0.02 * unit else 0
        state, damping = trial, max(damping / 10, 1e-15)
        linear = _linearize(system, state, extra)
    if linear is None or (calm < 3 and iteration == iterations):
        return None
    draws = _draws(system, state, linear, extra)
    inside = float(state.inside.square().sum())
    return None if draws is None else Refined(state.features, draws, inside, iteration)


def _state(system: MixingEquations, features: Tensor) -> _State:
    p = torch.softmax(features @ system.weight.T + system.bias, -1)
    d = (p - system.soft) * system.row
    mixing = features @ system.rows.T * system.whiten
    outside = d.T @ features - system.seen
    outside = outside - (outside @ system.rows.T) @ system.rows
    return _State(features, p, d, mixing, d.T @ system.augment(mixing) - system.target, outside)


def _linearize(system: MixingEquations, state: _State, extra: Tensor) -> _Linear | None:
    b, r = system.size, len(extra)
    values, vectors = torch.linalg.eigh(state.d @ state.d.T)
    weak = values < 1e-3 * values[-1]
    combinations, count = vectors[:, weak], int(weak.sum())
    if b * b + count * r > LARGEST:
        return None
    m, d, normal = system.jacobian(state.p[None], state.mixing[None])
    seen = system.weight @ extra.T
    change = state.p[..., None] * (seen - (state.p @ seen)[:, None]) * system.row[:, None]
    tilde = system.augment(state.mixing)
    moved = torch.einsum("kq,kcw,kl->qwcl", combinations, change, tilde).reshape(count * r, len(system.row), b + 1)
    cross = system.pull(m, d, state.mixing[None], moved) if count else moved.new_empty(0, b * b)
    flat = moved.flatten(1)
    own = flat @ flat.T
    own.diagonal().add_(values[weak].clamp_min(0).repeat_interleave(r))
    whole = torch.cat([torch.cat([normal[0], cross.T], 1), torch.cat([cross, own], 1)], 0)
    diagonal = whole.diagonal().clamp_min(1e-300).sqrt()
    whole = whole / diagonal / diagonal[:, None]
    return _Linear(whole, diagonal, combinations, m, flat)


def _pull(system: MixingEquations, state: _State, linear: _Linear, inside: Tensor, outside: Tensor) -> Tensor:
    """Return Jᵀ of a residual inside (C, B + 1) and in the columns V_w (C, r)."""
    first = system.pull(linear.m, state.d[None], state.mixing[None], inside[None])[0]
    second = linear.moved @ inside.flatten() + (linear.combinations.T @ state.d @ outside).flatten()
    return torch.cat([first, second])


def _step(
    system: MixingEquations, state: _State, linear: _Linear, extra: Tensor, damping: float
) -> tuple[_State | None, float]:
    """Return the next state, None where no damping improves, and the damping that did."""
    b, q = system.size, linear.combinations
    rest = -torch.linalg.pinv(state.d.T) @ state.outside
    rest = rest - q @ (q.T @ rest @ extra.T) @ extra
    gradient = _pull(system, state, linear, state.inside, state.outside @ extra.T)
    for _ in range(24):
        damped = linear.normal.clone()
        damped.diagonal().add_(damping)
        factor, failed = cholesky(damped[None])
        if not bool(failed):
            step = cholesky_solve((-gradient / linear.diagonal)[None, None], factor).flatten()
            a, tau = (step / linear.diagonal).split([b * b, len(step) - b * b])
            inside, outside = _bend(system, state, a.view(b, b), q @ tau.view(q.shape[1], len(extra)), extra)
            curve = _pull(system, state, linear, inside, outside)
            bent = cholesky_solve((-0.5 * curve / linear.diagonal)[None, None], factor).flatten()
            if 2 * float(bent.norm()) <= 0.75 * float(step.norm()):
                a, tau = ((step + bent) / linear.diagonal).split([b * b, len(step) - b * b])
                moved = a.view(b, b) @ system.basis + (q @ tau.view(q.shape[1], len(extra))) @ extra
                trial = _state(system, state.features + moved + rest)
                if trial.objective < state.objective:
                    return trial, damping
        damping = max(damping, 1e-15) * 5
    return None, damping


def _bend(system: MixingEquations, state: _State, a: Tensor, beyond: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second derivative of the residual inside and in the columns V_w along a step."""
    p = state.p
    z = (a @ system.basis + beyond @ extra) @ system.weight.T
    z = z - (p * z).sum(-1, keepdim=True)
    first = p * z
    second = p * (z**2 - (first * z).sum(-1, keepdim=True)) * system.row
    first = 2 * first * system.row
    flat = torch.cat([a, torch.zeros_like(a[:, :1])], 1)
    return second.T @ system.augment(state.mixing) + first.T @ flat, first.T @ beyond


def _draws(system: MixingEquations, state: _State, linear: _Linear, extra: Tensor) -> Tensor | None:
    """Return (S, B, d') changes of the features under noise of the size that the residual shows."""
    b, classes, width = system.size, len(system.row), len(system.column)
    sound = linear.normal.clone()
    sound.diagonal().add_(1e-14 * b)
    factor, info = torch.linalg.cholesky_ex(sound)
    if int(info) != 0:
        return None
    generator = torch.Generator().manual_seed(0)  # Always the same noise, so that a verdict is not a matter of luck.
    inside = float(state.inside.square().sum())
    freedom = system.freedom
    sigma = math.sqrt(inside / freedom) * (1 + 2 / math.sqrt(2 * freedom))
    spare = max((classes - b) * (width - b), 1)
    floor = ROUNDED * system.eps * system.scale / math.sqrt(classes * width)
    beyond = max(float(state.outside.norm()) / math.sqrt(spare), floor)
    noise = torch.randn((len(linear.normal), _DRAWS), generator=generator, dtype=torch.float64).to(state.inside)
    drawn = torch.linalg.solve_triangular(factor.mT, noise, upper=True) / linear.diagonal[:, None]
    drawn = max(sigma, beyond) * drawn.T
    q = linear.combinations
    a, tau = drawn[:, : b * b].reshape(-1, b, b), drawn[:, b * b :].reshape(_DRAWS, q.shape[1], len(extra))
    own = a @ system.basis + (q @ tau) @ extra
    # What lies outside is known as well as the least-squares solution of its columns.
    values, vectors = torch.linalg.eigh(state.d @ state.d.T)
    root = vectors / values.clamp_min(1e-14 * values[-1]).sqrt()
    rest = torch.randn((_DRAWS, b, width), generator=generator, dtype=torch.float64).to(root)
    rest = beyond * (root @ rest)
    rest = rest - (rest @ system.rows.T) @ system.rows
    return own + rest - q @ (q.T @ rest @ extra.T) @ extra
