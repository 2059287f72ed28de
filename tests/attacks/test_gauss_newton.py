"""Least squares on smooth models: convergence, noise, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak import defenses
from gradleak.attacks import gauss_newton as factory
from gradleak.attacks.base import Progress
from gradleak.attacks.gauss_newton import GaussNewton, by_layers, gauss_newton
from gradleak.attacks.least_squares import Problem, Sampled, is_smooth
from gradleak.errors import InvalidInput, InvalidModel, NotApplicable, ResourceLimit
from gradleak.models import lenet, resnet18

SHAPE = (1, 8, 8)


def client(
    n: int = 1,
    dtype: torch.dtype = torch.float64,
    training: gl.LocalTraining | None = None,
    activation: str = "sigmoid",
) -> gl.Client:
    model = lenet(width=6, classes=5, in_channels=1, image_size=8, seed=0, activation=activation)  # type: ignore[arg-type]
    images = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    return gl.Client(model.to(dtype), gl.Batch(images.to(dtype), torch.arange(n) % 5), training or gl.FedSGD())


def observe(sender: gl.Client, knows: gl.Knowledge | None = None) -> gl.Observation:
    threat = gl.ThreatModel() if knows is None else gl.ThreatModel(knows)
    return threat.observe(
        sender.model,
        sender.send(),
        space=gl.ImageSpace(SHAPE),
        training=sender.training,
        batch_size=len(sender.batch),
        labels=sender.batch.labels,
    )


def error(sender: gl.Client, found: gl.Reconstruction) -> float:
    return float((found.inputs.double() - sender.batch.inputs.double()).square().mean())


def test_factory_is_the_attack() -> None:
    assert factory is gauss_newton
    assert isinstance(gauss_newton(), GaussNewton)
    for wrong in ({"iterations": 0}, {"restarts": 0}, {"budget": 0.0}):
        with pytest.raises(InvalidInput, match="positive"):
            gauss_newton(**wrong)


@pytest.mark.parametrize(
    ("n", "training"), [(2, gl.FedSGD()), (1, gl.FedAvg(lr=0.1, epochs=2))], ids=["batch", "steps"]
)
def test_random_start_converges_to_rounding(n: int, training: gl.LocalTraining) -> None:
    sender = client(n, training=training)
    found = gauss_newton().reconstruct(observe(sender))
    assert found.status == "converged"
    assert found.iterations < 40
    assert error(sender, found) < 1e-20


@pytest.mark.parametrize("training", [gl.FedSGD(), gl.FedAvg(lr=0.1)], ids=["gradient", "delta"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-12), (torch.float64, 1e-25)])
def test_one_example_to_its_floor_by_all_layers(training: gl.LocalTraining, dtype: torch.dtype, limit: float) -> None:
    sender = client(dtype=dtype, training=training)
    found = gauss_newton().reconstruct(observe(sender))
    assert found.status == "exact"
    assert found.iterations < 20
    assert any("all layers together: determined" in n for n in found.notes)
    assert found.labels is not None
    assert found.labels.tolist() == [0]
    assert error(sender, found) < limit


def test_float32_update_of_a_batch_to_its_floor() -> None:
    sender = client(2, dtype=torch.float32)
    assert error(sender, gauss_newton().reconstruct(observe(sender))) < 1e-12


def chain(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*layers)
        for p in model.parameters():
            nn.init.uniform_(p, -0.5, 0.5)
        return model.double()


def convolution(channels: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, outputs, 3, stride=stride, padding=1)


def open_inside() -> nn.Module:
    # The input of the second convolution: 256 unknowns, 64 forward and 144 gradient equations.
    first, second = convolution(1, 4), convolution(4, 4, 2)
    return chain(first, nn.Sigmoid(), second, nn.Tanh(), nn.Flatten(), nn.Linear(64, 9))


def pooled() -> nn.Module:
    last = (nn.Flatten(), nn.Linear(192, 9), nn.Tanh(), nn.Linear(9, 5))
    return chain(convolution(1, 12), nn.Tanh(), nn.AvgPool2d(2), *last)


@pytest.mark.parametrize("make", [open_inside, pooled])
def test_exact_where_the_recursion_stops(make: Callable[[], nn.Module]) -> None:
    images = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    sender = gl.Client(make(), gl.Batch(images, torch.tensor([3])))
    alone = gl.attacks.recursion().reconstruct(observe(sender))
    assert alone.status == "stalled"
    assert "The recursion stops" in alone.notes[0]
    assert error(sender, gauss_newton().reconstruct(observe(sender))) < 1e-20
    chosen = gl.attacks.auto().reconstruct(observe(sender))
    assert chosen.attack == "gauss_newton"
    assert chosen.certificate is not None
    assert chosen.certificate.verdict == "proved"
    assert "all layers together" in chosen.certificate.reason


def test_a_first_linear_layer_is_nothing_to_solve_together() -> None:
    model = chain(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 5))
    sender = gl.Client(model, gl.Batch(torch.full((1, *SHAPE), 0.3).double(), torch.tensor([3])))
    with pytest.raises(NotApplicable, match="linear_inversion"):
        by_layers(observe(sender))
    assert error(sender, gauss_newton().reconstruct(observe(sender))) < 1e-20  # by its whole Jacobian


def test_an_update_that_is_not_explained_is_not_called_converged() -> None:
    sender = client()
    seen = observe(sender)
    name = next(n for n in seen.update.tensors if n.endswith("weight"))
    wrong = replace(seen.update, tensors={**seen.update.tensors, name: seen.update.tensors[name] * 1.01})
    found = gauss_newton().reconstruct(replace(seen, update=wrong))
    assert found.status == "stalled"
    assert "does not explain the update" in found.notes[-1]


def test_too_many_values_for_all_layers() -> None:
    model = chain(convolution(1, 200), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3200, 5))
    sender = gl.Client(model, gl.Batch(torch.full((1, *SHAPE), 0.3).double(), torch.tensor([3])))
    with pytest.raises(ResourceLimit, match="12800 rows"):
        by_layers(observe(sender))


def test_what_all_layers_leave_open_is_not_called_converged() -> None:
    model = chain(convolution(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 5))
    sender = gl.Client(model, gl.Batch(torch.full((1, *SHAPE), 0.3).double(), torch.tensor([3])))
    found = gauss_newton().reconstruct(observe(sender))
    assert found.status == "stalled"
    assert "without a unique solution" in found.notes[-1]
    chosen = gl.attacks.auto(iterations=5).reconstruct(observe(sender))
    assert chosen.certificate is not None
    assert chosen.certificate.verdict != "proved"
    assert any(n.startswith("gauss_newton: not taken. This model, 1 example") for n in chosen.notes)


def test_sampled_rows_precondition_the_whole() -> None:
    sender = client()
    problem = Problem.of(observe(sender), None, 0)
    z = sender.batch.inputs.flatten() + 0.01 * torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    dense, sampled = problem.linearize(z, None), Sampled(problem, z, None)
    for damping in (1e-2, 1e-9):
        # The means that scale the damping differ, so compare what the steps achieve.
        exact, found = dense.decrease(dense.step(damping)), dense.decrease(sampled.step(damping))
        assert found == pytest.approx(exact, rel=0.02)
    step = dense.step(1e-3)
    assert sampled.decrease(step) == pytest.approx(dense.decrease(step), rel=1e-6)


@pytest.mark.parametrize(("name", "limit"), [("half_precision", 1e-7), ("bfloat16", 1e-4)])
def test_weights_reach_through_16_bits(name: str, limit: float) -> None:
    training = getattr(defenses, name)().wrap(gl.FedSGD())
    sender = client(training=training)
    knows = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING
    for granted in (knows, knows | gl.Knowledge.DEFENSE):  # the number format shows in the numbers, told or not
        found = gauss_newton(restarts=3).reconstruct(observe(sender, granted))
        assert error(sender, found) < limit


def test_polish_keeps_what_was_found() -> None:
    sender = client()
    seen = observe(sender)
    near = sender.batch.inputs + 1e-2 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    rough = gl.Reconstruction(near, torch.tensor([0]), 1.0, notes=("rough",), features=torch.zeros(1, 3))
    found = gauss_newton().polish(seen, rough)
    assert error(sender, found) < 1e-20
    assert found.notes[0] == "rough"
    assert found.features is rough.features
    blind = observe(sender, gl.Knowledge.BATCH_SIZE)
    with pytest.raises(NotApplicable, match="TRAINING"):
        gauss_newton().polish(blind, rough)


def test_kinks_are_refused_with_a_remedy() -> None:
    with pytest.raises(NotApplicable, match=r"recursion\(\).*prior_matching\(\)"):
        gauss_newton().reconstruct(observe(client(activation="relu")))


def test_too_many_unknowns() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2500, 2))
    sender = gl.Client(model, gl.Batch(torch.rand(2, 1, 25, 100), torch.tensor([0, 1])))
    with pytest.raises(ResourceLimit, match="5000"):
        gl.simulate(sender, gauss_newton())


def test_interruption_and_budget_return_the_best_so_far() -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    found = gauss_newton().reconstruct(observe(client(2)), callback=stop)
    assert (found.status, found.iterations) == ("interrupted", 0)  # A step is interrupted, too.
    assert gauss_newton().reconstruct(observe(client()), callback=stop).status == "interrupted"
    assert replace(gauss_newton(), budget=1e-6).reconstruct(observe(client(2))).status == "budget"


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "softplus", "gelu"])
def test_smooth_models(activation: str) -> None:
    assert is_smooth(client(activation=activation).model, SHAPE)


@pytest.mark.parametrize("seed", [0, 38, 41, 52])  # on the last three, net changes of the slope nearly cancel
def test_steep_sigmoids_are_smooth(seed: int) -> None:
    assert is_smooth(lenet(seed=seed), (3, 32, 32))


@pytest.mark.parametrize("seed", range(4))
def test_models_with_kinks(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        affine = nn.Linear(6, 4)
    assert is_smooth(affine, (6,))
    for kink in (nn.ReLU(), nn.LeakyReLU(0.9), nn.MaxPool1d(2), nn.Hardtanh()):
        last = 2 if isinstance(kink, nn.MaxPool1d) else 4
        layers = (affine, kink, nn.Sigmoid(), nn.Linear(last, 3), nn.Tanh())
        assert not is_smooth(nn.Sequential(*layers), (6,))
        assert not is_smooth(nn.Sequential(affine, kink), (6,))
    assert not is_smooth(client(activation="relu").model, SHAPE)
    assert not is_smooth(resnet18(width=4, seed=0).eval(), (3, 16, 16))
    with pytest.raises(InvalidModel, match="dropout"):
        is_smooth(nn.Dropout(0.5), (6,))
