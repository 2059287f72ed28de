"""Features of every example of a batch from the gradient of the classification head: errors, verdicts, time.

Random CIFAR-100 test images, a fresh random model per batch, float32 updates, default options. Errors are Euclidean
distances between true and recovered features (assigned one to one within a class), divided by the root mean square
distance of the batch's features from their mean (by their norm for one example).

Targets: examples whose class is unique in the batch: error ≤ 1e-4 (ResNet-18, up to 32 examples) and ≤ 1e-2 (LeNet) for
at least 95 %; at least 99 % of the verdicts right ("exact" if and only if the error is at most 1e-2; "exact wrongly"
and "withheld" count the two ways to be wrong); 16 examples in 2 s, 64 in 60 s.

Only the head's parameters are trained here: its gradient has the same numbers as in an update of the whole model.

Run: ``python benchmarks/disaggregate.py [--data DIR] [--threads N] [--batches 20] [--large 20]`` (``--large`` is the
number of batches of 64 examples, which take most of the time). A run
that is stopped goes on where it was; ``--stored 1`` measures nothing and makes the table of what there is.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from _common import arguments, cifar100, observe, write_result
from _journal import Journal
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks import disaggregate
from gradleak.errors import NotApplicable
from gradleak.structure.head import features_and_logits, find_head
from gradleak.training import parameters

TOLERANCE = 1e-2
"""Error up to which features count as exact: the attack's default, and the yardstick of its verdicts."""
TARGET = {"lenet": 1e-2, "resnet18": 1e-4}
CASES: tuple[tuple[str, str, int, Sequence[int]], ...] = (
    ("lenet", "eval", 100, (1, 2, 4, 8, 16, 32, 64)),
    ("resnet18", "eval", 100, (1, 2, 4, 8, 16, 32, 64)),
    ("resnet18", "train", 100, (2, 4, 8, 16, 32, 64)),
    ("lenet", "eval", 10, (1, 2, 4, 8, 9, 10)),
    ("resnet18", "train", 10, (2, 4, 8, 9, 10)),
    ("lenet", "eval", 1000, (8, 32)),
    ("resnet18", "train", 1000, (8, 32)),
)


def build(name: str, mode: str, classes: int, seed: int) -> nn.Module:
    model = (
        gl.models.lenet(classes=classes, seed=seed)
        if name == "lenet"
        else gl.models.resnet18(classes=classes, seed=seed)
    )
    model = model.train(mode == "train")
    head = find_head(model, parameters(model), (3, 32, 32))
    assert head is not None
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in (head.weight_name, head.bias_name))
    return model


def errors(client: gl.Client, found: gl.Reconstruction) -> tuple[Tensor, Tensor]:
    """Return the error of every recovered example and whether its class is unique in the batch."""
    x, y = client.batch.inputs, client.batch.labels
    params = parameters(client.model)
    head = find_head(client.model, params, tuple(x.shape[1:]))
    assert head is not None
    assert found.features is not None
    assert found.labels is not None
    with torch.no_grad():
        truth = features_and_logits(client.model, params, x, head)[0].double()
    spread = (truth - truth.mean(0)).square().sum(1).mean().sqrt() if len(truth) > 1 else truth.norm()
    distance = torch.cdist(found.features.double(), truth) + 1e9 * (found.labels[:, None] != y)
    rows, columns = linear_sum_assignment(distance.numpy())
    return distance[rows, columns] / spread, torch.bincount(y, minlength=int(head.classes))[found.labels] == 1


def share(mask: Tensor) -> float | str:
    return float(mask.double().mean()) if len(mask) else ""


def worst(values: Tensor) -> float | str:
    return float(values.max()) if len(values) else ""


def victim(
    name: str, mode: str, classes: int, size: int, seed: int, images: Tensor, labels: Tensor
) -> tuple[gl.Client, gl.Observation]:
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * size + seed))[:size]
    y = labels[pick] % classes if classes < 100 else labels[pick] * (classes // 100) + pick % (classes // 100)
    return observe(gl.Client(build(name, mode, classes, seed), gl.Batch(images[pick].float(), y)))


def measure(name: str, mode: str, classes: int, size: int, seed: int, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return errors, verdicts and times of one batch."""
    client, seen = victim(name, mode, classes, size, seed, images, labels)
    begin, busy = time.perf_counter(), time.process_time()
    try:
        found = disaggregate().reconstruct(seen, seed=seed)
    except NotApplicable as reason:
        return {"bound": str(reason)}
    wall, cpu = time.perf_counter() - begin, time.process_time() - busy
    assert found.labels is not None
    assert found.certificate is not None
    right = found.labels.tolist() == client.batch.labels.sort().values.tolist()
    if right:
        error, unique = errors(client, found)
    else:
        error, unique = torch.full((size,), torch.inf).double(), torch.ones(size).bool()
    return {
        "labels right": right,
        "errors": [e if math.isfinite(e) else None for e in error.tolist()],
        "unique": unique.tolist(),
        "exact": [v == "exact" for v in found.certificate.examples],
        "seconds": wall,
        "processor seconds": cpu,
    }


def pool(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one line of the table from the batches of one size."""
    if "bound" in found[0]:
        return {"bound": found[0]["bound"]}
    error = torch.tensor([math.inf if e is None else e for f in found for e in f["errors"]]).double()
    unique = torch.tensor([u for f in found for u in f["unique"]])
    exact = torch.tensor([v for f in found for v in f["exact"]])
    good = error <= TOLERANCE
    return {
        "labels right": sum(f["labels right"] for f in found) / len(found),
        "unique": int(unique.sum()),
        "unique within target": share(error[unique] <= TARGET[name]),
        "unique median": float(error[unique].median()) if unique.any() else "",
        "unique worst": worst(error[unique]),
        "repeated": int((~unique).sum()),
        "repeated within 1e-2": share(good[~unique]),
        "verdicts right": float((exact == good).double().mean()),
        "exact wrongly": int((exact & ~good).sum()),
        "withheld": int((~exact & good).sum()),
        "seconds median": statistics.median(f["seconds"] for f in found),
        "seconds max": max(f["seconds"] for f in found),
        "cpu seconds median": statistics.median(f["processor seconds"] for f in found),
        "cpu seconds max": max(f["processor seconds"] for f in found),
    }


def main() -> None:
    options = arguments(__doc__ or "", batches=20, large=20, stored=0)
    images, labels = cifar100(options.data)
    journal, rows = Journal("disaggregate"), []
    for name, mode, classes, sizes in CASES:
        for size in sizes:
            batches = options.large if size >= 64 else options.batches
            if not batches:
                continue
            found = []
            for seed in range(batches):
                key = f"{name}, {mode}, C = {classes}, B = {size}, batch {seed}, {options.threads} threads"
                if options.stored and key not in journal.rows:
                    continue
                what = (name, mode, classes, size, seed, images, labels)
                found.append(journal.row(key, lambda what=what: measure(*what)))
            if not found:
                continue
            row = {"model": name, "mode": mode, "classes": classes, "examples": size, "batches": len(found)}
            rows.append(row | pool(name, found))
            print(rows[-1], file=sys.stderr, flush=True)
    targets = {"within target": TARGET, "verdicts right": 0.99, "seconds": {"16": 2, "64": 60}, "share": 0.95}
    write_result("disaggregate", rows, targets=targets, tolerance=TOLERANCE)
    if not options.stored:
        journal.finish()


if __name__ == "__main__":
    main()
