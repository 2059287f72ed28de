"""Labels in the form that the client's loss has them: granted, recovered, tried in turn, or optimized."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak as gl
from gradleak.attacks.matching import LBFGS, GradientMatching
from gradleak.errors import NotApplicable
from gradleak.training import BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError
from gradleak.types import NoteKind

TOLD = gl.ThreatModel(gl.ThreatModel().knows | gl.Knowledge.LABELS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.uniform_(p, -0.6, 0.6, generator=generator)
    return model.double()


def perceptron(outputs: int, width: int = 24) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs)))


def observe(
    model: nn.Module, inputs: Tensor, labels: Tensor, loss: Loss | None = None, threat: gl.ThreatModel | None = None
) -> gl.Observation:
    training = gl.FedSGD() if loss is None else gl.FedSGD(loss)
    client = gl.Client(model, gl.Batch(inputs, labels), training)
    return (threat or gl.ThreatModel()).observe(
        model,
        client.send(),
        space=gl.TensorSpace(tuple(inputs.shape[1:])),
        training=client.training,
        batch_size=len(inputs),
        labels=labels,
    )


def far(found: Tensor, truth: Tensor) -> float:
    """Return how far the worst private row is from the nearest reconstructed one."""
    return float(torch.cdist(found.flatten(1).double(), truth.flatten(1)).amin(0).max())


SEARCH = GradientMatching(solver=LBFGS(iterations=1500), tolerance=1e-18, trace=False)

# ------------------------------------------------------------------------------------------- optimized with the inputs


def test_real_targets_are_optimized_with_the_inputs() -> None:
    x, y = draw(2, 6), draw(2, 3, seed=1) * 4
    found = SEARCH.reconstruct(observe(perceptron(3), x, y, MeanSquaredError()))
    assert far(found.inputs, x) < 1e-5
    assert found.labels is None  # numbers are no classes
    assert found.label_probabilities is not None
    assert far(found.label_probabilities, y) < 1e-5


def test_probabilities_of_several_outputs_are_optimized_with_the_inputs() -> None:
    x, y = draw(1, 6), torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    attack = dataclasses.replace(SEARCH, restarts=4)  # Some starts end at a false minimum.
    found = attack.reconstruct(observe(perceptron(4), x, y, BinaryCrossEntropy()))
    assert far(found.inputs, x) < 1e-4
    assert found.label_probabilities is not None
    assert found.label_probabilities.round().tolist() == y.tolist()


def test_a_single_output_has_labels_zero_and_one() -> None:
    x, y = draw(1, 6), torch.tensor([[1.0]], dtype=torch.float64)
    found = SEARCH.reconstruct(observe(perceptron(1), x, y, BinaryCrossEntropy()))
    assert found.labels is not None
    assert found.labels.tolist() == [1]
    assert far(found.inputs, x) < 1e-4


def test_classes_with_weights_are_optimized_with_the_inputs() -> None:
    loss = CrossEntropy(weight=(0.2, 1.0, 3.0, 0.5))
    x, y = draw(2, 6), torch.tensor([2, 0])
    found = SEARCH.reconstruct(observe(perceptron(4), x, y, loss))
    assert far(found.inputs, x) < 1e-4
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0, 2]


def test_counts_that_ignore_class_weights_are_not_trusted() -> None:
    loss = CrossEntropy(weight=(0.2, 1.0, 3.0, 0.5))
    x, y = draw(3, 6), torch.tensor([2, 0, 1])
    found = gl.attacks.idlg(iterations=2000, trace=False).reconstruct(observe(perceptron(4), x, y, loss))
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [0, 1, 2]
    assert far(found.inputs, x) < 1e-4


def dense() -> nn.Module:
    return seeded(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 3, 3, padding=1)))


def test_classes_along_axis_one_of_dense_outputs() -> None:
    x = draw(1, 1, 4, 4)
    y = (3 * draw(1, 4, 4, seed=2)).long()
    found = SEARCH.reconstruct(observe(dense(), x, y))
    assert found.labels is not None
    assert found.labels.shape == y.shape
    assert found.label_probabilities is not None
    torch.testing.assert_close(found.label_probabilities.sum(1), torch.ones(1, 4, 4, dtype=torch.float64))
    told = SEARCH.reconstruct(observe(dense(), x, y, threat=TOLD))
    assert far(told.inputs, x) < 1e-4
    assert told.labels is not None
    assert torch.equal(told.labels, y)


# ------------------------------------------------------------------------------------------------------------ granted


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Divide as torch does: by the weights of the classes for indices, by the examples for probabilities."""
    return F.cross_entropy(outputs, targets, weight=torch.tensor([0.2, 1.0, 3.0, 0.5]).to(outputs))


