"""The attack that chooses."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak import defenses
from gradleak.attacks import auto
from gradleak.attacks.base import Progress
from gradleak.attacks.certifying import certified
from gradleak.attacks.recursion import from_layers
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.exact.one_example import RecursionResult
from gradleak.models import lenet

SHAPE = (1, 8, 8)


class Joined(nn.Module):
    """The identity, by a sum of two paths that nothing before the features can be solved through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + x) / 2


def victim(
    n: int = 1, dtype: torch.dtype = torch.float32, activation: str = "sigmoid", *, joins: bool = False
) -> gl.Client:
    """Return a client; one whose model joins two paths, which changes nothing but ends every exact way."""
    model: nn.Module = lenet(
        width=6,
        classes=5,
        in_channels=1,
        image_size=8,
        seed=0,
        activation=activation,  # type: ignore[arg-type]
    )
    if joins:
        first, act, *rest = model.body.children()  # type: ignore[union-attr]
        model = nn.Sequential(first, act, Joined(), *rest, nn.Flatten(), model.fc)  # type: ignore[arg-type]
    images = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    return gl.Client(model.to(dtype), gl.Batch(images.to(dtype), torch.arange(n) % 5))


def observe(client: gl.Client, threat: gl.ThreatModel | None = None) -> gl.Observation:
    return (threat or gl.ThreatModel()).observe(
        client.model,
        client.send(),
        space=gl.ImageSpace(SHAPE),
        training=client.training,
        batch_size=len(client.batch),
        labels=client.batch.labels,
    )


def error(client: gl.Client, found: gl.Reconstruction) -> float:
    return float((found.inputs.double() - client.batch.inputs.double()).square().mean())


def test_no_bound_is_below_the_rounding_of_the_update() -> None:
    client = victim(dtype=torch.float64)
    seen = observe(client)
    value = client.batch.inputs[0]
    lucky = RecursionResult(value, None, (), None, value.flatten(), True, 0, 1e-16, 0.0, 0.0, 0)
    proof = from_layers(seen, lucky, None, "why").construction
    assert proof is not None
    assert proof.error == pytest.approx(2.2e-16 * float(value.square().mean().sqrt()), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [gl.FedSGD(), gl.FedAvg(lr=0.1)], ids=["gradient", "one step"])
def test_one_example_takes_the_exact_way(dtype: torch.dtype, training: gl.LocalTraining) -> None:
    client = victim(dtype=dtype)
    client = gl.Client(client.model, client.batch, training)
    found = auto().reconstruct(observe(client))
    assert found.certificate is not None
    assert (found.status, found.certificate.verdict) == ("exact", "proved")
    assert found.attack == "recursion"
    assert found.labels is not None
    assert found.labels.tolist() == [0]
    assert error(client, found) < (1e-12 if dtype is torch.float32 else 1e-26)


def test_a_first_linear_layer_is_divided_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 5))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=draw) - 0.5)
    client = gl.Client(model, victim().batch)
    found = auto().reconstruct(observe(client))
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert found.attack == "linear_inversion"
    assert error(client, found) < 1e-12


@pytest.mark.slow
def test_a_batch_is_matched() -> None:
    batch, lone = victim(2, joins=True), victim()
    found, solved = auto().reconstruct_all([observe(batch), observe(lone)])
    assert found.certificate is not None
    assert found.certificate.examples == ("proved", "proved")
    assert found.attack != "recursion"
    assert any("one example" in n for n in found.notes)
    assert error(batch, found) < 1e-11
    assert solved.attack == "recursion"  # Every observation takes the way that fits it.
    assert error(lone, solved) < 1e-10


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_a_batch_through_convolutions_is_solved(activation: str) -> None:
    client = victim(2, activation=activation)
    found = auto().reconstruct(observe(client))
    assert found.attack == "recursion"
    assert found.certificate is not None
    assert found.certificate.examples == ("proved", "proved")
    assert error(client, found) < 1e-11


