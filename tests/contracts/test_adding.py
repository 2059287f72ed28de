"""A new defense, loss or way of ``auto`` is one file and one line; papers and spaces have tests of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks import linear_inversion
from gradleak.attacks.base import Attack, Callback
from gradleak.threat import Observation
from gradleak.training import TargetKind
from gradleak.types import Reconstruction, Status

DEFENSE = '''
"""Sending twice the update."""

from dataclasses import dataclass

import torch

from gradleak.defenses.base import UpdateDefense


@dataclass(frozen=True)
class Doubling(UpdateDefense):
    """Sending twice the update."""

    def transform(self, tensors, generator=None):
        return {k: 2 * t for k, t in tensors.items()}

    def explain(self, simulated, observed):
        return {k: o / 2 for k, o in observed.items()}

    def deviation(self, observed):
        return {k: torch.zeros_like(o) for k, o in observed.items()}


def double():
    return Doubling()
'''


def model() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    return net


def images() -> Tensor:
    return torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.slow
def test_a_new_defense_is_listed_and_known_to_attackers(run_extended: Callable[[str, str, str, str], str]) -> None:
    code = (
        "import sys, torch, gradleak as gl\n"
        "training = gl.defenses.double().wrap(gl.FedSGD())\n"
        "from torch.nn import Flatten, Linear, Sequential, Tanh\n"
        "model = Sequential(Flatten(), Linear(16, 8), Tanh(), Linear(8, 3))\n"
        "client = gl.Client(model.double(), gl.Batch(torch.rand(1, 1, 4, 4).double(), torch.tensor([1])), training)\n"
        "found = gl.simulate(client, gl.attacks.linear_inversion()).reconstruction\n"
        "print(found.certificate.verdict, (found.inputs - client.batch.inputs).abs().max().item() < 1e-9)\n"
        "from gradleak.audit.factories import build_defense\n"
        "print(build_defense(['double']))\n"
        "from gradleak.cli import main\n"
        "sys.argv = ['gradleak', 'list', 'defenses']\n"
        "main()\n"
    )
    told = run_extended("gradleak.defenses.doubling", DEFENSE, "double", code)
    assert told.startswith("proved True\nDoubling()\n")
    assert "double" in told.split()


@dataclass(frozen=True)
class Focal:
    """The focal loss (Lin et al. 2017, Equation 4), as a user writes it."""

    gamma: float = 2.0
    targets = TargetKind.CLASSES

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log = outputs.log_softmax(1).gather(1, targets[:, None])[:, 0]
        return (-((1 - log.exp()) ** self.gamma) * log).mean()


def test_a_new_loss_needs_no_line_at_all() -> None:
    client = gl.Client(model(), gl.Batch(images(), torch.tensor([1])), gl.FedSGD(Focal()))
    found = gl.simulate(client, linear_inversion()).reconstruction
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert found.labels is not None
    assert found.labels.tolist() == [1]
    assert float((found.inputs - client.batch.inputs).abs().max()) <= 1e-9


@dataclass(frozen=True)
class Remembering(Attack):
    """Knows a photograph, and whether it explains the update is the certificate's business."""

    memory: Tensor

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        return Reconstruction(self.memory, labels=torch.tensor([1]), objective=0.0, status=Status.CONVERGED)


@pytest.mark.parametrize("right", [True, False])
def test_a_new_way_of_auto_is_one_line(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = sys.modules["gradleak.attacks.auto"]
    client = gl.Client(model(), gl.Batch(images(), torch.tensor([1])))
    memory = images() if right else 1 - images()
    mine = ways.Way("remembering", lambda _: Remembering(memory), lambda case: None)
    monkeypatch.setattr(ways, "WAYS", (mine, *ways.WAYS))
    found = gl.simulate(client, gl.attacks.auto()).reconstruction
    assert found.certificate is not None
    assert found.certificate.verdict == "proved"
    assert (found.attack == "remembering") is right  # A wrong memory does not stand in the way of the next.
    assert found.attempts[0].attack == "remembering"
