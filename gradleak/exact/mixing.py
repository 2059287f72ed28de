"""The equations of a classification head for the features of a batch, and their solution.

The unknowns are the coordinates A (B, B) of the features in the row space V of the head's weight gradient; see
:mod:`gradleak.exact.features`. Levenberg–Marquardt runs from many starts at once, every start with a damping of its
own, and one batched factorization serves them all: the loop of :mod:`gradleak.solve.least_squares` follows one start,
and a second-order correction (geodesic acceleration, Transtrum and Sethna 2012) has no place in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.exact.labels import LabelEstimate, rounding
from gradleak.solve.cholesky import cholesky, cholesky_solve
from gradleak.structure.head import Head
from gradleak.training import CrossEntropy

__all__ = ["EXPLAINED", "ROUNDED", "Fit", "MixingEquations"]

ROUNDED = 0.25
"""Root mean square rounding of one number, in spacings of its format at one."""
EXPLAINED = 16.0
"""Relative residual, in such spacings, up to which a gradient counts as explained: roundings that add up on the client.
"""

_LIVE = 32.0
"""Spacings of the number format, relative to the largest feature, below which a feature counts as zero for all
examples: where weight decay was subtracted, features of zero keep its rounding."""


@dataclass(frozen=True, eq=False)
class Fit:
    """One end of a search: stationary within noise, or ended where only the refinement leads on."""

    mixing: Tensor
    objective: float
    iterations: int
    stationary: bool
    ended: bool


@dataclass(frozen=True, eq=False)
class MixingEquations:
    """The scaled equations ``R(A) = Ω Dᵀ [A V, 1] − s⁻¹ Ω [gW Γ, gb]`` for the mixing A (B, B), H = A V Γ⁻¹.

    Attributes:
        row: (C,) Ω; zero for rows without any signal.
        column: (d') Γ⁻¹ of the live columns.
        live: (d,) mask of the features that are not zero throughout.
        rows: V (B, d'), an orthonormal basis of the row space.
        whiten: (B,) weights of the equations in the basis V. The probabilities carry rounding errors of their own,
            which every feature multiplies: noise along the mean of the features, many times that of the other columns.
        basis: V / whiten, so that the coordinates A and the equations are those of white noise.
        project: (C, B) maps mixings to logits.
        bias: (C,).
        target: (C, B + 1) the right-hand side in the basis V; the last column is the bias gradient's.
        constant: the bias gradient's feature, zero without a bias.
        soft: (B, C) smoothed one-hot labels.
        outside: relative noise seen outside the row space, for all numbers.
        eps: spacing of the update's number format.
        rank: numerical rank of the scaled weight gradient.
        scale: norm of the seen right-hand side.
        seen: (C, d') the scaled weight gradient.
        weight: (C, d') the head's weight, for scaled features.
    """

    row: Tensor
    column: Tensor
    live: Tensor
    rows: Tensor
    whiten: Tensor
    basis: Tensor
    project: Tensor
    bias: Tensor
    target: Tensor
    constant: float
    soft: Tensor
    outside: float
    eps: float
    rank: int
    scale: float
    seen: Tensor
    weight: Tensor

    @property
    def size(self) -> int:
        """Number of examples."""
        return int(self.basis.shape[0])

    @property
    def freedom(self) -> int:
        """Independent equations less unknowns; rows of the residual sum to zero, so one class is redundant."""
        return max((len(self.row) - 1) * (self.size + (self.constant > 0)) - self.size**2, 1)

    @classmethod
    def build(
        cls, gw: Tensor, gb: Tensor | None, head: Head, estimate: LabelEstimate, means: Tensor, loss: CrossEntropy
    ) -> MixingEquations:
        """Scale the equations of a head's gradient ``gw`` (C, d) and ``gb`` (C,); see :func:`disaggregate`."""
        size, classes = int(estimate.counts.sum()), head.classes
        eps = rounding(gw.dtype, loss)
        factor = float(size) if loss.reduction == "mean" else 1.0
        seen = factor * gw.double()
        soft = torch.nn.functional.one_hot(estimate.labels, classes).to(seen)
        soft = soft * (1 - loss.label_smoothing) + loss.label_smoothing / classes
        counts = estimate.counts[estimate.counts > 0]
        p = torch.softmax(head.logits(means), 1).repeat_interleave(counts, 0)
        # A sum of d_ic h_i is rounded relative to its terms: p and y, not their difference.
        magnitude = ((4 * p) ** 2 + soft**2).sum(0).sqrt()
        row = torch.where(seen.abs().amax(1) > 0, 1 / magnitude.clamp_min(1e-30), 0.0)
        scaled = seen * row[:, None]
        column = scaled.norm(dim=0) / math.sqrt(classes)
        live = column > _LIVE * eps * column.max()
        column = column[live]
        scaled = scaled[:, live] / column
        u, s, vh = torch.linalg.svd(scaled, full_matrices=False)
        rows = vh[:size]
        constant, side = 0.0, torch.zeros_like(row)
        if gb is not None:
            side = factor * gb.double() * row
            level = float(side.norm()) / math.sqrt(classes)
            constant = 1 / level if level > 0 else 0.0
            side = side * constant
        target = torch.cat([u[:, :size] * s[:size], side[:, None]], 1)
        scale = float(target.norm())
        spare = max((1 - size / classes) * (1 - size / max(scaled.shape[1], size + 1)), 1e-3)
        outside = float(s[size:].norm() / s.norm()) / math.sqrt(spare) if len(s) > size else 0.0
        rank = int((s > EXPLAINED * eps * s[0]).sum())
        entries = math.sqrt(scaled.numel())
        noise = max(outside, ROUNDED * eps) * scale / entries
        mean = ((means[:, live] / column) @ rows.T).repeat_interleave(counts, 0).square().mean(0)
        whiten = (1 + (0.35 * eps / noise) ** 2 * mean).rsqrt()
        basis = rows / whiten[:, None]
        target[:, :-1] *= whiten
        weight = head.weight.double()[:, live] * column
        bias = torch.zeros_like(row) if head.bias is None else head.bias.double()
        return cls(
            row,
            column,
            live,
            rows,
            whiten,
            basis,
            weight @ basis.T,
            bias,
            target,
            constant,
            soft,
            outside,
            eps,
            rank,
            scale,
            scaled,
            weight,
        )

    def starts(self, means: Tensor, estimate: LabelEstimate, count: int, generator: torch.Generator) -> Tensor:
        """Return (count, B, B) mixings: class means, split at random where a class occurs more than once.

        Every other split keeps its class's mean. A class that the model predicts for the others too hardly shows its
        own examples: what is unknown of the repeated ones covers them, so its mean is drawn towards that of all.
        """
        counts = estimate.counts[estimate.counts > 0]
        repeated = (counts > 1).repeat_interleave(counts)[:, None]
        mixing = (means[:, self.live] / self.column) @ self.rows.T * self.whiten
        centered = mixing - mixing.mean(0)
        spread = centered.norm() / math.sqrt(max(len(mixing) - 1, 1)) if len(mixing) > 1 else 0.1 * mixing.norm()
        mixing = mixing.repeat_interleave(counts, 0)
        p, _ = self.residual(mixing[None])
        mine = estimate.labels[:, None] == estimate.labels
        own = 1 - p[0].gather(1, estimate.labels[:, None])[:, 0]
        others = (p[0][:, estimate.labels].square() * repeated * ~mine).sum(0)
        trust = torch.where(others > own.square(), own.square() / (own.square() + others).clamp_min(1e-300), 1.0)
        trust = trust[:, None]
        mixing = trust * mixing + (1 - trust) * (trust * mixing).sum(0) / trust.sum().clamp_min(1e-300)
        noise = torch.randn((count, self.size, self.size), generator=generator, dtype=torch.float64).to(mixing)
        noise[::2] -= (mine.to(noise) / mine.sum(1)) @ noise[::2]
        return mixing + 0.3 * spread / math.sqrt(self.size) * noise * repeated

    def augment(self, mixing: Tensor) -> Tensor:
        """Append the bias gradient's constant feature."""
        return torch.cat([mixing, torch.full_like(mixing[..., :1], self.constant)], -1)

    def residual(self, mixing: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities (R, B, C) and the residual (R, C, B + 1) of mixings (R, B, B)."""
        p = torch.softmax(mixing @ self.project.T + self.bias, -1)
        return p, ((p - self.soft) * self.row).mT @ self.augment(mixing) - self.target

    def residual_of(self, fit: Fit) -> float:
        """Return the relative residual of a fit."""
        return math.sqrt(max(fit.objective, 0.0)) / max(self.scale, 1e-300)

    def jacobian(self, p: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ∂(Ω p)/∂a (R, B, C, B), Ω d (R, B, C) and the normal matrix JᵀJ (R, B², B²).

        The residual is Σ_k Ω d_k ã_kᵀ, so example k contributes M_k ⊗ ã_k + Ω d_k ⊗ I to the Jacobian; products of
        such blocks need only the small matrices M_kᵀM_k', M_kᵀΩ d_k' and two Gram matrices, never J itself.
        """
        r, b = mixing.shape[:2]
        m = p[..., None] * (self.project - (p @ self.project)[:, :, None, :]) * self.row[:, None]
        d = (p - self.soft) * self.row
        flat = m.permute(0, 2, 1, 3).reshape(r, -1, b * b)
        normal = (flat.mT @ flat).view(r, b, b, b, b)
        tilde = self.augment(mixing)
        normal *= (tilde @ tilde.mT)[:, :, None, :, None]
        cross = torch.einsum("rkcl,rmc->rklm", m, d)
        normal.addcmul_(cross[:, :, :, :, None], mixing[:, :, None, None, :])
        normal.addcmul_(cross.permute(0, 3, 1, 2)[:, :, None, :, :], mixing.mT[:, None, :, :, None])
        normal.diagonal(dim1=2, dim2=4).add_((d @ d.mT)[..., None])
        return m, d, normal.view(r, b * b, b * b)

    def pull(self, m: Tensor, d: Tensor, mixing: Tensor, residual: Tensor) -> Tensor:
        """Return Jᵀ residual, (R, B²)."""
        b = self.size
        back = (residual @ self.augment(mixing).mT).mT
        return (torch.einsum("rkcl,rkc->rkl", m, back) + d @ residual[..., :b]).flatten(1)

    def bend(self, p: Tensor, mixing: Tensor, step: Tensor) -> Tensor:
        """Return the second derivative of the residual along ``step`` (R, B, B)."""
        z = step @ self.project.T
        z = z - (p * z).sum(-1, keepdim=True)
        first = p * z
        second = p * (z**2 - (first * z).sum(-1, keepdim=True))
        flat = torch.cat([step, torch.zeros_like(step[..., :1])], -1)
        return (second * self.row).mT @ self.augment(mixing) + 2 * (first * self.row).mT @ flat

    def solve(self, mixing: Tensor, iterations: int, *, pause: bool = False) -> Fit:
        """Run Levenberg–Marquardt from all starts (R, B, B) at once and return the best end.

        With ``pause`` it also ends where the gradient is explained and three steps gain less than 1 % each.
        """
        r, b = mixing.shape[:2]
        p, residual = self.residual(mixing)
        objective = residual.square().sum((1, 2))
        damping = torch.full_like(objective, 1e-3)
        growth = torch.full_like(objective, 2.0)
        calm = torch.zeros_like(objective, dtype=torch.long)
        slow = torch.zeros_like(calm)
        fresh, iteration = True, 0
        still = ended = settled = torch.zeros_like(objective, dtype=torch.bool)
        m = d = normal = gradient = diagonal = torch.empty(0)
        while iteration < iterations:
            iteration += 1
            if fresh:
                m, d, normal = self.jacobian(p, mixing)
                gradient = self.pull(m, d, mixing, residual)
                diagonal = normal.diagonal(dim1=1, dim2=2).clone()
            damped = normal.clone()
            damped.diagonal(dim1=1, dim2=2).add_(damping[:, None] * diagonal + 1e-300)
            factor, failed = cholesky(damped)
            del damped
            step = cholesky_solve(-gradient[:, None], factor).reshape(r, b, b)
            curve = self.pull(m, d, mixing, self.bend(p, mixing, step))
            extra = cholesky_solve(-0.5 * curve[:, None], factor).reshape(r, b, b)
            weight = diagonal.view(r, b, b)
            bent = 2 * ((weight * extra**2).sum((1, 2)) / (weight * step**2).sum((1, 2)).clamp_min(1e-300)).sqrt()
            trial = mixing + step + extra
            new_p, new_residual = self.residual(trial)
            new = new_residual.square().sum((1, 2))
            better = (new < objective) & ~failed & (bent <= 0.75)
            gain = torch.where(better, (objective - new) / objective.clamp_min(1e-300), 1.0)
            pick = better[:, None, None]
            mixing, p = torch.where(pick, trial, mixing), torch.where(pick, new_p, p)
            residual = torch.where(pick, new_residual, residual)
            objective = torch.where(better, new, objective)
            # A gain far below the variance of one equation is no information: three of them, or none at any
            # damping, end it.
            calm = torch.where(better & (gain < 0.05 / self.freedom), calm + 1, torch.where(better, 0, calm))
            # So does a nearly undamped step that promises as little.
            promise = -(gradient * step.flatten(1)).sum(1) < 0.05 / self.freedom * objective
            calm = torch.where(better & promise & (damping < 1e-8), 3, calm)
            damping = torch.where(better, (damping / 10).clamp_min(1e-15), damping * growth)
            growth = torch.where(better, 2.0, growth * 1.5)
            fresh = bool(better.any())
            slow = torch.where(better & (gain < 0.01), slow + 1, torch.where(better, 0, slow))
            still = (calm >= 3) | (damping > 1e4) | (objective.sqrt() <= 1e-15 * self.scale)
            explained = objective.sqrt() <= EXPLAINED * self.eps * self.scale
            ended = still | (explained & (slow >= 3)) if pause else still
            settled = ended & explained
            if bool(ended.all()) or bool(settled.any()):
                break
        # Starts that others outran have not ended; between ends, the objective decides.
        usable = settled if bool(settled.any()) else torch.isfinite(objective)
        best = int(torch.where(usable, objective, torch.inf).argmin())
        return Fit(mixing[best], float(objective[best]), iteration, bool(still[best]), bool(ended[best]))

    def unscale(self, features: Tensor) -> Tensor:
        """Return features (B, d) from scaled live ones (B, d')."""
        whole = torch.zeros((len(features), len(self.live)), dtype=torch.float64, device=features.device)
        whole[:, self.live] = features * self.column
        return whole
