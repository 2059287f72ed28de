"""DP-SGD: the step that Opacus takes, what an attacker simulates of it, and what it promises."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.defenses import clip, dp_sgd, gaussian_noise, secure_aggregation
from gradleak.errors import InvalidInput, InvalidModel
from gradleak.training import parameters

KNOWS = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        layers = [nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, 5)]
        return nn.Sequential(*layers)


def batch(count: int = 6) -> gl.Batch:
    generator = torch.Generator().manual_seed(2)
    return gl.Batch(torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 5)


@pytest.mark.parametrize(("norm", "noise"), [(0.3, 0.0), (100.0, 0.0), (0.3, 1.1)])
def test_a_step_is_that_of_opacus(norm: float, noise: float) -> None:
    pytest.importorskip("opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        theirs, data = GradSampleModule(model()), batch()
        optimizer = DPOptimizer(
            torch.optim.SGD(theirs.parameters(), lr=0.1),
            noise_multiplier=noise,
            max_grad_norm=norm,
            expected_batch_size=4,
            generator=torch.Generator().manual_seed(9),
        )
        before = {k: p.clone() for k, p in parameters(theirs._module).items()}
        nn.functional.cross_entropy(theirs(data.inputs), data.labels).backward()
        optimizer.step()
        moved = {k: p - before[k] for k, p in parameters(theirs._module).items()}
    ours = dp_sgd(noise, norm, 4).wrap(gl.FedAvg(lr=0.1), seed=9)(model(), data).tensors
    for name, expected in moved.items():
        assert float((ours[name] - expected).abs().max()) <= 1e-6


def test_two_steps_clip_and_noise_each_of_them() -> None:
    data, plain = batch(), gl.FedAvg(lr=0.1, epochs=2)
    private = dp_sgd(0.0, 1e6, 6).wrap(plain)
    for name, expected in plain(model(), data).tensors.items():
        torch.testing.assert_close(private(model(), data).tensors[name], expected, atol=1e-6, rtol=1e-4)
    noised = dp_sgd(1.0, 0.5, 6).wrap(plain, seed=1)
    moved = [noised.reseed(s)(model(), data).tensors["4.weight"] for s in range(30)]
    spread = torch.stack(moved).std(0).square().mean().sqrt()
    assert float(spread) == pytest.approx(0.1 * 0.5 / 6 * math.sqrt(2), rel=0.15)
    assert float(noised.deviation({"w": torch.zeros(1)})["w"]) == pytest.approx(0.1 * 0.5 / 6 * math.sqrt(2))


def test_an_attacker_simulates_the_clipping_and_has_no_seed() -> None:
    training, data = dp_sgd(0.5, 0.05, 6).wrap(gl.FedSGD(), seed=3), batch()
    update = training(model(), data)
    for knows, aware in ((KNOWS, True), (KNOWS & ~gl.Knowledge.DEFENSE, False)):
        seen = gl.ThreatModel(knows=knows).observe(
            model(), update, space=gl.ImageSpace((1, 8, 8)), training=training, batch_size=6
        )
        simulated = seen.simulator.update(data.inputs, data.labels)
        size = math.sqrt(sum(float(t.square().sum()) for t in simulated.values()))
        assert (size <= 0.05) == aware
        assert seen.simulator.defended == aware
        assert seen.gradient.scaled != aware
        left = seen.simulator.residual(simulated, update.tensors)
        if aware:  # What is left is the noise.
            whole = torch.cat([t.flatten() for t in left.values()])
            assert float(whole.square().mean().sqrt()) == pytest.approx(0.5 * 0.05 / 6, rel=0.1)


def test_what_is_reached_stays_below_the_bound() -> None:
    # The strongest attacker there is: two candidates, all else known, the likelihood ratio decides.
    model_, data, rounds = model().double(), batch(1), 400
    training = dp_sgd(1.0, 0.5, 1).wrap(gl.FedSGD())
    inputs = data.inputs.double()
    mean = {k: t.double() for k, t in training.known()(model_, gl.Batch(inputs, data.labels)).tensors.items()}
    size = math.sqrt(sum(float(t.square().sum()) for t in mean.values()))
    hits = 0
    for seed in range(rounds):
        sent = training.reseed(seed)(model_, gl.Batch(inputs, data.labels)).tensors
        score = sum(float((sent[k] * mean[k]).sum()) for k in mean) / size / 0.5
        hits += score > 2.3263478740408408  # exceeded with probability .01 by the noise alone
    bound = gl.bounds.upper_bound(training, examples=1, prior=0.01).value
    assert bound == pytest.approx(0.092, abs=6e-4)
    assert bound / 2 <= hits / rounds <= bound + 3 * math.sqrt(bound * (1 - bound) / rounds)


def test_bounds_count_steps_sampling_and_clients() -> None:
    private = dp_sgd(2.0, 1.0, 8)
    bound = gl.bounds.upper_bound

    def gamma(training: gl.LocalTraining, **options: float) -> float:
        found = bound(training, **{"examples": 8, "prior": 0.01, **options})
        assert found.value is not None
        return found.value

    exact = gl.bounds.reconstruction_robustness
    assert gamma(private.wrap(gl.FedSGD())) == exact(noise_multiplier=2.0, prior=0.01)
    steps = private.wrap(gl.FedAvg(lr=0.1, batch_size=2))
    assert gamma(steps, rounds=3) == exact(noise_multiplier=2.0, steps=12, prior=0.01)
    assert gamma(private.wrap(gl.FedSGD()), sampling_rate=0.1) == exact(
        noise_multiplier=2.0, sampling_rate=0.1, prior=0.01
    )
    four = secure_aggregation(4).wrap(gaussian_noise(1.0).wrap(clip(1.0).wrap(gl.FedSGD())))
    assert gamma(four) == exact(noise_multiplier=2.0, prior=0.01)


def test_what_cannot_be_clipped_by_example_is_refused() -> None:
    mixing = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 5))
    with pytest.raises(InvalidModel, match="GroupNorm"):
        dp_sgd(1.0, 1.0, 6).wrap(gl.FedSGD())(gl.training.batch_statistics(mixing), batch())
    with pytest.raises(InvalidInput, match="name it first"):
        dp_sgd(1.0, 1.0, 6).wrap(clip(1.0).wrap(gl.FedSGD()))
    with pytest.raises(InvalidInput, match="a norm above 0"):
        dp_sgd(1.0, 0.0, 6)
