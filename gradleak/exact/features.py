"""Exact features of every example of a batch from the gradient of the classification head.

The head sees a feature vector h_i of every example and returns logits z_i = W h_i + b. Cross-entropy gives

    gW = s Σ_i d_i h_iᵀ,   gb = s Σ_i d_i,   d_i = softmax(W h_i + b) − y_i      (s = 1/B for the mean, 1 for the sum).

gW has rank B (for B < C and B ≤ d), so every h_i lies in its row space V, h_i = V a_i: B² unknowns for about C (B + 1)
equations. They are solved together by Levenberg–Marquardt with the exact Jacobian and geodesic acceleration
(Transtrum and Sethna 2012), which the narrow curved valleys of classes that occur twice need. Two things make float32
updates enough: rows and columns are scaled so that every number carries the same rounding noise, and the start is the
fixed point of :func:`gradleak.exact.labels.class_counts`, exact already where every class occurs once. Where the
features of a repeated class stay in doubt, :mod:`gradleak.exact.features_refined` frees them from the noisy row space.

Published relative: gradient inversion with embeddings (GIE, ICME 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.errors import InvalidInput, ResourceLimit
from gradleak.exact.features_refined import LARGEST, Refined, refine
from gradleak.exact.labels import LabelEstimate, rounding
from gradleak.solve.cholesky import cholesky, cholesky_solve
from gradleak.structure.head import Head
from gradleak.training import CrossEntropy

__all__ = ["CLASS_SPAN", "EXACT", "NOT_IDENTIFIABLE", "Disaggregation", "disaggregate"]

EXACT = "exact"
CLASS_SPAN = "class-span only"
NOT_IDENTIFIABLE = "not identifiable"

_LIVE = 32.0
"""Spacings of the number format, relative to the largest feature, below which a feature counts as zero for all
examples: where weight decay was subtracted, features of zero keep its rounding."""
_LARGEST = 96
"""Largest batch for the dense joint system, (B²)² numbers."""


@dataclass(frozen=True, eq=False)
class Disaggregation:
    """Features and labels of every example of a batch, and what is known about each.

    Attributes:
        features: (B, d) inputs of the head, float64, sorted by label.
        labels: (B,) class indices, ascending.
        verdicts: per example "exact" (its predicted error is below the tolerance), "class-span only" (the mean of the
            examples of its class is, its own features are not), or "not identifiable".
        errors: (B,) predicted error of the features (three standard errors), relative to the spread between examples.
        residual: relative distance between the explained and the seen gradient of the head, every number weighted by
            its own rounding noise.
        floor: what rounding alone explains of it.
        rank: numerical rank of the head's weight gradient.
        iterations: Levenberg–Marquardt iterations of the returned start.
        reason: one sentence for a reader.

    """

    features: Tensor
    labels: Tensor
    verdicts: tuple[str, ...]
    errors: Tensor
    residual: float
    floor: float
    rank: int
    iterations: int
    reason: str

    @property
    def exact(self) -> Tensor:
        """(B,) mask of the examples whose verdict is "exact"."""
        return torch.tensor([v == EXACT for v in self.verdicts], device=self.features.device)


def disaggregate(
    gw: Tensor,
    gb: Tensor | None,
    head: Head,
    estimate: LabelEstimate,
    *,
    loss: CrossEntropy | None = None,
    restarts: int = 4,
    iterations: int = 150,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Disaggregation:
    """Return the features of every example of a batch from the gradient of the head.

    Args:
        gw: (C, d) head weight gradient, in the number format in which it was shared.
        gb: (C,) head bias gradient, None where the head has none.
        head: the head's parameters.
        estimate: the batch's class counts, as :func:`~gradleak.exact.labels.recover_labels` returns them.
        loss: reduction and label smoothing of the client.
        restarts: starts that differ in how examples of one class are split.
        iterations: at most so many per start.
        tolerance: predicted error, relative to the spread between examples, up to which features count as exact.
        generator: draws the splits.

    Raises:
        InvalidInput: the counts do not fit the head.
        ResourceLimit: the joint system of so many examples does not fit in memory.

    """
    loss = CrossEntropy() if loss is None else loss
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    size = int(estimate.counts.sum())
    if estimate.counts.numel() != head.classes or size < 1:
        raise InvalidInput(
            f"Class counts of {estimate.counts.numel()} classes do not fit a head of {head.classes}; "
            "take them from recover_labels() of the same model."
        )
    means = _class_means(gw, gb, head, estimate, loss)
    bound = min(head.classes - 1, head.width)
    if size > bound or not bool(gw.any()):
        return _unidentifiable(gw, head, estimate, means, loss, bound if bool(gw.any()) else 0)
    if size > _LARGEST:
        raise ResourceLimit(
            f"Separating {size} examples takes a dense system of {size**2} unknowns; "
            f"disaggregate at most {_LARGEST} examples."
        )
    system = System.build(gw, gb, head, estimate, means, loss)
    if system.size < size:  # Fewer features are alive than there are examples.
        return _unidentifiable(gw, head, estimate, means, loss, system.size)
    # One start where no class occurs twice; else as many together as keep the normal matrices small, and as many
    # iterations in all as the cubic cost of one allows (about 100 for 64 examples).
    repeated = int(estimate.counts.max()) > 1
    restarts = restarts if repeated else 1
    together = max(1, min(restarts, 2_000_000 // size**4))
    left = allowed = max(iterations // 4, int(100 * (64 / size) ** 2))
    best: _Fit | None = None
    while restarts > 0 and left > 0:
        starts = system.starts(means, estimate, together, generator)
        fit = system.solve(starts, min(iterations, left), pause=repeated)
        restarts, left = restarts - together, left - fit.iterations * together
        best = fit if best is None or fit.objective < best.objective else best
        if best.ended and system.residual_of(best) <= 16 * system.eps:
            break
    assert best is not None
    judged = system.judge(best, estimate, tolerance)
    # Under more noise than rounding the errors are no longer small, and linearized ones would mislead.
    rounded = max(judged.residual, system.outside) <= 16 * system.eps
    if not repeated or not rounded or bool(judged.exact.all()):
        return judged
    refined = refine(system, best.mixing)
    if refined is None and not best.stationary and size**2 <= LARGEST:
        return system.judge(system.solve(best.mixing[None], allowed), estimate, tolerance)
    return judged if refined is None else system.settle(judged, refined, estimate, tolerance)


def _class_means(gw: Tensor, gb: Tensor | None, head: Head, estimate: LabelEstimate, loss: CrossEntropy) -> Tensor:
    """Return (K, d) mean features of the K classes that occur, in class order."""
    if estimate.features is not None:
        return estimate.features.double()
    del gb
    gw = gw.double()
    size = int(estimate.counts.sum())
    scale = float(size) if loss.reduction == "mean" else 1.0
    share = loss.label_smoothing / head.classes
    present = estimate.counts.nonzero().flatten()
    counts = estimate.counts[present, None].double()
    index = torch.arange(len(present), device=gw.device)
    features = -scale * gw[present] / counts
    for _ in range(100):
        p = counts * (torch.softmax(head.logits(features), 1) - share)
        own = (counts.flatten() * (1 - loss.label_smoothing) - p[index, present]).clamp_min(1e-3)
        p[index, present] = 0
        new = ((p.T @ features - scale * gw)[present]) / own[:, None]
        if float((new - features).norm()) <= 1e-12 * float(new.norm()):
            break
        features = 0.5 * (features + new)
    return features


def _unidentifiable(
    gw: Tensor, head: Head, estimate: LabelEstimate, means: Tensor, loss: CrossEntropy, bound: int
) -> Disaggregation:
    size = int(estimate.counts.sum())
    features = torch.repeat_interleave(means, estimate.counts[estimate.counts > 0], 0)
    singular = torch.linalg.svdvals(gw.double())
    reason = (
        f"The head's gradient has rank at most {bound} (classes less one, or features), so {size} examples cannot be "
        "told apart from it; only class means are estimated."
    )
    if bound == 0:
        reason = "The head's weight gradient is zero: the features that reach it are, and show nothing."
    return Disaggregation(
        features,
        estimate.labels,
        (NOT_IDENTIFIABLE,) * size,
        torch.full((size,), math.inf, dtype=torch.float64, device=gw.device),
        math.inf,
        rounding(gw.dtype, loss),
        int((singular > 1e-7 * singular[0]).sum()),
        0,
        reason,
    )


@dataclass(frozen=True, eq=False)
class _Fit:
    """One end of a search: stationary within noise, or ended where only the refinement leads on."""

    mixing: Tensor
    objective: float
    iterations: int
    stationary: bool
    ended: bool


@dataclass(frozen=True, eq=False)
class System:
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
        return int(self.basis.shape[0])

    @property
    def freedom(self) -> int:
        """Independent equations less unknowns; rows of the residual sum to zero, so one class is redundant."""
        return max((len(self.row) - 1) * (self.size + (self.constant > 0)) - self.size**2, 1)

    @classmethod
    def build(
        cls, gw: Tensor, gb: Tensor | None, head: Head, estimate: LabelEstimate, means: Tensor, loss: CrossEntropy
    ) -> System:
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
        rank = int((s > 16 * eps * s[0]).sum())
        entries = math.sqrt(scaled.numel())
        noise = max(outside, 0.25 * eps) * scale / entries
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

    def residual_of(self, fit: _Fit) -> float:
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

    def solve(self, mixing: Tensor, iterations: int, *, pause: bool = False) -> _Fit:
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
            explained = objective.sqrt() <= 16 * self.eps * self.scale
            ended = still | (explained & (slow >= 3)) if pause else still
            settled = ended & explained
            if bool(ended.all()) or bool(settled.any()):
                break
        # Starts that others outran have not ended; between ends, the objective decides.
        usable = settled if bool(settled.any()) else torch.isfinite(objective)
        best = int(torch.where(usable, objective, torch.inf).argmin())
        return _Fit(mixing[best], float(objective[best]), iteration, bool(still[best]), bool(ended[best]))

    def judge(self, fit: _Fit, estimate: LabelEstimate, tolerance: float) -> Disaggregation:
        """Return features with a predicted error and a verdict each."""
        b, mixing = self.size, fit.mixing[None]
        classes, width = len(self.row), len(self.column)
        p, residual = self.residual(mixing)
        m, d, normal = self.jacobian(p, mixing)
        gradient = self.pull(m, d, mixing, residual)
        diagonal = normal.diagonal(dim1=1, dim2=2)[0].clamp_min(1e-300).sqrt()
        unit = (normal[0] / diagonal / diagonal[:, None]).clone()
        unit.diagonal().add_(1e-14 * b)
        factor, info = torch.linalg.cholesky_ex(unit)
        if int(info) != 0:
            unit.diagonal().add_(1e-11 * b)
            factor = torch.linalg.cholesky_ex(unit)[0]
        inverse = (torch.cholesky_inverse(factor) / diagonal / diagonal[:, None]).view(b, b, b, b)
        left = torch.cholesky_solve((-gradient[0] / diagonal)[:, None], factor)[:, 0] / diagonal
        # Noise per number: what the fit leaves, what lies outside the row space, or the number format, whichever most.
        entries = classes * width
        beyond = max(self.outside, 0.25 * self.eps) * self.scale / math.sqrt(entries)
        # Few degrees of freedom may show less noise than there is: two standard errors more.
        sigma = max(math.sqrt(fit.objective / self.freedom) * (1 + 2 / math.sqrt(2 * self.freedom)), beyond)
        metric = (self.basis * self.column**2) @ self.basis.T
        own = torch.einsum("klkm,lm->k", inverse, metric) * sigma**2
        # The part of the noise outside the row space reaches the features through the pseudo-inverse of Ω Dᵀ.
        pinv = torch.linalg.pinv(d[0].T)
        level = beyond if max(self.residual_of(fit), self.outside) <= 16 * self.eps else sigma
        own = own + (pinv.norm(dim=1) * level) ** 2 * float((self.column**2).sum())
        left = left.view(b, b)
        remaining = torch.einsum("kl,lm,km->k", left, metric, left)
        features = self.unscale(fit.mixing @ self.basis)
        spread = _spread(features)
        errors = (9 * own + remaining).clamp_min(0).sqrt() / spread
        share = self.residual_of(fit)
        floor = 16 * max(self.eps, self.outside)
        matched = share <= floor
        # A start that ran out of iterations may lie in a valley; then the next full step must be negligible as well.
        settled = remaining.clamp_min(0).sqrt() <= (math.inf if fit.stationary else 0.1 * tolerance) * spread
        verdicts = []
        for k in range(b):
            label = int(estimate.labels[k])
            group = (estimate.labels == label).nonzero().flatten()
            surely = bool(settled[k]) if matched else len(group) == 1 and share <= 1e-4
            if float(errors[k]) <= tolerance and surely:
                verdicts.append(EXACT)
                continue
            block = inverse[group][:, :, group].sum((0, 2)) / len(group) ** 2
            mean = 3 * sigma * math.sqrt(max(float((block * metric).sum()), 0.0)) / float(spread)
            known = len(group) > 1 and mean <= tolerance and share <= 1e-4
            verdicts.append(CLASS_SPAN if known else NOT_IDENTIFIABLE)
        return Disaggregation(
            features,
            estimate.labels,
            tuple(verdicts),
            errors,
            share,
            floor,
            self.rank,
            fit.iterations,
            self.explain(verdicts, share, floor),
        )

    def settle(
        self, judged: Disaggregation, refined: Refined, estimate: LabelEstimate, tolerance: float
    ) -> Disaggregation:
        """Return refined features with the errors and verdicts that the noise of the gradient allows."""
        features = self.unscale(refined.features)
        spread = _spread(features)
        drawn = refined.draws * self.column
        size = drawn.norm(dim=2) / spread
        errors = size.mean(0) + 3 * size.std(0)
        verdicts = []
        for k in range(self.size):
            group = (estimate.labels == estimate.labels[k]).nonzero().flatten()
            mean = drawn[:, group].mean(1).norm(dim=1) / spread
            known = float(mean.mean() + 3 * mean.std()) <= tolerance and len(group) > 1
            own = float(errors[k]) <= tolerance
            verdicts.append(EXACT if own else CLASS_SPAN if known else NOT_IDENTIFIABLE)
        share = math.sqrt(refined.objective) / max(self.scale, 1e-300)
        return replace(
            judged,
            features=features,
            verdicts=tuple(verdicts),
            errors=errors,
            residual=share,
            iterations=judged.iterations + refined.iterations,
            reason=self.explain(verdicts, share, judged.floor),
        )

    def unscale(self, features: Tensor) -> Tensor:
        """Return features (B, d) from scaled live ones (B, d')."""
        whole = torch.zeros((len(features), len(self.live)), dtype=torch.float64, device=features.device)
        whole[:, self.live] = features * self.column
        return whole

    def explain(self, verdicts: Sequence[str], share: float, floor: float) -> str:
        """Return one sentence, or two, for a reader."""
        exact, b = verdicts.count(EXACT), len(verdicts)
        reason = (
            f"{exact} of {b} examples are determined by the head's gradient, which is explained to {share:.1e} "
            f"(rounding: {floor:.1e}; rank {self.rank} of {b})."
        )
        if exact < b:
            rest = "examples of one class whose features are too close for the noise, or counts that are not right"
            reason += f" The others are {rest}."
        return reason


def _spread(features: Tensor) -> Tensor:
    """Return the root mean square distance of the features from their mean, the norm of a single one."""
    b = len(features)
    spread = (features - features.mean(0)).norm() / math.sqrt(b) if b > 1 else features.norm()
    return spread.clamp_min(1e-300)
