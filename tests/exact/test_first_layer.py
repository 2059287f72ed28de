"""Inputs of a linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.exact.first_layer import invert_linear, single_example_inputs
from gradleak.models import lenet
from gradleak.structure.first_layer import InputLayer, find_input_layer
from gradleak.training import parameters


def test_outer_products_are_inverted() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    found = invert_linear(delta[:, :, None] * x[:, None], delta)
    assert float((found - x).abs().max()) < 1e-14


def test_zero_bias_gradient_is_refused() -> None:
    with pytest.raises(NotApplicable, match="another update"):
        invert_linear(torch.ones(3, 2), torch.zeros(3))


def test_rows_with_one_active_example() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 30, generator=generator, dtype=torch.float64)
    delta = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    delta = delta * (torch.rand(3, 64, generator=generator) < 0.5)
    found, rows = single_example_inputs(delta.T @ x, delta.sum(0))
    alone = (delta != 0) & ((delta != 0).sum(0) == 1)
    assert sorted(map(len, rows)) == sorted(alone.sum(1).tolist())
    assert float(torch.cdist(found, x).min(0).values.max()) < 1e-12


def test_mixed_rows_show_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 30, generator=generator, dtype=torch.float64)
    delta = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    found, rows = single_example_inputs(delta.T @ x, delta.sum(0))
    assert len(found) == len(rows) == 0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(2 * x.flatten(1))


def test_input_layer_is_found_by_what_it_sees() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 12), nn.Linear(12, 2))
    assert find_input_layer(model, parameters(model), (3, 2, 2)) == InputLayer("1", "1.weight", "1.bias")
    assert find_input_layer(Scaled(), parameters(Scaled()), (3, 2, 2)) is None
    conv = lenet(seed=0)
    assert find_input_layer(conv, parameters(conv), (3, 32, 32)) is None
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    assert find_input_layer(plain, parameters(plain), (3, 2, 2)) == InputLayer("1", "1.weight", None)
