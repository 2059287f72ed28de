"""What must be said of situations from practice: factors of layers, other losses, means of several, partial results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks import auto, disaggregate, linear_inversion, recursion
from gradleak.errors import NotApplicable
from gradleak.training import SGD, BinaryCrossEntropy, MeanSquaredError
from gradleak.types import FindingKind, UpdateKind

GRANTED = gl.ThreatModel(gl.ThreatModel().knows | gl.Knowledge.LABELS)


def seeded(*layers: nn.Module, seed: int = 0) -> nn.Module:
    model = nn.Sequential(*layers)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            bound = (p[0].numel() if p.ndim > 1 else 16) ** -0.5
            p.copy_((2 * torch.rand(p.shape, generator=draw) - 1) * bound)
    return model


def perceptron(inputs: int = 30, outputs: int = 10, width: int = 64) -> nn.Module:
    return seeded(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def rows(count: int, width: int = 30, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def observe(
    model: nn.Module,
    tensors: dict[str, Tensor],
    size: int,
    space: gl.InputSpace,
    training: gl.LocalTraining | None = None,
    **options: object,
) -> gl.Observation:
    training = training or gl.FedSGD()
    return gl.ThreatModel().observe(
        model,
        gl.Update(tensors, training.kind),
        space=space,
        training=training,
        batch_size=size,
        **options,  # type: ignore[arg-type]
    )


def verdict(found: gl.Reconstruction) -> str:
    assert found.certificate is not None
    return found.certificate.verdict


def test_factors_of_tensors_are_found_and_no_scale_is_claimed_that_nothing_fixes() -> None:
    x, model = rows(1), perceptron()
    whole = gl.FedSGD()(model, gl.Batch(x, torch.tensor([3]))).tensors
    clipped = {k: t * min(1.0, 0.1 / float(t.norm())) for k, t in whole.items()}
    found = auto().reconstruct(observe(model, clipped, 1, gl.TensorSpace((30,))))
    assert verdict(found) == "matched"
    assert found.certificate is not None
    assert len(found.certificate.factors) == 4
    torch.testing.assert_close(found.inputs, x, rtol=0, atol=1e-5)
    # Without a second layer and without the right loss nothing says how large the input is.
    flat = seeded(nn.Linear(30, 10))
    other = gl.FedSGD(F.multi_margin_loss)(flat, gl.Batch(x, torch.tensor([3]))).tensors
    scaled = {k: t * (2 if k.endswith("bias") else 1) for k, t in other.items()}
    found = linear_inversion().reconstruct(observe(flat, scaled, 1, gl.TensorSpace((30,))))
    assert found.status == "converged"
    assert verdict(found) == "unproved"
    assert any("up to one factor" in note for note in found.notes)


def test_layers_clipped_by_themselves_do_not_hide_the_better_result() -> None:
    model = seeded(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 10))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    whole = gl.FedSGD()(model, gl.Batch(x, torch.tensor([5]))).tensors
    tensors = {k: t * (0.6 if k.startswith("0") else 0.7) for k, t in whole.items()}
    seen = observe(model, tensors, 1, gl.ImageSpace((1, 8, 8)))
    alone, chosen = recursion().reconstruct(seen), auto(iterations=20).reconstruct(seen)
    errors = [float((r.inputs - x).square().mean()) for r in (alone, chosen)]
    assert errors[1] <= 1.01 * errors[0] < 1e-4
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [5]
    assert verdict(chosen) != "proved"


@pytest.mark.slow
@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.parametrize(
    "loss", [MeanSquaredError(), F.mse_loss, BinaryCrossEntropy()], ids=["ours", "torch", "binary"]
)
def test_more_knowledge_gives_no_worse_rows(loss: gl.training.Loss, granted: bool) -> None:
    x, model = rows(4, 50), seeded(nn.Linear(50, 512), nn.ReLU(), nn.Linear(512, 1), seed=3)
    y = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    client = gl.Client(model, gl.Batch(x, y), gl.FedSGD(loss))
    threat = GRANTED if granted else None
    leak = gl.simulate(client, auto(budget=20), space=gl.TensorSpace((50,)), threat=threat).reconstruction
    assert float(torch.cdist(x, leak.inputs).min(1).values.max()) < 1e-3
    assert verdict(leak) != "unproved"


def test_weight_decay_that_was_stated_is_subtracted() -> None:
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    model = seeded(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    training = gl.FedAvg(optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4))
    client = gl.Client(model, gl.Batch(x, torch.tensor([5, 0, 4])), training)
    leak = gl.simulate(client, auto(budget=20)).reconstruction
    assert (leak.status, verdict(leak)) == ("exact", "proved")


def test_an_example_that_the_model_is_sure_of() -> None:
    model = seeded(nn.Conv2d(1, 6, 3, padding=1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(384, 10)).float()
    with torch.no_grad():
        model[3].weight.mul_(3)
        model[3].bias[6] += 18  # p rounds to one in single precision
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    leak = gl.simulate(gl.Client(model, gl.Batch(x, torch.tensor([6]))), recursion()).reconstruction
    assert float((leak.inputs - x).square().mean()) < 1e-8
    assert verdict(leak) != "unproved"


@pytest.mark.parametrize(("scale", "size"), [(0.0, 4), (1e-9, 4), (0.0, 1)])
def test_where_the_output_does_not_depend_on_the_input_a_mean_explains_the_update(scale: float, size: int) -> None:
    model = seeded(nn.Linear(30, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    update = gl.FedSGD()(model, gl.Batch(rows(size), torch.full((size,), 7)))
    found = auto().reconstruct(observe(model, dict(update.tensors), 1, gl.TensorSpace((30,))))
    assert verdict(found) == "matched"
    assert found.certificate is not None
    assert found.certificate.mixture
    assert found.status != "exact"


def test_a_number_of_examples_that_nobody_stated_carries_no_proof_where_means_fit() -> None:
    x, space = rows(1), gl.TensorSpace((30,))
    model = perceptron(width=20)  # twenty units see twenty of thirty directions
    tensors = dict(gl.FedSGD()(model, gl.Batch(x, torch.tensor([3]))).tensors)
    stated = auto().reconstruct(observe(model, tensors, 1, space))
    assumed = auto().reconstruct(observe(model, tensors, 1, space, batch_size_stated=False))
    assert (verdict(stated), verdict(assumed)) == ("proved", "matched")
    assert assumed.certificate is not None
    assert assumed.certificate.mixture
    # What the network cannot tell apart is that: two others have the mean x and the same gradient.
    kernel = torch.linalg.svd(model[0].weight.detach())[2][-1]
    pair = gl.FedSGD()(model, gl.Batch(torch.cat([x + kernel, x - kernel]), torch.tensor([3, 3])))
    for name, tensor in pair.tensors.items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-3, atol=1e-5)
    # A first layer that sees every direction tells one example from several.
    wide = perceptron(width=64)
    tensors = dict(gl.FedSGD()(wide, gl.Batch(x, torch.tensor([3]))).tensors)
    assert verdict(auto().reconstruct(observe(wide, tensors, 1, space, batch_size_stated=False))) == "proved"


@pytest.mark.parametrize("seed", range(4))
def test_without_the_number_of_examples_the_bound_covers_examples_that_are_alike(seed: int) -> None:
    # Two examples this near have the gradient of their mean, down to rounding.
    x, apart = rows(1, seed=seed), 10.0 ** -(2 + seed) * rows(1, seed=seed + 10)
    model = perceptron(width=64)
    update = gl.FedSGD()(model, gl.Batch(torch.cat([x + apart, x - apart]), torch.tensor([3, 3])))
    leak = linear_inversion().reconstruct(
        observe(model, dict(update.tensors), 1, gl.TensorSpace((30,)), batch_size_stated=False)
    )
    assert leak.certificate is not None
    if leak.certificate.verdict == "proved":
        assert leak.certificate.bound is not None
        assert float((leak.inputs - x - apart).square().mean().sqrt()) <= leak.certificate.bound


def test_noise_that_is_stated_and_hides_the_update_matches_nothing() -> None:
    told = gl.ThreatModel(gl.ThreatModel().knows | gl.Knowledge.DEFENSE)
    training = gl.defenses.gaussian_noise(1.0).wrap(gl.FedSGD(), seed=1)
    client = gl.Client(perceptron(), gl.Batch(rows(1), torch.tensor([3])), training)
    leak = gl.simulate(client, auto(budget=5, iterations=20), threat=told, space=gl.TensorSpace((30,))).reconstruction
    assert verdict(leak) == "unproved"
    assert leak.certificate is not None
    assert "hides the update" in leak.certificate.reason


def test_rows_of_embeddings_name_ids_where_nothing_else_applies() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(ids)).mean(1))

    client = gl.Client(Bag(), gl.Batch(torch.tensor([[3, 17, 3, 40]]), torch.tensor([2])))
    with pytest.raises(NotApplicable, match="3, 17, 40") as refused:
        gl.simulate(client, auto(), space=gl.TensorSpace((4,)))
    (finding,) = (f for f in refused.value.findings if f.kind is FindingKind.COLUMNS)
    assert (finding.proved, finding.count, finding.of) == (True, 3, 50)


def test_labels_are_findings_where_the_inputs_stay_hidden() -> None:
    model = seeded(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 20))
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    client = gl.Client(model, gl.Batch(x, torch.tensor([3, 11, 7, 19])))
    found = gl.simulate(client, auto(budget=3, iterations=10)).reconstruction
    (finding,) = (f for f in found.findings if f.kind is FindingKind.LABELS)
    assert (finding.count, finding.of) == (4, 4)
    assert "3, 7, 11, 19" in finding.text


def test_two_heads_hide_no_first_layer() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(30, 64), nn.Linear(64, 5), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.body(x))
            return self.one(h), self.two(h)

    def both(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(outputs[0], y[:, 0]) + F.cross_entropy(outputs[1], y[:, 1])

    x = rows(1)
    client = gl.Client(Heads(), gl.Batch(x, torch.tensor([[4, 2]])), gl.FedSGD(both))  # type: ignore[arg-type]
    for threat in (None, GRANTED):
        leak = gl.simulate(client, auto(budget=5, iterations=10), space=gl.TensorSpace((30,)), threat=threat)
        torch.testing.assert_close(leak.reconstruction.inputs, x, rtol=0, atol=1e-4)
    assert verdict(leak.reconstruction) == "proved"


def test_features_as_wide_as_the_input_are_not_shown_as_inputs() -> None:
    model = seeded(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    client = gl.Client(model, gl.Batch(rows(2, 16), torch.tensor([0, 2])))
    leak = gl.simulate(client, disaggregate(), space=gl.TensorSpace((16,))).reconstruction
    assert leak.shows == "features"
    alone = seeded(nn.Linear(16, 4))
    client = gl.Client(alone, gl.Batch(rows(2, 16), torch.tensor([0, 2])))
    assert gl.simulate(client, disaggregate(), space=gl.TensorSpace((16,))).reconstruction.shows == "inputs"


def test_more_examples_than_stated_are_noticed_at_the_head() -> None:
    client = gl.Client(seeded(nn.Linear(16, 12)), gl.Batch(rows(3, 16), torch.tensor([0, 2, 5])))
    seen = observe(client.model, dict(client.send().tensors), 1, gl.TensorSpace((16,)))
    found = disaggregate().reconstruct(seen)
    assert verdict(found) != "proved"


def test_a_limit_that_the_input_reaches_is_noticed() -> None:
    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.clamp(-100, 100))

    x = 90 * rows(1)
    client = gl.Client(Limited(), gl.Batch(x, torch.tensor([3])))
    with pytest.raises(NotApplicable, match="limits its input"):
        gl.simulate(client, linear_inversion(), space=gl.TensorSpace((30,)))
    inside = gl.Client(Limited(), gl.Batch(rows(1), torch.tensor([3])))
    leak = gl.simulate(inside, linear_inversion(), space=gl.TensorSpace((30,))).reconstruction
    assert (leak.status, verdict(leak)) == ("exact", "proved")


def test_exact_rows_of_a_batch_stay_and_the_rest_is_searched_around_them() -> None:
    model = seeded(nn.Linear(30, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 2), seed=5)
    x = 2 * rows(5, seed=9)
    client = gl.Client(model, gl.Batch(x, torch.tensor([0, 1, 0, 1, 1])))
    alone = gl.simulate(client, linear_inversion(), space=gl.TensorSpace((30,))).reconstruction
    assert alone.solved is not None
    solved = int(alone.solved.sum())
    assert 0 < solved < 5
    both = gl.simulate(client, auto(budget=10, iterations=30), space=gl.TensorSpace((30,))).reconstruction
    near = torch.cdist(x, both.inputs).min(1).values
    assert int((near < 1e-4).sum()) >= solved
    # SPEAR may solve them all.
    assert both.status == "exact" or any(f.kind is FindingKind.ROWS and f.count >= solved for f in both.findings)


@pytest.mark.parametrize("form", ["list", "numpy", "sparse", "mapping"])
def test_updates_as_people_hold_them(form: str) -> None:
    x, model = rows(1), perceptron()
    tensors = dict(gl.FedSGD()(model, gl.Batch(x, torch.tensor([3]))).tensors)
    given = {
        "list": list(tensors.values()),
        "numpy": {k: t.numpy() for k, t in tensors.items()},
        "sparse": gl.Update({k: t.to_sparse() for k, t in tensors.items()}),
        "mapping": tensors,
    }[form]
    seen = gl.ThreatModel().observe(
        model,
        given,
        space=gl.TensorSpace((30,)),
        training=gl.FedSGD(),
        batch_size=1,  # type: ignore[arg-type]
    )
    assert verdict(linear_inversion().reconstruct(seen)) == "proved"
    for wrong in (
        {**tensors, "0.bias": None},
        {k: (1000 * t).int() for k, t in tensors.items()},
        list(tensors.values())[:2],
    ):
        with pytest.raises(gl.errors.InvalidUpdate):
            gl.ThreatModel().observe(
                model,
                wrong,
                space=gl.TensorSpace((30,)),
                training=gl.FedSGD(),
                batch_size=1,  # type: ignore[arg-type]
            )
    assert seen.update.kind is UpdateKind.GRADIENT
