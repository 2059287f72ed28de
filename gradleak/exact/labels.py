"""Labels from the gradient of the classification head.

Cross-entropy of logits z = W h + b has the gradient p − y with respect to z, so the head's gradients over a batch are
``gb = s Σ_i (p_i − y_i)`` and ``gW = s Σ_i (p_i − y_i) h_iᵀ`` with s = 1/B for the mean and 1 for the sum. The counts
are therefore ``n_c = Σ_i p_ic − gb_c / s``: exact once the mean probabilities are known (Wainakh et al. 2022; Geng et
al. 2023; one example: Zhao et al. 2020, iDLG, Section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.structure.head import Head, features_and_logits, find_head
from gradleak.structure.probe import probe_inputs
from gradleak.training import CrossEntropy, Loss

__all__ = [
    "LabelEstimate",
    "class_counts",
    "neighbors",
    "one_hot_label",
    "recover_labels",
    "round_counts",
    "solve_labels",
]

Tensors = Mapping[str, Tensor]

_ROUNDS = 100
"""Most rounds in which counts, features and probabilities come to agree."""


@dataclass(frozen=True, eq=False)
class LabelEstimate:
    """How often every class occurs in a batch, as read off the head's gradient.

    Attributes:
        counts: (C,) integers that sum to the batch size.
        labels: (B,) the same as a sorted list of class indices.
        exact: the head's gradient is reproduced down to the noise floor of its number format, so the counts are
            proved, not estimated.
        reason: one sentence: why they are exact, or what they rest on and how close the call was.
        raw: (C,) the counts before rounding.
        features: (K, d) estimated mean features of the K classes with a positive count, in class order; None where
            there was no bias to divide by.
    """

    counts: Tensor
    labels: Tensor
    exact: bool
    reason: str
    raw: Tensor
    features: Tensor | None = None


def one_hot_label(gw: Tensor | None, gb: Tensor | None) -> int:
    """Return the label of a single example: the only class whose logit gradient is negative (iDLG, Section 3.1).

    Args:
        gw: (C, d) head weight gradient; used only without ``gb``, and then needs features with a positive sum (ReLU,
            sigmoid).
        gb: (C,) head bias gradient.

    Raises:
        NotApplicable: neither is given.
    """
    if gb is not None:
        return int(gb.argmin())
    if gw is None:
        raise NotApplicable("A label is read off the head's gradient; share the head's weight or bias gradient.")
    return int(gw.sum(1).argmin())


def round_counts(raw: Tensor, total: int) -> Tensor:
    """Return the non-negative integers nearest to ``raw`` (C,) that sum to ``total`` (largest remainders)."""
    raw = torch.nan_to_num(raw, nan=0.0, posinf=float(total), neginf=0.0).clamp(max=total)
    counts = raw.clamp_min(0).floor()
    while (gap := total - int(counts.sum())) != 0:
        # The change that moves the counts least away from the raw values, one unit at a time.
        if gap > 0:
            counts[(raw - counts).argmax()] += 1
        else:
            counts[torch.where(counts > 0, raw - counts, torch.inf).argmin()] -= 1
    return counts.long()


def neighbors(estimate: LabelEstimate, limit: int) -> Iterator[LabelEstimate]:
    """Yield the ``limit`` next best roundings: one example moved to another class, closest calls first."""
    if estimate.exact:
        return
    doubt = estimate.raw - estimate.counts
    taken = estimate.counts.nonzero().flatten()
    cost = doubt[taken][:, None] - doubt[None]
    cost[torch.arange(len(taken)), taken] = torch.inf
    for flat in cost.flatten().argsort()[:limit].tolist():
        counts = estimate.counts.clone()
        counts[taken[flat // len(doubt)]] -= 1
        counts[flat % len(doubt)] += 1
        labels = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        yield replace(estimate, counts=counts, labels=labels, reason="A neighboring rounding.", features=None)


def class_counts(
    gw: Tensor,
    gb: Tensor,
    head: Head,
    batch_size: int,
    *,
    mean_probabilities: Tensor,
    loss: CrossEntropy | None = None,
) -> LabelEstimate:
    """Return the class counts of a batch by iterating counts, class features and probabilities until they agree.

    The gradient of row c is a weighted sum of the features of class c plus what the other examples' probabilities
    contribute; subtracting the latter with the current estimate and dividing by the same expression of the bias
    gradient gives the mean feature of the class, whose probabilities give the counts. With one example per class the
    fixed point satisfies all C·d equations of the weight gradient, which is what makes the result exact.

    Args:
        gw: (C, d) head weight gradient.
        gb: (C,) head bias gradient.
        head: the head's parameters.
        batch_size: number of examples B.
        mean_probabilities: (C,) a first guess of the batch's mean softmax.
        loss: reduction and label smoothing of the client.
    """
    loss = CrossEntropy() if loss is None else loss
    floor = _floor(gw.dtype, loss)
    gw, gb = gw.double(), gb.double()
    scale = float(batch_size) if loss.reduction == "mean" else 1.0
    share = loss.label_smoothing / head.classes
    target_w, target_b = scale * gw, scale * gb
    hit = 1 - loss.label_smoothing
    weight = head.weight.double()
    bias = torch.zeros(head.classes, dtype=torch.float64, device=gw.device) if head.bias is None else head.bias.double()

    raw = (batch_size * (mean_probabilities.double() - share) - target_b) / hit
    counts = round_counts(raw, batch_size)
    present = counts.nonzero().flatten()
    # A row's own ratio is its class mean up to the other examples' small share.
    features = gw[present] / torch.where(gb[present].abs() > 1e-30, gb[present], 1e-30)[:, None]
    best: tuple[float, Tensor, Tensor, Tensor, Tensor] | None = None
    idle = 0
    for _ in range(_ROUNDS):
        p = torch.softmax(features @ weight.T + bias, 1)
        weighted = counts[present, None] * (p - share)
        rows, ratio = _rows(weighted, features, target_w, target_b, present)
        # own(c): what is left for class c itself is n_c (1 − ε − p_cc + ε/C), in features and in numbers.
        own = torch.full((head.classes,), hit, dtype=torch.float64, device=gw.device)
        own[present] = (hit + share - p.gather(1, present[:, None]).flatten()).clamp_min(1e-6)
        raw = ratio / own
        misfit = _misfit(weighted, features, target_w, counts, present, hit)
        idle = 0 if best is None or misfit < 0.9 * best[0] else idle + 1
        if best is None or misfit < best[0]:
            best = (misfit, counts, raw, features, present)
        if misfit <= floor or idle >= 8 or not bool(torch.isfinite(raw).all()):
            break
        counts = round_counts(raw, batch_size)
        fresh = counts.nonzero().flatten()
        features = rows[fresh] / torch.where(ratio[fresh].abs() > 1e-30, ratio[fresh], 1e-30)[:, None]
        present = fresh
    assert best is not None
    misfit, counts, raw, features, present = best
    labels = torch.repeat_interleave(torch.arange(head.classes, device=counts.device), counts)
    close = float((raw - counts).abs().max())
    if misfit <= floor:
        reason = f"The head's gradient is reproduced to {misfit:.1e}, so the labels are exact."
    else:
        reason = (
            f"Class counts are rounded from estimates at most {close:.2f} away "
            f"(0.5 would be a coin toss); the head's gradient is explained to {misfit:.1e}."
        )
    return LabelEstimate(counts, labels, misfit <= floor, reason, raw, features)


def recover_labels(
    model: nn.Module,
    params: Tensors,
    update: Tensors,
    shape: tuple[int, ...],
    batch_size: int,
    loss: Loss,
    generator: torch.Generator | None = None,
    *,
    head: Head | None = None,
) -> LabelEstimate:
    """Return the labels of a batch as the head's gradient shows them.

    Args:
        model: the model that was sent out, in the client's mode.
        params: its trainable parameters by name.
        update: gradients by parameter name (scale a weight delta of one SGD step by −1/lr first).
        shape: shape of one input.
        batch_size: number of examples.
        loss: the client's loss; :class:`~gradleak.training.CrossEntropy` with its reduction and label smoothing.
        generator: draws the dummy inputs that start the estimate of the mean probabilities.
        head: the head, where it has been found already.

    Raises:
        NotApplicable: the loss is not cross-entropy, or the model's output is not that of a linear layer.
    """
    if not isinstance(loss, CrossEntropy):
        raise NotApplicable(
            f"Labels are read off the gradient of softmax cross-entropy, not of {type(loss).__name__}; "
            "pass the labels (Knowledge.LABELS) or optimize them jointly."
        )
    head = find_head(model, params, shape) if head is None else head
    if head is None:
        raise NotApplicable(
            "The model's output is not that of a trained linear layer, so its gradient does not show the labels; "
            "pass the labels (Knowledge.LABELS) or optimize them jointly."
        )
    gw, gb = head.gradients(update, dtype=update[head.weight_name].dtype)
    if batch_size == 1:
        single = _single(gw, gb, head, loss)
        if single is not None:
            return single
    like = next(iter(params.values()))
    with torch.no_grad():
        inputs = probe_inputs(shape, 16, like, generator)
        features, logits = features_and_logits(model, params, inputs, head)
    mean = torch.softmax(logits.double(), 1).mean(0)
    if gb is not None:
        return class_counts(gw, gb, head, batch_size, mean_probabilities=mean, loss=loss)
    return _without_bias(gw, head, batch_size, mean, features.double().mean(0), loss)


def rounding(dtype: torch.dtype, loss: CrossEntropy) -> float:
    """Return the relative rounding unit of a gradient: its format's, or float32's where the loss smooths labels.

    ``torch.nn.functional.cross_entropy`` holds the smoothing in single precision, whatever the format of the logits.
    """
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if loss.label_smoothing > 0 else 0.0)


def _floor(dtype: torch.dtype, loss: CrossEntropy) -> float:
    """Relative error that a gradient of this precision carries (sums of some thousand rounded terms)."""
    return 64 * rounding(dtype, loss)


def _rows(
    weighted: Tensor, features: Tensor, target_w: Tensor, target_b: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what each class's own examples must contribute: to the weight rows (C, d) and to the bias (C,)."""
    others = weighted.clone()
    others[torch.arange(len(present), device=present.device), present] = 0
    return others.T @ features - target_w, others.sum(0) - target_b


