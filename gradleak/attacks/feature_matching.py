"""Matching with one feature target per example: a batch becomes one problem without permutation or head."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradleak.attacks.base import Attack, Callback
from gradleak.attacks.disaggregation import FeatureDisaggregation
from gradleak.attacks.matching import LBFGS, GradientMatching
from gradleak.attacks.matching.coordinates import NaturalImages
from gradleak.attacks.peeling import Separated, separate_batch
from gradleak.attacks.recursion import solved
from gradleak.clock import Deadline
from gradleak.errors import NotApplicable
from gradleak.structure.chain import Affine, Step
from gradleak.threat import Knowledge, Observation
from gradleak.training import CrossEntropy, LocalTraining, Loss, Tensors
from gradleak.types import Note, Reconstruction, Update, UpdateKind

__all__ = ["FeatureMatching", "feature_matching"]

FEATURES = "features of the head"
"""Name under which the features stand beside the gradients; no parameter can have it."""


@final
@dataclass(frozen=True, eq=False)
class FeatureGradient(LocalTraining):
    """What remains of FedSGD once every example's features h_i and logit gradients d_i are known.

    The head drops out: the body's gradient is Σ_i (∂φ(x_i)/∂θ)ᵀ Wᵀ d_i with known ``cotangents`` Wᵀ d_i (N, d), and
    φ(x_i) = h_i. Neither couples examples through a softmax, and example i can only be explained by x_i. Layers before
    the head that were peeled drop out in the same way; then φ ends before them. ``weight`` multiplies the features,
    which puts both kinds of equation on one scale; ``steps`` are the layers of φ, None where it is the whole model that
    is given.
    """

    cotangents: Tensor
    weight: float
    steps: tuple[Step, ...] | None = None
    loss: Loss = field(default_factory=CrossEntropy)

    kind = UpdateKind.GRADIENT

    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the body's gradient and the weighted features; without steps, ``model`` ends where the head began."""

        def features(p: Tensors) -> Tensor:
            if self.steps is None:
                with sdpa_kernel(SDPBackend.MATH):
                    return functional_call(model, {**p, **(buffers or {})}, (inputs,))
            x = inputs
            for step in self.steps:
                x = step.forward(x, {**frozen, **p}).to(inputs.dtype)
            return x.flatten(1)

        wanted = dict(params)
        if self.steps is not None:
            used = {n for s in self.steps if isinstance(s, Affine) for n in (s.weight_name, s.bias_name)}
            wanted = {k: v for k, v in params.items() if k in used}
        frozen = {k: v.detach().to(inputs.dtype) for k, v in model.named_parameters() if k not in wanted}
        found, pull, *_ = vjp(features, wanted)
        (gradient,) = pull(self.cotangents.to(found))
        return {**gradient, FEATURES: self.weight * found}, {}


def decouple(observation: Observation, separated: Separated, weight: float) -> Observation:
    """Return the observation of what is left of the model, with one known target per example.

    ``weight`` is that of the target equations relative to the gradient equations, both taken with unit norm.
    """
    found, head, peeled = separated.found, separated.head, separated.peeled
    assert found.features is not None and found.labels is not None
    targets, cotangents, steps = found.features.double(), separated.cotangents, None
    body = {k: v for k, v in separated.gradient.items() if k not in (head.weight_name, head.bias_name)}
    model = observation.model
    if separated.chain is not None and peeled is not None and peeled.index < len(separated.chain.steps):
        targets, cotangents = peeled.known.values, peeled.known.pull
        steps = separated.chain.steps[: peeled.index]
        left = {n for s in steps if isinstance(s, Affine) for n in (s.weight_name, s.bias_name)}
        body = {k: v for k, v in body.items() if k in left}
    else:
        model = copy.deepcopy(model)
        parent, _, name = head.module.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    size = torch.stack([v.double().square().sum() for v in body.values()]).sum().sqrt()
    spread = (targets - targets.mean(0)).norm() if len(targets) > 1 else targets.norm()
    factor = float(weight * size / spread)
    update = Update({**body, FEATURES: (factor * targets).to(next(iter(body.values())))})
    return replace(
        observation,
        model=model,
        update=update,
        training=FeatureGradient(cotangents, factor, steps),
        labels=torch.zeros_like(found.labels),  # The body knows no classes, and its outputs may be fewer.
    )


@final
@dataclass(frozen=True)
class FeatureMatching(Attack):
    """Disaggregates the head, then matches body and features; made by :func:`feature_matching`.

    The budget of ``match`` covers the separation as well.
    """

    separate: FeatureDisaggregation
    match: GradientMatching
    weight: float = 0.2

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        deadline = Deadline(self.match.budget)
        separated = []
        for observation in observations:
            separated.append(separate_batch(observation, self.separate, seed=seed))
            if observation.update.kind is not UpdateKind.GRADIENT:
                why = "Feature matching needs one gradient, not a weight delta; use dlg(), which unrolls."
                raise NotApplicable(why)
        results = [solved(o, s) if s.complete else None for o, s in zip(observations, separated, strict=True)]
        rest = [i for i, found in enumerate(results) if found is None]
        reduced = [decouple(observations[i], separated[i], self.weight) for i in rest]
        # At least a moment, so that every example is searched at all.
        match = replace(self.match, budget=None if self.match.budget is None else max(deadline.left(), 1e-3))
        matched = match._reconstruct(reduced, seed, callback) if rest else []
        for i, result in zip(rest, matched, strict=True):
            s = separated[i]
            layers = () if s.peeled is None else s.peeled.layers
            results[i] = replace(
                result,
                features=s.found.features,
                labels=s.found.labels,
                label_probabilities=None,
                notes=(*s.found.notes, *(Note(str(r)) for r in layers), *result.notes),
            )
        return [found for found in results if found is not None]


def feature_matching(
    *,
    iterations: int = 10000,
    restarts: int = 1,
    weight: float = 0.2,
    tolerance: float = 1e-13,
    budget: float | None = None,
    trace: bool = True,
) -> FeatureMatching:
    """Separate the batch at the head first, then match one feature target per example beside the body's gradient.

    With exact features and logit gradients the head drops out of the problem: no softmax couples the examples, their
    order is fixed, and every example has its own target. So do the layers before it whose inputs their own equations
    determine for all examples (:mod:`gradleak.exact.backward`); where that leads to the first layer nothing is left to
    match. The rest is squared-error matching as in :func:`dlg`, in its coordinates and for smooth models; published
    relative: gradient inversion with embeddings (GIE, ICME 2024).

    ``weight`` is that of the feature equations against the gradient equations, both taken with unit norm; the other
    options are those of :func:`dlg`.
    """
    match = GradientMatching(
        solver=LBFGS(iterations=iterations),
        init_std=0.05,
        coordinates=NaturalImages(),
        restarts=restarts,
        tolerance=tolerance,
        warm_dtype=torch.float32,
        budget=budget,
        trace=trace,
    )
    return FeatureMatching(FeatureDisaggregation(), match, weight)
