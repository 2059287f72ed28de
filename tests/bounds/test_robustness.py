"""Bounds on reconstruction: published values, limits that have a closed form, and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

import gradleak as gl
from gradleak.bounds import robustness
from gradleak.errors import InvalidInput

bound = gl.bounds.reconstruction_robustness


@pytest.mark.parametrize(("sigma", "gamma"), [(0.5, 0.372), (1.0, 0.092), (2.0, 0.034), (4.0, 0.019)])
def test_published_values_of_one_step(sigma: float, gamma: float) -> None:
    assert bound(noise_multiplier=sigma, prior=0.01) == pytest.approx(gamma, abs=6e-4)


@pytest.mark.parametrize("steps", [1, 4, 100])
@pytest.mark.parametrize("prior", [1e-4, 0.01, 0.3])
def test_composing_steps_agrees_with_the_closed_form_where_every_example_is_sampled(steps: int, prior: float) -> None:
    sigma = math.sqrt(steps)
    exact = norm.cdf(norm.ppf(prior) + math.sqrt(steps) / sigma)
    composed = bound(noise_multiplier=sigma, steps=steps, sampling_rate=1 - 1e-9, prior=prior)
    assert exact * (1 - 1e-5) <= composed <= exact * 1.001


def test_two_samples_agree_with_one_of_two_where_nothing_else_tells() -> None:
    # Hardly any noise: the example is seen exactly where it was sampled at least once.
    for sigma in (0.05, 0.01):
        gamma = bound(noise_multiplier=sigma, steps=2, sampling_rate=0.1, prior=0.01)
        assert gamma == pytest.approx(1 - 0.81 * 0.99, rel=2e-3)


@pytest.mark.parametrize(("sigma", "rate", "steps", "prior"), [(1.0, 0.1, 10, 0.01), (0.6, 0.05, 50, 0.1)])
def test_sampled_steps_agree_with_draws(sigma: float, rate: float, steps: int, prior: float) -> None:
    draw, count = np.random.default_rng(0), 100_000

    def losses(shift: float) -> np.ndarray:
        total = np.zeros(count)
        for _ in range(steps):
            x = sigma * draw.standard_normal(count) + (draw.random(count) < shift)
            total += np.log(1 - rate + rate * np.exp((2 * x - 1) / (2 * sigma**2)))
        return total

    drawn = float((losses(rate) > np.quantile(losses(0.0), 1 - prior)).mean())
    exact = bound(noise_multiplier=sigma, steps=steps, sampling_rate=rate, prior=prior)
    assert exact == pytest.approx(drawn, abs=5 * math.sqrt(4 * drawn / count))


def test_composition_never_falls_below_a_finer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"noise_multiplier": 0.8, "steps": 20, "sampling_rate": 0.2, "prior": 0.02}
    usual = bound(**arguments)
    monkeypatch.setattr(robustness, "_KNOTS", 2**10)
    coarse = bound(**arguments)
    assert usual <= coarse <= 1.05 * usual


def test_laplacian_noise_keeps_to_its_epsilon() -> None:
    assert bound(noise_multiplier=1.0, prior=0.01, mechanism="laplace") == pytest.approx(0.01 * math.e)
    assert bound(noise_multiplier=0.1, prior=0.01, mechanism="laplace") == pytest.approx(1 - 0.99 * math.exp(-10))
    assert bound(noise_multiplier=1e-3, steps=9, prior=0.01, mechanism="laplace") <= 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_multiplier": 0.0},
        {"prior": 1.0},
        {"steps": 0},
        {"steps": 1.5},
        {"sampling_rate": 1.1},
        {"mechanism": "x"},
    ],
)
def test_arguments_out_of_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="give noise above 0"):
        bound(**{"noise_multiplier": 1.0, "prior": 0.01, **bad})
