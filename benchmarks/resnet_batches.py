"""Batches on ResNet-18 at 32x32: cosine and total variation, with and without the features of the head, at equal time.

All variants run in one loop (signed Adam, step size 0.1 that falls tenfold after 3/8, 5/8 and 7/8 of the steps, pixels
kept in [0, 1]) from the same starts; features and labels come from ``disaggregate()``, never from the truth. The term
of the features is the mean squared distance of every example's features from its own target, relative to the spread of
the targets; the schedules say with which weight (``--exponent 3``: 10⁻³) it is added:

- none: cosine and total variation alone, which is ``inverting_gradients()``.
- constant: the weight throughout.
- first: the weight, which falls to zero at half of the steps, so that the features place the images and the gradient
  draws them.
- late: zero for the first half, then the weight.

PSNR is taken per example after assignment, once at the end of every variant and once at the processor time at which
the fastest variant was done ("equal time"). Victims are random models in evaluation mode with random CIFAR-100 images.

On the one other batch that was tried (N = 4, 120 of the steps, weight 0.1) no schedule helped: 14.8 dB without features
at that point, 14.4 late, 11.9 first, 10.2 constant.

Run: ``python benchmarks/resnet_batches.py [--batches 10] [--steps 4800] [--threads N] [--size 4] [--first 0]``; a run
that is stopped goes on where it was. ``--first`` is the number of the first batch: schedules are compared on batches
from 1000 on, which the table does not contain.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from _common import RESULTS, arguments, cifar100, observe, write_result
from _journal import Journal
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.matching import Cosine, TotalVariation
from gradleak.attacks.matching.convolutions import LeanConvolutions
from gradleak.metrics import assign, psnr
from gradleak.structure.head import features_and_logits, find_head
from gradleak.training import parameters

SIZES = (4, 8, 16)
SCHEDULES = ("none", "constant", "first", "late")


def weight(schedule: str, done: float, top: float) -> float:
    """Return the weight of the features after a share ``done`` of the steps."""
    return {
        "none": 0.0,
        "constant": top,
        "first": top * max(0.0, 1 - 2 * done),
        "late": top * (done >= 0.5),
    }[schedule]


def victim(size: int, number: int, images: Tensor, labels: Tensor) -> tuple[gl.Client, gl.Observation]:
    """Return a client with a fresh random model and a batch of different classes, and what the server sees."""
    generator = torch.Generator().manual_seed(100_000 + 1000 * size + number)
    order = torch.randperm(len(images), generator=generator)
    seen: list[int] = []
    picked = [i for i in order[: 20 * size].tolist() if not (int(labels[i]) in seen or seen.append(int(labels[i])))]
    chosen = picked[:size]
    model = gl.models.resnet18(classes=100, seed=number).eval()
    return observe(gl.Client(model, gl.Batch(images[chosen].float(), labels[chosen])))


def search(
    size: int, number: int, schedule: str, steps: int, top: float, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Run one variant on one batch and return its PSNR over processor time."""
    client, seen = victim(size, number, images, labels)
    found = gl.attacks.disaggregate().reconstruct(seen, seed=number)
    assert found.features is not None
    assert found.labels is not None
    targets, classes, model = found.features, found.labels, client.model
    spread = (targets - targets.mean(0)).square().sum(1).mean()
    params = {k: p.clone().requires_grad_() for k, p in parameters(model).items()}
    head = find_head(model, params, (3, 32, 32))
    assert head is not None
    observed = dict(seen.update.tensors)
    objective, prior, loss = Cosine(), TotalVariation(1e-4), nn.CrossEntropyLoss()
    scale = objective.scale(observed)
    kept = RESULTS / f"resnet_batches.{size}.{number}.{schedule}.{steps}.{top:.0e}.partial.pt"
    x = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(number))
    state = {"step": 0, "x": x, "m": torch.zeros_like(x), "v": torch.zeros_like(x), "best": x.clone(), "low": math.inf}
    state |= {"seconds": 0.0, "curve": []}
    if kept.exists():
        state = torch.load(kept, weights_only=True)
    x, m, v, best, low, curve = (state[k] for k in ("x", "m", "v", "best", "low", "curve"))
    spent, begun = state["seconds"], time.process_time()

    def note(step: int) -> None:
        nonlocal spent, begun
        spent += time.process_time() - begun
        shown = best.clamp(0, 1)
        curve.append([step, spent, psnr(shown[assign(shown, client.batch.inputs)], client.batch.inputs).tolist()])
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"step": step, "x": x, "m": m, "v": v, "best": best, "low": low, "seconds": spent, "curve": curve}, kept
        )
        begun = time.process_time()

    for step in range(state["step"], steps):
        leaf = x.detach().requires_grad_()
        with LeanConvolutions():
            features, logits = features_and_logits(model, params, leaf, head)
        gradient = torch.autograd.grad(loss(logits, classes), list(params.values()), create_graph=True)
        distance = objective(dict(zip(params, gradient, strict=True)), observed, scale)
        share = weight(schedule, step / steps, top)
        total = distance + prior(leaf)
        if share:
            total = total + share * (features - targets).square().sum(1).mean() / spread
        (slope,) = torch.autograd.grad(total, leaf)
        value = float((distance + prior(leaf)).detach())  # The same measure for all variants chooses the iterate.
        if value < low:
            best, low = x.clone(), value
        slope = slope.sign()
        m = 0.9 * m + 0.1 * slope
        v = 0.999 * v + 0.001 * slope.square()
        rate = 0.1 * 0.1 ** sum(step >= steps * k / 8 for k in (3, 5, 7))
        move = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        x = (x - rate * move).clamp(0, 1)
        if (step + 1) % 10 == 0 or step + 1 == steps:
            note(step + 1)
    kept.unlink(missing_ok=True)
    return {"curve": curve, "proved": found.status == "exact", "objective": low}


