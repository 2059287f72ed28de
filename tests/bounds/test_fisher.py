"""Fisher information: the Jacobian's own, what an unbiased attacker reaches, and where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.bounds import fisher_information
from gradleak.defenses import clip, dp_sgd, gaussian_noise
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.training import Simulator


def setting() -> tuple[nn.Module, gl.Batch]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, gl.Batch(torch.rand(2, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2]))


@pytest.mark.parametrize("training", [gaussian_noise(0.1).wrap(gl.FedSGD()), dp_sgd(0.5, 0.2, 2).wrap(gl.FedSGD())])
def test_it_is_that_of_the_jacobian(training: gl.LocalTraining) -> None:
    model, batch = setting()
    simulator = Simulator(model, training.known())

    def sent(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.flatten() for t in simulator.update(x, batch.labels).values()])

    jacobian = torch.autograd.functional.jacobian(sent, batch.inputs.double())
    sigma = 0.1 if isinstance(training, gl.defenses.Defended) else 0.5 * 0.2 / 2
    found = fisher_information(model, training, batch, samples=4000)
    torch.testing.assert_close(found, jacobian.square().sum(0) / sigma**2, rtol=0.15, atol=0)


def test_without_noise_everywhere_there_is_none() -> None:
    model, batch = setting()
    with pytest.raises(NotApplicable, match="without noise"):
        fisher_information(model, clip(0.1).wrap(gl.FedSGD()), batch)
    with pytest.raises(InvalidInput, match="at least 1"):
        fisher_information(model, gaussian_noise(0.1).wrap(gl.FedSGD()), batch, samples=0)
