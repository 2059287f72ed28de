"""One image out of a vision transformer: ViT-Base/16 on ImageNet samples, and the layouts that people federate, small.

Float32 gradients, labels unknown, the first 12 of the ImageNet samples (``--large`` of
them for ViT-Base/16), a model drawn anew for each. The small models
(tests/attacks/vision_transformers.py, and transformers' own) are at their initialization, in training mode with dropout
0.1, on the same samples at 16 × 16. ``--remains`` images measure what a search finds where the closed form refuses.
Target: ≥ 90 dB and proved, ≤ 2 s after the model is loaded.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import arguments, write_result
from torch import Tensor, nn

import gradleak as gl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.attacks.vision_transformers import SHAPE, Timm, Torchvision, build, hugging_face

HALF = gl.ImageSpace((3, 224, 224), (0.5,) * 3, (0.5,) * 3)
SMALL: dict[str, Callable[[], nn.Module]] = {
    "Hugging Face ViT": partial(hugging_face, "ViT", 0.1),
    "Hugging Face DeiT": partial(hugging_face, "DeiT", 0.1),
    "timm layout": partial(Timm, drop=0.1),
    "timm layout, mean pooling": partial(Timm, pool="avg", drop=0.1),
    "torchvision layout": partial(Torchvision, 0.1),
}
REMAINS: dict[str, Callable[[], nn.Module]] = {
    "fixed positions": partial(Timm, "fixed"),
    "16 patches, width 12": partial(Timm, width=12),
}


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", images=12, large=12, remains=3, budget=30)
    stored = np.load(options.data / "imagenet_samples.npz", allow_pickle=False)
    images = torch.from_numpy(stored["x"][: options.images]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(stored["y"][: options.images].astype("int64"))
    rows, summary = [], []
    for dropout in (0.0, 0.1):
        make = partial(gl.models.vision_transformer, dropout=dropout)
        name = f"ViT-Base/16, 224 × 224, dropout {dropout:g}"
        some = slice(0, options.large)
        rows.append(measure(name, lambda i, make=make: make(seed=i).train(), images[some], labels[some], HALF))
        summary.append(_summary(rows[-1], 2.0))
        write_result("vit", rows, summary=summary)  # A run that is ended keeps what it has.
    small = F.avg_pool2d(images, 14)
    for name, layout in SMALL.items():
        model = partial(_small, layout)
        rows.append(measure(f"{name}, dropout 0.1", model, small, labels % 10, gl.ImageSpace(SHAPE)))
        summary.append(_summary(rows[-1], 2.0))
    write_result("vit", rows, summary=summary)
    for name, layout in REMAINS.items():
        if options.remains:
            some = slice(0, options.remains)
            attack = gl.attacks.auto(budget=float(options.budget))
            model = partial(_small, layout)
            rows.append(measure(name, model, small[some], labels[some] % 10, gl.ImageSpace(SHAPE), attack))
            rows[-1]["gray dB"] = _median([_psnr(torch.full_like(x, 0.5), x) for x in small[some]])
            summary.append(
                {
                    "what": f"vision transformer, {name}, no closed form: `auto(budget={options.budget})`",
                    "target": "what remains",
                    "measured": f"median {rows[-1]['PSNR median']:.1f} dB, gray {rows[-1]['gray dB']:.1f} dB",
                    "met": None,
                }
            )
    write_result("vit", rows, summary=summary)


def _small(layout: Callable[[], nn.Module], seed: int) -> nn.Module:
    return build(layout, seed, trained=False).train()


def measure(
    name: str,
    model: Callable[[int], nn.Module],
    images: Tensor,
    labels: Tensor,
    space: gl.ImageSpace,
    attack: Any = None,
) -> dict[str, Any]:
    """Return one line: every image alone, with a model of its own."""
    attack = gl.attacks.auto() if attack is None else attack
    decibels, walls, cores, bounds, proved, right = [], [], [], [], 0, 0
    for i in range(len(images)):
        with torch.random.fork_rng():  # the client's masks
            torch.manual_seed(1000 + i)
            client = gl.Client(model(i), gl.Batch(space.encode(images[i : i + 1]), labels[i : i + 1]))
            seen = gl.ThreatModel().observe(
                client.model, client.send(), space=space, training=client.training, batch_size=1
            )
        wall, core = time.perf_counter(), time.process_time()
        found = attack.reconstruct(seen)
        walls.append(time.perf_counter() - wall)
        cores.append(time.process_time() - core)
        decibels.append(_psnr(found.inputs[0], images[i]))
        proved += found.certificate.verdict == "proved"
        bounds.append(found.certificate.bound)
        right += int(found.labels is not None and found.labels.tolist() == labels[i : i + 1].tolist())
        print(f"{name} {i}: {decibels[-1]:.1f} dB, {cores[-1]:.2f} s, {found.certificate.verdict.value}", flush=True)
    return {
        "model": name,
        "images": len(images),
        "proved": proved,
        ">= 90 dB": sum(v >= 90 for v in decibels),
        "PSNR min": min(decibels),
        "PSNR median": _median(decibels),
        "labels right": right,
        "largest bound": max((b for b in bounds if b is not None), default=None),
        "seconds median": _median(walls),
        "processor s": _median(cores),
        "processor s max": max(cores),
    }


def _summary(row: dict[str, Any], limit: float) -> dict[str, Any]:
    count, hits = row["images"], min(row["proved"], row[">= 90 dB"])
    measured = f"{hits} of {count}, least {row['PSNR min']:.0f} dB, {row['processor s']:.2g} s of one processor"
    return {
        "what": f"`auto()`, one image, {row['model']}: ≥ 90 dB and proved, time",
        "target": f"all, ≤ {limit:.0f} s",
        "measured": measured,
        "met": hits == count and row["processor s"] <= limit if count >= 12 else None,
    }


def _psnr(found: Tensor, truth: Tensor) -> float:
    return float(gl.metrics.psnr(found[None], truth[None])[0])


def _median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
