"""Labels of examples whose inputs are known, for attacks that solve the inputs without them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import functional_call

from gradleak.attacks.disaggregation import one_gradient
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.exact.labels import solve_labels
from gradleak.structure.head import features_and_logits, find_head
from gradleak.structure.probe import probe_inputs, run_quietly
from gradleak.threat import Observation
from gradleak.training import CrossEntropy, FedSGD, check_reproducible

__all__ = ["aligned", "distance", "hides_mixtures", "read_labels"]

_MOST_CLASSES = 256
"""Up to so many classes, the label of one example is found by trying all of them."""
_HARD = 0.05
"""Largest distance of a solved label from a class that is still taken for rounding."""
_MULTIPLE = 0.01
"""Relative distance at which p − y counts as a multiple of that of one class."""
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
    found = _solved(observation, inputs)
    if found is not None:
        return found
    return (_best(observation, inputs), None) if len(inputs) == 1 else (None, None)


def aligned(granted: Tensor | None, labels: Tensor, soft: Tensor | None) -> Tensor | None:
    """Return the order in which examples with these labels have the granted ones; None where they are others."""
    if granted is None:
        return None
    if granted.is_floating_point():
        ours = soft if soft is not None else torch.nn.functional.one_hot(labels, granted.shape[1])
        if ours.shape != granted.shape:
            return None
        from scipy.optimize import linear_sum_assignment  # Not at the top: it takes long to import.

        costs = torch.cdist(granted.double(), ours.double()).cpu().numpy()
        order = torch.as_tensor(linear_sum_assignment(costs)[1]).to(labels.device)
        return order if float((ours[order].to(granted) - granted).abs().max()) <= _HARD else None
    if not torch.equal(granted.sort().values, labels.sort().values):
        return None
    return labels.argsort(stable=True)[granted.argsort(stable=True).argsort()]


def _solved(observation: Observation, inputs: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return what the head's gradient says, None where it says nothing or is not explained."""
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
    loss = training.loss
    labels, misfit = solve_labels(features, logits, seen[head.weight_name].flatten(1), gb, loss)
    if misfit > _EXPLAINED:
        return None
    # A scaled gradient looks like one of soft labels between the probabilities and the class; the class is meant.
    classes, hit = labels.shape[1], 1 - loss.label_smoothing
    share = loss.label_smoothing / classes
    p = torch.softmax(logits.double(), 1)
    seen_difference = p - (hit * labels + share)
    whole = p[:, None] - (hit * torch.eye(classes).to(p) + share)  # (N, C, C): p − y of every class
    scale = (whole * seen_difference[:, None]).sum(2) / whole.square().sum(2).clamp_min(1e-300)
    rest = (seen_difference[:, None] - scale[..., None] * whole).norm(dim=2)
    rest = rest + (scale < 0) * 1e-6  # Two classes fit either sign.
    least = rest.min(1)
    if bool((least.values <= _MULTIPLE * seen_difference.norm(dim=1) + 1e-6).all()):
        return least.indices, None
    # Labels are no negative shares.
    if float(labels.min()) < -_HARD:
        return None
    soft = labels.clamp_min(0)
    return labels.argmax(1), soft / soft.sum(1, keepdim=True)


def _best(observation: Observation, inputs: Tensor) -> Tensor | None:
    """Return the label (1,) of one example under which the update points most nearly as the seen one does."""
    training = FedSGD() if observation.training is None else observation.training.undefended
    if not isinstance(training.loss, CrossEntropy):
        return None
    model, seen = observation.model, observation.update.tensors
    check_reproducible(model)
    own = next(iter(observation.params.values()))
    x = inputs.to(own)
    with torch.no_grad():
        outputs = functional_call(model, {}, (x,))
    classes = int(outputs.shape[-1])
    if outputs.ndim != 2 or not 1 < classes <= _MOST_CLASSES:
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


def hides_mixtures(observation: Observation, db: Tensor) -> bool:
    """Tell whether several examples may give an outer product of bias gradient ``db``: one live output, or two classes.

    With two classes all gradients at the logits are multiples of (1, −1), and so are those before, where activations
    have the same slopes for all.
    """
    if int((db != 0).sum()) < 2:
        return True
    like = next(iter(observation.params.values()))
    with torch.no_grad():
        probe = probe_inputs(tuple(observation.space.shape), 2, like)
        outputs = run_quietly(observation.model, observation.params, probe)
    return outputs.shape[-1] <= 2


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
