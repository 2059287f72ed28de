"""What the head and the layers before it show of a batch, for the attacks that build on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradleak.analytic.disaggregate import EXACT
from gradleak.analytic.graph import Chain, trace_chain
from gradleak.analytic.head import Head, find_head
from gradleak.analytic.peel import Peeled, obstacle, peel
from gradleak.attacks.disaggregation import FeatureDisaggregation, one_gradient
from gradleak.errors import NotApplicable
from gradleak.threat import Observation
from gradleak.training import CrossEntropy, soft_labels
from gradleak.types import Reconstruction

__all__ = ["Separated", "check_batch", "separate_batch"]


@final
@dataclass(frozen=True, eq=False)
class Separated:
    """A batch whose examples are known apart.

    Attributes:
        found: features and labels, all exact.
        head: the classification head.
        gradient: of all parameters that were shared, in the scale of a gradient.
        cotangents: (N, d) gradients of the client's loss with respect to the features.
        chain: the layers from the input to the head, None where the model is not such a chain.
        peeled: what these show, None without a chain.

    """

    found: Reconstruction
    head: Head
    gradient: Mapping[str, Tensor]
    cotangents: Tensor
    chain: Chain | None
    peeled: Peeled | None

    @property
    def complete(self) -> bool:
        """Whether every layer was peeled, so that the inputs themselves are known."""
        return self.peeled is not None and self.peeled.index == 0 and self.peeled.stop is None


def separate_batch(observation: Observation, separate: FeatureDisaggregation, *, seed: int = 0) -> Separated:
    """Separate the examples at the head, and peel the layers before it that their gradients determine.

    Raises:
        NotApplicable: some example's features are not proved, or the update is not one gradient of cross-entropy.

    """
    found = separate.reconstruct(observation, seed=seed)
    verdicts = found.certificate.examples if found.certificate is not None else ()
    if any(v != EXACT for v in verdicts) or found.features is None or found.labels is None:
        raise NotApplicable(
            f"Only {sum(v == EXACT for v in verdicts)} of {len(verdicts)} examples have proved features "
            "(classes that repeat in a batch may not show theirs); use dlg()."
        )
    training = observation.training
    assert training is not None and isinstance(training.loss, CrossEntropy)
    loss, shape = training.loss, tuple(observation.space.shape)
    head = find_head(observation.model, observation.params, shape)
    assert head is not None  # Or the disaggregation would not have applied.
    gradient = one_gradient(observation, list(observation.update.tensors))
    features = found.features.double()
    targets = soft_labels(found.labels, head.classes, features.dtype).to(features)
    targets = targets * (1 - loss.label_smoothing) + loss.label_smoothing / head.classes
    scale = 1 / len(features) if loss.reduction == "mean" else 1.0
    cotangents = scale * (head.logits(features).softmax(-1) - targets) @ head.weight.to(features)
    chain = _chain(observation, head)
    if chain is not None and chain.stop is not None:
        chain = None  # What leads from the input to the chain's beginning is not known as steps.
    peeled = None if chain is None else peel(chain, _params(observation), gradient, features, cotangents)
    return Separated(found, head, gradient, cotangents, chain, peeled)


def check_batch(observation: Observation) -> None:
    """Check that counting does not exclude that all layers of a batch can be solved backward.

    Raises:
        NotApplicable: it does, or the model has no such layers.

    """
    shape = tuple(observation.space.shape)
    head = find_head(observation.model, observation.params, shape)
    if head is None or observation.batch_size is None:
        raise NotApplicable("The recursion of a batch starts at a linear layer as the model's output; use matching.")
    chain = trace_chain(observation.model, shape, anchor=head.weight_name)
    reason = obstacle(chain, _params(observation), observation.update.tensors, observation.batch_size)
    if reason is not None:
        raise NotApplicable(f"The recursion of {observation.batch_size} examples stops: {reason}; use matching.")


def _chain(observation: Observation, head: Head) -> Chain | None:
    try:
        return trace_chain(observation.model, tuple(observation.space.shape), anchor=head.weight_name)
    except NotApplicable:
        return None


def _params(observation: Observation) -> dict[str, Tensor]:
    return {k: p.detach() for k, p in observation.model.named_parameters()}
