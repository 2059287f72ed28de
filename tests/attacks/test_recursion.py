"""The exact attack behind the wall."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradleak.attacks import auto, recursion
from gradleak.errors import MissingKnowledge, NotApplicable
from gradleak.exact import choices, counting, normal_matrix
from gradleak.exchange import Client, simulate
from gradleak.metrics import assign
from gradleak.models import dlg_resnet, lenet, resnet18
from gradleak.spaces import TensorSpace
from gradleak.threat import Knowledge, ThreatModel
from gradleak.training import SGD, FedAvg, FedSGD, LocalTraining
from gradleak.types import Batch


def batch(n: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    draw = torch.Generator().manual_seed(0)
    return Batch(torch.rand(n, 3, 16, 16, generator=draw).to(dtype), torch.arange(5, 5 + n))


@pytest.mark.parametrize(
    "training",
    [FedSGD(), FedAvg(lr=0.1), FedAvg(optimizer=SGD(0.05, momentum=0.9, weight_decay=0.1, nesterov=True))],
    ids=["gradient", "one step", "one step with weight decay"],
)
def test_one_float32_example_to_the_noise_floor(training: LocalTraining) -> None:
    exchange = simulate(Client(lenet(image_size=16, seed=2), batch(), training), recursion())
    found = exchange.reconstruction
    assert found.status == "exact", found.notes
    assert float((found.inputs - exchange.truth.inputs).square().mean()) < 1e-10
    assert found.labels is not None
    assert found.labels.tolist() == [5]
    assert found.features is not None


def pooled(seed: int, channels: tuple[int, int] = (12, 16), side: int = 8) -> nn.Module:
    """The CNN of McMahan et al. 2017, small."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, channels[0], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(*channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(channels[1] * (side // 4) ** 2, 24), nn.ReLU(), nn.Linear(24, 10),
        )  # fmt: skip


def image(n: int = 1, side: int = 8) -> Batch:
    return Batch(torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)), torch.arange(n))


def test_through_max_pooling_and_relu() -> None:
    exchange = simulate(Client(pooled(1), image()), auto())
    found, proof = exchange.reconstruction, exchange.reconstruction.certificate
    assert found.attack == "recursion"
    assert proof is not None
    assert proof.verdict == "proved", found.notes
    assert proof.local
    assert float((found.inputs - exchange.truth.inputs).square().mean()) < 1e-10


@pytest.mark.slow
def test_two_examples_through_max_pooling() -> None:
    exchange = simulate(Client(pooled(0, (24, 32)), image(2)), recursion())
    found, proof = exchange.reconstruction, exchange.reconstruction.certificate
    assert proof is not None
    assert proof.verdict == "proved", found.notes
    order = assign(found.inputs, exchange.truth.inputs)
    assert float((found.inputs[order] - exchange.truth.inputs).square().mean()) < 1e-10


@pytest.mark.slow
def test_a_guess_behind_choices_that_were_not_found_is_finite_and_unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_TRIES", 1)
    monkeypatch.setattr(choices, "_BETAS", (4.0, 100.0))
    exchange = simulate(Client(pooled(0, (4, 6), side=16), image(side=16)), recursion())
    found, proof = exchange.reconstruction, exchange.reconstruction.certificate
    assert "is not known" in " ".join(found.notes)
    assert bool(torch.isfinite(found.inputs).all())
    assert proof is not None
    assert proof.verdict == "unproved"


@pytest.mark.slow
def test_a_search_for_choices_leaves_time_to_others() -> None:
    client = Client(pooled(0, (4, 6), side=16), image(side=16))
    found = simulate(client, auto(budget=2)).reconstruction
    assert found.seconds is not None
    assert found.seconds < 10
    tried = [a.attack for a in found.attempts]
    assert tried.index("recursion") < len(tried) - 1, found.attempts


def test_float64_update() -> None:
    exchange = simulate(Client(lenet(image_size=16, seed=2).double(), batch(dtype=torch.float64)), recursion())
    assert float((exchange.reconstruction.inputs - exchange.truth.inputs).square().mean()) < 1e-20


def test_only_the_batch_size_is_needed() -> None:
    client = Client(lenet(image_size=16, seed=2), batch())
    assert simulate(client, recursion(), threat=ThreatModel(Knowledge.BATCH_SIZE)).reconstruction.status == "exact"
    with pytest.raises(MissingKnowledge):
        simulate(client, recursion(), threat=ThreatModel(Knowledge.NOTHING))


def test_signals_and_volumes() -> None:
    torch.manual_seed(0)
    signal = nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 16, 5, padding=2, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 12, 5),
    )  # fmt: skip
    volume = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 120, 5))
    for model, shape in ((signal, (2, 24)), (volume, (1, 4, 5, 6))):
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
        exchange = simulate(Client(model, Batch(x, torch.tensor([2]))), recursion(), space=TensorSpace(shape))
        found = exchange.reconstruction
        assert found.status == "exact", found.notes
        assert found.certificate is not None
        assert found.certificate.verdict == "proved"
        assert float((found.inputs - x).square().mean()) < 1e-10


def test_what_it_cannot_do_is_an_answer() -> None:
    too_few = "6144 unknowns, 1536 forward and 3600 gradient equations of rank at most 5136"
    with pytest.raises(NotApplicable, match=too_few):
        simulate(Client(lenet(image_size=16, seed=2), batch(8)), recursion())
    with pytest.raises(NotApplicable, match="3 local steps"):
        simulate(Client(lenet(image_size=16, seed=2), batch(), FedAvg(lr=0.1, epochs=3)), recursion())
    with pytest.raises(NotApplicable, match="keeps"):
        simulate(Client(resnet18(width=4, seed=0).eval(), batch()), recursion())


