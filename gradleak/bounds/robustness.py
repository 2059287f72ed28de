"""Reconstruction robustness: how often any attacker can succeed against noise of a stated size.

An attacker who guesses without the update succeeds with probability κ (the prior). Success is an event of the noised
update, so its probability γ with the example is at most the largest P(E) over events with Q(E) ≤ κ, where P and Q are
the distributions of the update with the example and without it. By the Neyman–Pearson lemma that is one minus the
trade-off function of P and Q, and in terms of their privacy profile δ(ε) the least value of e^ε κ + δ(ε).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gradleak.errors import InvalidInput

__all__ = ["reconstruction_robustness"]

Array = NDArray[np.float64]

_KNOTS = 2**16
"""Points at which the losses of all steps together are kept, at least."""
_LARGEST = 2**21
"""Points that one step may have, where its losses spread more than those of all steps together."""
_ENDLESS = 60.0
"""Loss of one step from which on it counts as infinite."""
_NEGLIGIBLE = 1e-15
"""Probability that may lie outside of them on either side; it counts as success."""


def reconstruction_robustness(
    *,
    noise_multiplier: float,
    steps: int = 1,
    sampling_rate: float = 1.0,
    prior: float,
    mechanism: str = "gaussian",
) -> float:
    """Return γ, the largest probability with which any attacker reconstructs an example from noised updates.

    *Reconstructs* is any event that the attacker counts as success, such as an error below a threshold; ``prior`` is
    the best probability of it without the updates. The attacker may know everything but the example, and sees all
    steps.

    Sources: Hayes, Mahloujifar, Balle, *Bounding Training Data Reconstruction in DP-SGD*, NeurIPS 2023, Theorem 2;
    Kaissis et al., *Bounding data reconstruction attacks with the hypothesis testing interpretation of differential
    privacy*, arXiv 2307.03928, Section 3, for the closed form √steps / σ of the Gaussian mechanism. Deviations: steps
    on samples are composed numerically, from above (Doroshenko et al., *Connect the Dots*, 2022, Section 3), instead
    of by drawing; Laplacian noise is bounded by its ε alone, which holds in any number of dimensions.

    Args:
        noise_multiplier: standard deviation of Gaussian noise over the L2 norm that one example is clipped to; of
            Laplacian noise its scale over the L1 norm.
        steps: number of noised updates that the example may be in.
        sampling_rate: probability with which it is in each of them (Poisson sampling), in (0, 1].
        prior: κ, in (0, 1).
        mechanism: "gaussian" or "laplace".

    Raises:
        InvalidInput: an argument is out of its range.
    """
    good = 0 < noise_multiplier < math.inf and steps >= 1 and 0 < sampling_rate <= 1 and 0 < prior < 1
    if not good or steps != int(steps) or mechanism not in ("gaussian", "laplace"):
        raise InvalidInput(
            f"No bound for noise_multiplier={noise_multiplier}, steps={steps}, sampling_rate={sampling_rate}, "
            f"prior={prior}, mechanism={mechanism!r}; give noise above 0, at least one step, a rate in (0, 1], a prior "
            "in (0, 1), and 'gaussian' or 'laplace'."
        )
    if mechanism == "laplace":
        # ε of one step, less where the example is in a sample only.
        total = steps * math.log1p(sampling_rate * math.expm1(min(1 / noise_multiplier, 700.0)))
        return min(prior * math.exp(min(total, 700.0)), 1 - (1 - prior) * math.exp(-total))
    from scipy.stats import norm  # Not at the top: it takes long to import.

    if sampling_rate == 1.0:
        return float(norm.cdf(norm.ppf(prior) + math.sqrt(steps) / noise_multiplier))
    if steps == 1:  # The likelihood ratio grows with the update, as without sampling.
        caught = norm.cdf(norm.ppf(prior) + 1 / noise_multiplier)
        return float((1 - sampling_rate) * prior + sampling_rate * caught)
    losses, masses, certain = _composed(noise_multiplier, sampling_rate, int(steps))
    # δ at every loss: what lies above it, less e^ε of how often that happens without the example.
    above = np.append(np.cumsum(masses[::-1])[::-1][1:], 0.0) + certain
    unseen = np.exp(np.minimum(np.log(np.maximum(masses, 1e-300)) - losses, 0.0))
    without = np.append(np.cumsum(unseen[::-1])[::-1][1:], 0.0)
    odds = np.exp(np.minimum(losses, _ENDLESS))
    return float(min(1.0, (odds * prior + np.maximum(above - odds * without, certain)).min()))


def _composed(sigma: float, rate: float, steps: int) -> tuple[Array, Array, float]:
    """Return privacy losses of all steps, the probability of each with the example, and that of an infinite loss."""
    least, most, low, high = _window(sigma, rate, steps)
    step = max((high - low) / _KNOTS, (most - least) / (_LARGEST - 4))
    first, last = math.floor(least / step) - 1, math.ceil(most / step) + 1
    knots: Array = step * np.arange(first, last + 1, dtype=np.float64)
    delta = _profile(knots, sigma, rate)
    # The line through neighboring points of δ over e^ε lies above δ, and belongs to losses at the knots only.
    slopes = np.concatenate([[-1.0], np.diff(delta) / np.diff(np.exp(knots)), [0.0]])
    single = np.maximum(np.diff(slopes) * np.exp(knots), 0.0)
    certain = max(1.0 - float(single.sum()), 0.0)
    # A circular convolution, whose window holds the losses of all steps.
    size = 2 ** math.ceil(math.log2(max(len(single), (high - low) / step + 4)))
    total = np.fft.irfft(np.fft.rfft(single, size) ** steps, size)
    places = np.arange(size) + math.floor(low / step) - 1
    infinite = -math.expm1(steps * math.log1p(-min(certain, 1 - 1e-16))) + 2 * _NEGLIGIBLE
    return step * places, np.maximum(total[(places - steps * first) % size], 0.0), infinite


def _window(sigma: float, rate: float, steps: int) -> tuple[float, float, float, float]:
    """Return the least and largest loss of one step and of all, outside of which is a negligible probability."""
    x = np.linspace(-9 * sigma, 1 + 9 * sigma, 20_001)
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))
    density = np.logaddexp(math.log1p(-rate) - x**2 / (2 * sigma**2), math.log(rate) - (x - 1) ** 2 / (2 * sigma**2))
    density -= np.logaddexp.reduce(density)
    orders, tail = np.logspace(-3, 3, 61), -math.log(_NEGLIGIBLE)
    # Chernoff's bound of the sum of all steps, on either side.
    above = min((steps * np.logaddexp.reduce(t * loss + density) + tail) / t for t in orders)
    below = max(-(steps * np.logaddexp.reduce(-t * loss + density) + tail) / t for t in orders)
    least, most = float(loss[0]), min(float(loss[-1]), _ENDLESS)
    return least, most, max(float(below), steps * least), min(float(above), steps * most)


def _profile(epsilon: Array, sigma: float, rate: float) -> Array:
    """Return δ(ε) of one step, in closed form: the loss exceeds ε where the noise does a threshold."""
    from scipy.stats import norm

    inside = (np.exp(epsilon) - (1 - rate)) / rate
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(inside > 0, sigma**2 * np.log(np.maximum(inside, 1e-300)) + 0.5, -np.inf)
    without = norm.sf(x / sigma)
    return np.maximum((1 - rate - np.exp(epsilon)) * without + rate * norm.sf((x - 1) / sigma), 0.0)
