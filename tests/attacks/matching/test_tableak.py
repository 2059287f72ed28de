from __future__ import annotations

import pytest
import torch

import gradleak as gl
from gradleak.attacks.matching.papers.tableak import _aligned, _confidence
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.spaces import Category, Number, TableSpace
from gradleak.types import Reconstruction

SPACE = TableSpace(
    (
        Number("age", low=17, high=90, mean=40, std=10, decimals=0),
        Category("job", ("clerk", "nurse", "cook")),
        Category("town", ("Rome", "Oslo")),
    )
)
ROWS = torch.tensor([[30.0, 1, 0], [52.0, 2, 1]], dtype=torch.float64)


def exchange(attack, knows: gl.Knowledge = gl.Knowledge.LABELS):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.ReLU(), torch.nn.Linear(40, 2))
    batch = gl.Batch(SPACE.encode(ROWS).float(), torch.tensor([0, 1]))
    threat = gl.ThreatModel(gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | knows)
    return gl.simulate(gl.Client(model, batch), attack, space=SPACE, threat=threat)


def test_the_ensemble_finds_the_rows() -> None:
    found = exchange(gl.attacks.tableak(members=3, iterations=400)).reconstruction
    assert torch.equal(found.inputs, ROWS)  # numbers too: with the right categories they are solved
    assert found.confidence.shape == (2, 3)
    assert found.certificate.verdict in ("matched", "proved")


def test_equal_seeds_give_equal_rows() -> None:
    first, second = (exchange(gl.attacks.tableak(members=2, iterations=5)).reconstruction for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)


def test_known_rows_stay_as_they_are() -> None:
    seen = exchange(gl.attacks.tableak(members=1, iterations=1)).observation
    attack = gl.attacks.tableak(members=2, iterations=20)
    mask = torch.tensor([False, True])
    result = attack.around(seen, ROWS, mask)
    assert torch.equal(result.inputs[1], ROWS[1])
    assert result.solved.tolist() == [False, True]


def found(inputs: torch.Tensor, labels: list[int]) -> Reconstruction:
    return Reconstruction(inputs, torch.tensor(labels), 0.0)


def test_members_are_aligned_but_never_across_classes() -> None:
    soft, nobody = SPACE.encode(ROWS), torch.zeros(2, dtype=torch.bool)
    assert torch.equal(_aligned(SPACE, found(soft.flip(0), [0, 0]), found(soft, [0, 0]), nobody), soft)
    assert torch.equal(_aligned(SPACE, found(soft.flip(0), [0, 1]), found(soft, [0, 1]), nobody), soft.flip(0))


def test_confidence_is_what_members_agree_on() -> None:
    one, other = SPACE.encode(ROWS[:1]), SPACE.encode(ROWS[1:])
    assert torch.equal(_confidence(SPACE, torch.stack([one, one])), torch.ones(1, 3, dtype=torch.float64))
    mixed = _confidence(SPACE, torch.stack([one, other]))
    assert mixed[0, 0] == 0.5
    assert float(mixed[0, 2]) == pytest.approx(0, abs=1e-6)


def test_other_inputs_are_refused() -> None:
    model = torch.nn.Linear(3, 2)
    client = gl.Client(model, gl.Batch(torch.zeros(1, 3), torch.tensor([0])))
    with pytest.raises(NotApplicable, match="TableSpace"):
        gl.simulate(client, gl.attacks.tableak(), space=gl.TensorSpace((3,)))
    codes = TableSpace((Number("x"), Number("y"), Category("c", ("a", "b"), one_hot=False)))
    with pytest.raises(NotApplicable, match="entity_embeddings"):
        gl.simulate(client, gl.attacks.tableak(), space=codes)
    with pytest.raises(InvalidInput, match="members"):
        gl.attacks.tableak(members=0)
