"""What the head and the layers before it show of a batch, for the attacks that build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.disaggregation import FeatureDisaggregation
from gradleak.errors import NotApplicable
from gradleak.exact.backward import Walked, walk_back
from gradleak.exact.counting import obstacle
from gradleak.exact.layer_iterative import Known
from gradleak.structure.chain import Chain
from gradleak.structure.head import Head, find_head
from gradleak.structure.reader import trace_chain
from gradleak.threat import Observation
from gradleak.types import Reconstruction

__all__ = ["Separated", "separate_batch"]

_ACCUMULATED = 16.0
"""Error of separated features, in rounding units of their size."""


@final
@dataclass(frozen=True, eq=False)
class Separated:
    """A batch whose examples are known apart: features and labels in ``found``, all exact.

    Attributes:
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
    peeled: Walked | None

    @property
    def complete(self) -> bool:
        """Whether every layer was peeled, so that the inputs themselves are known."""
        return self.peeled is not None and self.peeled.stop is None


def separate_batch(
    observation: Observation,
    separate: FeatureDisaggregation,
    *,
    seed: int = 0,
    whole: bool = False,
    going: Callable[[], bool] | None = None,
) -> Separated:
    """Separate the examples at the head, and peel the layers before it that their equations determine.

    ``whole`` refuses, before anything is solved, where counting excludes that all layers are peeled; ``going`` says
    whether to go on, asked where a layer takes long.

    Raises:
        NotApplicable: some example's features are not proved, the update is not one gradient of cross-entropy, or
            ``going`` said no.
    """
    head = find_head(observation.model, observation.params, tuple(observation.space.shape))
    params = {k: p.detach() for k, p in observation.model.named_parameters()}
    chain = _chain(observation, head, params, whole=whole)
    found = separate.reconstruct(observation, seed=seed)
    if found.solved is None or not bool(found.solved.all()) or found.features is None or found.labels is None:
        sure = 0 if found.solved is None else int(found.solved.sum())
        raise NotApplicable(
            f"Only {sure} of {len(found)} examples have proved features "
            "(classes that repeat in a batch may not show theirs); use dlg()."
        )
    assert head is not None and observation.training is not None  # Or the disaggregation would not have applied.
    gradient = observation.gradient.require_single()
    features = found.features.double()
    loss, labels = observation.training.loss, found.labels

    def pull(features: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = features.clone().requires_grad_()
            return torch.autograd.grad(loss(head.logits(leaf), labels), leaf)[0]

    cotangents, peeled = pull(features), None
    if chain is not None:
        noise = max(torch.finfo(t.dtype).eps for t in observation.update.tensors.values())
        deviation = _ACCUMULATED * noise * float(features.square().mean().sqrt())
        known = Known.plain(features, cotangents, deviation, torch.Generator().manual_seed(seed))
        known = replace(known, slips=torch.stack([pull(features + e) - cotangents for e in known.errors]))
        peeled = walk_back(chain, params, gradient, known, noise, seed=seed, going=going)
    return Separated(found, head, gradient, cotangents, chain, peeled)


def _chain(observation: Observation, head: Head | None, params: Mapping[str, Tensor], *, whole: bool) -> Chain | None:
    """Return the layers from the input to the head, None where the model is not such a chain."""
    if head is None:
        if whole:
            raise NotApplicable(
                "The recursion of a batch starts at a linear layer as the model's output; use matching."
            )
        return None
    try:
        chain = trace_chain(observation.model, tuple(observation.space.shape), anchor=head.weight_name)
    except NotApplicable:
        if whole:
            raise
        return None
    if whole:
        assert observation.batch_size is not None
        reason = obstacle(chain, params, observation.update.tensors, observation.batch_size)
        if reason is not None:
            raise NotApplicable(f"The recursion of {observation.batch_size} examples stops: {reason}; use matching.")
    # What leads from the input to the beginning of a chain that stops earlier is not known as steps.
    return chain if chain.stop is None else None
