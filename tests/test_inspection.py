from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.attacks.auto import WAYS
from gradleak.attacks.counting import gradient_rank
from gradleak.defenses import gaussian_noise
from gradleak.errors import InvalidInput
from gradleak.inspection import Gives, Prediction

KNOWS = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE


def observe(model: nn.Module, count: int, shape: tuple[int, ...], training=None, knows=KNOWS) -> gl.Observation:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(count, *shape, generator=draw)
    training = training or gl.FedSGD()
    batch = gl.Batch(inputs, torch.arange(count) % 5)
    space = gl.ImageSpace(shape) if len(shape) == 3 else gl.TensorSpace(shape)
    return gl.ThreatModel(knows).observe(
        model, training(model, batch), space=space, training=training, batch_size=count
    )


def rows(width: int = 40) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 5))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(18, 5))


@pytest.mark.parametrize(
    ("model", "count", "shape", "training", "prediction"),
    [
        (rows(), 1, (12,), None, Prediction.EXACT),
        (rows(), 4, (12,), None, Prediction.EXACT),
        (rows(), 4, (12,), gl.FedAvg(0.1, steps=3), Prediction.PARTIAL),
        (rows(3), 8, (12,), None, Prediction.MATCHING),
        (convolutions(), 4, (1, 8, 8), None, Prediction.MATCHING),
        (rows(), 1, (12,), gaussian_noise(10.0).wrap(gl.FedSGD()), Prediction.NOTHING),
    ],
)
def test_predictions(model, count, shape, training, prediction) -> None:
    found = gl.inspect(observe(model, count, shape, training))
    assert found.prediction is prediction, found.reason
    assert found.seconds < 10
    assert [w.name for w in found.ways] == [w.name for w in WAYS if not w.continues]
    assert all(w.reason.endswith(".") for w in found.ways)
    assert found.reason in str(found)
    assert json.loads(json.dumps(found.to_json()))["prediction"] == prediction


def test_what_is_predicted_exact_is_what_auto_finds() -> None:
    observation = observe(rows(), 4, (12,))
    found, done = gl.inspect(observation), gl.attacks.auto().reconstruct(observation)
    solving = [w.name for w in found.ways if w.solved == 4]
    assert solving == [done.attack]
    assert found.reason == f"{done.attack} solves all of 4, {done.certificate.verdict}."


def test_layers_say_what_they_give() -> None:
    found = gl.inspect(observe(rows(), 3, (12,)))
    first, last = found.layers
    assert (first.name, first.kind, first.numbers, first.vectors) == ("0", "Linear", 12 * 40 + 40, 1)
    assert (first.rank, first.largest) == (3, 12)
    assert set(first.gives) == {Gives.INPUTS, Gives.SPAN}
    assert Gives.LABELS in last.gives
    assert found.counted.count == 3
    pixels = gl.inspect(observe(convolutions(), 2, (1, 8, 8)))
    assert pixels.layers[0].gives == (Gives.EQUATIONS,)


def test_what_noise_covers_gives_nothing() -> None:
    found = gl.inspect(observe(rows(), 1, (12,), gaussian_noise(10.0).wrap(gl.FedSGD())))
    assert [layer.gives for layer in found.layers] == [(), ()]
    faint = gl.inspect(observe(rows(), 1, (12,), gaussian_noise(1e-9).wrap(gl.FedSGD())))
    assert Gives.INPUTS in faint.layers[0].gives


def test_ids_are_named() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(50, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(x.round().long().clamp(0, 49)).mean(1))

    torch.manual_seed(0)
    model = Looks()
    batch = gl.Batch(torch.tensor([[3.0, 7.0, 7.0]]), torch.tensor([1]))
    update = gl.FedSGD()(model, batch)
    observation = gl.ThreatModel(KNOWS).observe(
        model, update, space=gl.TensorSpace((3,)), training=gl.FedSGD(), batch_size=1
    )
    found = gl.inspect(observation)
    table = next(layer for layer in found.layers if layer.name == "table")
    assert table.gives == (Gives.IDS,)
    assert "2 of 50" in table.text
    assert found.prediction is Prediction.PARTIAL


def test_what_is_not_granted_is_said() -> None:
    found = gl.inspect(observe(rows(), 2, (12,), knows=gl.Knowledge.NOTHING))
    assert found.examples is None
    assert found.prediction is Prediction.NOTHING
    assert any("TRAINING" in w.reason or "BATCH_SIZE" in w.reason for w in found.ways)


@pytest.mark.parametrize("rank", [0, 1, 3, 40])
def test_rank_of_a_large_gradient(rank: int) -> None:
    draw = torch.Generator().manual_seed(rank)
    gradient = torch.randn(600, rank, generator=draw) @ torch.randn(rank, 700, generator=draw)
    assert gradient_rank(gradient) == (rank, 512)


def test_no_time_is_refused() -> None:
    with pytest.raises(InvalidInput, match="above 0"):
        gl.inspect(observe(rows(), 1, (12,)), seconds=0)
