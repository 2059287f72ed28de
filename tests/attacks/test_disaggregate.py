"""Disaggregation from an update as a client sends it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks import disaggregate
from gradleak.attacks.disaggregation import FeatureDisaggregation
from gradleak.errors import MissingKnowledge, NotApplicable
from gradleak.models import lenet, resnet20
from gradleak.structure.head import features_and_logits, find_head
from gradleak.training import SGD, Adam, CrossEntropy, FedAvg, FedSGD, LocalTraining, parameters
from gradleak.types import Reconstruction

SHAPE = (1, 8, 8)


def victim(classes: int = 30, dtype: torch.dtype = torch.float64) -> nn.Module:
    return lenet(width=6, classes=classes, in_channels=1, image_size=8, seed=0).to(dtype)


def run(
    labels: list[int],
    training: LocalTraining | None = None,
    *,
    model: nn.Module | None = None,
    attack: FeatureDisaggregation | None = None,
) -> tuple[Reconstruction, Tensor]:
    """Return the reconstruction and the relative error of every example's features (nearest of its class)."""
    model = victim() if model is None else model
    like = next(iter(model.parameters()))
    x = torch.rand(len(labels), *SHAPE, generator=torch.Generator().manual_seed(1)).to(like)
    client = gl.Client(model, gl.Batch(x, torch.tensor(labels)), FedSGD() if training is None else training)
    found = gl.simulate(client, disaggregate() if attack is None else attack).reconstruction
    return found, errors(model, x, torch.tensor(labels), found)


def errors(model: nn.Module, x: Tensor, labels: Tensor, found: Reconstruction) -> Tensor:
    params = parameters(model)
    head = find_head(model, params, tuple(x.shape[1:]))
    assert head is not None
    assert found.features is not None
    assert found.labels is not None
    with torch.no_grad():
        truth = features_and_logits(model, params, x, head)[0]
    spread = (truth - truth.mean(0)).square().sum(1).mean().sqrt() if len(x) > 1 else truth.norm()
    distance = torch.cdist(found.features.double(), truth.double())
    same = found.labels[:, None] == labels
    return torch.where(same, distance, torch.inf).min(1).values / spread


@pytest.mark.parametrize("labels", [[5], [9, 2], [17, 3, 3, 28], [4, 1, 22, 11, 1, 7, 29, 15]])
def test_features_and_labels_of_every_example(labels: list[int]) -> None:
    found, error = run(labels)
    assert found.labels is not None
    assert found.labels.tolist() == sorted(labels)
    assert float(error.max()) < 1e-6
    assert found.status == "exact"
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert found.certificate.examples == ("proved",) * len(labels)
    assert len(found) == len(labels)
    assert found.shows == "features"


@pytest.mark.parametrize(
    "training",
    [
        FedAvg(lr=0.1),
        FedAvg(optimizer=SGD(0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)),
        FedSGD(CrossEntropy("sum")),
        FedSGD(CrossEntropy(label_smoothing=0.1)),
    ],
)
def test_other_losses_and_deltas_of_one_step(training: LocalTraining) -> None:
    found, error = run([17, 3, 3, 28], training)
    assert found.labels is not None
    assert found.labels.tolist() == [3, 3, 17, 28]
    assert float(error.max()) < 1e-4


@pytest.mark.parametrize(
    "training", [FedAvg(lr=0.1, epochs=2), FedAvg(lr=0.1, batch_size=2), FedAvg(optimizer=Adam(1e-3))]
)
def test_several_steps_are_not_one_gradient(training: LocalTraining) -> None:
    with pytest.raises(NotApplicable, match=r"unrolls|simulates"):
        run([17, 3, 3, 28], training)


def test_conditions_are_named() -> None:
    with pytest.raises(NotApplicable, match="rank at most 4"):
        run([0, 1, 2, 3, 4], model=victim(5))
    with pytest.raises(NotApplicable, match="linear layer as the model's output"):
        run([1], model=nn.Sequential(victim(), nn.Tanh()))
    with pytest.raises(NotApplicable, match="softmax cross-entropy"):
        run([1], FedSGD(nn.functional.multi_margin_loss))
    client = gl.Client(victim(), gl.Batch(torch.rand(1, *SHAPE).double(), torch.tensor([0])))
    with pytest.raises(MissingKnowledge, match="BATCH_SIZE"):
        gl.simulate(client, disaggregate(), threat=gl.ThreatModel(gl.Knowledge.TRAINING))


def test_features_as_inputs_of_a_bare_head() -> None:
    generator = torch.Generator().manual_seed(4)
    model = nn.Linear(12, 9).double()
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    x = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    client = gl.Client(model, gl.Batch(x, torch.tensor([1, 4, 8])))
    found = gl.simulate(client, disaggregate(), space=gl.TensorSpace((12,))).reconstruction
    assert float((found.inputs - x).abs().max()) < 1e-9


class NoBias(nn.Module):
    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.fc = nn.Linear(32, classes, bias=False)
        generator = torch.Generator().manual_seed(3)
        for p in self.parameters():
            nn.init.uniform_(p, -0.3, 0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.hidden(x.flatten(1))))


def test_without_bias_the_residual_finds_the_right_counts() -> None:
    for labels in ([2], [2, 11], [2, 2, 11, 19], [0, 3, 3, 8, 12, 19]):
        found, error = run(labels, model=NoBias().double())
        assert found.labels is not None
        assert found.labels.tolist() == labels
        assert float(error.max()) < 1e-6


@pytest.mark.data
@pytest.mark.parametrize("mode", [False, True])
def test_float32_residual_network_with_photographs(data_dir: Path, mode: bool) -> None:
    archive = np.load(data_dir / "cifar100.npz", allow_pickle=False)
    x = torch.tensor(archive["x_test"][:12] / 255.0).permute(0, 3, 1, 2).float()
    y = torch.tensor(archive["y_test"][:12].astype("int64"))
    model = resnet20(classes=100, seed=0).train(mode)
    update = FedSGD()(model, gl.Batch(x, y))
    seen = gl.ThreatModel().observe(
        model, update, space=gl.ImageSpace((3, 32, 32)), training=FedSGD(), batch_size=12, labels=y
    )
    found = disaggregate().reconstruct(seen)
    error = errors(model, x, y, found)
    unique = torch.bincount(y, minlength=100)[found.labels] == 1
    assert int(unique.sum()) > 6
    assert float(error[unique].max()) < 1e-4
    assert found.certificate is not None
    for k, verdict in enumerate(found.certificate.examples):
        assert verdict != "exact" or float(error[k]) < 1e-2


def test_fewer_live_features_than_examples_is_no_crash() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    with torch.no_grad():
        model[1].bias[2:] = -100.0
    client = gl.Client(model, gl.Batch(torch.rand(4, 3, 2, 2), torch.tensor([1, 4, 4, 7])))
    seen = gl.ThreatModel().observe(
        model, client.send(), space=gl.ImageSpace((3, 2, 2)), training=client.training, batch_size=4
    )
    found = gl.attacks.disaggregate().reconstruct(seen)
    assert found.certificate is not None
    assert "exact" not in found.certificate.examples
