from __future__ import annotations

import pytest
import torch

from gradleak.attacks.matching import BalancedError, SquaredError

OBSERVED = {"head": torch.tensor([3.0, 4.0]), "first": torch.tensor([[0.06, 0.08]]), "none": torch.zeros(2)}
SIMULATED = {"head": torch.tensor([3.0, 9.0]), "first": torch.tensor([[0.06, 0.13]]), "none": torch.zeros(2)}


def distance(objective: BalancedError | SquaredError, simulated: dict[str, torch.Tensor]) -> float:
    return float(objective(simulated, OBSERVED, objective.scale(OBSERVED)))


def test_balanced_error_by_hand() -> None:
    # Norms 5 and 0.1; squared distances 25 and 0.0025.
    assert distance(BalancedError(power=1, floor=0), SIMULATED) == pytest.approx((25 / 5 + 0.0025 / 0.1) / 5.1)
    assert distance(BalancedError(power=2, floor=0), SIMULATED) == pytest.approx((1 + 0.25) / 3)
    assert distance(BalancedError(power=0, floor=0), SIMULATED) == pytest.approx(distance(SquaredError(), SIMULATED))
    assert distance(BalancedError(), OBSERVED) == 0


def test_the_floor_keeps_rounding_from_counting() -> None:
    rounding = {**OBSERVED, "none": torch.full((2,), 1e-10)}
    assert distance(BalancedError(), rounding) < 1e-10
    assert distance(BalancedError(floor=0), rounding) > 1
