"""Matching with one feature target per example."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.attacks.feature_matching import FEATURES, decouple
from gradleak.attacks.peeling import separate_batch
from gradleak.errors import NotApplicable

SHAPE = (1, 8, 8)


def victim(
    n: int, labels: list[int], loss: gl.CrossEntropy | None = None, width: int = 8
) -> tuple[gl.Client, gl.Observation]:
    model = gl.models.lenet(width=width, classes=12, in_channels=1, image_size=8, seed=0).double()
    images = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    training = gl.FedSGD(gl.CrossEntropy() if loss is None else loss)
    client = gl.Client(model, gl.Batch(images, torch.tensor(labels)), training)
    seen = gl.ThreatModel().observe(model, client.send(), space=gl.ImageSpace(SHAPE), training=training, batch_size=n)
    return client, seen


@pytest.mark.parametrize("peeled", [False, True])
@pytest.mark.parametrize("loss", [gl.CrossEntropy(), gl.CrossEntropy("sum", 0.1)])
def test_the_decoupled_map_equals_the_body_of_the_gradient(loss: gl.CrossEntropy, peeled: bool) -> None:
    client, seen = victim(9, list(range(9)), loss, width=4)
    whole = separate_batch(seen, gl.attacks.disaggregate())
    separated = whole if peeled else replace(whole, chain=None, peeled=None)
    reduced = decouple(seen, separated, 0.2)
    assert reduced.training is not None
    again = reduced.training.tensors(reduced.model, reduced.params, client.batch.inputs, client.batch.labels)
    dropped = ("fc", "body.4") if peeled else ("fc",)
    assert set(again) == {k for k in seen.update.tensors if not k.startswith(dropped)} | {FEATURES}
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, reduced.update.tensors[name], rtol=1e-9, atol=1e-12)


def test_a_batch_comes_back_with_its_labels_and_the_model_is_left_alone() -> None:
    client, seen = victim(3, [7, 0, 4])
    state = {k: v.clone() for k, v in seen.model.state_dict().items()}
    found = gl.attacks.feature_matching(iterations=1500).reconstruct(seen)
    assert list(seen.model.state_dict()) == list(state)
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0, 4, 7]
    order = [found.labels.tolist().index(k) for k in (7, 0, 4)]
    assert float((found.inputs[order] - client.batch.inputs).square().mean()) <= 1e-4


class Branching(nn.Module):
    """Two paths that join, then a convolution that a batch's gradient would determine."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(1, 4, 1)
        self.third = nn.Conv2d(4, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24 * 4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.tanh(self.first(x)) + self.second(x)
        logits: torch.Tensor = self.head(torch.sigmoid(self.third(joined)).flatten(1))
        return logits


def test_a_chain_that_does_not_begin_at_the_input_is_left_whole() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branching().double()
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    client = gl.Client(model, gl.Batch(images, torch.tensor([2, 5])))
    seen = gl.ThreatModel().observe(
        model, client.send(), space=gl.ImageSpace((1, 4, 4)), training=client.training, batch_size=2
    )
    separated = separate_batch(seen, gl.attacks.disaggregate())
    assert not separated.complete
    found = gl.attacks.feature_matching(iterations=1500).reconstruct(seen)
    assert float((found.inputs - images).square().mean()) <= 1e-4
    with pytest.raises(NotApplicable, match="joins"):
        gl.attacks.recursion().reconstruct(seen)


def test_weight_deltas_are_refused_with_the_alternative() -> None:
    client, _ = victim(1, [3])
    training = gl.FedAvg(lr=0.1)
    seen = gl.ThreatModel().observe(
        client.model,
        gl.Client(client.model, client.batch, training).send(),
        space=gl.ImageSpace(SHAPE),
        training=training,
        batch_size=1,
    )
    with pytest.raises(NotApplicable, match=r"dlg\(\)"):
        gl.attacks.feature_matching().reconstruct(seen)
