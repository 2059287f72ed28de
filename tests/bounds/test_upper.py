"""Upper bounds read off a client's defenses: which have one, how large it is, and what is said where there is none."""

from __future__ import annotations

import math

import pytest
import torch

import gradleak as gl
from gradleak.bounds import upper_bound
from gradleak.defenses import UpdateDefense, clamp, clip, compose, gaussian_noise, int8, laplacian_noise, prune, sign
from gradleak.errors import InvalidInput


def bound(*defenses: UpdateDefense, **options: float) -> gl.bounds.Bound:
    training: gl.LocalTraining = gl.FedSGD()
    for defense in defenses:
        training = defense.wrap(training)
    return upper_bound(training, **{"examples": 1, "prior": 0.01, **options})


@pytest.mark.parametrize(("sigma", "gamma"), [(0.5, 0.372), (1.0, 0.092), (2.0, 0.034), (4.0, 0.019)])
def test_a_clipped_and_noised_update_has_the_published_bound(sigma: float, gamma: float) -> None:
    for norm in (0.1, 3.0):
        found = bound(clip(norm), gaussian_noise(sigma * norm))
        assert found.value == pytest.approx(gamma, abs=6e-4)
        assert (found.mechanism, found.noise_multiplier) == ("gaussian", pytest.approx(sigma))
        assert f"{found.value:.3g}" in found.text


def test_wrapped_and_composed_defenses_have_one_bound_and_sampling_does_not_hide_a_whole_update() -> None:
    parts = clip(1.0), gaussian_noise(2.0)
    values = {bound(*parts).value, bound(compose(*parts)).value, bound(compose(*parts), sampling_rate=0.1).value}
    assert len(values) == 1
    assert bound(*parts, rounds=4).value == pytest.approx(bound(clip(1.0), gaussian_noise(1.0)).value)


def test_laplacian_noise_needs_the_sum_of_magnitudes() -> None:
    found = bound(clip(1.0), laplacian_noise(10.0), coordinates=100)
    assert (found.mechanism, found.epsilon, found.delta) == ("laplace", pytest.approx(1.0), 0.0)
    assert found.value == pytest.approx(0.01 * math.e)
    unknown = bound(clip(1.0), laplacian_noise(10.0))
    assert unknown.value is None
    assert "coordinates=" in unknown.text


def test_what_follows_the_noise_changes_nothing_and_the_lowest_bound_counts() -> None:
    once = bound(clip(1.0), gaussian_noise(1.0)).value
    assert bound(clip(1.0), gaussian_noise(1.0), int8(), prune(0.5), sign()).value == once
    assert bound(gaussian_noise(9.0), clip(1.0), gaussian_noise(1.0), gaussian_noise(0.5)).value == once


@pytest.mark.parametrize("defense", [clip(1.0), compose(prune(0.1, globally=True), clamp(0.01)), int8(), sign()])
def test_without_noise_there_is_no_bound(defense: UpdateDefense) -> None:
    for options in ({}, {"coordinates": 10}):
        found = bound(defense, **options)
        assert found.value is None
        assert found.epsilon is None
        assert found.text.startswith("No bound exists for this filter because it adds no noise")


def test_noise_that_nothing_was_limited_for_has_no_bound() -> None:
    found = bound(gaussian_noise(1.0), coordinates=10)
    assert found.value is None
    assert found.text.startswith("No bound exists for this filter because nothing limits")


LIMITS = [clip(0.7), clamp(0.1), compose(clip(0.5), int8()), compose(clip(1e-6), gl.defenses.half_precision()), sign()]


@pytest.mark.parametrize("defense", [*LIMITS, compose(clip(0.5), prune(0.5)), compose(clip(1.0), clamp(0.05))])
def test_no_update_exceeds_the_stated_norm(defense: UpdateDefense) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-7, 1e-2, 1.0, 30.0):
        drawn = scale * torch.randn(50, generator=generator, dtype=torch.float64) ** 3
        sent = defense.transform({"w": drawn})["w"]
        for order in (1, 2):
            limit = defense.largest(math.inf, order, 50)
            assert float(sent.norm(p=order)) <= limit * (1 + 1e-9)


def test_a_bound_that_allows_everything_promises_nothing() -> None:
    found = bound(clip(1.0), gaussian_noise(0.01))
    assert found.value is not None
    assert found.value > 0.999
    assert found.text.startswith("The bound allows everything")


def test_epsilon_is_that_of_the_accountant_of_opacus() -> None:
    pytest.importorskip("opacus")
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(20):
        accountant.step(noise_multiplier=1.3, sample_rate=0.05)
    options = {"noise_multiplier": 1.3, "steps": 20, "sampling_rate": 0.05, "delta": 1e-6}
    assert gl.bounds.privacy_budget(**options, accountant="rdp") == pytest.approx(accountant.get_epsilon(1e-6))
    assert gl.bounds.privacy_budget(**options) <= accountant.get_epsilon(1e-6)
    assert bound(clip(1.0), gaussian_noise(1.0)).epsilon == pytest.approx(4.38, abs=0.01)
    assert gl.bounds.privacy_budget(noise_multiplier=1e-3) > 1e5  # At once, and not in 20 GB.


@pytest.mark.parametrize(
    "bad", [{"prior": 0.0}, {"examples": 0}, {"rounds": 0}, {"sampling_rate": 2.0}, {"delta": 1.0}]
)
def test_arguments_out_of_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="give counts of at least 1"):
        bound(clip(1.0), gaussian_noise(1.0), **bad)