def interval(values: list[float]) -> str:
    """Return the 95 % interval of the mean over batches (normal), or a dash for one batch."""
    if len(values) < 2:
        return "–"
    t = torch.tensor(values).double()
    half = 1.96 * float(t.std()) / math.sqrt(len(values))
    return f"{float(t.mean()) - half:.1f}-{float(t.mean()) + half:.1f}"


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", batches=10, steps=4800, size=0, first=0, schedules=len(SCHEDULES), exponent=3)
    top = 10.0**-options.exponent
    images, labels = cifar100(options.data)
    journal, rows = Journal("resnet_batches"), []
    for size in SIZES if options.size == 0 else (options.size,):
        runs: dict[str, list[dict[str, Any]]] = {s: [] for s in SCHEDULES[: options.schedules]}
        for number in range(options.first, options.first + options.batches):
            for schedule in runs:
                runs[schedule].append(
                    journal.row(
                        f"N = {size}, batch {number}, {schedule}, {options.steps} steps, weight {top:.0e}",
                        lambda size=size, number=number, schedule=schedule: search(
                            size, number, schedule, options.steps, top, images, labels
                        ),
                    )
                )
        for schedule, found in runs.items():
            even = []
            for i, run in enumerate(found):
                limit = min(other[i]["curve"][-1][1] for other in runs.values())
                even.append([c for c in run["curve"] if c[1] <= limit * 1.001][-1][2])
            ends = [run["curve"][-1][2] for run in found]
            means = [sum(e) / len(e) for e in even]
            rows.append(
                {
                    "N": size,
                    "features": schedule,
                    "batches": len(found),
                    "steps": options.steps,
                    "dB at equal time": sum(means) / len(means),
                    "95 % interval": interval(means),
                    "worst dB": min(min(e) for e in even),
                    "dB at the end": sum(sum(e) / len(e) for e in ends) / len(ends),
                    "examples >= 20 dB": sum(v >= 20 for e in ends for v in e),
                    "processor s": sum(run["curve"][-1][1] for run in found) / len(found),
                    "features proved": sum(run["proved"] for run in found),
                }
            )
    if options.first:
        for row in rows:
            print(row)
        return
    rows = sorted([*others(options.size), *rows], key=lambda row: row["N"])
    write_result("resnet_batches", rows, weight=top, summary=summary(rows))
    journal.finish()


def others(size: int) -> list[dict[str, Any]]:
    """Return the stored rows of the sizes that this run does not measure."""
    path = RESULTS / "resnet_batches.json"
    if size == 0 or not path.exists():
        return []
    return [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["N"] != size]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per size and number of steps."""
    found = []
    for size, steps in dict.fromkeys((r["N"], r["steps"]) for r in rows):
        mine = [r for r in rows if (r["N"], r["steps"]) == (size, steps)]
        values = "; ".join(f"{r['features']} {r['dB at equal time']:.1f} dB ({r['95 % interval']})" for r in mine)
        batches = mine[0]["batches"]
        found.append(
            {
                "what": f"ResNet-18, N = {size}, cosine + TV, schedules of features ({batches} batches, {steps} steps)",
                "target": "PSNR at equal time, 10 batches, interval",
                "measured": values,
                "met": True if batches >= 10 else None,
            }
        )
    return found


if __name__ == "__main__":
    main()
