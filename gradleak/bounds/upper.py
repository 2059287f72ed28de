"""What no attacker can beat under the defenses that a client states: one number and one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from gradleak.bounds.accounting import privacy_budget
from gradleak.bounds.robustness import reconstruction_robustness
from gradleak.defenses import Composition, Defended, GaussianNoise, LaplacianNoise, SparseVector, UpdateDefense
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.training import Aggregated, FedAvg, FedSGD, LocalTraining

__all__ = ["Bound", "upper_bound"]


@dataclass(frozen=True)
class Bound:
    """An upper bound on what any attacker can reconstruct, or why there is none.

    Attributes:
        value: γ, the largest probability with which an attacker succeeds who would succeed with probability ``prior``
            without the updates; None where there is no bound.
        text: what it means, in a sentence or two.
        mechanism: "gaussian" or "laplace", None where there is no bound.
        noise_multiplier: standard deviation (of Laplacian noise: scale) of the noise over what it hides.
        prior: κ, the probability of success without the updates.
        epsilon: of differential privacy, where it is known: Gaussian noise needs the extra ``dp``.
        delta: that belongs to ``epsilon``; 0 for Laplacian noise.
    """

    value: float | None
    text: str
    mechanism: str | None = None
    noise_multiplier: float | None = None
    prior: float | None = None
    epsilon: float | None = None
    delta: float | None = None


_ALLOWS = 0.99
"""Probability of success above which a bound is no promise."""


@dataclass(frozen=True)
class _Release:
    """One addition of noise: of what kind, how large over what it hides, how often, and what it hides."""

    mechanism: str
    multiplier: float
    steps: int
    rate: float
    hides: str


def upper_bound(
    training: LocalTraining,
    *,
    examples: int,
    rounds: int = 1,
    sampling_rate: float = 1.0,
    prior: float,
    coordinates: int | None = None,
    delta: float = 1e-5,
) -> Bound:
    """Return what no attacker can beat, whatever it knows besides, from the defenses of ``training``.

    A bound takes noise, and something before it that limits what the noise must hide: clipping of each example
    (DP-SGD: the bound is for one example whose neighbors are known), or of the whole update (for anything about the
    client's data at once). Whatever follows the noise changes nothing. Of several additions of noise the one with the
    lower bound counts.

    Source: Hayes, Mahloujifar, Balle, *Bounding Training Data Reconstruction in DP-SGD*, NeurIPS 2023, Theorem 2. For
    a whole update the reference is the noise alone, so that its norm, not twice its norm, is what the noise hides.

    Args:
        training: the client's forward map with its defenses.
        examples: number of examples of the client that are in a round.
        rounds: number of rounds in which the attacker sees the client.
        sampling_rate: probability with which an example is in a local batch, in (0, 1], drawn anew for every step and
            kept secret (Poisson sampling). It counts for DP-SGD only: the whole update of a client is seen either way.
        prior: κ, the probability of success without the updates, in (0, 1).
        coordinates: number of all numbers of an update, which Laplacian noise and limits per number need.
        delta: at which ``epsilon`` is stated.

    Raises:
        InvalidInput: an argument is out of its range.
    """
    good = examples >= 1 and rounds >= 1 and 0 < sampling_rate <= 1 and 0 < prior < 1 and 0 < delta < 1
    if not good or not (coordinates is None or coordinates >= 1):
        raise InvalidInput(
            f"No bound for examples={examples}, rounds={rounds}, sampling_rate={sampling_rate}, prior={prior}, "
            f"coordinates={coordinates}, delta={delta}; give counts of at least 1, a rate in (0, 1], and a prior and "
            "a delta in (0, 1)."
        )
    releases, noised = _releases(training, rounds, sampling_rate, coordinates, examples)
    if not releases:
        return Bound(None, _why_none(training, noised, coordinates is None), prior=prior)

    def gamma(r: _Release) -> float:
        return reconstruction_robustness(
            noise_multiplier=r.multiplier, steps=r.steps, sampling_rate=r.rate, prior=prior, mechanism=r.mechanism
        )

    value, best = min(((gamma(r), r) for r in releases), key=lambda found: found[0])
    epsilon: float | None = None
    if best.mechanism == "laplace":
        epsilon, delta = best.steps * math.log1p(best.rate * math.expm1(min(1 / best.multiplier, 700.0))), 0.0
    else:
        with suppress(NotApplicable):  # Opacus counts it, where it is installed.
            epsilon = privacy_budget(
                noise_multiplier=best.multiplier, steps=best.steps, sampling_rate=best.rate, delta=delta
            )
    seen = "one round" if best.steps == 1 else f"all {best.steps} noised steps"
    hidden = f"{best.hides} ({examples} examples)" if best.hides == _ALL and examples > 1 else best.hides
    if value > _ALLOWS:
        text = (
            f"The bound allows everything: against an attacker who sees {seen}, noise of {best.multiplier:.3g} times "
            f"what it hides promises nothing for {hidden}."
        )
        return Bound(value, text, best.mechanism, best.multiplier, prior, epsilon, None if epsilon is None else delta)
    text = (
        f"No attacker who sees {seen} reconstructs {hidden} with a probability above {value:.3g}, where "
        f"{prior:.3g} is the best without seeing any; the noise is {best.multiplier:.3g} times what it hides."
    )
    return Bound(value, text, best.mechanism, best.multiplier, prior, epsilon, None if epsilon is None else delta)


def _releases(
    training: LocalTraining, rounds: int, rate: float, coordinates: int | None, examples: int
) -> tuple[list[_Release], bool]:
    """Return the additions of noise that hide something limited, and whether there is any noise at all."""
    if isinstance(training, Aggregated):
        found, noised = _releases(training.inner, rounds, rate, coordinates, max(1, examples // training.clients))
        # The noise of all clients hides each of them; of Laplacian noise one client's is counted.
        wider = training.clients**0.5
        found = [replace(r, multiplier=r.multiplier * wider) if r.mechanism == "gaussian" else r for r in found]
        return found, noised
    found, noised = [], False
    base, l1, l2 = training, math.inf, math.inf
    while isinstance(base, Defended):
        base = base.inner
    if isinstance(base, Aggregated):
        # What a client's own noise hides stays hidden, whatever is done to the mean.
        found, noised = _releases(base, rounds, rate, coordinates, examples)
    private = base.private if isinstance(base, (FedSGD, FedAvg)) else None
    if private is not None and private.noise_multiplier > 0:
        noised = True
        steps = rounds * (base.count(examples) if isinstance(base, FedAvg) else 1)
        found.append(_Release("gaussian", private.noise_multiplier, steps, rate, _ONE))
    for defense in _chain(training):
        kind, size, norm = None, 0.0, math.inf
        if isinstance(defense, GaussianNoise):
            kind, size, norm = "gaussian", defense.sigma, l2
        elif isinstance(defense, LaplacianNoise):
            kind, size, norm = "laplace", defense.scale, l1
        if kind is not None and size > 0:
            noised = True
            if norm < math.inf:
                found.append(_Release(kind, size / norm, rounds, 1.0, _ALL))
        l1, l2 = defense.largest(l1, 1, coordinates), defense.largest(l2, 2, coordinates)
        if coordinates is not None:
            l1 = min(l1, math.sqrt(coordinates) * l2)
        l2 = min(l1, l2)
    return found, noised


_ONE = "an example, even knowing all others,"
_ALL = "any of the client's data"


def _chain(training: LocalTraining) -> Iterator[UpdateDefense]:
    """Yield the defenses of the finished update in the order in which they are applied."""
    if isinstance(training, Defended):
        yield from _chain(training.inner)
        yield from _flat(training.defense)


def _flat(defense: UpdateDefense) -> Iterator[UpdateDefense]:
    if isinstance(defense, Composition):
        for part in defense.defenses:
            yield from _flat(part)
    else:
        yield defense


def _why_none(training: LocalTraining, noised: bool, uncounted: bool) -> str:
    while isinstance(training, Aggregated):
        training = training.inner
    if any(isinstance(d, SparseVector) for d in _chain(training)):
        return (
            "No bound is stated for the sparse vector filter: it asks again until enough numbers are accepted, and the "
            "noise on what it sends hides each of them by itself, not the update."
        )
    if noised and uncounted:
        return (
            "No bound is stated for this filter: nothing limits what its noise must hide, or the limit depends on the "
            "number of coordinates; clip before the noise, and pass coordinates=."
        )
    if noised:
        return (
            "No bound exists for this filter because nothing limits what its noise must hide: an example may change "
            "the update by any amount; clip before the noise."
        )
    return (
        "No bound exists for this filter because it adds no noise: equal data give equal updates, so nothing keeps an "
        "attacker from telling two candidates apart but the rank of what is sent."
    )
