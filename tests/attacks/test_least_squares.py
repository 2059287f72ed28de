"""Least squares without matrices: steps from a start that is nearly right."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import gradleak as gl
from gradleak.attacks.least_squares import Iterated, Problem, search
from gradleak.errors import NotApplicable

SHAPE = (1, 8, 8)


def observe(dtype: torch.dtype, activation: str) -> tuple[gl.Observation, gl.Batch]:
    model = gl.models.lenet(width=8, classes=6, in_channels=1, image_size=8, seed=0, activation=activation)  # type: ignore[arg-type]
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    client = gl.Client(model.to(dtype), gl.Batch(images.to(dtype), torch.tensor([0, 3, 5])))
    seen = gl.ThreatModel().observe(
        client.model, client.send(), space=gl.ImageSpace(SHAPE), training=client.training, batch_size=3
    )
    return seen, client.batch


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["sigmoid", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_nearby_they_reach_the_rounding_of_the_update(
    dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("gradleak.attacks.least_squares"), "LARGEST", 16)
    seen, batch = observe(dtype, activation)
    problem = Problem.of(seen, batch.labels, 0, kinks=True)
    truth = batch.inputs.double().flatten()
    start = truth + 1e-5 * torch.randn(len(truth), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert isinstance(problem.linearize(start, None), Iterated)
    found = search(problem, start, iterations=3)
    # What is left is the rounding that the truth leaves as well, and the solution is nearer to it.
    assert found.cost < 1.2 * problem.cost(truth) + 1e-9 * problem.cost(start)
    assert float((found.z - truth).square().mean()) < 0.1 * float((start - truth).square().mean())


def test_they_end_when_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("gradleak.attacks.least_squares"), "LARGEST", 16)
    seen, batch = observe(torch.float64, "sigmoid")
    problem = replace(Problem.of(seen, batch.labels, 0), going=lambda: False)
    start = batch.inputs.flatten() + 1e-4
    system = problem.linearize(start, None)
    assert float(system.step(1e-3).abs().max()) == 0
    assert torch.equal(search(problem, start, iterations=3).z, start)


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_is_left_when_the_time_is_over(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(importlib.import_module("gradleak.attacks.least_squares"), "_DENSE", 0)
    seen, batch = observe(torch.float64, "sigmoid")
    asked = iter([True, False])  # before the step, within it
    problem = replace(Problem.of(seen, batch.labels, 0), going=lambda: next(asked))
    start = batch.inputs.flatten() + 1e-4
    found = search(problem, start, iterations=3)
    assert (found.status, found.steps) == ("budget", 0)
    assert torch.equal(found.z, start)


def test_kinks_are_admitted_only_where_the_caller_knows_the_pattern() -> None:
    seen, batch = observe(torch.float64, "relu")
    with pytest.raises(NotApplicable, match="kinks"):
        Problem.of(seen, batch.labels, 0)
    assert Problem.of(seen, batch.labels, 0, kinks=True).unknowns == 3 * 64


def test_a_failed_singular_value_decomposition_gives_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, batch = observe(torch.float64, "sigmoid")
    problem = Problem.of(seen, batch.labels, 0)
    start = batch.inputs.double().flatten() + 1e-3
    wanted = problem.linearize(start, None).step(1e-3)

    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "svd", fail)
    other = problem.linearize(start, None)
    torch.testing.assert_close(other.step(1e-3), wanted, rtol=1e-6, atol=1e-8)
    assert other.decrease(wanted) > 0


def test_derivatives_that_are_not_finite_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, batch = observe(torch.float64, "sigmoid")
    problem = Problem.of(seen, batch.labels, 0)
    with pytest.raises(NotApplicable, match="not finite"):
        problem.linearize(torch.full((batch.inputs.numel(),), torch.nan, dtype=torch.float64), None)
