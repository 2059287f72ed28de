from __future__ import annotations

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.capture_checks import check_capture
from gradleak.errors import InvalidUpdate
from gradleak.training import SGD, CrossEntropy, FedAvg, FedSGD, LocalTraining, parameters
from gradleak.types import Batch, NoteKind, Update, UpdateKind

SPACE = gl.TensorSpace((12,))
CLASSES = 10


def net(seed: int = 0, scale: float = 0.6) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    for p in model.parameters():
        p.data = scale * torch.randn(p.shape, generator=generator)
    return model


def batch(n: int = 1, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 12, generator=generator), torch.randint(CLASSES, (n,), generator=generator))


def times(update: Update, factor: float) -> Update:
    return Update({k: factor * v for k, v in update.tensors.items()}, update.kind)


TRAININGS = [
    FedSGD(),
    FedSGD(CrossEntropy("sum")),
    FedSGD(CrossEntropy(label_smoothing=0.2)),
    FedSGD(CrossEntropy(weight=(1.0, 5.0) * 5)),
    FedAvg(lr=0.1),
    FedAvg(lr=0.5, epochs=4, batch_size=2),
    FedAvg(optimizer=SGD(0.1, momentum=0.9, weight_decay=1e-2), epochs=3),
    FedAvg(optimizer=gl.training.Adam(1e-3), epochs=3),
    gl.defenses.gaussian_noise(1e-3).wrap(FedSGD()),
    gl.defenses.int8().wrap(FedSGD()),
]


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_nothing_is_suspicious_about_what_clients_send(training: LocalTraining) -> None:
    for seed in range(15):
        for n in (1, 2, 8, 30):
            model, private = net(seed), batch(n, seed)
            update = training.reseed(seed)(model, private)
            assert check_capture(model, update, training, n, SPACE) == ()
            assert check_capture(model, update) == ()


def test_noise_has_no_sign() -> None:
    model = net()
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        noise = {k: torch.randn(p.shape, generator=generator) * 1e-3 for k, p in parameters(model).items()}
        assert check_capture(model, Update(noise), FedSGD(), 1, SPACE) == ()


@pytest.mark.parametrize("kind", list(UpdateKind))
@pytest.mark.parametrize("epochs", [1, 20])
def test_whole_weights_are_no_update(kind: UpdateKind, epochs: int) -> None:
    model = net()
    delta = FedAvg(lr=0.05, epochs=epochs)(model, batch(4)).tensors
    after = {k: p + delta[k] for k, p in parameters(model).items()}
    with pytest.raises(InvalidUpdate, match="subtract those that were sent out"):
        check_capture(model, Update(after, kind))


@pytest.mark.parametrize(
    ("training", "remedy"),
    [(FedSGD(), "--kind weight_delta"), (FedAvg(lr=0.1), "after minus before"), (FedAvg(lr=0.1, epochs=3), "after")],
)
def test_the_opposite_sign_is_named(training: LocalTraining, remedy: str) -> None:
    for seed in range(20):
        model = net(seed, scale=0.3)
        update = training(model, batch(1, seed))
        with pytest.raises(InvalidUpdate, match=remedy):
            check_capture(model, times(update, -1), training, 1, SPACE)


def test_a_batch_of_as_many_examples_as_classes_may_have_any_sign() -> None:
    model, training = net(), FedSGD()
    update = times(training(model, batch(CLASSES)), -1)
    assert check_capture(model, update, training, CLASSES, SPACE) == ()


@pytest.mark.parametrize(("stated", "word"), [(FedSGD(), "loss scale"), (FedAvg(lr=0.01), "learning rate")])
def test_an_update_too_large_for_any_batch_is_named(stated: LocalTraining, word: str) -> None:
    model = net()
    sent = FedSGD() if isinstance(stated, FedSGD) else FedAvg(lr=1.0)
    update = sent(model, batch())
    update = times(update, 100) if isinstance(stated, FedSGD) else update
    (note,) = check_capture(model, update, stated, 1, SPACE)
    assert word in note
    assert note.kind is NoteKind.LIMIT
    gradient = training_gradient(model)
    assert f"{100 * gradient / 2:.3g} times" in note


def training_gradient(model: nn.Module) -> float:
    return float(FedSGD()(model, batch()).tensors["2.bias"].abs().sum())


def test_other_losses_have_no_such_bounds() -> None:
    model, training = net(), FedSGD(gl.training.MeanSquaredError())
    private = Batch(batch().inputs, torch.full((1, CLASSES), 1e4))
    assert check_capture(model, training(model, private), training, 1, SPACE) == ()
