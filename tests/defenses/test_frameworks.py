"""Named defenses beside what the frameworks' own classes gave for the same numbers (``frameworks.json``)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak import defenses
from gradleak.errors import InvalidInput

SEEN: dict[str, Any] = json.loads(Path(__file__).with_name("frameworks.json").read_text())
PLAIN = {k: torch.tensor(v) for k, v in SEEN["input"].items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Any]) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], torch.tensor(value), atol=1e-8, rtol=1e-6)
    assert not any(t.any() for name, t in ours.items() if name not in theirs)


@pytest.mark.parametrize("case", SEEN["percentile"], ids=lambda c: f"{c['percentile']}-{c['gamma']}-{c['steps']}")
def test_percentile_privacy_is_that_of_nvflare(case: dict[str, Any]) -> None:
    defense = defenses.percentile_privacy(**{k: case[k] for k in ("percentile", "gamma", "steps")})
    assert_equal(defense.transform(PLAIN), case["out"])
    if 0 < case["percentile"] < 100:  # What the filter hides is explained by what was there.
        left = defense.residual(PLAIN, {k: torch.tensor(v) for k, v in case["out"].items()})
        assert all(float(t.abs().max()) <= 1e-7 for t in left.values())


def test_excluded_tensors_are_those_of_nvflare() -> None:
    defense = defenses.exclude_vars("weight")
    sent = defense.transform(PLAIN)
    assert_equal(sent, SEEN["exclude"])
    assert not any(t.any() for t in defense.residual(PLAIN, sent).values())
    with pytest.raises(InvalidInput, match="narrower"):
        defenses.exclude_vars(".").transform(PLAIN)


def test_the_sparse_vector_filter_is_that_of_nvflare_without_its_noise() -> None:
    case = SEEN["svt"]
    defense = defenses.svt_privacy(
        fraction=case["fraction"], epsilon=1e12, noise_var=1e12, gamma=case["gamma"], tau=case["tau"], replace=False
    )
    assert_equal(defense.transform(PLAIN, torch.Generator().manual_seed(0)), case["out"])


def test_the_sparse_vector_filter_sends_as_many_numbers_with_as_much_noise_as_that_of_nvflare() -> None:
    big = torch.cat([torch.full((500,), 0.5), torch.full((1500,), 0.001)])
    defense = defenses.svt_privacy(fraction=0.1, epsilon=4000.0, noise_var=0.5, gamma=0.01, tau=0.004)
    seen = []
    for seed in range(60):
        sent = defense.transform({"w": big}, torch.Generator().manual_seed(seed))["w"]
        live = sent != 0
        seen.append([live.sum(), live[:500].sum(), (sent - big.clamp(-0.01, 0.01))[live].abs().mean()])
    mean = torch.tensor(seen).mean(0)
    for ours, theirs, spread in zip(mean.tolist(), SEEN["svt_stats"]["mean"], SEEN["svt_stats"]["std"], strict=True):
        assert abs(ours - theirs) <= 4 * spread / math.sqrt(60)


@pytest.mark.parametrize("norm", [0.2, 5.0])
def test_clipping_is_that_of_flower(norm: float) -> None:
    case = SEEN["flower"]
    moved = {"w": torch.tensor(case["after"]) - torch.tensor(case["before"])}
    for defense in (defenses.clip(norm), defenses.adaptive_clip(norm)):
        torch.testing.assert_close(
            defense.transform(moved)["w"], torch.tensor(case[f"clip {norm}"]), atol=1e-6, rtol=1e-5
        )
    assert (float(moved["w"].norm()) > norm) == case[f"bit {norm}"]


def test_the_adaptive_norm_moves_as_in_flower() -> None:
    start = defenses.adaptive_clip(0.1, quantile=0.5, rate=0.2)
    assert start.after(1.0).norm == pytest.approx(0.1 * math.exp(-0.1))
    assert start.after(0.5).norm == start.norm < start.after(0.0).norm


def test_local_dp_adds_the_noise_of_flower() -> None:
    defense = defenses.local_dp(1.0, 0.5, 2.0, 1e-5)
    _, noise = defense.defenses
    assert isinstance(noise, defenses.GaussianNoise)
    assert noise.sigma == pytest.approx(SEEN["flower"]["std"])
    bound = gl.bounds.upper_bound(defense.wrap(gl.FedSGD()), examples=1, prior=0.01)
    assert bound.noise_multiplier == pytest.approx(SEEN["flower"]["std"])
    with pytest.raises(InvalidInput, match="above 0"):
        defenses.local_dp(1.0, 0.5, 0.0, 1e-5)


def test_aggregation_is_the_mean_of_what_the_clients_send() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    batch = gl.Batch(torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)
    for inner in (gl.FedSGD(), defenses.clip(0.1).wrap(gl.FedAvg(lr=0.3, epochs=2))):
        parts = [inner(model, gl.Batch(batch.inputs[i : i + 2], batch.labels[i : i + 2])).tensors for i in (0, 2, 4)]
        seen = defenses.secure_aggregation(3).wrap(inner)(model, batch).tensors
        for name, value in seen.items():
            torch.testing.assert_close(value, torch.stack([p[name] for p in parts]).mean(0))
    noised = defenses.secure_aggregation(3).wrap(defenses.gaussian_noise(0.1).wrap(gl.FedSGD(), seed=1))
    plain = gl.FedSGD()(model, batch).tensors["1.weight"]
    noise = torch.stack([noised.reseed(s)(model, batch).tensors["1.weight"] - plain for s in range(100)])
    assert float(noise.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.1)
    assert float(noised.deviation({"w": torch.zeros(1)})["w"]) == pytest.approx(0.1 / math.sqrt(3))
    with pytest.raises(InvalidInput, match="clients of equal size"):
        defenses.secure_aggregation(4).wrap(gl.FedSGD())(model, batch)
