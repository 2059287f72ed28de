"""Situations of people who audit federations, rebuilt small: what the command must say of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.types import NoteKind

MODELS = """
import torch
from torch import nn


def logistic():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return model


def table():
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))


def picture(width=8):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64 * width, 5))


def trace():
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 24, 5)
    )


def gated():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
"""


@pytest.fixture
def captured(case):
    """Return a function that captures the update of a model of ``MODELS``, and runs the command on it."""
    (case.folder / "nets.py").write_text(MODELS)
    names: dict[str, object] = {}
    exec(MODELS, names)

    def go(name: str, x: Tensor, y: Tensor, *more: str, loss=F.cross_entropy, scale=None, **options: str | None):
        model: nn.Module = names[name]()
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data = p.data if not bool(p.any()) else 0.3 * torch.randn(p.shape, generator=generator)
        loss(model(x), y).backward()
        update = {k: p.grad if scale is None else scale(p.grad) for k, p in model.named_parameters()}
        case.write("w.safetensors", dict(model.state_dict()))
        case.write("u.safetensors", update)
        case.write("t.safetensors", {"inputs": x, "labels": y.flatten().long()})
        options = {
            "model": f"nets.py:{name}", "weights": "w.safetensors", "update": "u.safetensors", "classes": None,
            "input_shape": ",".join(map(str, x.shape[1:])), "batch_size": str(len(x)), "attack": None,
        } | options  # fmt: skip
        done = case.attack(*more, **options)
        assert done.code == 0, done.err
        return case.record(), done, case.tensors("out/reconstruction.safetensors")["inputs"].float()

    return go


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_no_proof_rests_on_a_batch_size_that_nobody_stated(captured) -> None:
    """Of zero weights, every batch of one class has the gradient of its mean."""
    x, y = random(4, 1, 8, 8), torch.full((4,), 2)
    found, done, inputs = captured("logistic", x, y, batch_size=None)
    assert found.verdict.grade != "proved"
    assert found.certificate.verdict == "matched"
    assert found.subject.batch_size_source == "assumed"
    assert "mean of several" in done.out or "Assuming one image" in done.out
    assert torch.allclose(inputs, x.mean(0, keepdim=True), atol=1e-5)
    assert any("batch size was not stated" in note for note in found.outcome.notes)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, F.mse_loss])
def test_one_output_is_read_under_its_own_loss(captured, loss, count: int) -> None:
    """Neither loss is stated: both are tried, and the one that explains the update is named."""
    x, y = random(count, 10) - 0.5, torch.ones(count, 1)
    found, done, inputs = captured("table", x, y, loss=loss)
    assert found.certificate.verdict != "unproved"
    assert torch.cdist(inputs, x).min(0).values.max() < 1e-4
    assert "Assuming binary cross-entropy: " in done.out or "Assuming squared error: " in done.out
    (kind,) = [k for n, k in zip(found.outcome.notes, found.outcome.note_kinds, strict=True) if "loss was not" in n]
    assert kind == NoteKind.ASSUMPTION
    found, done, _ = captured("table", x, y, "--truth", "t.safetensors", loss=loss)
    assert found.verdict.grade == "leaked"


def test_a_stated_loss_is_no_assumption(captured) -> None:
    found, done, _ = captured(
        "table", random(1, 10), torch.ones(1, 1), "--loss", "mse", "--labels", "1", loss=F.mse_loss
    )
    assert "Assuming" not in done.out
    assert found.certificate.verdict in ("proved", "matched")
    assert "squared error" in found.subject.training


def test_three_axes_that_are_no_image(captured) -> None:
    """A spectrogram in decibels: plain numbers come back as they are."""
    x, y = 4 * random(1, 1, 8, 8) - 3, torch.tensor([2])
    found, _, inputs = captured("picture", x, y, "--input-kind", "tensor", "--truth", "t.safetensors")
    assert torch.allclose(inputs, x, atol=1e-3)
    assert found.verdict.grade == "leaked"
    assert found.subject.input_kind == "tensor"


def test_values_outside_of_images_name_the_remedy(captured, case) -> None:
    x, y = 4 * random(1, 1, 8, 8) - 3, torch.tensor([2])
    captured("picture", x, y)
    words = ("--model", "nets.py:picture", "--weights", "w.safetensors", "--update", "u.safetensors")
    done = case.run("attack", *words, "--input-shape", "1,8,8", "--out", "o", "--truth", "t.safetensors")
    assert done.code == 2
    assert "--input-kind tensor" in done.err


def test_a_flat_base_line_does_not_hide_what_came_back(captured) -> None:
    """A sensor trace: most values are near zero, one peak is not."""
    t = torch.linspace(0, 1, 24)
    beat = torch.exp(-(((t - 0.4) / 0.02) ** 2)) - 0.2 * torch.exp(-(((t - 0.7) / 0.03) ** 2))
    x, y = torch.stack([beat, 0.6 * beat])[None], torch.tensor([3])
    found, _, inputs = captured("trace", x, y, "--truth", "t.safetensors")
    assert torch.allclose(inputs, x, atol=1e-4)
    assert found.verdict.grade == "leaked"


@pytest.mark.slow
def test_a_budget_that_ends_any_phase_is_a_budget(captured) -> None:
    """More examples than a search can tell apart on a smooth network, polish included."""
    x, y = random(12, 1, 8, 8), torch.arange(12) % 5
    found, done, _ = captured("gated", x, y, budget="2s")
    assert found.outcome.status in ("budget", "converged")
    assert done.err == ""


def test_factors_of_single_tensors_claim_no_scale(captured) -> None:
    """Clipping per tensor leaves the input known up to one factor: it is not called proved."""

    def clipped(gradient: Tensor) -> Tensor:
        return gradient * min(1.0, 0.1 / float(gradient.norm()))

    found, _, _ = captured("logistic", random(1, 1, 8, 8), torch.tensor([2]), scale=clipped)
    assert found.verdict.grade != "proved"
    assert found.certificate.verdict != "proved"
