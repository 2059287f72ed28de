"""Known examples stay as they are, bit for bit, and the others are searched around them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.matching import LBFGS, GradientMatching
from gradleak.attacks.matching.problem import _arrangements
from gradleak.errors import InvalidInput

TOLD = gl.ThreatModel(gl.ThreatModel().knows | gl.Knowledge.LABELS)
SHAPE = (1, 5, 5)
SPACE = gl.ImageSpace(SHAPE, mean=(0.4,), std=(0.3,))  # so that encoding and decoding rounds
LABELS = torch.tensor([2, 0, 1])


def batch(seed: int = 0) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, 4)
    ).double()
    for p in model.parameters():
        nn.init.uniform_(p, -0.6, 0.6, generator=generator)
    return model, torch.rand(3, *SHAPE, generator=generator)


def observe(threat: gl.ThreatModel = TOLD, labels: Tensor = LABELS) -> tuple[gl.Observation, Tensor]:
    model, images = batch()
    client = gl.Client(model, gl.Batch(SPACE.encode(images).double(), labels))
    seen = threat.observe(
        model, client.send(), space=SPACE, training=client.training, batch_size=3, labels=client.batch.labels
    )
    return seen, images


SEARCH = GradientMatching(solver=LBFGS(iterations=2500), tolerance=1e-13, trace=False)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [[True, False, True], [False, True, False]])
@pytest.mark.parametrize("restarts", [1, 3])
def test_known_rows_stay_bit_for_bit_and_the_rest_is_found(mask: list[bool], restarts: int) -> None:
    seen, images = observe()
    solved, chosen = images.clone(), torch.tensor(mask)
    solved[~chosen] = torch.nan  # What lies outside the mask must not matter.
    attack = dataclasses.replace(SEARCH, restarts=restarts)
    found = attack.around(seen, solved, chosen)
    assert torch.equal(found.inputs[chosen].float(), images[chosen])
    assert float((found.inputs - images).square().mean()) < 1e-8
    assert found.labels is not None
    assert found.labels.tolist() == LABELS.tolist()
    assert found.solved is not None
    assert found.solved.tolist() == mask


def test_labels_may_be_unknown_or_stated_in_the_order_of_the_rows() -> None:
    seen, images = observe(gl.ThreatModel())
    mask = torch.tensor([True, True, False])
    found = dataclasses.replace(SEARCH, labels="recovered").around(seen, images, mask)
    assert found.labels is not None
    assert found.labels.tolist() == LABELS.tolist()
    assert float((found.inputs - images).square().mean()) < 1e-8
    order = torch.tensor([2, 0, 1])
    turned = SEARCH.around(seen, images[order], mask, LABELS[order])
    assert float((turned.inputs - images[order]).square().mean()) < 1e-8
    assert turned.labels is not None
    assert turned.labels.tolist() == LABELS[order].tolist()


def test_granted_labels_are_paired_with_rows_that_come_in_another_order() -> None:
    seen, images = observe()
    order, mask = torch.tensor([2, 0, 1]), torch.tensor([True, True, False])
    found = SEARCH.around(seen, images[order], mask)
    assert found.labels is not None
    assert found.labels.tolist() == LABELS[order].tolist()
    assert float((found.inputs - images[order]).square().mean()) < 1e-6


def test_ways_to_pair_labels_with_rows_are_counted_once() -> None:
    ways = _arrangements(torch.tensor([7, 7, 3]), [0, 2])
    assert ways is not None
    assert sorted(ways.tolist()) == [[3, 7, 7], [7, 3, 7], [7, 7, 3]]
    assert _arrangements(torch.arange(5), [0, 1, 2, 3]) is None  # 120 ways


def test_nothing_known_is_the_plain_reconstruction() -> None:
    seen, images = observe()
    attack = GradientMatching(solver=LBFGS(iterations=30))
    plain = attack.reconstruct(seen, seed=4)
    around = attack.around(seen, images, torch.zeros(3, dtype=torch.bool), seed=4)
    assert torch.equal(around.inputs, plain.inputs)
    assert around.objective == plain.objective
    assert plain.solved is None


def test_everything_known_is_only_measured() -> None:
    seen, images = observe()
    found = GradientMatching().around(seen, images, torch.ones(3, dtype=torch.bool), LABELS)
    assert torch.equal(found.inputs.float(), images)
    assert found.objective < 1e-10
    assert found.evaluations == 1
    wrong = GradientMatching().around(seen, 1 - images, torch.ones(3, dtype=torch.bool))
    assert wrong.objective > 1e-3


def test_known_rows_that_do_not_fit_are_refused() -> None:
    seen, images = observe()
    with pytest.raises(InvalidInput, match="one boolean"):
        SEARCH.around(seen, images, torch.tensor([True, False]))
    with pytest.raises(InvalidInput, match="not finite"):
        SEARCH.around(seen, images / 0, torch.tensor([True, False, False]))
