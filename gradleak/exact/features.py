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
from gradleak.exact.mixing import EXPLAINED, ROUNDED, Fit, MixingEquations
from gradleak.structure.head import Head
from gradleak.training import CrossEntropy

__all__ = ["CLASS_SPAN", "EXACT", "NOT_IDENTIFIABLE", "Disaggregation", "disaggregate"]

EXACT = "exact"
CLASS_SPAN = "class-span only"
NOT_IDENTIFIABLE = "not identifiable"

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
    system = MixingEquations.build(gw, gb, head, estimate, means, loss)
    if system.size < size:  # Fewer features are alive than there are examples.
        return _unidentifiable(gw, head, estimate, means, loss, system.size)
    # One start where no class occurs twice; else as many together as keep the normal matrices small, and as many
    # iterations in all as the cubic cost of one allows (about 100 for 64 examples).
    repeated = int(estimate.counts.max()) > 1
    restarts = restarts if repeated else 1
    together = max(1, min(restarts, 2_000_000 // size**4))
    left = allowed = max(iterations // 4, int(100 * (64 / size) ** 2))
    best: Fit | None = None
    while restarts > 0 and left > 0:
        starts = system.starts(means, estimate, together, generator)
        fit = system.solve(starts, min(iterations, left), pause=repeated)
        restarts, left = restarts - together, left - fit.iterations * together
        best = fit if best is None or fit.objective < best.objective else best
        if best.ended and system.residual_of(best) <= EXPLAINED * system.eps:
            break
    assert best is not None
    judged = _judge(system, best, estimate, tolerance)
    # Under more noise than rounding the errors are no longer small, and linearized ones would mislead.
    rounded = max(judged.residual, system.outside) <= EXPLAINED * system.eps
    if not repeated or not rounded or bool(judged.exact.all()):
        return judged
    refined = refine(system, best.mixing)
    if refined is None and not best.stationary and size**2 <= LARGEST:
        return _judge(system, system.solve(best.mixing[None], allowed), estimate, tolerance)
    return judged if refined is None else _settle(system, judged, refined, estimate, tolerance)


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


def _judge(system: MixingEquations, fit: Fit, estimate: LabelEstimate, tolerance: float) -> Disaggregation:
    """Return features with a predicted error and a verdict each."""
    b, mixing = system.size, fit.mixing[None]
    classes, width = len(system.row), len(system.column)
    p, residual = system.residual(mixing)
    m, d, normal = system.jacobian(p, mixing)
    gradient = system.pull(m, d, mixing, residual)
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
    beyond = max(system.outside, ROUNDED * system.eps) * system.scale / math.sqrt(entries)
    # Few degrees of freedom may show less noise than there is: two standard errors more.
    sigma = max(math.sqrt(fit.objective / system.freedom) * (1 + 2 / math.sqrt(2 * system.freedom)), beyond)
    metric = (system.basis * system.column**2) @ system.basis.T
    own = torch.einsum("klkm,lm->k", inverse, metric) * sigma**2
    # The part of the noise outside the row space reaches the features through the pseudo-inverse of Ω Dᵀ.
    pinv = torch.linalg.pinv(d[0].T)
    level = beyond if max(system.residual_of(fit), system.outside) <= EXPLAINED * system.eps else sigma
    own = own + (pinv.norm(dim=1) * level) ** 2 * float((system.column**2).sum())
    left = left.view(b, b)
    remaining = torch.einsum("kl,lm,km->k", left, metric, left)
    features = system.unscale(fit.mixing @ system.basis)
    spread = _spread(features)
    errors = (9 * own + remaining).clamp_min(0).sqrt() / spread
    share = system.residual_of(fit)
    floor = EXPLAINED * max(system.eps, system.outside)
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
        system.rank,
        fit.iterations,
        _explain(system, verdicts, share, floor),
    )


def _settle(
    system: MixingEquations, judged: Disaggregation, refined: Refined, estimate: LabelEstimate, tolerance: float
) -> Disaggregation:
    """Return refined features with the errors and verdicts that the noise of the gradient allows."""
    features = system.unscale(refined.features)
    spread = _spread(features)
    drawn = refined.draws * system.column
    size = drawn.norm(dim=2) / spread
    errors = size.mean(0) + 3 * size.std(0)
    verdicts = []
    for k in range(system.size):
        group = (estimate.labels == estimate.labels[k]).nonzero().flatten()
        mean = drawn[:, group].mean(1).norm(dim=1) / spread
        known = float(mean.mean() + 3 * mean.std()) <= tolerance and len(group) > 1
        own = float(errors[k]) <= tolerance
        verdicts.append(EXACT if own else CLASS_SPAN if known else NOT_IDENTIFIABLE)
    share = math.sqrt(refined.objective) / max(system.scale, 1e-300)
    return replace(
        judged,
        features=features,
        verdicts=tuple(verdicts),
        errors=errors,
        residual=share,
        iterations=judged.iterations + refined.iterations,
        reason=_explain(system, verdicts, share, judged.floor),
    )


def _explain(system: MixingEquations, verdicts: Sequence[str], share: float, floor: float) -> str:
    """Return one sentence, or two, for a reader."""
    exact, b = verdicts.count(EXACT), len(verdicts)
    reason = (
        f"{exact} of {b} examples are determined by the head's gradient, which is explained to {share:.1e} "
        f"(rounding: {floor:.1e}; rank {system.rank} of {b})."
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
