"""The least-squares loop on a problem with a known answer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gradleak.solve.least_squares import State, minimize


def residual(z: Tensor) -> Tensor:
    """Rosenbrock's valley: zero at (1, 1) only."""
    return torch.stack([10 * (z[1] - z[0] ** 2), 1 - z[0]])


@dataclass
class Linear:
    r: Tensor
    jacobian: Tensor
    evaluations: int = 1

    def step(self, damping: float) -> Tensor:
        normal = self.jacobian.T @ self.jacobian
        return -torch.linalg.solve(normal + damping * torch.diag(normal.diagonal()), self.jacobian.T @ self.r)

    def decrease(self, change: Tensor) -> float:
        return float(self.r.square().sum() - (self.r + self.jacobian @ change).square().sum())


class Valley:
    def cost(self, z: Tensor) -> float:
        return float(residual(z).square().sum())

    def linearize(self, z: Tensor, former: Linear | None) -> Linear:
        return Linear(residual(z), torch.autograd.functional.jacobian(residual, z))


START = torch.tensor([-1.2, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_it_follows_the_valley_to_its_end(damping: float) -> None:
    found = minimize(Valley(), START, iterations=60, damping=damping)
    assert found.status == "converged"
    torch.testing.assert_close(found.z, torch.ones(2, dtype=torch.float64))


def test_the_best_so_far_is_returned_when_it_is_told_to_end() -> None:
    def twice(state: State, damping: float) -> bool:
        return state.steps < 2

    found = minimize(Valley(), START, iterations=60, going=twice)
    assert (found.status, found.steps) == ("budget", 2)
    assert found.cost == pytest.approx(Valley().cost(found.z))
    assert found.cost < Valley().cost(START)

    def interrupt(state: State, damping: float) -> bool:
        raise KeyboardInterrupt

    assert minimize(Valley(), START, iterations=60, going=interrupt).status == "interrupted"


def test_below_what_rounding_leaves_no_step_is_damped() -> None:
    near = torch.ones(2, dtype=torch.float64) + 1e-9
    found = minimize(Valley(), near, iterations=60, damping=0.0, least=1e-12)
    assert found.status == "converged"
    assert found.steps <= 2
