"""Batched solvers against torch's own, against each other, and against interruption."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradleak.attacks.matching import LBFGS, Adam, GradientDescent
from gradleak.errors import InvalidInput


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def evaluate(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    value = rosenbrock(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def starts(problems: int, size: int) -> Tensor:
    return torch.randn(problems, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def torch_evaluations(start: Tensor, history: int, target: float) -> int:
    x = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [x],
        max_iter=2000,
        max_eval=2000,
        history_size=history,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )
    values: list[float] = []

    def closure() -> Tensor:
        solver.zero_grad()
        value = rosenbrock(x).sum()
        value.backward()
        values.append(value.item())
        return value

    solver.step(closure)
    return next(i for i, v in enumerate(values) if v <= target)


def test_lbfgs_needs_no_more_evaluations_than_torch() -> None:
    start = 1 + 0.3 * starts(8, 20)  # Farther away, the function has a second minimum.
    ours = LBFGS(iterations=2000, history=20, check_every=1).minimize(evaluate, start, tolerance=1e-12)
    theirs = [torch_evaluations(s[None], 20, 1e-12) for s in start]
    assert bool(ours.converged.all())
    assert float(ours.evaluations.double().mean()) <= 1.2 * sum(theirs) / len(theirs)


def test_lbfgs_problems_do_not_influence_each_other() -> None:
    start = starts(5, 10)
    solver = LBFGS(iterations=60, history_dtype=torch.float64)  # float32 sums depend on the size of the batch.
    together = solver.minimize(evaluate, start)
    for i in range(5):
        alone = solver.minimize(evaluate, start[i : i + 1])
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-6, atol=1e-8)


def test_lbfgs_keeps_finished_problems_while_others_go_on() -> None:
    start = starts(6, 10)
    start[:4] = 1 + 1e-3 * start[:4]
    found = LBFGS(iterations=500, check_every=5).minimize(evaluate, start, tolerance=1e-18)
    assert bool(found.converged.all())
    assert int(found.evaluations[:4].max()) < int(found.evaluations[4:].min())
    torch.testing.assert_close(found.x, torch.ones_like(found.x), rtol=0, atol=1e-6)


def test_lbfgs_survives_infinite_regions() -> None:
    def barrier(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        value = (leaf - torch.log(leaf)).sum(1)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    start = torch.full((3, 4), 1e-3, dtype=torch.float64)
    found = LBFGS(iterations=200).minimize(barrier, start)
    torch.testing.assert_close(found.x, torch.ones_like(found.x), rtol=0, atol=1e-5)


def test_lbfgs_says_that_a_problem_stalls() -> None:
    def constant(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(len(x), dtype=x.dtype), torch.zeros_like(x)

    found = LBFGS(iterations=400, patience=50).minimize(constant, starts(2, 3), tolerance=1e-6)
    assert bool(found.stalled.all())
    assert not bool(found.converged.any())
    assert int(found.evaluations.max()) < 400


def test_lbfgs_refuses_a_projection() -> None:
    with pytest.raises(InvalidInput, match="use Adam"):
        LBFGS().minimize(evaluate, starts(1, 3), project=lambda x: x)


@pytest.mark.parametrize("solver", [LBFGS(iterations=50), Adam(iterations=50), GradientDescent(iterations=50, lr=1e-4)])
def test_interruption_returns_the_best_so_far(solver: LBFGS | Adam | GradientDescent) -> None:
    seen: list[float] = []

    def stop(step: int, rows: Tensor, x: Tensor, objective: Tensor) -> bool:
        seen.append(float(objective.min()))
        if step == 10:
            raise KeyboardInterrupt
        return False

    found = solver.minimize(evaluate, starts(3, 4), monitor=stop)
    assert found.interrupted
    assert float(found.objective.min()) == pytest.approx(min(seen))
    torch.testing.assert_close(rosenbrock(found.x), found.objective)


def test_adam_equals_torch() -> None:
    start = starts(1, 5)
    ours = Adam(lr=0.01, iterations=40)
    x = start.clone().requires_grad_()
    theirs = torch.optim.Adam([x], lr=0.01)
    path: list[Tensor] = []
    ours.minimize(evaluate, start, monitor=lambda step, rows, x, f: path.append(x.clone()) or False)
    for step in range(41):
        torch.testing.assert_close(path[step], x.detach(), rtol=1e-9, atol=1e-12)
        theirs.zero_grad()
        rosenbrock(x).sum().backward()
        theirs.step()


def test_gradient_descent_equals_torch() -> None:
    start = starts(1, 5)
    x = start.clone().requires_grad_()
    theirs = torch.optim.SGD([x], lr=1e-4, momentum=0.9)
    path: list[Tensor] = []
    GradientDescent(lr=1e-4, iterations=20).minimize(
        evaluate, start, monitor=lambda step, rows, x, f: path.append(x.clone()) or False
    )
    for step in range(21):
        torch.testing.assert_close(path[step], x.detach(), rtol=1e-9, atol=1e-12)
        theirs.zero_grad()
        rosenbrock(x).sum().backward()
        theirs.step()


def test_signed_steps_have_the_size_of_the_step() -> None:
    path: list[Tensor] = []
    GradientDescent(lr=0.1, momentum=0.0, iterations=3, signed=True).minimize(
        evaluate, starts(2, 5), monitor=lambda step, rows, x, f: path.append(x.clone()) or False
    )
    torch.testing.assert_close((path[1] - path[0]).abs(), torch.full_like(path[0], 0.1))
