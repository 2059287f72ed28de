"""SPEAR: batches taken apart by the zeros of a ReLU, and what it refuses to say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks import auto, spear
from gradleak.errors import InvalidInput, MissingKnowledge, NotApplicable
from gradleak.training import FedAvg, FedSGD, LocalTraining

WIDTH = 30


def network(*between: nn.Module, hidden: int = 60, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    middle = between or (nn.ReLU(), nn.Linear(hidden, 40), nn.ReLU(), nn.Linear(40, 10))
    return nn.Sequential(nn.Linear(WIDTH, hidden), *middle)


def client(
    count: int, model: nn.Module | None = None, training: LocalTraining | None = None, *, seed: int = 0
) -> gl.Client:
    draw = torch.Generator().manual_seed(seed)
    batch = gl.Batch(torch.randn(count, WIDTH, generator=draw), torch.randint(0, 10, (count,), generator=draw))
    return gl.Client(network(seed=seed) if model is None else model, batch, training or FedSGD())


def attack(sender: gl.Client, how: gl.attacks.base.Attack | None = None) -> gl.Reconstruction:
    return gl.simulate(sender, how or spear(), space=gl.TensorSpace((WIDTH,))).reconstruction


def errors(found: gl.Reconstruction, sender: gl.Client) -> Tensor:
    return (found.inputs[:, None] - sender.batch.inputs).abs().amax(2).amin(0)


@pytest.mark.parametrize("count", [2, 6, 10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_batch_comes_back_with_its_labels_proved(count: int, seed: int) -> None:
    sender = client(count, seed=seed)
    found = attack(sender)
    assert float(errors(found, sender).max()) <= 1e-4
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert found.status == "exact"
    assert bool(found.solved.all())
    assert found.labels is not None
    assert found.labels.sort().values.equal(sender.batch.labels.sort().values)
    assert found.construction is not None
    assert found.construction.error <= 1e-5


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.Hardtanh(0, 1), nn.Sequential(nn.BatchNorm1d(60), nn.ReLU())])
def test_any_activation_that_is_flat_on_one_side_will_do(between: nn.Module) -> None:
    sender = client(5, network(between, nn.Linear(60, 10)).eval())
    found = attack(sender)
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert float(errors(found, sender).max()) <= 1e-4


@pytest.mark.parametrize("between", [nn.LeakyReLU(), nn.GELU(), nn.Tanh()])
def test_without_zeros_it_says_so(between: nn.Module) -> None:
    with pytest.raises(NotApplicable, match="lets every unit through"):
        attack(client(4, network(between, nn.Linear(60, 10))))


def test_what_it_needs_is_said() -> None:
    with pytest.raises(NotApplicable, match="no trained bias"):
        attack(client(3, nn.Sequential(nn.Linear(WIDTH, 60, bias=False), nn.ReLU(), nn.Linear(60, 10))))
    with pytest.raises(NotApplicable, match="without a gap"):
        attack(client(4, training=gl.defenses.gaussian_noise(1e-3).wrap(FedSGD())))
    with pytest.raises(NotApplicable, match="no single gradient"):
        attack(client(4, training=FedAvg(epochs=3, lr=0.1)))
    with pytest.raises(InvalidInput, match="one start"):
        spear(starts=0)


def test_equal_examples_lower_the_rank() -> None:
    sender = client(4)
    twins = gl.Client(sender.model, gl.Batch(sender.batch.inputs[[0, 1, 2, 2]], sender.batch.labels))
    with pytest.raises(NotApplicable, match="rank 3 for 4 examples"):
        attack(twins)


def test_one_step_of_local_training_is_a_gradient() -> None:
    sender = client(4, training=FedAvg(lr=0.5))
    assert float(errors(attack(sender), sender).max()) <= 1e-2


def test_too_large_a_batch_is_refused() -> None:
    with pytest.raises(NotApplicable, match="too few to tell"):
        attack(client(29, network(hidden=50)))
    with pytest.raises(NotApplicable, match="0 were found in 64 starts"):
        attack(client(24, network(nn.ReLU(), nn.Linear(60, 10))), spear(starts=64))


def test_what_was_found_when_the_time_ends_is_right() -> None:
    sender = client(14)

    def stop(progress: gl.attacks.base.Progress) -> None:
        if progress.done > 0:
            raise KeyboardInterrupt

    seen = gl.ThreatModel().observe(
        sender.model, sender.send(), space=gl.TensorSpace((WIDTH,)), training=sender.training, batch_size=14
    )
    found = spear().reconstruct(seen, callback=stop)
    assert found.status == "interrupted"
    assert found.certificate is not None
    assert found.certificate.verdict == "unproved"
    assert found.solved is not None
    assert 0 < int(found.solved.sum()) < 14
    near = (found.inputs[:, None] - sender.batch.inputs).abs().amax(2).amin(1)
    assert float(near[found.solved].max()) <= 1e-3
    assert found.findings[0].count == int(found.solved.sum())


def test_auto_takes_a_batch_apart_and_keeps_the_granted_order() -> None:
    sender = client(8)
    threat = gl.ThreatModel(gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.LABELS)
    found = gl.simulate(sender, auto(), threat=threat, space=gl.TensorSpace((WIDTH,))).reconstruction
    assert found.attack == "spear"
    assert found.labels is not None
    assert found.labels.equal(sender.batch.labels)


def test_without_a_stated_number_nothing_is_proved() -> None:
    sender = client(3, network(hidden=20))
    seen = gl.ThreatModel(gl.Knowledge.TRAINING).observe(
        sender.model, sender.send(), space=gl.TensorSpace((WIDTH,)), training=sender.training
    )
    try:
        found = spear().reconstruct(seen)
    except (NotApplicable, MissingKnowledge):
        return
    assert found.certificate is not None
    assert found.certificate.verdict != "proved"


def test_one_output_mixes_nothing() -> None:
    # Units with the same active examples show the same mixture, which division reads as an input.
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 1))
    x, y = torch.randn(3, 20), torch.tensor([[1.0], [-2.0], [5.0]])
    sender = gl.Client(model, gl.Batch(x, y), FedSGD(nn.functional.mse_loss))
    for how in (gl.attacks.linear_inversion(), spear(), auto()):
        found = gl.simulate(sender, how, space=gl.TensorSpace((20,))).reconstruction
        assert float((found.inputs[:, None] - x).abs().amax(2).amin(1).max()) <= 1e-4


@pytest.mark.parametrize("factor", [3.0, 1.0])
def test_examples_that_activate_the_same_units_are_not_mixed(factor: float) -> None:
    # Behind the same units a mixture at the edge of one more unit looks like an example of its own.
    for seed in range(12):
        torch.manual_seed(seed)
        x = torch.randn(3, WIDTH)
        x[1] = factor * x[0]
        sender = gl.Client(network(hidden=20, seed=seed), gl.Batch(x, torch.tensor([1, 2, 3])))
        try:
            found = attack(sender, spear(starts=64))
        except NotApplicable:
            continue
        if found.solved is not None:
            shown = found.inputs[found.solved]
            assert float((shown[:, None] - x).abs().amax(2).amin(1).max()) <= 1e-3
