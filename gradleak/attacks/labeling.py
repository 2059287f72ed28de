"""Labels of examples whose inputs are known, for attacks that solve the inputs without them."""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import InvalidModel, NotApplicable
from gradleak.exact.labels import LabelEstimate, recover_labels, solve_labels
from gradleak.exact.targets import fit_targets, try_classes
from gradleak.structure.head import Head, features_and_logits, find_head
from gradleak.threat import Observation
from gradleak.training import CrossEntropy, TargetKind, check_reproducible, target_kind

__all__ = ["MOST_CLASSES", "align", "estimate_labels", "labels_to_try", "order_as_granted", "read_labels"]

MOST_CLASSES = 64
"""Classes of which each is tried as the label of one example, at most."""

_HARD = 0.05
"""Largest distance of a solved label from a class that is still taken for rounding."""
_MULTIPLE = 0.01
"""Relative distance at which p − y counts as a multiple of that of one class."""
_EXPLAINED = 0.01
"""Share of the head's gradient that solved labels may leave unexplained."""
_LIKELY = 0.9
"""Cosine of the seen update with that of a class, from which on an unknown loss is taken for one of classes."""
_SAME = 1e-2
"""Difference between a solved and a granted number, relative to their size, that is taken for rounding."""

Labels = tuple[Tensor | None, Tensor | None]
"""Class indices (N,), and targets (N, ...) where those are real numbers; None where nothing is known."""


def estimate_labels(
    observation: Observation, generator: torch.Generator | None = None, *, head: Head | None = None
) -> LabelEstimate:
    """Return the labels of a batch as its head's gradient shows them; see :func:`gradleak.exact.labels.recover_labels`.

    Raises:
        NotApplicable: the head says nothing about them.
    """
    return recover_labels(
        observation.model,
        observation.params,
        observation.gradient.tensors,
        tuple(observation.space.shape),
        observation.batch_size or 1,
        observation.simulator.undefended.loss,
        torch.Generator().manual_seed(0) if generator is None else generator,
        head=head,
    )


def read_labels(observation: Observation, inputs: Tensor) -> Labels:
    """Return the labels of model inputs (N, *shape), as the client's loss takes them.

    The head's gradient is linear in p − y and p is known, so y follows by least squares; targets of other losses follow
    in the same way from the whole gradient. Where the update is not one gradient, the label of one example is the one
    whose update points most nearly as the seen one does.

    Raises:
        InvalidModel: the client cannot be simulated.
    """
    check_reproducible(observation.model)
    simulator = observation.simulator
    if simulator.defended:
        return (_best(observation, inputs), None) if len(inputs) == 1 else (None, None)
    loss = simulator.undefended.loss
    if isinstance(loss, CrossEntropy) and loss.weight is None and simulator.known:
        found = _from_head(observation, inputs, loss)
        if found is not None:
            return found
    if len(inputs) == 1:
        label = _best(observation, inputs)
        if label is not None:
            return label, None
    return _from_gradient(observation, inputs)


def labels_to_try(observation: Observation, kind: TargetKind, outputs: Tensor) -> list[Tensor]:
    """Return the labels of one example to try, as granted or of the form that the loss takes."""
    granted = observation.labels
    if granted is not None:
        return list(granted.unique(dim=0)[:, None])
    if kind is TargetKind.BINARY:
        count = outputs.shape[1] if outputs.ndim == 2 else 0
        if not 1 <= count <= 6:
            return []
        return [torch.tensor([[float(i >> k & 1) for k in range(count)]]).to(outputs) for i in range(2**count)]
    if outputs.ndim != 2 or outputs.shape[1] > MOST_CLASSES:
        return []
    return [torch.tensor([c], device=outputs.device) for c in range(outputs.shape[1])]


def order_as_granted(granted: Tensor | None, labels: Tensor | None, soft: Tensor | None) -> Tensor | None:
    """Return the order in which examples with these labels have the granted ones; None where they are others."""
    if granted is None or (labels is None and soft is None):
        return None
    if granted.is_floating_point():
        ours = soft
        if ours is None and labels is not None and granted.ndim == 2 and granted.shape[1] > 1:
            ours = torch.nn.functional.one_hot(labels, granted.shape[1])
        if ours is None or ours.numel() != granted.numel():
            return None
        from scipy.optimize import linear_sum_assignment  # Not at the top: it takes long to import.

        ours, theirs = ours.double().flatten(1).cpu(), granted.double().flatten(1).cpu()
        ours = ours.view_as(theirs) if ours.numel() == theirs.numel() else ours
        order = torch.as_tensor(linear_sum_assignment(torch.cdist(theirs, ours).numpy())[1])
        limit = max(_HARD if float(theirs.abs().max()) <= 1 else 0.0, _SAME * float(theirs.abs().max()))
        return order if float((ours[order] - theirs).abs().max()) <= limit else None
    if labels is None or labels.shape != granted.shape:
        return None
    granted, labels = granted.cpu(), labels.cpu()
    if not torch.equal(granted.flatten().sort().values, labels.flatten().sort().values) or granted.ndim > 1:
        return None
    return labels.argsort(stable=True)[granted.argsort(stable=True).argsort()]


