"""Labels of examples whose inputs are known, for attacks that solve the inputs without them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import functional_call

from gradleak.analytic.head import features_and_logits, find_head
from gradleak.analytic.labels import solve_labels
from gradleak.attacks.disaggregation import one_gradient
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.threat import Observation
from gradleak.training import CrossEntropy, FedSGD, check_reproducible

__all__ = ["distance", "read_labels"]

_MOST_CLASSES = 256
"""Up to so many classes, the label of one example is found by trying all of them."""
_HARD = 0.05
"""Largest distance of a solved label from a class that is still taken for rounding."""
_EXPLAINED = 0.01
"""Share of the head's gradient that solved labels may leave unexplained."""


def read_labels(observation: Observation, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return class indices (N,) of model inputs (N, *shape), and probabilities (N, C) where those are not 0 and 1.

    The head's gradient is linear in p − y and p is known, so y follows by least squares, with label smoothing and soft
    labels too; where the update is not one gradient, the label of one example is the one whose update points most
    nearly as the seen one does. Both are None where nothing says it.

    Raises:
        InvalidModel: the client cannot be simulated.

    """
    solved = _solved(observation, inputs)
    if solved is not None:
        hard = solved.argmax(1)
        if float((solved - torch.nn.functional.one_hot(hard, solved.shape[1])).abs().max()) <= _HARD:
            return hard, None
        soft = solved.clamp_min(0)
        return hard, soft / soft.sum(1, keepdim=True)
    return (_best(observation, inputs), None) if len(inputs) == 1 else (None, None)


def _solved(observation: Observation, inputs: Tensor) -> Tensor | None:
    """Return what the head's gradient says (N, C), None where it says nothing or is not explained."""
    training = observation.training
    if training is None or training is not training.undefended or not isinstance(training.loss, CrossEntropy):
        return None
    try:
        head = find_head(observation.model, observation.params, tuple(observation.space.shape))
        if head is None or head.shared or len(inputs) > head.width + 1:
            return None
        names = [n for n in (head.weight_name, head.bias_name) if n is not None]
        seen = one_gradient(observation, names) if observation.batch_size == len(inputs) else {}
    except (NotApplicable, InvalidModel):
        return None
    if not seen:
        return None
    with torch.no_grad():
        like = next(iter(observation.params.values()))
        features, logits = features_and_logits(observation.model, observation.params, inputs.to(like), head)
    gb = None if head.bias_name is None else seen[head.bias_name]
    labels, misfit = solve_labels(features, logits, seen[head.weight_name].flatten(1), gb, training.loss)
    # Labels are no negative shares; an update of the opposite sign would take some.
    return labels if misfit <= _EXPLAINED and float(labels.min()) >= -_HARD else None


def _best(observation: Observation, inputs: Tensor) -> Tensor | None:
    """Return the label (1,) of one example under which the update points most nearly as the seen one does."""
    training = FedSGD() if observation.training is None else observation.training.undefended
    model, seen = observation.model, observation.update.tensors
    check_reproducible(model)
    own = next(iter(observation.params.values()))
    x = inputs.to(own)
    with torch.no_grad():
        classes = int(functional_call(model, {}, (x,)).shape[-1])
    if classes > _MOST_CLASSES:
        return None
    target = torch.cat([t.flatten() for t in seen.values()]).to(own)
    scores = []
    for label in range(classes):
        y = torch.tensor([label], device=own.device)
        found = training.tensors(model, observation.params, x, y, buffers=dict(model.named_buffers()))
        ours = torch.cat([found[k].flatten() for k in seen])
        cosine = float(ours @ target / (ours.norm() * target.norm()).clamp(min=1e-30))
        # Without the client's training, a weight delta has the opposite sign.
        scores.append(abs(cosine) if observation.training is None else cosine)
    return torch.tensor([max(range(classes), key=scores.__getitem__)])


def distance(observation: Observation, inputs: Tensor, labels: Tensor) -> float:
    """Return the relative distance of the update re-simulated at model inputs (N, *shape), in float64, to the seen one.

    Labels are class indices (N,) or probabilities (N, C); the client's training must be known.
    """
    assert observation.training is not None
    params = {k: p.double() for k, p in observation.params.items()}
    buffers = {k: b.double() if b.is_floating_point() else b for k, b in observation.model.named_buffers()}
    x, y = inputs.double(), labels.double() if labels.is_floating_point() else labels
    ours = observation.training.undefended.tensors(observation.model, params, x, y, buffers=buffers)
    seen = observation.update.tensors
    rest = sum(float((ours[k].double() - t.double()).square().sum()) for k, t in seen.items())
    return math.sqrt(rest / sum(float(t.double().square().sum()) for t in seen.values()))
