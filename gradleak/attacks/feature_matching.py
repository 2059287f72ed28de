"""Matching with one feature target per example: a batch becomes one problem without permutation or head."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradleak.analytic.disaggregate import EXACT
from gradleak.analytic.head import Head, find_head
from gradleak.attacks.base import Attack, Callback
from gradleak.attacks.disaggregation import FeatureDisaggregation
from gradleak.attacks.matching import LBFGS, GradientMatching
from gradleak.attacks.matching.coordinates import NaturalImages
from gradleak.errors import NotApplicable
from gradleak.threat import Knowledge, Observation
from gradleak.training import CrossEntropy, LocalTraining, Loss, Tensors, soft_labels
from gradleak.types import Reconstruction, Update, UpdateKind

__all__ = ["FeatureMatching", "feature_matching"]

FEATURES = "features of the head"
"""Name under which the features stand beside the gradients; no parameter can have it."""


@final
@dataclass(frozen=True, eq=False)
class FeatureGradient(LocalTraining):
    """What remains of FedSGD once every example's features h_i and logit gradients d_i are known.

    The head drops out: the body's gradient is Σ_i (∂φ(x_i)/∂θ)ᵀ Wᵀ d_i with known cotangents Wᵀ d_i, and φ(x_i) = h_i.
    Neither couples examples through a softmax, and example i can only be explained by x_i.

    Attributes:
        cotangents: (N, d) gradients of the client's loss with respect to the features.
        weight: multiplies the features, which puts both kinds of equation on one scale.

    """

    cotangents: Tensor
    weight: float
    loss: Loss = field(default_factory=CrossEntropy)

    @property
    def kind(self) -> UpdateKind:
        """A gradient."""
        return UpdateKind.GRADIENT

    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the body's gradient and the weighted features; ``model`` ends where the head began."""

        def features(p: Tensors) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(model, {**p, **(buffers or {})}, (inputs,))

        found, pull, *_ = vjp(features, dict(params))
        (gradient,) = pull(self.cotangents.to(found))
        return {**gradient, FEATURES: self.weight * found}, {}

    def tensors(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, *, buffers: Tensors | None = None
    ) -> dict[str, Tensor]:
        """Return the body's gradient and the weighted features, by name."""
        return self.run(model, params, inputs, labels, buffers)[0]


def decouple(observation: Observation, head: Head, features: Tensor, labels: Tensor, weight: float) -> Observation:
    """Return the observation of the body alone, with known features (N, d) and labels (N,) of every example.

    Args:
        observation: of one gradient of softmax cross-entropy.
        head: the classification head, whose input is the body's output.
        features: (N, d), exact.
        labels: (N,) class indices.
        weight: of the feature equations relative to the gradient equations, both taken with unit norm.

    """
    training = observation.training
    assert training is not None and isinstance(training.loss, CrossEntropy)
    loss = training.loss
    logits = head.logits(features)
    targets = soft_labels(labels, head.classes, features.dtype)
    targets = targets * (1 - loss.label_smoothing) + loss.label_smoothing / head.classes
    scale = 1 / len(labels) if loss.reduction == "mean" else 1.0
    cotangents = scale * (logits.softmax(-1) - targets) @ head.weight.to(features)
    body = {k: v for k, v in observation.update.tensors.items() if k not in (head.weight_name, head.bias_name)}
    size = torch.stack([v.double().square().sum() for v in body.values()]).sum().sqrt()
    spread = (features - features.mean(0)).norm() if len(labels) > 1 else features.norm()
    factor = float(weight * size / spread)
    model = copy.deepcopy(observation.model)
    parent, _, name = head.module.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    update = Update({**body, FEATURES: (factor * features).to(next(iter(body.values())).device)})
    return replace(
        observation,
        model=model,
        update=update,
        training=FeatureGradient(cotangents, factor),
        labels=torch.zeros_like(labels),  # The body knows no classes, and its outputs may be fewer.
    )


@final
@dataclass(frozen=True)
class FeatureMatching(Attack):
    """Disaggregates the head, then matches body and features; made by :func:`feature_matching`.

    Attributes:
        separate: finds features and labels.
        match: searches the inputs.
        weight: of the feature equations against the gradient equations.

    """

    separate: FeatureDisaggregation
    match: GradientMatching
    weight: float = 0.2

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        separated = [self.separate.reconstruct(o, seed=seed) for o in observations]
        reduced = [self._reduce(o, found) for o, found in zip(observations, separated, strict=True)]
        results = self.match.reconstruct_all(reduced, seed=seed, callback=callback)
        return [
            replace(
                result,
                features=found.features,
                labels=found.labels,
                label_probabilities=None,
                notes=(*found.notes[:1], *result.notes),
            )
            for result, found in zip(results, separated, strict=True)
        ]

    def _reduce(self, observation: Observation, found: Reconstruction) -> Observation:
        verdicts = found.certificate.examples if found.certificate is not None else ()
        if any(v != EXACT for v in verdicts) or found.features is None or found.labels is None:
            raise NotApplicable(
                f"Only {sum(v == EXACT for v in verdicts)} of {len(verdicts)} examples have proved features "
                "(classes that repeat in a batch may not show theirs); use dlg()."
            )
        if observation.update.kind is not UpdateKind.GRADIENT:
            raise NotApplicable("Feature matching needs one gradient, not a weight delta; use dlg(), which unrolls.")
        head = find_head(observation.model, observation.params, tuple(observation.space.shape))
        assert head is not None  # Or the disaggregation would not have applied.
        return decouple(observation, head, found.features.double(), found.labels, self.weight)


def feature_matching(
    *, iterations: int = 10000, restarts: int = 1, weight: float = 0.2, tolerance: float = 1e-13, trace: bool = True
) -> FeatureMatching:
    """Separate the batch at the head first, then match one feature target per example beside the body's gradient.

    With exact features and logit gradients the head drops out of the problem: no softmax couples the examples, their
    order is fixed, and every example has its own target. The rest is squared-error matching as in :func:`dlg`, in its
    coordinates and for smooth models; published relative: gradient inversion with embeddings (GIE, ICME 2024).

    Args:
        iterations: evaluations of the objective's gradient per candidate.
        restarts: independent starts, chosen by the objective.
        weight: of the feature equations against the gradient equations, both taken with unit norm.
        tolerance: relative squared distance at which a candidate is done.
        trace: record iterates for the report.

    """
    match = GradientMatching(
        solver=LBFGS(iterations=iterations),
        init_std=0.05,
        coordinates=NaturalImages(),
        restarts=restarts,
        tolerance=tolerance,
        warm_dtype=torch.float32,
        trace=trace,
    )
    return FeatureMatching(FeatureDisaggregation(), match, weight)
