"""What exact attacks and certificates claim, on models and clients that invite a wrong claim."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.base import Attack
from gradleak.attacks.certifying import certified
from gradleak.errors import NotApplicable
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.types import Batch, Update, UpdateKind

A = gl.attacks


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return make()


def rows(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def observe(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    training: gl.LocalTraining | None = None,
    *,
    size: int | None = None,
    space: gl.InputSpace | None = None,
    threat: ThreatModel | None = None,
    update: Update | None = None,
) -> Observation:
    training = training or gl.FedSGD()
    update = training(model, Batch(inputs, labels)) if update is None else update
    space = space or gl.TensorSpace(tuple(inputs.shape[1:]))
    return (threat or ThreatModel()).observe(
        model, update, space=space, training=training, batch_size=size or len(inputs)
    )


def verdict(attack: Attack, seen: Observation) -> tuple[str, str | None]:
    found = attack.reconstruct(seen)
    return found.status, None if found.certificate is None else found.certificate.verdict


@pytest.mark.parametrize("width", [30, 300])
def test_two_classes_do_not_tell_one_row_from_a_mixture(width: int) -> None:
    model = seeded(lambda: nn.Linear(width, 2))
    seen = observe(model, rows(8, width), torch.tensor([0, 1, 0, 1, 0, 1, 1, 1]), size=1)
    assert verdict(A.linear_inversion(), seen)[0] != "exact"
    found = A.auto().reconstruct(seen)
    assert found.status != "exact"
    assert found.certificate is not None
    assert found.certificate.verdict != "proved"


def test_two_classes_behind_a_hidden_layer_do() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2)))
    assert verdict(A.auto(), observe(model, rows(1, 30), torch.tensor([1]))) == ("exact", "proved")
    assert verdict(A.auto(iterations=5), observe(model, rows(4, 30), torch.tensor([0, 1, 1, 0]), size=1))[1] != "proved"


def test_two_classes_have_no_proof_of_the_other_label() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2)))
    x, y = rows(1, 30), torch.tensor([1])
    seen = observe(model, x, y)
    assert certified(seen, gl.Reconstruction(x, y, 0.0)).certificate.verdict == "proved"
    assert certified(seen, gl.Reconstruction(x, 1 - y, 0.0)).certificate.verdict != "proved"


def test_a_scaled_gradient_is_proved_with_its_factor() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 10)))
    x, y = rows(1, 30), torch.tensor([1])
    update = Update({k: 7 * v for k, v in gl.FedSGD()(model, Batch(x, y)).tensors.items()})
    found = A.auto().reconstruct(observe(model, x, y, update=update))
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert found.certificate.factor == pytest.approx(7, rel=1e-4)


class Limited(nn.Module):
    def __init__(self, limit: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.limit = limit
        self.body = nn.Sequential(nn.Linear(width, 40), nn.ReLU(), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.limit(x))


@pytest.mark.parametrize("width", [30, 300])
@pytest.mark.parametrize("limit", [lambda x: x.clamp(-1, 1), torch.abs, torch.relu], ids=["clamp", "abs", "relu"])
def test_a_first_layer_behind_a_limit_shows_no_inputs(limit: Callable[[Tensor], Tensor], width: int) -> None:
    seen = observe(seeded(lambda: Limited(limit, width)), rows(1, width), torch.tensor([3]))
    with pytest.raises(NotApplicable):
        A.linear_inversion().reconstruct(seen)
    found = A.auto(iterations=5).reconstruct(seen)
    assert found.certificate is not None
    assert (found.status == "exact", found.certificate.verdict) == (False, found.certificate.verdict)
    assert found.certificate.verdict != "proved"


@pytest.mark.slow
@pytest.mark.parametrize("first", [nn.ReLU, nn.Tanh], ids=["relu", "saturated"])
def test_the_recursion_does_not_look_behind_a_first_activation(first: type[nn.Module]) -> None:
    for count, width in ((1, 300), (3, 60)):
        model = seeded(lambda: nn.Sequential(first(), nn.Linear(width, 60), nn.Sigmoid(), nn.Linear(60, 10)))  # noqa: B023
        x = 8 * rows(count, width)
        seen = observe(model, x, torch.arange(count))
        with contextlib.suppress(NotApplicable):
            assert A.recursion().reconstruct(seen).status != "exact"
        assert verdict(A.auto(iterations=5), seen)[1] != "proved"


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_agree_are_told_from_mixtures_by_their_own_gradients(seed: int) -> None:
    # With two classes, units that the same examples activate all show the same mixture of them.
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 256), nn.ReLU(), nn.Linear(256, 2)).double(), seed)
    x = rows(4, 50, seed).double()
    found = A.linear_inversion().reconstruct(observe(model, x, torch.tensor([0, 1, 0, 1])))
    assert found.solved is not None
    assert bool(found.solved.any())
    nearest = torch.cdist(found.inputs[found.solved], x).min(1)
    assert float(nearest.values.max()) <= 1e-9
    assert nearest.indices.unique().numel() == int(found.solved.sum())


@pytest.mark.parametrize("seed", range(6))
def test_one_output_of_unknown_value_shows_mixtures_and_none_is_called_an_input(seed: int) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 1)), seed)
    x, y = rows(3, 20, seed), torch.tensor([[1.0], [-2.0], [5.0]])
    found = A.linear_inversion().reconstruct(observe(model, x, y, gl.FedSGD(nn.functional.mse_loss)))
    if found.solved is None or not bool(found.solved.any()):
        assert found.status != "exact"
    else:  # The units that the inputs activate tell them from their mixtures.
        assert float(torch.cdist(found.inputs[found.solved], x).min(1).values.max()) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_units_that_are_never_silent_show_no_single_example(seed: int) -> None:
    # Small weights make all slopes of tanh nearly one, so that several units show nearly the same mixture.
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 1)), seed)
    x, y = 0.1 * rows(2, 50, seed), torch.tensor([[3.0], [1.0]])
    with contextlib.suppress(NotApplicable):
        found = A.linear_inversion().reconstruct(observe(model, x, y, gl.FedSGD(nn.functional.poisson_nll_loss)))
        assert found.status != "exact"
        assert found.solved is None or not bool(found.solved.any())


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (lambda o, t: ((o - t) ** 2).mean(), [1.4, -0.3, 1.0]),
        (lambda o, t: nn.functional.binary_cross_entropy_with_logits(o, t), [1.0, 0.0, 1.0]),
    ],
)
def test_targets_of_a_function_are_solved_and_called_no_class(loss: gl.training.Loss, targets: list[float]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)))
    x = rows(1, 40)
    found = A.linear_inversion().reconstruct(observe(model, x, torch.tensor([targets]), gl.FedSGD(loss)))
    assert found.labels is None
    assert found.label_probabilities is not None
    assert found.label_probabilities[0].tolist() == pytest.approx(targets, abs=1e-3)
    assert found.certificate is not None
    assert found.certificate.verdict in ("matched", "proved")


def test_without_the_number_of_examples_nothing_is_exact() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 512), nn.ReLU(), nn.Linear(512, 10)))
    seen = observe(model, rows(2, 50), torch.tensor([0, 1]), threat=ThreatModel(Knowledge.TRAINING))
    assert verdict(A.linear_inversion(), seen)[0] != "exact"


@pytest.mark.parametrize("granted", [False, True])
def test_auto_keeps_a_batch_that_was_read_off(granted: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 512), nn.ReLU(), nn.Linear(512, 3)))
    x, y = rows(4, 50).abs(), torch.tensor([2, 1, 0, 1])
    more = Knowledge.LABELS if granted else Knowledge.NOTHING
    threat = ThreatModel(Knowledge.BATCH_SIZE | Knowledge.TRAINING | more)
    seen = threat.observe(
        model,
        gl.FedSGD()(model, Batch(x, y)),
        space=gl.TensorSpace((50,)),
        training=gl.FedSGD(),
        batch_size=4,
        labels=y,
    )
    found = A.auto(budget=20.0).reconstruct(seen)
    assert found.status == "exact"
    nearest = torch.cdist(x, found.inputs).min(1)
    assert float(nearest.values.max()) < 1e-4
    assert found.labels is not None
    assert torch.equal(found.labels[nearest.indices], y)
    assert found.certificate is not None
    assert found.certificate.verdict != "unproved"
    if granted:
        assert torch.equal(found.labels, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_formats_are_no_excuse(dtype: torch.dtype) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 10)))
    whole = gl.FedSGD()(model, Batch(rows(4, 50), torch.arange(4))).tensors
    one = gl.FedSGD()(model, Batch(rows(1, 50), torch.arange(1))).tensors
    noisy = {k: v + 0.05 * float(v.std()) * torch.randn_like(v) for k, v in one.items()}
    for tensors, size in ((whole, 4), (noisy, 1)):
        update = Update({k: v.to(dtype) for k, v in tensors.items()})
        seen = observe(model, rows(size, 50), torch.arange(size), update=update)
        with contextlib.suppress(NotApplicable):
            assert A.linear_inversion().reconstruct(seen).status not in ("exact", "converged")
    update = Update({k: v.to(dtype) for k, v in one.items()})
    assert verdict(A.linear_inversion(), observe(model, rows(1, 50), torch.arange(1), update=update))[0] == "exact"


def test_signs_are_no_gradient() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 10)))
    x, y = rows(1, 50), torch.tensor([2])
    signs = Update({k: v.sign() for k, v in gl.FedSGD()(model, Batch(x, y)).tensors.items()})
    adam = gl.FedAvg(optimizer=gl.training.Adam(lr=1e-3))
    for seen in (observe(model, x, y, update=signs), observe(model, x, y, adam)):
        with pytest.raises(NotApplicable):
            A.linear_inversion().reconstruct(seen)
        assert A.auto(iterations=5).reconstruct(seen).status != "exact"


@pytest.mark.parametrize("lr", [1.0, 0.1, 0.01])
def test_captured_deltas_are_proved_in_spite_of_their_subtraction(lr: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)))
    x, y = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([4])
    exact = gl.FedAvg(lr=lr)(model, Batch(x, y)).tensors
    before = {k: p.detach() for k, p in model.named_parameters()}
    delta = Update({k: (before[k] + d) - before[k] for k, d in exact.items()}, kind=UpdateKind.WEIGHT_DELTA)
    seen = observe(model, x, y, gl.FedAvg(lr=lr), space=gl.ImageSpace((3, 8, 8)), update=delta)
    found = A.auto().reconstruct(seen)
    assert float((found.inputs - x).square().mean()) < 1e-6
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert found.labels is not None
    assert found.labels.tolist() == [4]


def test_an_exact_input_is_kept_where_the_client_is_not_as_stated() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)))
    x, y = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([4])
    told = gl.FedSGD()
    for made in (gl.FedSGD(gl.CrossEntropy(label_smoothing=0.3)), gl.FedAvg(lr=0.1)):
        update = Update(made(model, Batch(x, y)).tensors)
        found = A.auto().reconstruct(observe(model, x, y, told, space=gl.ImageSpace((3, 8, 8)), update=update))
        assert found.status == "exact"
        assert float((found.inputs - x).square().mean()) < 1e-9


def test_normalized_images_are_shown_and_named() -> None:
    lenet = gl.models.lenet(image_size=8, classes=20, seed=0)
    mlp = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 20)))
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for model in (lenet, mlp):
        seen = observe(model, (image - 0.5) / 0.25, torch.tensor([4]), space=gl.ImageSpace((3, 8, 8)))
        found = A.auto().reconstruct(seen)
        assert found.status == "exact"
        assert any("normalizes" in note for note in found.notes)
        shown = torch.stack([found.inputs.flatten(), image.flatten()])
        assert float(torch.corrcoef(shown)[0, 1]) > 0.999


def test_dropout_does_not_hide_what_was_read_off() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)))
    x = rows(1, 50)
    found = A.auto(iterations=5).reconstruct(observe(model.train(), x, torch.tensor([2])))
    assert found.status == "exact"
    assert float((found.inputs - x).abs().max()) < 1e-4


def test_labels_under_smoothing_and_soft_labels() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 10)))
    with torch.no_grad():
        model[2].bias[3] += 6
        model[2].bias[5] += 4.2
    x, y = rows(1, 50), torch.tensor([3])
    found = A.recursion().reconstruct(observe(model, x, y, gl.FedSGD(gl.CrossEntropy(label_smoothing=0.1))))
    assert found.labels is not None
    assert found.labels.tolist() == [3]
    soft = torch.zeros(1, 10)
    soft[0, 2], soft[0, 7] = 0.6, 0.4
    found = A.auto().reconstruct(observe(model, x, soft))
    assert found.status == "exact"
    assert found.label_probabilities is not None
    torch.testing.assert_close(found.label_probabilities.float(), soft, rtol=0, atol=1e-3)
    assert found.certificate is not None
    assert found.certificate.verdict != "unproved"


def test_features_behind_a_known_defense_are_not_proved() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 2)))
    with torch.no_grad():
        model[2].weight.mul_(10)
    for seed in (0, 7):
        training = gl.defenses.base.Defended(gl.FedSGD(), gl.defenses.sign(), seed)
        threat = ThreatModel(Knowledge.BATCH_SIZE | Knowledge.TRAINING | Knowledge.DEFENSE)
        seen = observe(model, rows(1, 20, seed), torch.tensor([0]), training, threat=threat)
        assert verdict(A.disaggregate(), seen)[1] != "proved"


def test_certificates_keep_the_factor() -> None:
    assert {f.name for f in dataclasses.fields(gl.Certificate)} >= {"factor"}


def test_examples_of_one_activation_pattern_are_no_proof_of_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)))
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    x, y = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    wrong = observe(model, x, y, size=1)
    assert verdict(A.linear_inversion(), wrong)[0] != "exact"
    assert verdict(A.recursion(), wrong)[0] != "exact"
    found = A.auto(iterations=20).reconstruct(wrong)
    assert found.certificate is not None
    assert found.certificate.verdict != "proved"
    for size, threat in ((2, None), (1, ThreatModel(Knowledge.TRAINING))):
        seen = observe(model, x, y, size=size, threat=threat)
        result = A.linear_inversion().reconstruct(seen)
        assert result.status != "exact"
        assert not any("of one example" in n or "one of them reaches" in n for n in result.notes)
    # One example alone has the scale that the stated training gives.
    assert verdict(A.auto(), observe(model, x[:1], y[:1])) == ("exact", "proved")


def test_a_convolution_before_two_logits_is_no_proof_of_one_either() -> None:
    layers = (nn.Conv2d(1, 8, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    model = seeded(lambda: nn.Sequential(*layers))
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    x, y = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    seen = observe(model, x, y, size=1, space=gl.ImageSpace((1, 8, 8)))
    with contextlib.suppress(NotApplicable):
        assert A.recursion().reconstruct(seen).status != "exact"
    assert verdict(A.auto(iterations=20), seen)[1] != "proved"


def test_binary_inputs_are_not_taken_for_signs() -> None:
    x = (rows(1, 30) > 0).float()
    for model in (
        seeded(lambda: nn.Linear(30, 2)),
        seeded(lambda: nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 10))),
    ):
        found = A.auto().reconstruct(observe(model, x, torch.tensor([1])))
        assert float((found.inputs - x).abs().max()) < 1e-4
        assert found.certificate is not None
        assert found.certificate.verdict != "unproved"
    several = A.linear_inversion().reconstruct(
        observe(seeded(lambda: nn.Linear(30, 2)), x, torch.tensor([1]), gl.FedAvg(lr=0.01, epochs=5))
    )
    assert several.status == "exact"


@pytest.mark.parametrize("factor", [-0.1, -0.01, 0.01, 0.05, 0.5])
def test_scaled_gradients_keep_their_class(factor: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10)))
    x, y = rows(1, 10), torch.tensor([4])
    update = Update({k: factor * v for k, v in gl.FedSGD()(model, Batch(x, y)).tensors.items()})
    found = A.auto().reconstruct(observe(model, x, y, update=update))
    assert float((found.inputs - x).abs().max()) < 1e-4
    assert found.labels is not None
    assert found.labels.tolist() == [4]
    assert found.label_probabilities is None
    assert found.certificate is not None
    assert found.certificate.factor == pytest.approx(factor, rel=1e-3)
    assert (found.certificate.verdict == "proved") == (factor > 0)


def test_other_losses_get_no_class() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1)))
    x = rows(1, 10)
    for loss, y in (
        (nn.functional.mse_loss, torch.tensor([[0.7]])),
        (nn.functional.binary_cross_entropy_with_logits, torch.tensor([[1.0]])),
    ):
        found = A.linear_inversion().reconstruct(observe(model, x, y, gl.FedSGD(loss)))
        assert found.labels is None
        assert float((found.inputs - x).abs().max()) < 1e-4


def test_granted_probabilities_are_matched_to_their_examples() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(50, 512), nn.ReLU(), nn.Linear(512, 6)))
    x, y = rows(3, 50).abs(), torch.tensor([5, 1, 3])
    truth = 0.8 * torch.nn.functional.one_hot(y, 6) + 0.2 / 6
    training, space = gl.FedSGD(), gl.TensorSpace((50,))
    threat = ThreatModel(Knowledge.BATCH_SIZE | Knowledge.TRAINING | Knowledge.LABELS)
    update = training(model, Batch(x, truth))
    found = A.auto(budget=20.0).reconstruct(
        threat.observe(model, update, space=space, training=training, batch_size=3, labels=truth)
    )
    assert found.status == "exact"
    assert float((found.inputs - x).abs().max()) < 1e-3
    assert found.certificate is not None
    assert found.certificate.verdict != "unproved"


def test_an_input_of_zeros_is_read_off() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10)))
    assert verdict(A.linear_inversion(), observe(model, torch.zeros(1, 30), torch.tensor([3])))[0] == "exact"