def align(granted: Tensor | None, inputs: Tensor, labels: Tensor | None, soft: Tensor | None) -> tuple[Tensor, Labels]:
    """Return inputs (N, *shape) and labels in the order of the granted labels, where these are the same."""
    order = order_as_granted(granted, labels, soft)
    if order is None:
        return inputs, (labels, soft)
    order = order.to(inputs.device)
    return inputs[order], (None if labels is None else labels[order], None if soft is None else soft[order])


def _from_head(observation: Observation, inputs: Tensor, loss: CrossEntropy) -> Labels | None:
    """Return what the head's gradient says, None where it says nothing or is not explained."""
    gradient = observation.gradient
    if not (gradient.single and gradient.scaled) or observation.batch_size != len(inputs):
        return None
    try:
        head = find_head(observation.model, observation.params, tuple(observation.space.shape))
    except (NotApplicable, InvalidModel):
        return None
    if head is None or head.shared or len(inputs) > head.width + 1:
        return None
    with torch.no_grad():
        like = next(iter(observation.params.values()))
        features, logits = features_and_logits(observation.model, observation.params, inputs.to(like), head)
    gb = None if head.bias_name is None else gradient.tensors[head.bias_name]
    labels, misfit = solve_labels(features, logits, gradient.tensors[head.weight_name].flatten(1), gb, loss)
    if misfit > _EXPLAINED:
        return None
    # A scaled gradient looks like one of soft labels between the probabilities and the class; the class is meant.
    classes, hit = labels.shape[1], 1 - loss.label_smoothing
    share = loss.label_smoothing / classes
    p = torch.softmax(logits.double(), 1)
    seen = p - (hit * labels + share)
    whole = p[:, None] - (hit * torch.eye(classes).to(p) + share)  # (N, C, C): p − y of every class
    scale = (whole * seen[:, None]).sum(2) / whole.square().sum(2).clamp_min(1e-300)
    rest = (seen[:, None] - scale[..., None] * whole).norm(dim=2)
    rest = rest + (scale < 0) * 1e-6  # Two classes fit either sign.
    least = rest.min(1)
    if bool((least.values <= _MULTIPLE * seen.norm(dim=1) + 1e-6).all()):
        return least.indices, None
    # Labels are no negative shares.
    if float(labels.min()) < -_HARD:
        return None
    soft = labels.clamp_min(0)
    return labels.argmax(1), soft / soft.sum(1, keepdim=True)


def _best(observation: Observation, inputs: Tensor) -> Tensor | None:
    """Return the class (1,) under which the update points most nearly as the seen one does."""
    simulator = observation.simulator
    with torch.no_grad():
        outputs = simulator.outputs(inputs)
    loss = simulator.undefended.loss
    if not isinstance(outputs, Tensor) or target_kind(loss, outputs) is not TargetKind.CLASSES:
        return None
    # A loss that does not say how its targets look may take others than classes.
    least = -1.0 if hasattr(loss, "targets") else _LIKELY
    # Without the client's training, a weight delta has the opposite sign.
    return try_classes(simulator, inputs, observation.update.tensors, signed=simulator.known, least=least)


def _from_gradient(observation: Observation, inputs: Tensor) -> Labels:
    """Return what the whole gradient says about the targets of any loss that is affine in them."""
    gradient, loss = observation.gradient, observation.simulator.undefended.loss
    if not gradient.single or observation.batch_size not in (None, len(inputs)):
        return None, None
    targets = fit_targets(observation.simulator, inputs, gradient.tensors, scaled=gradient.scaled)
    if targets is None:
        return None, None
    kind = target_kind(loss, targets)
    guessed = not hasattr(loss, "targets") and float((targets.sum(1) - 1).abs().max()) > _HARD
    if kind is TargetKind.VALUES or guessed:
        return None, targets
    if kind is TargetKind.BINARY:
        near = targets.round().clamp(0, 1)
        return None, near if float((near - targets).abs().max()) <= _HARD else targets
    if targets.ndim == 2:
        hard = targets.argmax(1)
        if float((torch.nn.functional.one_hot(hard, targets.shape[1]) - targets).abs().max()) <= _HARD:
            return hard, None
    if float(targets.min()) < -_HARD:
        return None, None
    return None, targets
