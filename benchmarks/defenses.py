"""NVFlare's percentile filter as it ships (percentile 10, gamma 0.01), on three models: told, unaware, and a guess.

One example, one plain local step (FedAvg, lr 0.1), a fresh random model for each: the CNN of McMahan et al. 2017 and a
small DenseNet (GroupNorm) on random CIFAR-10 test images, and a perceptron 108-100-100-2 on UCI Adult rows. Images are
attacked by ``noise_aware()``, which is told the filter, and by the better (by residual) of ``recursion()`` and
``prior_matching()``, which are not, with equal numbers of steps; the null guess is mid-gray; a success is 20 dB. Rows
take ``auto()``, the commonest row as null guess; a success is every cell. Labels are not known. Every example is
stored, so that a run may be split: ``--part 0 --first 10 --count 10``.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from _common import RESULTS, arguments, write_result
from pooling import mcmahan
from tables import adult, right
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.base import Attack
from gradleak.audit.scores import wilson
from gradleak.data import load_images
from gradleak.errors import NotApplicable

TOLD = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE
FILTERED = gl.defenses.percentile_privacy().wrap(gl.FedAvg(lr=0.1))
VISIBLE = 20.0
MODELS = ("FedAvg CNN, CIFAR-10", "small DenseNet, CIFAR-10", "perceptron, Adult")


class Dense(nn.Module):
    """A small DenseNet: three blocks of three layers, growth 12, GroupNorm, average pooling between the blocks."""

    def __init__(self, growth: int = 12, classes: int = 10) -> None:
        super().__init__()
        width, self.stem = 2 * growth, nn.Conv2d(3, 2 * growth, 3, padding=1)
        self.layers = nn.ModuleList()
        for _ in range(9):
            norm = nn.GroupNorm(4, width)
            self.layers.append(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1)))
            width += growth
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, 32, 32)."""
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            x = torch.cat([x, layer(x)], 1)
            if number in (2, 5):
                x = nn.functional.avg_pool2d(x, 2)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a model with random weights of this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def attacked(
    model: nn.Module, batch: gl.Batch, space: gl.InputSpace, knows: gl.Knowledge, attack: Attack, seed: int
) -> tuple[gl.Reconstruction, float]:
    """Return what an attack makes of a filtered update, and its processor seconds."""
    update = FILTERED(model, batch)
    seen = gl.ThreatModel(knows).observe(model, update, space=space, training=FILTERED, batch_size=1)
    begin = time.process_time()
    return attack.reconstruct(seen, seed=seed), time.process_time() - begin


def residual(found: gl.Reconstruction) -> float:
    """Return what a result leaves of the update, infinite where it could not be simulated."""
    left = math.inf if found.certificate is None else found.certificate.residual
    return math.inf if math.isnan(left) else left


def image(part: int, index: int, options: Any) -> dict[str, Any]:
    """Attack one image; its PSNR for each attacker, in dB."""
    found = load_images(str(options.data / "cifar10.npz"), split="test", dtype=torch.float32)
    assert found.labels is not None
    place = int(np.random.default_rng(0).permutation(len(found.inputs))[index])
    batch = gl.Batch(found.inputs[place][None], found.labels[place][None])
    model = seeded((lambda: mcmahan(3, 32)) if part == 0 else Dense, index)
    space = gl.ImageSpace((3, 32, 32))
    matching = gl.attacks.prior_matching(iterations=options.steps, trace=False)
    ways = {"told": (TOLD, [gl.attacks.noise_aware(iterations=options.steps)])}
    ways["unaware"] = (TOLD & ~gl.Knowledge.DEFENSE, [gl.attacks.recursion(), matching])
    record: dict[str, Any] = {"index": index}
    for name, (knows, attacks) in ways.items():
        results, total = [], 0.0
        for attack in attacks:
            with suppress(NotApplicable):
                result, seconds = attacked(model, batch, space, knows, attack, index)
                results.append(result)
                total += seconds
        best = min(results, key=residual)  # the attacker's own choice
        record |= {name: float(gl.metrics.psnr(best.inputs, batch.inputs)), f"{name} seconds": total}
    record["null"] = float(gl.metrics.psnr(torch.full_like(batch.inputs, 0.5), batch.inputs))
    return record


def row(index: int, options: Any) -> dict[str, Any]:
    """Attack one row; whether every cell came back, for each attacker."""
    space, rows, labels = adult(options.data, one_hot=True)
    place = int(np.random.default_rng(0).permutation(len(rows))[index])
    truth = rows[place][None]
    batch = gl.Batch(space.encode(truth).float(), labels[place][None])
    model = gl.models.perceptron(width=100, classes=2, in_channels=1, image_size=(1, space.shape[0]), seed=index)
    record: dict[str, Any] = {"index": index}
    attack = gl.attacks.auto(iterations=options.steps, polish=False)
    for name, knows in (("told", TOLD), ("unaware", TOLD & ~gl.Knowledge.DEFENSE)):
        result, seconds = attacked(model, batch, space, knows, attack, index)
        assert result.certificate is not None
        record |= {name: right(space, result, truth), f"{name} seconds": seconds}
        record[f"{name} verdict"] = str(result.certificate.verdict)
    common = torch.stack([v.mode().values for v in rows.T])
    record["null"] = int(bool(space.cells(common[None], truth).all()))
    return record


def summary(name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a line of the page for one model."""
    limit = 0.5 if name == MODELS[2] else VISIBLE
    told = []
    for who in ("told", "unaware", "null"):
        hits = sum(r[who] >= limit for r in records)
        low, high = wilson(hits, len(records))
        middle = "" if name == MODELS[2] else f", median {statistics.median(r[who] for r in records):.1f} dB"
        told.append(f"{who} {hits} of {len(records)} [{low:.2f}, {high:.2f}]{middle}")
    what = "every cell" if name == MODELS[2] else "≥ 20 dB"
    return {
        "what": f"Stock PercentilePrivacy, {name}, one example: {what}",
        "target": "published, n ≥ 20",
        "measured": "; ".join(told),
        "met": True if len(records) >= 20 else None,
    }


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", first=0, count=20, part=-1, steps=100)
    stored = RESULTS / "defenses.json"
    kept: dict[str, list[dict[str, Any]]] = json.loads(stored.read_text())["examples"] if stored.exists() else {}
    for part in range(3) if options.part < 0 else [options.part]:
        for index in range(options.first, options.first + options.count):
            record = row(index, options) if part == 2 else image(part, index, options)
            # Read anew: other parts may run beside this one.
            kept = json.loads(stored.read_text())["examples"] if stored.exists() else {}
            mine = [r for r in kept.get(MODELS[part], []) if r["index"] != index]
            kept[MODELS[part]] = sorted([*mine, record], key=lambda r: r["index"])
            lines = [summary(n, kept[n]) for n in MODELS if n in kept]
            write_result("defenses", lines, examples=kept, steps=options.steps, summary=lines)


if __name__ == "__main__":
    main()