def _misfit(weighted: Tensor, features: Tensor, target: Tensor, counts: Tensor, present: Tensor, hit: float) -> float:
    """Return the relative distance between the weight gradient of class means and the seen one."""
    explained = weighted.clone()
    explained[torch.arange(len(present), device=present.device), present] -= hit * counts[present]
    return float((explained.T @ features - target).norm() / target.norm().clamp_min(1e-300))


def _single(gw: Tensor, gb: Tensor | None, head: Head, loss: CrossEntropy) -> LabelEstimate | None:
    """Return the proved label of one example, None where the gradient does not prove it."""
    floor = _floor(gw.dtype, loss)
    gw = gw.double()
    hit, share = 1 - loss.label_smoothing, loss.label_smoothing / head.classes
    if gb is not None:
        gb = gb.double()
        row = int(gb.abs().argmax())
        if float(gb[row].abs()) == 0.0:
            return None
        feature = gw[row] / gb[row]
        target = torch.softmax(head.logits(feature), 0) - gb
        one_hot = (target - share) / hit
        label = int(one_hot.argmax())
        distance = float((one_hot - torch.nn.functional.one_hot(torch.tensor(label), head.classes).to(one_hot)).norm())
        if distance > max(1e-3, 1e3 * floor):
            return None
        reason = f"The head's input is gW/gb and leaves the one-hot label y = p - gb to {distance:.1e}."
        return _known(label, head, reason, one_hot, feature[None])
    # Without a bias only the direction of p − y is seen; it has exactly one negative entry.
    u, s, _ = torch.linalg.svd(gw, full_matrices=False)
    direction = u[:, 0] * torch.where((u[:, 0] > 0).sum() * 2 >= head.classes, 1.0, -1.0)
    negative = direction < -floor
    rank_one = s.numel() == 1 or float(s[1]) <= 10 * floor * float(s[0])
    if head.classes < 3 or loss.label_smoothing > 0 or int(negative.sum()) != 1 or not rank_one:
        return None
    label = int(direction.argmin())
    reason = "The head's gradient has rank one and only one class pulls its logit up, so that is the label."
    return _known(label, head, reason, torch.nn.functional.one_hot(torch.tensor(label), head.classes).double(), None)


