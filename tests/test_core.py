"""Forward map, wall and exchange: identities in float64, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.errors import InvalidInput, InvalidUpdate
from gradleak.spaces import TokenSpace

SHAPE = (1, 8, 8)


def victim(n: int = 3) -> gl.Client:
    model = gl.models.lenet(width=4, classes=5, in_channels=1, image_size=8, seed=0).double()
    images = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return gl.Client(model, gl.Batch(images, torch.arange(n) % 5))


def test_client_map_is_the_autograd_gradient_and_the_attacker_map() -> None:
    client = victim()
    sent = client.send()
    loss = nn.CrossEntropyLoss()(client.model(client.batch.inputs), client.batch.labels)
    names = [k for k, _ in client.model.named_parameters()]
    for name, gradient in zip(names, torch.autograd.grad(loss, list(client.model.parameters())), strict=True):
        torch.testing.assert_close(sent.tensors[name], gradient, rtol=1e-12, atol=1e-14)
    soft = torch.nn.functional.one_hot(client.batch.labels, 5).double()
    params = {k: p.detach() for k, p in client.model.named_parameters()}
    again = client.training.tensors(client.model, params, client.batch.inputs, soft)
    for name in names:
        torch.testing.assert_close(sent.tensors[name], again[name], rtol=1e-12, atol=1e-14)


def test_forward_map_passes_gradcheck_in_inputs_and_soft_labels() -> None:
    client = victim(2)
    params = {k: p.detach() for k, p in client.model.named_parameters()}
    x = client.batch.inputs.clone().requires_grad_()
    y = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(-1).requires_grad_()

    def update(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([v.reshape(-1) for v in gl.FedSGD().tensors(client.model, params, x, y).values()])

    assert torch.autograd.gradcheck(update, (x, y), fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(reduction: str, smoothing: float) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 3, 1])
    soft = torch.nn.functional.one_hot(labels, 5).double()
    expected = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
    ours = gl.CrossEntropy(reduction, smoothing)
    torch.testing.assert_close(ours(logits, labels), expected(logits, labels))
    torch.testing.assert_close(ours(logits, soft), expected(logits, soft))


def test_fused_attention_can_be_inverted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))

    torch.manual_seed(0)
    model = Attention().double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    tensors = gl.FedSGD().tensors(model, params, x, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(sum(v.square().sum() for v in tensors.values()), x)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0


def test_client_leaves_its_model_untouched_and_shares_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 5)).double().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    update = gl.Client(model, victim().batch).send()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert update.buffers is not None
    assert not torch.equal(update.buffers["1.running_mean"], before["1.running_mean"])
    seen = gl.ThreatModel().observe(model, update, space=gl.ImageSpace(SHAPE), training=gl.FedSGD(), batch_size=3)
    assert seen.update.buffers is None


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(x)}


MISFITS = {
    "class too large": ({"labels": torch.tensor([0, 1, 5])}, "class 5, but .* from 0 to 4"),
    "class below 0": ({"labels": torch.tensor([0, -1, 4])}, "class -1, but .* from 0 to 4"),
    "ignored class": ({"labels": torch.tensor([0, -100, 4])}, "class -100"),
    "float classes": ({"labels": torch.tensor([0.0, 1.0, 2.0])}, r"probabilities of shape \(N, 5\).*labels\.long\(\)"),
    "probabilities of others": ({"labels": torch.ones(3, 4) / 4}, r"\(N, 5\), not \(3, 4\)"),
    "column": ({"labels": torch.tensor([[0], [1], [2]])}, r"of shape \(N,\), not int64 of shape \(3, 1\)"),
    "short integers": ({"labels": torch.tensor([0, 1, 2], dtype=torch.int32)}, "not int32"),
    "bytes": ({"inputs": torch.zeros(3, *SHAPE, dtype=torch.uint8)}, r"bytes .*inputs\.to\(torch\.float64\) / 255"),
    "other precision": ({"inputs": torch.zeros(3, *SHAPE)}, r"are float32, the model is float64; pass batch\.to\("),
    "other channels": ({"inputs": torch.zeros(3, 3, 8, 8).double()}, r"of shape \(3, 3, 8, 8\) \(.*\); pass inputs"),
    "integers": ({"inputs": torch.zeros(3, *SHAPE, dtype=torch.int64)}, "does not take int64 inputs"),
    "dictionary": ({"model": Wrapped()}, r"returns a dict .*\.logits"),
    "one logit": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()}, r"one logit.*FedSGD\(loss"),
    "no batch": (
        {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Flatten(0)).double()},
        r"\(1[05],\) for [23]",
    ),
}


@pytest.mark.parametrize("training", [gl.FedSGD(), gl.FedAvg(lr=0.1, epochs=2, batch_size=2, checkpoint=True)])
@pytest.mark.parametrize("case", MISFITS)
def test_a_batch_that_does_not_fit_its_model_ends_in_the_remedy(case: str, training: gl.LocalTraining) -> None:
    changed, words = MISFITS[case]
    client = victim()
    model = changed.get("model", client.model)
    batch = gl.Batch(changed.get("inputs", client.batch.inputs), changed.get("labels", client.batch.labels))
    with pytest.raises(InvalidInput, match=words) as caught:
        gl.Client(model, batch, training).send()
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())


def test_losses_of_others_take_what_they_like() -> None:
    def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs["logits"], targets)

    batch = gl.Batch(victim().batch.inputs, torch.zeros(3, 5).double())
    assert set(gl.Client(Wrapped(), batch, gl.FedSGD(loss)).send().tensors) == {"model.1.weight", "model.1.bias"}
    with pytest.raises(KeyError):  # a mistake in a loss of one's own shows itself
        gl.Client(Wrapped(), batch, gl.FedSGD(lambda outputs, targets: outputs["loss"])).send()


def test_the_wall_shows_only_what_is_granted() -> None:
    client = victim()
    seen = gl.ThreatModel(gl.Knowledge.NOTHING).observe(
        client.model,
        client.send(),
        space=gl.ImageSpace(SHAPE),
        training=client.training,
        batch_size=3,
        labels=client.batch.labels,
        public=client.batch.inputs,
    )
    assert (seen.training, seen.batch_size, seen.labels, seen.public) == (None, None, None, None)
    assert seen.model is not client.model


def test_an_observation_is_made_by_the_wall_only() -> None:
    client = victim()
    with pytest.raises(InvalidInput, match=r"ThreatModel\.observe"):
        gl.Observation(client.model, client.send(), gl.ImageSpace(SHAPE), gl.Knowledge.NOTHING)


def test_granting_what_is_not_handed_over_is_an_error() -> None:
    client = victim()
    with pytest.raises(InvalidInput, match="BATCH_SIZE"):
        gl.ThreatModel().observe(client.model, client.send(), space=gl.ImageSpace(SHAPE), training=client.training)


def bad_updates() -> dict[str, tuple[gl.Update, str]]:
    client = victim()
    good = dict(client.send().tensors)
    name = next(iter(good))
    holes = {k: v.clone() for k, v in good.items()}
    holes[name].view(-1)[0] = torch.nan
    endless = {k: v.clone() for k, v in good.items()}
    endless[name].view(-1)[0] = torch.inf
    return {
        "nan": (gl.Update(holes), "NaN or infinite"),
        "infinite": (gl.Update(endless), "NaN or infinite"),
        "missing": (gl.Update({k: v for k, v in good.items() if k != name}), "lacks"),
        "extra": (gl.Update(good | {"other": torch.zeros(1)}), "does not train"),
        "other names": (gl.Update({f"net{k}": v for k, v in good.items()}), f"lacks '{name}' and has 'net{name}'"),
        "parallel": (gl.Update({f"module.{k}": v for k, v in good.items()}), r"DistributedDataParallel.*removeprefix"),
        "compiled": (
            gl.Update({f"_orig_mod.{k}": v for k, v in good.items()}),
            r"'_orig_mod\.' \(from torch\.compile\)",
        ),
        "shape": (gl.Update(good | {name: torch.zeros(1)}), "shape"),
        "zero gradient": (gl.Update({k: 0 * v for k, v in good.items()}), r"zero in every .* before zero_grad"),
        "zero delta": (gl.Update({k: 0 * v for k, v in good.items()}, gl.UpdateKind.WEIGHT_DELTA), r"clone\(\)"),
    }


BAD = [
    "nan", "infinite", "missing", "extra", "other names", "parallel", "compiled", "shape", "zero gradient", "zero delta"
]  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_updates_are_refused_with_the_remedy(case: str) -> None:
    update, words = bad_updates()[case]
    with pytest.raises(InvalidUpdate, match=words):
        gl.ThreatModel().observe(victim().model, update, space=gl.ImageSpace(SHAPE), training=gl.FedSGD(), batch_size=3)


def test_an_update_without_the_wrapper_of_its_model() -> None:
    client = victim()
    update = gl.Update(client.send().tensors)
    with pytest.raises(InvalidUpdate, match=r"lack 'module\.'.*use the model inside"):
        update.check(nn.ModuleDict({"module": client.model}))


def test_buffers_in_an_update_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    tensors = {k: torch.ones_like(v, dtype=torch.float32) for k, v in model.state_dict().items()}
    with pytest.raises(InvalidUpdate, match=r"'1\.running_mean', .* as buffers .* leave them out"):
        gl.Update(tensors).check(model)


def test_batches_and_spaces_are_checked() -> None:
    with pytest.raises(InvalidInput, match="as many labels"):
        gl.Batch(torch.zeros(2, 3), torch.zeros(1, dtype=torch.long))
    with pytest.raises(InvalidInput, match=r"torch\.tensor\(\[3\]\)"):
        gl.Batch(torch.zeros(1, 3), torch.tensor(3))
    with pytest.raises(InvalidInput, match="at least one"):
        gl.Batch(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InvalidInput, match="channels, height, width"):
        gl.ImageSpace((8, 8))
    with pytest.raises(InvalidInput, match="positive"):
        gl.ImageSpace(SHAPE, std=(0.0,))


class Nothing:
    """An attack that must not be reached."""

    def reconstruct(self, observation: gl.Observation, *, seed: int = 0) -> gl.Reconstruction:
        raise AssertionError


def outside() -> dict[str, tuple[torch.Tensor, gl.InputSpace | None, str]]:
    images = victim().batch.inputs
    normal = gl.ImageSpace(SHAPE, mean=(0.5,), std=(0.25,))
    return {
        "bytes": (255 * images, None, r"to 25\d.*, outside the \[0, 1\] of images; divide bytes by 255"),
        "normalized": (normal.encode(images), None, r"describe normalized images with space=ImageSpace\(shape, mean"),
        "bytes and normalization": (normal.encode(255 * images), normal, "after normalization is undone, outside"),
        "NaN": (images + torch.nan, None, "outside"),
        "other shape": (images, gl.ImageSpace((1, 4, 4)), r"\(1, 8, 8\), those of the space \(1, 4, 4\)"),
        "other features": (images.flatten(1), gl.TensorSpace((8,)), r"\(64,\), those of the space \(8,\)"),
        "rows": (images.flatten(1), None, r"no images; pass space=TensorSpace\(\(64,\)\)"),
    }


@pytest.mark.parametrize("case", outside())
def test_a_batch_outside_its_space_is_refused_before_the_attack(case: str) -> None:
    inputs, space, words = outside()[case]
    client = victim()
    with pytest.raises(InvalidInput, match=words):
        gl.simulate(gl.Client(client.model, gl.Batch(inputs, client.batch.labels)), Nothing(), space=space)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_of_normalized_images_stays_inside_their_space(dtype: torch.dtype) -> None:
    space = gl.ImageSpace((3, 4, 4), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    for value in (0.0, 1.0):
        space.check(space.encode(torch.full((2, 3, 4, 4), value)).to(dtype))


def test_token_ids_are_checked() -> None:
    space = TokenSpace(torch.eye(5), 3)
    space.check(torch.tensor([[0, 4, 2]]))
    space.check(torch.zeros(1, 3, 5))
    for ids, words in (
        (torch.tensor([[0, 5, 2]]), "ids outside 0 to 4"),
        (torch.tensor([[0, 1]]), "not 3 token ids"),
        (torch.zeros(1, 3), r"those of the space \(3, 5\)"),
    ):
        with pytest.raises(InvalidInput, match=words):
            space.check(ids)


def test_image_space_projects_to_what_decodes_to_valid_images() -> None:
    space = gl.ImageSpace((3, 4, 4), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    wild = 5 * torch.randn(2, 3, 4, 4, dtype=torch.float64)
    inside = space.project(wild)
    torch.testing.assert_close(space.encode(space.decode(wild)), inside)
    torch.testing.assert_close(space.project(inside), inside)