def test_several_steps_that_nobody_told_of_are_noticed() -> None:
    client = Client(lenet(image_size=16, seed=2), batch(), FedAvg(lr=0.003, epochs=2))
    found = simulate(client, recursion(), threat=ThreatModel(Knowledge.BATCH_SIZE)).reconstruction
    assert found.status == "stalled"
    assert "not the plain gradient" in found.notes[-1]


def test_residual_blocks_without_strides_are_refused_before_any_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normal_matrix, "MEMORY", 2**20)
    client = Client(dlg_resnet(depth=8, width=4, image_size=16, seed=0).eval(), batch())
    with pytest.raises(NotApplicable, match="'pool' keeps 256 of the 4096 values"):
        simulate(client, recursion())


@pytest.mark.slow
def test_what_the_walk_found_stands_where_the_matrices_of_further_steps_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Flatten(),
            nn.Linear(8 * 256, 10),
        )  # fmt: skip
    client = Client(model, batch())
    polished = simulate(client, recursion(quick=False))
    monkeypatch.setattr(normal_matrix, "MEMORY", 4 * 2**20)
    walked = simulate(client, recursion(quick=False))
    assert polished.reconstruction.iterations > walked.reconstruction.iterations == 0
    truth = walked.truth.inputs
    ours, best = (float((e.reconstruction.inputs - truth).square().mean()) for e in (walked, polished))
    assert best < ours < 1e-6


def test_a_layer_that_takes_too_long_is_said_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(lenet(image_size=16, seed=2), batch())
    monkeypatch.setattr(counting, "_WORK", 1000)
    with pytest.raises(NotApplicable, match=r"takes more than .* multiplications in every iteration; use matching"):
        simulate(client, recursion())
    assert simulate(client, auto(iterations=2, polish=False)).reconstruction.certificate is not None


def perceptron(act: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 30))


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("training", [FedSGD(), FedAvg(lr=0.1)], ids=["gradient", "one step"])
def test_every_example_of_a_batch(act: type[nn.Module], training: LocalTraining) -> None:
    exchange = simulate(Client(perceptron(act), batch(6), training), recursion())
    found = exchange.reconstruction
    assert found.labels is not None
    assert found.labels.tolist() == list(range(5, 11))
    assert found.status == "exact", found.notes
    assert float((found.inputs - exchange.truth.inputs).square().mean(dim=(1, 2, 3)).max()) < 1e-8


def test_units_near_a_kink_are_told_by_the_solution() -> None:
    # Twins of one class leave features so noisy that some units look active that are dead, and the other way round.
    solved = 0
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        images = torch.rand(16, 3, 16, 16, generator=draw)
        labels = torch.randint(0, 12, (16,), generator=draw, dtype=torch.int64)
        torch.manual_seed(seed)
        layers = (nn.Flatten(), nn.Linear(768, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 60))
        exchange = simulate(Client(nn.Sequential(*layers), Batch(images, labels)), recursion())
        found = exchange.reconstruction
        order = assign(found.inputs, images)
        solved += float((found.inputs[order] - images).square().mean(dim=(1, 2, 3)).max()) < 1e-10
    assert solved == 6


def test_a_batch_through_convolutions() -> None:
    draw = torch.Generator().manual_seed(0)
    small = Batch(torch.rand(3, 3, 8, 8, generator=draw).double(), torch.arange(5, 8))
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, padding=2), nn.Sigmoid(), nn.Conv2d(24, 24, 5, padding=2), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(24 * 64, 20),
    ).double()  # fmt: skip
    exchange = simulate(Client(model, small), recursion())
    assert exchange.reconstruction.status == "exact"
    assert float((exchange.reconstruction.inputs - small.inputs).square().mean()) < 1e-12


def test_granted_labels_keep_their_order() -> None:
    images = batch(4).inputs
    exchange = simulate(
        Client(perceptron(nn.Tanh), Batch(images, torch.tensor([9, 3, 20, 3]))),
        recursion(),
        threat=ThreatModel(Knowledge.LABELS | Knowledge.BATCH_SIZE | Knowledge.TRAINING),
    )
    found = exchange.reconstruction
    assert found.labels is not None
    assert found.labels.tolist() == [9, 3, 20, 3]
    torch.testing.assert_close(found.inputs[[0, 2]], images[[0, 2]], rtol=0, atol=1e-4)


def test_a_batch_needs_the_loss_and_proved_features() -> None:
    client = Client(perceptron(nn.Tanh), batch(4))
    with pytest.raises(NotApplicable, match="TRAINING"):
        simulate(client, recursion(), threat=ThreatModel(Knowledge.BATCH_SIZE))


def test_the_error_of_twins_is_told() -> None:
    """Features of twins are known less well than others, and their own output gradients hardly differ."""
    twins = batch(4)
    twins = Batch(twins.inputs[[0, 0, 1, 2]], torch.tensor([5, 5, 6, 7]))
    exchange = simulate(Client(perceptron(nn.Tanh), twins), recursion())
    apart = (exchange.reconstruction.inputs - twins.inputs).square().mean((1, 2, 3)).sqrt()
    assert float(apart.max()) < 1e-3
    assert float(apart[2:].max()) < 1e-6


def test_values_that_no_equation_touches_are_not_called_determined() -> None:
    # A stride beyond the kernel skips three pixels of four; the counts alone would allow the rest to pay for them.
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 16, 10))
    small = Batch(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([3]))
    for quick in (True, False):
        for dtype in (torch.float64, torch.float32):
            client = Client(nn.Sequential(*layers).to(dtype), Batch(small.inputs.to(dtype), small.labels))
            found = simulate(client, recursion(quick=quick)).reconstruction
            assert found.status == "stalled"
            assert "stops" in found.notes[0]
            assert found.certificate is not None
            assert found.certificate.verdict != "proved"
