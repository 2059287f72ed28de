"""Training out of updates: the arithmetic of torch.optim, and what a defense does to it."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradleak.defenses import gaussian_noise, half_precision
from gradleak.errors import InvalidInput, InvalidUpdate
from gradleak.papers.packages import load_package
from gradleak.training import SGD, FedAvg, LocalTraining

load_package("experiments_under_test", Path(__file__).resolve().parents[2] / "experiments" / "2019_zhu_dlg")
_cohort = importlib.import_module("experiments_under_test._cohort")
accuracy, fit = _cohort.accuracy, _cohort.fit


def blobs(n: int = 90) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    centers = 3 * torch.eye(3, 5, dtype=torch.float64)
    return centers[y] + torch.randn(n, 5, generator=g, dtype=torch.float64), y


def network(norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, 3)]
        return nn.Sequential(*layers).double()


def test_equals_torch_optim_batch_by_batch() -> None:
    x, y = blobs()
    model, reference = network(norm=True), network(norm=True)
    seen: list[int] = []
    trained = fit(
        model, x, y, epochs=2, batch_size=90, optimizer=SGD(0.1, momentum=0.9), callback=lambda e, _: seen.append(e)
    )
    steps = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        steps.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        steps.step()
    for (name, p), q in zip(reference.state_dict().items(), trained.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-12, msg=name)
    assert seen == [0, 1, 2]
    assert all(torch.equal(p, network(norm=True).state_dict()[name]) for name, p in model.state_dict().items())


def test_averaging_deltas_with_step_one_equals_gradient_descent() -> None:
    x, y = blobs()
    by_gradient = fit(network(), x, y, epochs=2, batch_size=20, optimizer=SGD(0.1), seed=3)
    by_delta = fit(network(), x, y, FedAvg(0.1), epochs=2, batch_size=20, optimizer=SGD(1.0), seed=3)
    for p, q in zip(by_gradient.parameters(), by_delta.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("training", "least", "most"),
    [
        (None, 0.95, 1.0),
        (half_precision().wrap(FedAvg(0.1)), 0.95, 1.0),
        (gaussian_noise(30.0).wrap(FedAvg(0.1)), 0.0, 0.8),
    ],
)
def test_learns_unless_the_noise_drowns_it(training: LocalTraining | None, least: float, most: float) -> None:
    x, y = blobs()
    optimizer = None if training is None else SGD(1.0)
    trained = fit(network(), x, y, training, epochs=40, batch_size=30, optimizer=optimizer or SGD(0.1))
    assert least <= accuracy(trained, x, y) <= most


def test_every_client_draws_its_own_noise() -> None:
    x, y = blobs(2)
    frozen = x * 0  # a constant gradient of the bias; only noise differs from step to step
    moved: list[Tensor] = []
    fit(
        network(), frozen, y, gaussian_noise(1.0).wrap(FedAvg(1e-9)), epochs=3, batch_size=2, optimizer=SGD(1.0),
        callback=lambda _, m: moved.append(m[3].weight.detach().clone()),
    )  # fmt: skip
    steps = [b - a for a, b in itertools.pairwise(moved)]
    assert (steps[0] - steps[1]).abs().max() > 0.1
    assert (steps[1] - steps[2]).abs().max() > 0.1


def test_accuracy_counts() -> None:
    model = nn.Identity()
    assert accuracy(model, torch.eye(4), torch.tensor([0, 1, 2, 0]), batch_size=3) == 0.75


def test_refuses_nonsense() -> None:
    x, y = blobs()
    with pytest.raises(InvalidInput, match="at least 1"):
        fit(network(), x, y, epochs=0)
    with pytest.raises(InvalidUpdate, match="smaller step"):
        fit(network(), x, y, FedAvg(1e300, epochs=2), epochs=2, optimizer=SGD(1e10))