def solve_labels(
    features: Tensor, logits: Tensor, gw: Tensor, gb: Tensor | None, loss: CrossEntropy
) -> tuple[Tensor, float]:
    """Return the labels of examples whose features are known: the head's gradient is linear in p − y.

    Args:
        features: (N, d) inputs of the head.
        logits: (N, C).
        gw: (C, d) head weight gradient.
        gb: (C,) head bias gradient, None where there is none.
        loss: reduction and label smoothing of the client.

    Returns:
        (N, C) labels as probabilities, as solved (they need not be positive), and the share of the gradient's norm that
        they leave unexplained. Examples with the same features share the mean of their labels.
    """
    known, seen = features.double(), gw.double()
    if gb is not None:
        known = torch.cat([known, torch.ones_like(known[:, :1])], 1)
        seen = torch.cat([seen, gb.double()[:, None]], 1)
    scale = float(len(features)) if loss.reduction == "mean" else 1.0
    difference = scale * seen @ torch.linalg.pinv(known, rtol=1e-10)  # (C, N)
    misfit = float((difference @ known - scale * seen).norm() / (scale * seen).norm().clamp_min(1e-300))
    labels = torch.softmax(logits.double(), 1) - difference.T
    return (labels - loss.label_smoothing / logits.shape[1]) / (1 - loss.label_smoothing), misfit


