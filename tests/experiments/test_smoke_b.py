"""Defenses, property inference and the earlier attacks: pure parts, and a slow run of the smoke scale."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import gradleak as gl
from gradleak.papers import reproduce
from gradleak.papers.experiment import share
from gradleak.papers.packages import load_package

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "2019_zhu_dlg"
NAMES = ("defenses", "property_inference", "synthetic")


def load(name: str) -> ModuleType:
    load_package("zhu_for_tests", FOLDER)
    return importlib.import_module(f"zhu_for_tests.{name}")


@pytest.fixture(scope="module")
def properties() -> ModuleType:
    return load("property_inference")


@pytest.fixture(scope="module")
def defenses() -> ModuleType:
    return load("defenses")


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    return load("synthetic")


def test_area_counts_ordered_pairs_and_ties_half(properties: ModuleType) -> None:
    generator = np.random.default_rng(0)
    scores, truth = generator.integers(0, 6, 40).astype(float), generator.integers(0, 2, 40)
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, s in zip(scores, truth, strict=True)
        if s
        for b, t in zip(scores, truth, strict=True)
        if not t
    ]
    assert properties.area(scores.tolist(), truth.tolist()) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(properties.area([1.0, 2.0], [1, 1]))


def test_interval_of_a_perfect_area_is_not_a_point(properties: ModuleType) -> None:
    small, large = (properties.auc([*range(2 * n)], [0] * n + [1] * n) for n in (5, 50))
    assert small.value == large.value == small.high == 1.0
    assert 0.5 < small.low < large.low < 1.0
    mirrored = properties.auc([*range(10)], [1] * 5 + [0] * 5)
    assert mirrored.value == 0.0
    assert mirrored.high == pytest.approx(1 - small.low, abs=1e-9)


def test_interval_covers_as_often_as_it_says(properties: ModuleType) -> None:
    generator, shift, hits = np.random.default_rng(1), 1.2, 0
    theta = 0.5 * (1 + math.erf(shift / 2))  # area of two unit normals, `shift` apart
    truth = [0] * 30 + [1] * 30
    for _ in range(400):
        scores = generator.normal(size=60) + shift * np.array(truth)
        found = properties.auc(scores.tolist(), truth)
        hits += found.low <= theta <= found.high
    assert 0.92 <= hits / 400 <= 0.985


def test_logistic_regression_is_stationary(properties: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64) > 0.3).double()
    w = properties.logistic(x, y, 0.1)
    weight = torch.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    slope = (weight * ((x @ w[:-1] + w[-1]).sigmoid() - y)) @ x / 60 + 0.1 * w[:-1]
    assert float(slope.abs().max()) < 1e-5


def test_scores_of_a_visible_property_rank_unseen_rows(properties: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 300, generator=generator)
    y = (torch.arange(120) % 2).long()
    x[:, :5] += 3.0 * y[:, None]
    scores = properties.fitted(x[:80], y[:80], x[80:])
    assert properties.area(scores, y[80:].tolist()) > 0.95


def test_gradient_features_are_the_updates(properties: ModuleType) -> None:
    model = gl.models.lenet(width=4, classes=2, in_channels=1, image_size=8, seed=0)
    x, y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 0])
    rows = properties.features(model, x, y)
    batches = properties.features(model, x.view(2, 3, 1, 8, 8), y.view(2, 3))
    sent = gl.FedSGD()(model, gl.Batch(x[4:5], y[4:5])).tensors
    torch.testing.assert_close(rows[4], torch.cat([v.flatten() for v in sent.values()]))
    torch.testing.assert_close(batches[1], rows[3:].mean(0))
    turned = properties.aligned(rows)
    assert bool((turned[:, -1] > 0).all())
    assert bool((rows[:, -1] < 0).any())
    torch.testing.assert_close(turned.abs(), rows.abs())


def test_outer_product_head_leaves_an_undefended_update_and_cleans_a_noisy_one(defenses: ModuleType) -> None:
    model = gl.models.lenet(classes=20, seed=0)
    batch = gl.Batch(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3]))
    update = gl.FedSGD()(model, batch)
    clean = defenses.outer_product_head(update)
    for name, tensor in update.tensors.items():
        torch.testing.assert_close(clean.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    noisy = gl.defenses.gaussian_noise(1e-2).wrap(gl.FedSGD(), seed=1)(model, batch)
    clean, key = defenses.outer_product_head(noisy), "fc.0.weight"
    before, after = ((u.tensors[key] - update.tensors[key]).norm() for u in (noisy, clean))
    assert after < before / 3


def test_noise_share_is_that_of_the_noise(defenses: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = gl.Update({"w": torch.randn(200_000, generator=generator)})
    for name, noise in (("Gaussian 1e-1", gl.defenses.gaussian_noise(0.1)),
                        ("Laplacian 1e-1", gl.defenses.laplacian_noise(0.1))):  # fmt: skip
        sent = gl.Update(noise.transform(plain.tensors, generator))
        energy = (sent.tensors["w"] - plain.tensors["w"]).square().sum() / sent.tensors["w"].square().sum()
        assert defenses.noise_share(name, sent) == pytest.approx(float(energy), rel=0.05)
    assert defenses.noise_share("8 bit", plain) == 0.0


def test_every_defense_of_the_table_changes_an_update(defenses: ModuleType) -> None:
    model = gl.models.lenet(classes=20, seed=0)
    batch = gl.Batch(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3]))
    plain = gl.FedSGD()(model, batch).tensors
    for name in defenses.GRID:
        sent = defenses.client(name)(model, batch).tensors
        assert any(not torch.equal(sent[k], plain[k]) for k in plain) is (name != "none"), name


def test_verdicts_on_the_papers_marks(defenses: ModuleType) -> None:
    assert defenses.defended(0.4, 1.0) is True
    assert defenses.defended(0.5, 1.0) is False
    assert defenses.defended(0.0, 0.0) is None
    assert "falls" in defenses.fate(True, False, True, n=100, sure=True)
    assert "✓ stands" in defenses.fate(True, True, True, n=100, sure=True)
    assert "✗ stands" in defenses.fate(False, False, None, n=100, sure=True)


def test_no_verdict_where_nothing_is_recovered_without_a_defense(defenses: ModuleType) -> None:
    for paper in (True, False, None):
        assert defenses.fate(paper, None, None, n=2, sure=True).startswith("Nothing follows")


def test_a_verdict_says_how_few_images_it_rests_on(defenses: ModuleType) -> None:
    assert defenses.fate(True, False, True, n=1, sure=False).endswith("(1 image, too few to be sure)")
    assert defenses.fate(True, False, True, n=100, sure=True).endswith("(100 images)")
    assert not defenses.decided(share([True]), 1.0)  # one of one: by chance as well
    assert not defenses.decided(share([False] * 3), 1.0)
    assert defenses.decided(share([True] * 99 + [False]), 1.0)
    assert defenses.decided(share([False] * 100), 1.0)


def test_distances_tell_the_example_from_the_average(synthetic: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    example, average = (torch.rand(1, 28, 28, generator=generator) for _ in range(2))
    found = synthetic.distances(torch.stack([example, example]), example, average)
    assert found["mse to example"] == 0.0
    assert found["ssim to example"] == pytest.approx(1.0)
    assert found["mse to average"] == pytest.approx(float((example - average).square().mean()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_smoke_scale_runs_and_repeats_nothing(name: str, data_dir: Path, tmp_path: Path) -> None:
    first = reproduce.reproduce("2019_zhu_dlg", only=name, scale="smoke", data=data_dir, out=tmp_path)
    assert not first.failures
    assert first.results[name]["rows"]
    again = reproduce.reproduce("2019_zhu_dlg", only=name, scale="smoke", data=data_dir, out=tmp_path)
    assert again.results[name]["rows"] == first.results[name]["rows"]
    assert again.results[name]["seconds"] < first.results[name]["seconds"] / 2
