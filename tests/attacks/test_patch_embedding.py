"""The closed form of vision transformers: layouts that are federated, and what it must refuse or not call proved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks import auto, patch_embedding
from gradleak.data import demo_image
from gradleak.errors import NotApplicable
from gradleak.models import lenet
from gradleak.training import SGD, FedAvg, FedSGD, LocalTraining
from tests.attacks.vision_transformers import (
    CLASSES,
    COUNT,
    SHAPE,
    WIDTH,
    Own,
    Timm,
    Torchvision,
    build,
)

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
SPACE = gl.ImageSpace(SHAPE)
LAYOUTS = {
    "timm": Timm,
    "timm, no position of the class token": partial(Timm, "patches"),
    "timm, mean pooling": partial(Timm, pool="avg"),
    "timm, dropout": partial(Timm, drop=0.1),
    "positions looked up": partial(Timm, "table"),
    "positions added to the map": partial(Timm, "map"),
    "torchvision": Torchvision,
    "torchvision, dropout": partial(Torchvision, 0.1),
    "own, normalization inside": Own,
    "own, no bias": partial(Own, False),
}


def images(count: int = 1, seed: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def observe(
    model: nn.Module,
    inputs: Tensor,
    *,
    training: LocalTraining | None = None,
    change: Change | None = None,
    labels: Tensor | None = None,
    told: int = 1,
    **stated: Any,
) -> gl.Observation:
    """Return what a server sees that is told of ``told`` examples, after ``change`` of what the client computed."""
    training = FedSGD() if training is None else training
    labels = torch.arange(3, 3 + len(inputs)) if labels is None else labels
    with torch.random.fork_rng():  # the client's masks
        torch.manual_seed(4)
        sent = training(model, gl.Batch(inputs, labels))
    tensors = dict(sent.tensors) if change is None else change(dict(sent.tensors))
    return gl.ThreatModel().observe(
        model, gl.Update(tensors, sent.kind), space=SPACE, training=training, batch_size=told, **stated
    )


def psnr(found: gl.Reconstruction, truth: Tensor) -> float:
    return float(gl.metrics.psnr(found.inputs, truth)[0])


def error(found: gl.Reconstruction, truth: Tensor) -> float:
    return float((found.inputs.double() - truth.double()).square().mean().sqrt())


def proof(found: gl.Reconstruction) -> gl.types.Certificate:
    assert found.certificate is not None
    return found.certificate


@pytest.mark.parametrize("trained", [False, True], ids=["at initialization", "moved"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_image_is_exact_and_proved(layout: str, trained: bool) -> None:
    model = build(LAYOUTS[layout], trained=trained).train()
    seen, truth = observe(model, images()), images()
    found = patch_embedding().reconstruct(seen)
    assert psnr(found, truth) >= 90
    assert (found.status, proof(found).verdict) == ("exact", "proved")
    assert error(found, truth) <= (proof(found).bound or 0) < 1e-2
    assert found.labels is not None
    assert found.labels.tolist() == [3]  # read off the last bias, whatever masks were drawn
    assert len(proof(found).part) in (1, 2)
    assert not proof(found).local


def test_auto_takes_it_with_dropout_on() -> None:
    found = auto().reconstruct(observe(build(partial(Torchvision, 0.1)).train(), images()))
    assert (found.attack, proof(found).verdict) == ("patch_embedding", "proved")
    assert [a.attack for a in found.attempts if a.taken] == ["patch_embedding"]


@pytest.mark.parametrize(
    "training",
    [
        FedAvg(lr=0.1),
        FedAvg(optimizer=SGD(0.1, weight_decay=0.01)),
        FedSGD(nn.functional.multi_margin_loss),
    ],
    ids=["delta", "weight decay", "another loss"],
)
def test_deltas_and_losses(training: LocalTraining) -> None:
    found = patch_embedding().reconstruct(observe(build(Timm), images(), training=training))
    assert psnr(found, images()) >= 90
    assert proof(found).verdict == "proved"


def test_a_common_factor_and_the_opposite_sign_do_not_matter() -> None:
    seen = observe(build(Timm), images(), change=lambda u: {k: -3 * v for k, v in u.items()})
    found = patch_embedding().reconstruct(seen)
    assert psnr(found, images()) >= 90
    assert proof(found).verdict == "proved"


@pytest.mark.parametrize("layout", ["timm", "torchvision, dropout"])
def test_factors_per_tensor_leave_the_scale_open(layout: str) -> None:
    clip: Change = lambda u: {k: v * min(1.0, 0.1 / float(v.norm())) for k, v in u.items()}  # noqa: E731
    found = patch_embedding().reconstruct(observe(build(LAYOUTS[layout]).train(), images(), change=clip))
    assert proof(found).verdict == "matched"
    assert set(proof(found).factors) == set(proof(found).part)
    assert psnr(found, images()) >= 90  # What the first layer sees of the tokens fixes it all the same.
    assert any("factors of their own" in n for n in found.notes)


def test_several_examples_are_refused_and_never_proved() -> None:
    two = images(2)
    with pytest.raises(NotApplicable, match="sum over the 2 examples"):
        patch_embedding().reconstruct(observe(build(Timm), two, told=2))
    found = patch_embedding().reconstruct(observe(build(Timm), two))
    assert proof(found).verdict == "unproved"


@pytest.mark.parametrize("layout", ["timm", "timm, dropout", "torchvision"])
def test_near_duplicates_taken_for_one_are_within_the_bound(layout: str) -> None:
    one, move = images(), images(seed=2) - 0.5
    model = build(LAYOUTS[layout]).train()
    for step in (1e-1, 1e-2, 3e-3, 1e-3):
        near = torch.cat([one + step * move, one - step * move])
        found = patch_embedding().reconstruct(observe(model, near, labels=torch.tensor([3, 3])))
        assert proof(found).verdict != "proved" or error(found, near[:1]) <= (proof(found).bound or 0)


class Flat(nn.Module):
    """Tokens side by side before the last layer, two classes: gradients of all images are parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.pos = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.zeros(COUNT, WIDTH))
        self.out = nn.Linear(COUNT * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.patch(x).flatten(2).transpose(1, 2) + self.pos).flatten(1))