@pytest.mark.parametrize("restarts", [1, 3])
def test_granted_indices_reach_the_loss_as_indices(restarts: int) -> None:
    x, y = draw(3, 6), torch.tensor([2, 0, 3])
    assert weighted(x[:, :4], y) != pytest.approx(weighted(x[:, :4], F.one_hot(y, 4).double()))
    attack = dataclasses.replace(SEARCH, restarts=restarts)
    found = attack.reconstruct(observe(perceptron(4), x, y, weighted, TOLD))
    torch.testing.assert_close(found.inputs, x, rtol=0, atol=1e-5)


def test_a_loss_that_differs_for_probabilities_is_not_optimized_over_them() -> None:
    with pytest.raises(NotApplicable, match=r"grant LABELS.*CrossEntropy\(weight"):
        SEARCH.reconstruct(observe(perceptron(4), draw(3, 6), torch.tensor([2, 0, 3]), weighted))


def flat(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], targets)


def test_a_loss_with_targets_of_another_shape_needs_granted_labels() -> None:
    x, y = draw(1, 6), torch.ones(1, dtype=torch.float64)
    with pytest.raises(NotApplicable, match=r"outputs' shape \(1, 1\).*grant LABELS"):
        SEARCH.reconstruct(observe(perceptron(1), x, y, flat))
    assert far(SEARCH.reconstruct(observe(perceptron(1), x, y, flat, TOLD)).inputs, x) < 1e-4


def indices_only(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(outputs.log_softmax(1), targets)


def test_a_loss_of_indices_only_tries_every_class_for_a_lone_example() -> None:
    x = draw(1, 6)
    found = SEARCH.reconstruct(observe(perceptron(4), x, torch.tensor([3]), indices_only))
    assert found.labels is not None
    assert found.labels.tolist() == [3]
    assert far(found.inputs, x) < 1e-5
    assert [n.kind for n in found.notes] == [NoteKind.LABELS]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 4), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).tanh()
        return self.first(hidden), self.second(hidden)


def both(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    second = F.binary_cross_entropy_with_logits(outputs[1], targets[:, 1:].to(outputs[1]))
    return F.cross_entropy(outputs[0], targets[:, 0]) + second


def test_several_heads_need_granted_labels() -> None:
    x, y = draw(2, 6), torch.tensor([[1, 0, 1], [3, 1, 1]])
    found = SEARCH.reconstruct(observe(seeded(TwoHeads()), x, y, both, TOLD))  # type: ignore[arg-type]
    torch.testing.assert_close(found.inputs, x, rtol=0, atol=1e-5)
    with pytest.raises(NotApplicable, match=r"returns a tuple.*grant LABELS"):
        SEARCH.reconstruct(observe(seeded(TwoHeads()), x, y, both))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- where the head says nothing


def frozen() -> nn.Module:
    model = perceptron(4)
    model[2].requires_grad_(False)
    return model


def headless() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 4), nn.Tanh()))


@pytest.mark.parametrize("make", [frozen, headless])
def test_every_class_is_tried_for_a_lone_example_whose_head_says_nothing(make) -> None:
    x = draw(1, 6)
    attack = gl.attacks.idlg(iterations=1500, trace=False)
    found = attack.reconstruct(observe(make(), x, torch.tensor([3])))
    assert found.labels is not None
    assert found.labels.tolist() == [3]
    assert far(found.inputs, x) < 1e-4
    assert [n.kind for n in found.notes] == [NoteKind.LABELS]


def test_labels_of_a_batch_are_optimized_where_the_head_says_nothing() -> None:
    x, y = draw(2, 6), torch.tensor([3, 1])
    found = gl.attacks.idlg(iterations=3000, trace=False).reconstruct(observe(headless(), x, y))
    assert found.label_probabilities is not None
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == [1, 3]
    assert [n.kind for n in found.notes] == [NoteKind.LABELS]
