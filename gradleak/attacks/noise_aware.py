"""The attacker who knows how large the noise of a defense is, and weighs the update against a prior accordingly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback
from gradleak.attacks.least_squares import is_smooth
from gradleak.attacks.matching import (
    LBFGS,
    GradientMatching,
    NaturalImages,
    SquaredError,
    TotalVariation,
    prior_matching,
)
from gradleak.attacks.recursion import recursion
from gradleak.errors import InvalidInput, InvalidModel, NotApplicable, ResourceLimit
from gradleak.spaces import ImageSpace
from gradleak.structure.head import find_head
from gradleak.threat import Knowledge, Observation
from gradleak.training.simulate import cast
from gradleak.types import Note, Reconstruction, Status, Update

__all__ = ["NoiseAware", "noise_aware", "noise_share"]

_EDGE = 0.056
"""Mean absolute difference of neighboring pixels in photographs of 32 × 32 (the CIFAR-100 training images)."""
_CALM = 0.3
"""Share of that weight which is used: in full it smooths too much. Chosen on one CIFAR-100 training image."""


def noise_share(observation: Observation) -> float:
    """Return the share of the update's squared norm that known defenses hide, by noise or by limits, in [0, 1]."""
    training = observation.training
    if training is None or not observation.simulator.defended:
        return 0.0
    seen = observation.update.tensors
    spread = training.deviation(seen)
    noise = sum(float(torch.where(torch.isfinite(d), d, seen[k]).square().sum()) for k, d in spread.items())
    return min(1.0, noise / max(sum(float(t.square().sum()) for t in seen.values()), 1e-300))


@final
@dataclass(frozen=True)
class NoiseAware(Attack):
    """Solves the layers of a cleaned update, and searches with the prior that the noise implies.

    Made by :func:`noise_aware`, which says its options.
    """

    iterations: int = 400
    restarts: int = 1

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING | Knowledge.DEFENSE

    def __post_init__(self) -> None:
        if min(self.iterations, self.restarts) < 1:
            raise InvalidInput(
                f"noise_aware cannot use iterations={self.iterations} with restarts={self.restarts}; give at least 1."
            )

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        share = noise_share(observation)
        if share == 0:
            raise NotApplicable("No stated defense adds noise or hides numbers, so there is none to weigh; use auto().")
        weight = _prior_weight(share, observation) if isinstance(observation.space, ImageSpace) else 0.0
        found: list[Reconstruction] = []
        if observation.batch_size == 1:
            try:
                cleaned = replace(observation, update=_outer_product_head(observation))
                found.append(recursion().reconstruct(cleaned, seed=seed, callback=callback))
            except (InvalidModel, NotApplicable, ResourceLimit):
                pass
        training = observation.training
        assert training is not None  # granted: ``requires``
        plain = replace(observation, training=training.undefended)
        # Rounding leaves cells, whose centers are better than their nearest points: that is the plain search.
        for seen in (observation,) if _adds(observation) else (observation, plain):
            found.append(self._search(seen, weight).reconstruct(seen, seed=seed, callback=callback))
        costs = [_cost(observation, f, weight) for f in found]
        best = found[costs.index(min(costs))]
        note = Note(f"The stated defense explains {share:.2g} of the update's energy; the prior weighs {weight:.1e}.")
        # What was solved was solved from a cleaned update: its equations hold up to the noise only.
        return replace(
            best,
            status=Status.CONVERGED if best.status is Status.EXACT else best.status,
            notes=(*best.notes, note),
            evaluations=sum(f.evaluations for f in found),
            construction=None,
            solved=None,
            certificate=None,
        )

    def _search(self, observation: Observation, weight: float) -> GradientMatching:
        if not is_smooth(observation.model, tuple(observation.space.shape)):
            return prior_matching(iterations=self.iterations, restarts=self.restarts, trace=False)
        priors = (TotalVariation(weight),) if weight > 0 else ()
        return GradientMatching(
            SquaredError(),
            LBFGS(iterations=self.iterations),
            priors,
            labels="joint",
            restarts=self.restarts,
            coordinates=NaturalImages(),
            init_std=0.05,
            trace=False,
        )


