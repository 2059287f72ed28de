"""Model inversion climbs the confidence, and the update has no say in it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import gradleak as gl
from gradleak.attacks.base import Progress
from gradleak.clock import TimeSpent
from gradleak.errors import InvalidInput, MissingKnowledge, NotApplicable
from gradleak.papers.packages import load_package

load_package("experiments_under_test", Path(__file__).resolve().parents[2] / "experiments" / "2019_zhu_dlg")
model_inversion = importlib.import_module("experiments_under_test._model_inversion").model_inversion
SHAPE = (1, 8, 8)


def seen(seed: int, knows: gl.Knowledge = gl.Knowledge.LABELS) -> gl.Observation:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    torch.nn.init.uniform_(model[1].weight, -0.5, 0.5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(model[1].bias)
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    batch = gl.Batch(image, torch.tensor([2]))
    return gl.ThreatModel(knows).observe(
        model, gl.FedSGD()(model, batch), space=gl.ImageSpace(SHAPE), labels=batch.labels
    )


def test_confidence_rises_to_what_the_objective_says() -> None:
    observation = seen(0)
    found = model_inversion(iterations=200, lr=1.0).reconstruct(observation)
    with torch.no_grad():
        black, climbed = (observation.model(x).softmax(-1)[0, 2] for x in (torch.zeros(1, *SHAPE), found.inputs))
    assert black == pytest.approx(0.25)
    assert climbed > 0.9
    assert found.objective == pytest.approx(1 - float(climbed), abs=1e-6)
    assert found.inputs.min() >= 0
    assert found.inputs.max() <= 1


def test_the_private_example_makes_no_difference() -> None:
    first, second = (model_inversion(iterations=20).reconstruct(seen(s)).inputs for s in (1, 2))
    assert torch.equal(first, second)


def test_confidence_reached_ends_the_run() -> None:
    found = model_inversion(confidence=1e-6).reconstruct(seen(0))
    assert found.status == "converged"
    assert found.iterations == 0


def test_labels_are_needed() -> None:
    with pytest.raises(MissingKnowledge, match="LABELS"):
        model_inversion().reconstruct(seen(0, gl.Knowledge.NOTHING))


@pytest.mark.parametrize("options", [{"iterations": 0}, {"lr": 0.0}, {"confidence": 1.5}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="model_inversion"):
        model_inversion(**options)


def test_a_model_without_classes_is_refused_in_one_sentence() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
    batch = gl.Batch(torch.rand(1, *SHAPE), torch.tensor([[1.0]]))
    training = gl.FedSGD(gl.training.BinaryCrossEntropy())
    observation = gl.ThreatModel(gl.Knowledge.LABELS).observe(
        model, training(model, batch), space=gl.ImageSpace(SHAPE), labels=batch.labels
    )
    with pytest.raises(NotApplicable, match=r"shape \(1, 1\)"):
        model_inversion().reconstruct(observation)


@pytest.mark.parametrize(("error", "status"), [(TimeSpent, "budget"), (KeyboardInterrupt, "interrupted")])
def test_a_stop_returns_the_best_so_far(error: type[BaseException], status: str) -> None:
    def stop(progress: Progress) -> None:
        if progress.done >= 100:
            raise error

    found = model_inversion(confidence=1.0, patience=10**6).reconstruct(seen(0), callback=stop)
    assert found.status == status
    assert found.iterations == 100