@pytest.mark.parametrize("count", [1, 2])
def test_a_mixture_is_called_one(count: int) -> None:
    seen = observe(build(Flat), images(count), labels=torch.ones(count, dtype=torch.long))
    found = patch_embedding().reconstruct(seen)
    assert (proof(found).verdict, proof(found).mixture) == ("matched", True)
    assert found.status != "exact"


@pytest.mark.parametrize(
    "change",
    [
        lambda u: {k: v + 1e-3 * v.std(unbiased=False) * torch.randn_like(v) for k, v in u.items()},
        lambda u: {k: v * (v.abs() > 0.01 * v.abs().max()) for k, v in u.items()},
    ],
    ids=["noise", "pruning"],
)
def test_distorted_updates_are_not_proved(change: Change) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = patch_embedding().reconstruct(observe(build(Timm), images(), change=change))
    assert proof(found).verdict == "unproved"
    assert found.status != "exact"


def test_rounded_updates_keep_their_word() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        seen = observe(
            build(partial(Torchvision, 0.1)).train(),
            images(),
            change=lambda u, d=dtype: {k: v.to(d).to(v) for k, v in u.items()},
        )
        found = patch_embedding().reconstruct(seen)
        assert proof(found).verdict != "proved" or error(found, images()) <= (proof(found).bound or 0)


def test_more_patches_than_the_embedding_is_wide() -> None:
    found = patch_embedding().reconstruct(observe(build(partial(Timm, width=12)), images()))
    assert (found.status, proof(found).verdict) == ("stalled", "unproved")
    assert "16 tokens have rank 1" in found.notes[0]


def test_matching_starts_from_what_is_not_determined() -> None:
    photo = demo_image(SHAPE[1])
    seen = observe(build(partial(Timm, width=12)), photo)
    start, found = patch_embedding().reconstruct(seen), auto(iterations=30, polish=False).reconstruct(seen)
    assert found.attack != "patch_embedding"
    assert proof(found).residual < proof(start).residual
    assert psnr(found, photo) > psnr(start, photo) - 1
    assert psnr(start, photo) > 25


def test_values_outside_the_stated_range_are_said_to_be() -> None:
    found = patch_embedding().reconstruct(observe(build(Timm), 2 * images() - 1))
    assert (found.status, proof(found).verdict) == ("exact", "unproved")
    assert "normalizes" in found.notes[0]


class Standardized(Timm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))


class Clamped(Timm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(0, 0.5))


class Flipped(Timm):
    """An augmentation in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1) if float(torch.rand(())) < 0.5 else x)


class Masked(Timm):
    """Dropout on the patches, before their positions are added."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed["proj"] = nn.Sequential(self.patch_embed["proj"], nn.Dropout(0.2))


class Normed(Timm):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed["proj"] = nn.Sequential(self.patch_embed["proj"], nn.GroupNorm(1, WIDTH))


class Twice(Timm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(-1))


class Shared(Timm):
    """Positions that are used once more, further on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.pos_embed.sum()


class Frozen(Timm):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed.requires_grad_(False)


class Zero(Timm):
    """The last layer starts at zero, as torchvision's does."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (partial(Timm, "fixed"), "no trained position embedding.*confines each of the 16 patches"),
        (Frozen, "no trained position embedding"),
        (Normed, "not simply added"),
        (Masked, "not simply added"),
        (Shared, "not simply added"),
        (Twice, "runs 2 times"),
        (Standardized, "nothing but scaling before it"),
        (Clamped, "nothing but scaling before it"),
        (Flipped, "by chance"),
        (Zero, "is zero"),
        (partial(lenet, classes=CLASSES, image_size=SHAPE[1]), "this model has none"),
    ],
)
def test_refusals_say_why(make: Callable[[], nn.Module], why: str) -> None:
    model = build(make, trained=False).train()
    with pytest.raises(NotApplicable, match=why):
        patch_embedding().reconstruct(observe(model, images()))


def test_several_steps_on_one_image_show_it_and_prove_nothing() -> None:
    # The tokens move with the weights, so the span of what the first layer saw does not fix the scale.
    found = patch_embedding().reconstruct(observe(build(Timm), images(), training=FedAvg(lr=0.1, epochs=3)))
    assert psnr(found, images()) >= 90
    assert proof(found).verdict == "matched"


def test_signs_are_refused() -> None:
    signs = observe(build(Timm), images(), change=lambda u: {k: v.sign() for k, v in u.items()})
    with pytest.raises(NotApplicable, match="one size"):
        patch_embedding().reconstruct(signs)
