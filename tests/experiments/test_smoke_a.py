"""Experiments on images: every smoke version runs and fills its rows; the pure parts are right."""

from __future__ import annotations

import importlib
import math
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gradleak.papers.experiment import Lab
from gradleak.papers.packages import load_package
from gradleak.papers.reproduce import reproduce

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "2019_zhu_dlg"
NAMES = (
    "images", "batches", "federated", "training_stage", "layers", "optimizers", "model_size", "accumulated",
)  # fmt: skip


def module(name: str) -> ModuleType:
    load_package("experiments_under_test", FOLDER)
    return importlib.import_module(f"experiments_under_test.{name}")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, data_dir: Path, tmp_path: Path) -> None:
    done = reproduce("2019_zhu_dlg", only=name, scale="smoke", data=data_dir, out=tmp_path)
    rows = done.results[name]["rows"]
    assert rows
    assert all(row["ours"] is not None or row["published"] is not None for row in rows)
    assert all((tmp_path / "results-smoke" / figure["file"]).is_file() for figure in done.results[name]["figures"])
    stored = sorted((tmp_path / name).iterdir())
    reproduce("2019_zhu_dlg", only=name, scale="smoke", data=data_dir, out=tmp_path)
    assert sorted((tmp_path / name).iterdir()) == stored  # nothing is measured twice


@pytest.mark.slow
@pytest.mark.data
def test_one_image_is_exact_from_its_float32_gradient(data_dir: Path, tmp_path: Path) -> None:
    record = module("images").ours(Lab("images", tmp_path, data_dir), name="mnist", image=7, iterations=3000)
    assert record["status"] == "exact"
    assert record["mse"][0] < 1e-10


def test_published_descends_on_a_small_model_and_returns_the_last_iterate() -> None:
    published = module("_published").published
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.5, 0.5, generator=generator)
    x, y = torch.rand(1, 1, 2, 2, generator=generator), torch.tensor([1])
    loss = torch.nn.functional.cross_entropy(model(x), y)
    names = [k for k, _ in model.named_parameters()]
    gradient = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    seen: list[tuple[int, int]] = []
    result = published(
        model, gradient, (1, 2, 2), 2, seed=1, watch=lambda step, evaluations, _: seen.append((step, evaluations))
    )
    assert result.labels.tolist() == [1]
    torch.testing.assert_close(result.inputs, x, rtol=0, atol=1e-2)
    assert result.status == "settled"
    assert seen[-1] == (result.outer, result.evaluations)
    assert seen[0][1] <= 25  # 20 inner iterations a step, not more than 25 evaluations


def test_published_stops_where_nothing_is_finite() -> None:
    model = torch.nn.Linear(2, 2)
    gradient = {k: torch.full_like(p, torch.inf) for k, p in model.named_parameters()}
    result = module("_published").published(model, gradient, (2,), 2)
    assert (result.status, result.outer) == ("diverged", 1)


def test_errors_are_assigned_clamped_and_never_missing() -> None:
    errors = module("_shared").errors
    truth = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert errors(truth.flip(0), truth) == [0.0, 0.0]
    assert errors(3 * truth, truth) == [0.0, 0.0]
    spoiled = truth.clone()
    spoiled[1, 0, 0, 0] = torch.nan
    assert errors(spoiled, truth) == [0.0, math.inf]


def test_reached_counts_the_first_hit_and_its_share_of_the_time() -> None:
    reached = module("optimizers").reached
    assert reached([10, 20, 40], [1.0, 5e-5, 1e-6], 8.0, 40) == (20.0, 4.0)
    assert reached([10], [1.0], 8.0, 10) == (math.inf, math.inf)


def test_delta_of_one_step_is_read_as_the_gradient() -> None:
    import gradleak as gl

    model = torch.nn.Linear(3, 2).double()
    batch = gl.Batch(torch.ones(1, 3, dtype=torch.float64), torch.tensor([0]))
    read = module("_shared").gradients(model, gl.FedAvg(lr=0.1)(model, batch), lr=0.1)
    for name, value in gl.FedSGD()(model, batch).tensors.items():
        torch.testing.assert_close(read[name], value)


def test_average_of_clients_is_the_gradient_of_their_union() -> None:
    import gradleak as gl

    model = torch.nn.Linear(3, 2).double()
    x = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    y = torch.tensor([0, 1, 1, 0])
    parts = [gl.Batch(x[:2], y[:2]), gl.Batch(x[2:], y[2:])]
    averaged = module("accumulated").average(model, parts)
    for name, value in gl.FedSGD()(model, gl.Batch(x, y)).tensors.items():
        torch.testing.assert_close(averaged.tensors[name], value)


def test_shared_layers_and_depth() -> None:
    assert module("layers").shared_layers("first", 2) == ("body.0", "body.2")
    assert module("layers").shared_layers("last", 1) == ("fc.0",)
    deep = module("model_size").deep_lenet(12, 5, 3)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in deep.modules()) == 5
    assert deep(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert all(float(p.detach().abs().max()) <= 0.5 for p in deep.parameters())


def test_largest_batch_in_words() -> None:
    batches = module("batches")
    settings = [batches.Setting("lenet", 12, n, 1, 1) for n in (1, 2)]
    found = [
        (settings[0], [{"mse": [1e-6]}], [{"mse": [1.0]}]),
        (settings[1], [{"mse": [1e-6, 1.0]}], [{"mse": [1.0]}]),
    ]
    assert batches._limits(found) == ("N = 1, fails at N = 2", "none, fails at N = 1")
    assert batches._qualities(found) == "mean PSNR of ours: 60 dB at N = 1, 30 dB at N = 2"


def test_explanations_hold_no_result_that_another_run_may_contradict() -> None:
    expected = tomllib.loads((FOLDER / "expected.toml").read_text(encoding="utf-8"))
    explained = [record["why"] for table in expected.values() for record in table.values() if "why" in record]
    assert explained
    for why in explained:
        assert not re.search(r"\d (dB|%|s|evaluations)\b|\d+ of \d+|were not recovered", why), why
