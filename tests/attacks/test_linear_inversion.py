"""Linear inversion from an update as a client sends it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks import linear_inversion
from gradleak.errors import NotApplicable
from gradleak.models import lenet
from gradleak.spaces import Category, Number, TableSpace
from gradleak.training import SGD, CrossEntropy, FedAvg, FedSGD, LocalTraining

SHAPE = (3, 8, 8)


def network(dtype: torch.dtype = torch.float64, units: int = 40, bias: bool = True) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, units, bias=bias), nn.ReLU(), nn.Linear(units, 10)).to(dtype)
    for p in model.parameters():
        nn.init.uniform_(p, -0.3, 0.3, generator=generator)
    return model


def images(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def client(
    count: int = 1,
    training: LocalTraining | None = None,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
) -> gl.Client:
    model = network(dtype) if model is None else model
    batch = gl.Batch(images(count, dtype), torch.arange(count) % 10)
    return gl.Client(model, batch, FedSGD() if training is None else training)


@pytest.mark.parametrize(
    "training",
    [
        FedSGD(),
        FedSGD(CrossEntropy("sum", label_smoothing=0.1)),
        FedAvg(lr=0.1, epochs=7),
        FedAvg(optimizer=SGD(0.05, momentum=0.9), epochs=3),
    ],
)
def test_one_example_is_exact(training: LocalTraining) -> None:
    sender = client(training=training)
    found = gl.simulate(sender, linear_inversion()).reconstruction
    assert float((found.inputs - sender.batch.inputs).abs().max()) <= 1e-9
    assert found.status == "exact"


def test_a_piecewise_linear_loss_does_not_tell_one_example_from_a_mean() -> None:
    # Behind ReLUs the gradient of a margin loss does not change while the input moves, so x + d and x − d sum to 2x.
    sender = client(training=FedSGD(nn.functional.multi_margin_loss))
    found = gl.simulate(sender, linear_inversion()).reconstruction
    assert float((found.inputs - sender.batch.inputs).abs().max()) <= 1e-9
    assert found.certificate is not None
    assert (found.certificate.verdict, found.certificate.mixture) == ("matched", True)


def test_label_of_one_example() -> None:
    assert gl.simulate(client(), linear_inversion()).reconstruction.labels.tolist() == [0]  # type: ignore[union-attr]


def test_it_needs_no_knowledge_at_all() -> None:
    sender = client()
    threat = gl.ThreatModel(gl.Knowledge.NOTHING)
    found = gl.simulate(sender, linear_inversion(), threat=threat).reconstruction
    assert float((found.inputs - sender.batch.inputs).abs().max()) <= 1e-9


def test_float32_and_normalized_images() -> None:
    sender = client(dtype=torch.float32)
    space = gl.ImageSpace(SHAPE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    shown = gl.Client(sender.model, gl.Batch(space.encode(sender.batch.inputs), sender.batch.labels))
    found = gl.simulate(shown, linear_inversion(), space=space).reconstruction
    assert found.inputs.dtype == torch.float32
    assert float((found.inputs - sender.batch.inputs).abs().max()) <= 1e-5


def test_small_batches_through_relu() -> None:
    sender = client(2, model=network(units=200))
    found = gl.simulate(sender, linear_inversion()).reconstruction
    assert found.status == "exact"
    distance = torch.cdist(found.inputs.flatten(1), sender.batch.inputs.flatten(1))
    assert float(distance.min(0).values.max()) <= 1e-9
    assert found.labels is not None


def test_examples_that_never_act_alone_are_named() -> None:
    # The bias keeps the second unit group closed for the first image only, so the first never acts alone.
    model = network(units=30)
    found = gl.simulate(client(4, model=model), linear_inversion()).reconstruction
    alone = int(found.notes[0].split()[0])
    assert 0 < alone <= 4
    assert len(found) == 4
    truth = images(4).flatten(1)
    distance = torch.cdist(found.inputs.flatten(1)[:alone], truth).min(1).values
    assert float(distance.max()) <= 1e-9
    assert (found.status == "exact") == (alone == 4)


def test_conditions_are_named() -> None:
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.Sigmoid(), nn.Linear(40, 10)).double()
    with pytest.raises(NotApplicable, match="needs one example"):
        gl.simulate(client(3, model=smooth), linear_inversion())
    with pytest.raises(NotApplicable, match="this model has none"):
        gl.simulate(client(model=lenet(classes=10, image_size=8, seed=0).double()), linear_inversion())
    with pytest.raises(NotApplicable, match="no trained bias"):
        gl.simulate(client(3, model=network(bias=False)), linear_inversion())


def test_a_noised_update_is_not_called_exact() -> None:
    sender = client()
    update = sender.send()
    generator = torch.Generator().manual_seed(0)
    noised = gl.Update(
        {k: v + 1e-4 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in update.tensors.items()}
    )
    seen = gl.ThreatModel().observe(
        sender.model, noised, space=gl.ImageSpace(SHAPE), training=sender.training, batch_size=1
    )
    found = linear_inversion().reconstruct(seen)
    assert found.status == "stalled"
    assert any("noised" in note for note in found.notes)


@pytest.mark.parametrize("seed", range(3))
def test_mixtures_of_rows_are_told_from_rows_by_their_groups(seed: int) -> None:
    """One output: units with the same active examples show the same mixture, whatever their number."""
    columns = (*(Category(str(i), tuple("abcdefgh")) for i in range(4)), Number("age", decimals=0, mean=40, std=10))
    space = TableSpace(columns)
    draw = torch.Generator().manual_seed(seed)
    codes, age = torch.randint(0, 8, (6, 4), generator=draw), torch.randint(20, 80, (6, 1), generator=draw)
    rows = torch.cat([codes, age], 1).double()
    model = nn.Sequential(nn.Linear(33, 128), nn.ReLU(), nn.Linear(128, 1))
    for p in model.parameters():
        nn.init.uniform_(p, -0.3, 0.3, generator=draw)
    targets = torch.randn(6, 1, generator=draw)
    client = gl.Client(model, gl.Batch(space.encode(rows).float(), targets), gl.FedSGD(nn.functional.mse_loss))

    def mixtures(space: gl.InputSpace) -> int:
        found = gl.simulate(client, gl.attacks.linear_inversion(), space=space).reconstruction
        near = torch.cdist(space.encode(found.inputs.double()), TableSpace(columns).encode(rows)) < 1e-3
        return int((~near.any(1)).sum())

    assert mixtures(space) < mixtures(gl.TensorSpace((33,)))


@pytest.mark.parametrize("bound", [0.01, 0.002])
@pytest.mark.parametrize("told", [True, False], ids=["stated", "recognized"])
def test_numbers_that_a_filter_left_alone_still_divide(bound: float, told: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = torch.where(x < 0.2, 0.0, x)  # Black pixels, whose entries are zero as well.
    plain = gl.FedAvg(lr=0.05)
    client = gl.Client(model, gl.Batch(x, torch.tensor([5])), percentile(bound).wrap(plain))
    knows = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE
    seen = gl.ThreatModel(knows).observe(
        model, client.send(), space=gl.ImageSpace((1, 8, 8)), training=client.training if told else plain, batch_size=1
    )
    found = gl.attacks.linear_inversion().reconstruct(seen)
    assert float((found.inputs - x).square().mean()) < 1e-12
    assert found.status == "exact", found.notes
    assert found.labels is not None
    assert found.labels.tolist() == [5]
    assert found.certificate is not None
    assert found.certificate.verdict == ("proved" if told else "unproved")


def test_a_filtered_mean_of_two_is_not_taken_for_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sent = gl.Client(model, gl.Batch(x, torch.tensor([5, 2])), percentile(0.002).wrap(gl.FedAvg(lr=0.05))).send()
    seen = gl.ThreatModel().observe(
        model, sent, space=gl.ImageSpace((1, 8, 8)), training=gl.FedAvg(lr=0.05), batch_size=1
    )
    assert gl.attacks.linear_inversion().reconstruct(seen).status == "stalled"


def percentile(bound: float) -> gl.defenses.UpdateDefense:
    return gl.defenses.compose(gl.defenses.prune(0.1, globally=True), gl.defenses.clamp(bound))


class Normalizing(nn.Module):
    """Asserts, normalizes by a buffer and turns axes around before its layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.register_buffer("mean", torch.tensor([0.4]))

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) > 0
        assert float(x.min()) > -1
        return self.body(((x - self.mean) / 0.25).transpose(2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 3])