def test_a_batch_with_granted_labels_is_matched_and_polished() -> None:
    client = victim(2, joins=True)
    threat = gl.ThreatModel(gl.Knowledge.LABELS | gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING)
    found = auto(iterations=300).reconstruct(observe(client, threat))
    assert found.attack == "idlg and gauss_newton"
    assert found.certificate is not None
    assert found.certificate.examples == ("proved", "proved")
    assert error(client, found) < 1e-11


def test_kinks_are_left_to_prior_matching() -> None:
    found = auto(iterations=20).reconstruct(observe(victim(2, activation="relu", joins=True)))
    assert found.certificate is not None
    assert found.certificate.verdict == "unproved"
    assert found.attack == "prior_matching"
    assert [(a.attack, a.taken) for a in found.attempts][-1] == ("gauss_newton", False)


def test_without_the_training_the_scale_is_fitted() -> None:
    client = victim()
    client = gl.Client(client.model, client.batch, gl.FedAvg(lr=0.25))
    found = auto().reconstruct(observe(client, gl.ThreatModel(gl.Knowledge.BATCH_SIZE)))
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert "factor of -0.25" in found.certificate.reason
    with pytest.raises(NotApplicable, match="TRAINING"):
        auto().reconstruct(observe(victim(2), gl.ThreatModel(gl.Knowledge.BATCH_SIZE)))


def test_a_noised_update_is_not_proved() -> None:
    client = victim()
    noised = gl.Client(client.model, client.batch, defenses.gaussian_noise(1e-3).wrap(gl.FedSGD()))
    found = auto(iterations=30).reconstruct(observe(noised))
    assert found.certificate is not None
    assert found.certificate.verdict == "unproved"


def test_budget_returns_the_best_so_far() -> None:
    begin = time.monotonic()
    seen: list[Progress] = []
    found = auto(budget=1.0, iterations=10**6).reconstruct(
        observe(victim(4, activation="relu", joins=True)), callback=seen.append
    )
    assert time.monotonic() - begin < 20
    assert found.status == "budget"
    assert any("time budget" in n for n in found.notes)
    assert seen
    with pytest.raises(InvalidInput, match="budget"):
        auto(budget=0)


def test_interruption_returns_the_best_so_far() -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    # What is complete is not thrown away, and a search returns where it stands.
    assert auto().reconstruct(observe(victim()), callback=stop).status == "exact"
    found = auto().reconstruct(observe(victim(2, joins=True)), callback=stop)
    assert found.status == "interrupted"
    assert found.certificate is not None


def test_certificate_of_any_result() -> None:
    client = victim()
    seen = observe(client)
    # Without a label in the result, the best one is found from the update.
    truth = gl.Reconstruction(client.batch.inputs, None, 0.0)
    assert certified(seen, truth).certificate.verdict == "proved"
    assert certified(seen, gl.Reconstruction(1 - client.batch.inputs, None, 0.0)).certificate.verdict == "unproved"
    # So are those of a batch, from the head's gradient.
    batch = gl.Reconstruction(victim(2).batch.inputs, None, 0.0)
    assert certified(observe(victim(2)), batch).certificate.verdict == "proved"


@pytest.mark.parametrize(("act", "way"), [(torch.nn.Tanh, "recursion"), (torch.nn.ReLU, "spear")])
def test_a_batch_that_its_layers_determine_is_proved_without_search(act: type[torch.nn.Module], way: str) -> None:
    torch.manual_seed(0)
    layers = (
        torch.nn.Flatten(),
        torch.nn.Linear(192, 48),
        act(),
        torch.nn.Linear(48, 48),
        act(),
        torch.nn.Linear(48, 20),
    )
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    client = gl.Client(torch.nn.Sequential(*layers), gl.Batch(images, torch.arange(5)))
    seen = gl.ThreatModel().observe(
        client.model, client.send(), space=gl.ImageSpace((3, 8, 8)), training=client.training, batch_size=5
    )
    found = gl.attacks.auto().reconstruct(seen)
    assert found.certificate is not None
    assert found.certificate.examples == ("proved",) * 5
    assert "no other input nearby" in found.certificate.reason
    assert found.attack == way
    assert found.evaluations == 0
    assert float((found.inputs - images).square().mean()) < 1e-9
