"""The attacker who knows the defense, beside the one who does not: never worse, and better where there is something."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak import defenses
from gradleak.attacks.noise_aware import noise_share
from gradleak.data import demo_image
from gradleak.errors import NotApplicable

TOLD = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE
SIZE, SEEDS = 12, 3

# Every defense of ``gl.defenses``, at a strength at which something is left: the gradient's root mean square is 0.02.
AT_WORK: dict[str, gl.defenses.Defense] = {
    "adaptive_clip": defenses.adaptive_clip(0.5),
    "bfloat16": defenses.bfloat16(),
    "clamp": defenses.clamp(0.01),
    "clip": defenses.clip(0.5),
    "compose": defenses.compose(defenses.clip(0.5), defenses.gaussian_noise(1e-3)),
    "dp_sgd": defenses.dp_sgd(2e-3, 0.5, 1),
    "exclude_vars": defenses.exclude_vars("fc"),
    "gaussian_noise": defenses.gaussian_noise(1e-2),
    "half_precision": defenses.half_precision(),
    "int8": defenses.int8(),
    "laplacian_noise": defenses.laplacian_noise(1e-2),
    "local_dp": defenses.local_dp(0.5, 1e-3, 5.0, 1e-5),
    "percentile_privacy": defenses.percentile_privacy(gamma=0.01),
    "prune": defenses.prune(0.6),
    "secure_aggregation": defenses.secure_aggregation(1),
    "sign": defenses.sign(),
    "svt_privacy": defenses.svt_privacy(fraction=0.3, gamma=0.02, noise_var=30.0),
    "top_k": defenses.top_k(0.3),
}


def seen(defense: gl.defenses.Defense, seed: int, knows: gl.Knowledge) -> tuple[gl.Observation, Tensor]:
    model = gl.models.lenet(width=6, classes=10, image_size=SIZE, seed=seed)
    batch = gl.Batch(demo_image(SIZE).float(), torch.tensor([seed % 10]))
    training = defense.wrap(gl.FedSGD(), seed=seed)
    space = gl.ImageSpace((3, SIZE, SIZE))
    update = training(model, batch)
    shown = gl.ThreatModel(knows).observe(model, update, space=space, training=training, batch_size=1)
    return shown, batch.inputs


def error(defense: gl.defenses.Defense, seed: int, knows: gl.Knowledge) -> float:
    shown, truth = seen(defense, seed, knows)
    found = gl.attacks.auto(iterations=100, polish=False, uniqueness=False).reconstruct(shown, seed=seed)
    assert found.certificate is not None
    # What the defense hides is no proof, whatever it looks like.
    assert found.certificate.verdict is not gl.Verdict.PROVED or float(gl.metrics.mse(found.inputs, truth)) < 1e-4
    return float(gl.metrics.psnr(found.inputs, truth))


def test_every_defense_is_at_work_here() -> None:
    assert set(AT_WORK) == {n for n in defenses.__all__ if n[0].islower()}


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_WORK)
def test_who_knows_the_defense_does_no_worse(name: str) -> None:
    aware = [error(AT_WORK[name], s, TOLD) for s in range(SEEDS)]
    unaware = [error(AT_WORK[name], s, TOLD & ~gl.Knowledge.DEFENSE) for s in range(SEEDS)]
    # The mean over seeds, in dB; one dB is what the search itself varies by.
    assert mean(aware) >= mean(unaware) - 1.0, (aware, unaware)


@pytest.mark.parametrize("name", ["gaussian_noise", "percentile_privacy", "compose"])
def test_knowing_the_defense_pays(name: str) -> None:
    assert error(AT_WORK[name], 0, TOLD) > error(AT_WORK[name], 0, TOLD & ~gl.Knowledge.DEFENSE) + 1.0


def test_noise_is_weighed_by_its_share_of_the_update() -> None:
    shown, _ = seen(defenses.gaussian_noise(1e-2), 0, TOLD)
    total = sum(float(t.square().sum()) for t in shown.update.tensors.values())
    count = sum(t.numel() for t in shown.update.tensors.values())
    assert noise_share(shown) == pytest.approx(1e-4 * count / total)
    assert noise_share(seen(defenses.sign(), 0, TOLD)[0]) == 1.0
    assert noise_share(seen(defenses.clip(0.5), 0, TOLD)[0]) == 0.0
    with pytest.raises(NotApplicable, match="none to weigh"):
        gl.attacks.noise_aware().reconstruct(seen(defenses.clip(0.5), 0, TOLD)[0])
