"""How many examples an update shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.attacks.counting import count_examples
from gradleak.training import BinaryCrossEntropy


def model(outputs: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("outputs", [1, 10])
def test_the_rank_counts_examples(size: int, outputs: int) -> None:
    draw = torch.Generator().manual_seed(size)
    x = torch.randn(size, 20, generator=draw)
    loss = gl.CrossEntropy() if outputs > 1 else BinaryCrossEntropy()
    y = torch.arange(size) % outputs if outputs > 1 else torch.ones(size, 1)
    net, training = model(outputs), gl.FedSGD(loss)
    found = count_examples(net, training(net, gl.Batch(x, y)), training, gl.TensorSpace((20,)))
    assert found.count == size


def test_more_examples_than_ranks_are_not_counted() -> None:
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    net, training = model(10), gl.FedSGD()
    found = count_examples(net, training(net, gl.Batch(x, torch.arange(40) % 10)), training, gl.TensorSpace((20,)))
    assert found.count is None
    assert "or more" in found.reason


def test_convolutions_alone_do_not_count() -> None:
    net, training = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), gl.FedSGD()
    update = training(net, gl.Batch(torch.rand(1, 1, 8, 8), torch.tensor([1])))
    assert count_examples(net, update, training, gl.ImageSpace((1, 8, 8))).count is None