def _known(label: int, head: Head, reason: str, raw: Tensor, features: Tensor | None) -> LabelEstimate:
    labels = torch.tensor([label], device=raw.device)
    counts = torch.zeros(head.classes, dtype=torch.long, device=raw.device)
    counts[label] = 1
    return LabelEstimate(counts, labels, True, reason, raw, features)


def _without_bias(
    gw: Tensor, head: Head, batch_size: int, mean: Tensor, feature: Tensor, loss: CrossEntropy
) -> LabelEstimate:
    """Return counts for a head without bias: find t with h_i·t = 1, so that gW t is the missing bias gradient.

    The classes that do not occur give the equations ``gW_c t = mean p_c − ε/C``; what t then says about the others is
    their count (as iLRG, Ma et al. 2023, but with the batch's own row space instead of class embeddings).
    """
    gw = gw.double()
    scale = float(batch_size) if loss.reduction == "mean" else 1.0
    hit, share = 1 - loss.label_smoothing, loss.label_smoothing / head.classes
    _, s, vh = torch.linalg.svd(gw, full_matrices=False)
    rank = max(1, min(batch_size, int((s > 1e-5 * s[0]).sum())))
    basis = vh[:rank].T
    design = scale * gw @ basis
    # Start: all features alike, as on an untrained network.
    t = basis.T @ feature / (feature @ feature).clamp_min(1e-300)
    wanted = batch_size * (mean - share)
    prior = t.clone()
    ridge = 1e-3 * float(design.norm()) ** 2 / rank
    raw = (wanted - design @ t) / hit
    for _ in range(20):
        absent = round_counts(raw, batch_size) == 0
        rows = design[absent]
        normal = rows.T @ rows + ridge * torch.eye(rank, dtype=torch.float64, device=gw.device)
        t = torch.linalg.solve(normal, rows.T @ wanted[absent] + ridge * prior)
        new = (wanted - design @ t) / hit
        if float((new - raw).abs().max()) < 1e-9:
            break
        raw = new
    counts = round_counts(raw, batch_size)
    labels = torch.repeat_interleave(torch.arange(head.classes, device=counts.device), counts)
    close = float((raw - counts).abs().max())
    reason = (
        f"The head has no bias, so class counts rest on mean probabilities of dummy inputs; "
        f"they are rounded from estimates at most {close:.2f} away (0.5 would be a coin toss)."
    )
    return LabelEstimate(counts, labels, False, reason, raw)