def test_normalization_inside_the_model_is_undone(count: int) -> None:
    torch.manual_seed(0)
    model = Normalizing(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    exchange = gl.simulate(gl.Client(model, gl.Batch(x, torch.tensor([1, 2, 5])[:count])), linear_inversion())
    found = exchange.reconstruction
    assert found.certificate is not None
    assert (found.status, found.certificate.verdict) == ("exact", "proved")
    assert float(torch.cdist(found.inputs.flatten(1), x.flatten(1)).min(0).values.max()) < 1e-5


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("later", [True, False], ids=["later biases", "no bias at all"])
@pytest.mark.parametrize("make", [Normalizing, lambda *layers: nn.Sequential(nn.Flatten(), *layers)])
def test_without_a_bias_the_rest_fixes_the_scale(
    act: type[nn.Module], later: bool, make: Callable[..., nn.Module]
) -> None:
    torch.manual_seed(0)
    model = make(nn.Linear(64, 48, bias=False), act(), nn.Linear(48, 32, bias=later), act(), nn.Linear(32, 10, later))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = gl.simulate(gl.Client(model, gl.Batch(x, torch.tensor([5]))), linear_inversion()).reconstruction
    assert found.certificate is not None
    assert (found.status, found.certificate.verdict) == ("exact", "proved"), found.notes
    assert float((found.inputs - x).square().mean()) < 1e-10


def test_without_a_bias_and_a_known_scale_nothing_is_claimed_that_does_not_show() -> None:
    """Without any bias, softmax alone tells the scale, and at initialization hardly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 10, bias=False))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sent = gl.Client(model, gl.Batch(x, torch.tensor([5]))).send()
    seen = gl.ThreatModel(gl.Knowledge.BATCH_SIZE).observe(
        model, sent, space=gl.ImageSpace((1, 8, 8)), training=gl.FedSGD(), batch_size=1
    )
    found = linear_inversion().reconstruct(seen)
    off = float((found.inputs - x).square().mean().sqrt())
    assert found.status != "exact" or off < 1e-3