def _adds(observation: Observation) -> bool:
    """Tell whether the defense does nothing but add noise, so that knowing it changes no residual."""
    seen = observation.update.tensors
    left = observation.simulator.residual({k: 2 * t for k, t in seen.items()}, seen)
    return all(torch.equal(left[k], t) for k, t in seen.items())


def _prior_weight(share: float, observation: Observation) -> float:
    """Return the weight of total variation beside the relative squared distance that the noise level implies.

    −log posterior = ‖∇W′ − ∇W‖² / 2σ² + Σ|neighbor differences| / edge, times 2σ² / ‖∇W‖².
    """
    coordinates = sum(t.numel() for t in observation.update.tensors.values())
    values = (observation.batch_size or 1) * math.prod(observation.space.shape)
    return _CALM * 2 * share / coordinates * values / _EDGE


def _outer_product_head(observation: Observation) -> Update:
    """Return the update with the head's gradient replaced by the nearest outer product (Eckart and Young 1936).

    One example's gradient of weight and bias is g ⊗ (h, 1): all else in there is the defense's.

    Raises:
        NotApplicable: the model has no linear head with a bias of its own.
    """
    tensors = observation.update.tensors
    head = find_head(observation.model, observation.params, tuple(observation.space.shape))
    if head is None or head.bias_name is None or head.shared:
        raise NotApplicable("The model has no linear head with a bias, whose gradient could be cleaned; use matching.")
    weight, bias = head.gradients(tensors)
    assert bias is not None  # It has a name.
    left, size, right = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1), full_matrices=False)
    if not float(right[0, -1].abs()) > 0:
        raise NotApplicable("The head's bias gradient is lost in the noise; use matching.")
    g, h = left[:, 0] * size[0] * right[0, -1], right[0, :-1] / right[0, -1]
    like = tensors[head.weight_name]
    cleaned = {head.weight_name: torch.outer(g, h).reshape(like.shape).to(like), head.bias_name: g.to(like)}
    return replace(observation.update, tensors={**tensors, **cleaned})


def _cost(observation: Observation, found: Reconstruction, weight: float) -> float:
    """Return what the defense leaves unexplained, relative, plus the prior: −log posterior up to a factor."""
    labels: Tensor | None = found.labels if found.label_probabilities is None else found.label_probabilities
    if labels is None or not bool(torch.isfinite(found.inputs).all()):
        return math.inf
    inputs = observation.space.encode(found.inputs.double())
    training, seen = observation.training, cast(observation.update.tensors, torch.float64)
    assert training is not None  # granted: ``requires``
    with torch.no_grad():
        ours = observation.simulator.update(inputs, labels)
    # Where every number has a spread, errors are spread about its center; else what was sent as it was must fit.
    spread = all(bool(((d > 0) & torch.isfinite(d)).all()) for d in training.deviation(seen).values())
    left = (training.centered if spread else training.residual)({k: ours[k] for k in seen}, seen)
    total = sum(float(t.square().sum()) for t in seen.values())
    return sum(float(t.square().sum()) for t in left.values()) / total + float(TotalVariation(weight)(inputs))


def noise_aware(*, iterations: int = 400, restarts: int = 1) -> NoiseAware:
    """Attack noised, pruned and quantized updates as one who knows the defense: clean, solve, search with a prior.

    One example's head gradient is an outer product whatever was added to it, so the nearest one takes most of the noise
    away; the layers are solved backward from there. Matching follows, on what the defense leaves to be explained, with
    the weight of total variation that the noise implies (on smooth models; elsewhere the relative prior of
    :func:`prior_matching`). The more probable result counts.

    Sources: Eckart and Young 1936; Bayes-optimal form of Balunović et al., *Bayesian Framework for Gradient Leakage*,
    ICLR 2022, Section 3. Deviation: the prior is total variation with the mean step of photographs, not learned.

    Args:
        iterations: evaluations of the search per start.
        restarts: starts of the search, chosen by its objective.
    """
    return NoiseAware(iterations=iterations, restarts=restarts)
