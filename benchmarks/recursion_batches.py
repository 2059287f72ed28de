"""Whole batches by linear algebra: ``recursion()`` on perceptrons and on LeNets, errors and time.

Random CIFAR-100 test images with their own labels (classes may repeat), a fresh random model per batch, float32
gradients. Models are perceptrons with two hidden layers (3,072-256-256-100, PyTorch's initialization) and the paper's
LeNet (its initialization) of several widths, whose layers take both gradient and forward equations. A batch counts as
solved where the attack calls it exact; errors are mean squared errors of the worst example, in images of [0, 1]. There
is no target: the table says how far it leads.

Run: ``python benchmarks/recursion_batches.py [--data DIR] [--threads N] [--batches 20] [--largest 48] [--lenets 8]``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from _common import arguments, cifar100, observe, write_result
from torch import Tensor

import gradleak as gl
from gradleak.errors import NotApplicable
from gradleak.metrics import assign
from gradleak.models.building import Activation

ACTIVATIONS: tuple[Activation, ...] = ("relu", "tanh", "sigmoid")
SIZES = (2, 8, 16, 32, 48)
LENETS: tuple[tuple[Activation, int, int], ...] = (
    ("sigmoid", 24, 2),
    ("sigmoid", 32, 2),
    ("sigmoid", 32, 3),
    ("sigmoid", 64, 4),
    ("tanh", 24, 2),
    ("tanh", 32, 2),
    ("relu", 24, 2),
    ("relu", 32, 2),
)
"""Activation, width, examples."""


def measure(act: Activation, width: int | None, size: int, seed: int, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return error and time of one batch, on the LeNet of ``width`` or the perceptron."""
    if width is None:
        model = gl.models.perceptron(activation=act, seed=seed)
    else:
        model = gl.models.lenet(width=width, activation=act, seed=seed)
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * size + seed))[:size]
    truth = images[pick]
    _, seen = observe(gl.Client(model, gl.Batch(truth.float(), labels[pick])))
    began = time.process_time()
    try:
        found = gl.attacks.recursion().reconstruct(seen)
    except NotApplicable as reason:
        return {"stopped": str(reason), "seconds": time.process_time() - began}
    seconds = time.process_time() - began
    if found.status != "exact":
        return {"stopped": "the update is not explained", "seconds": seconds}
    inputs = found.inputs.double()[assign(found.inputs, truth)]
    return {"error": float((inputs - truth).square().mean((1, 2, 3)).max()), "seconds": seconds}


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", batches=20, largest=SIZES[-1], lenets=len(LENETS))
    images, labels = cifar100(options.data)
    cases: list[tuple[Activation, int | None, int]] = [
        (act, None, s) for act in ACTIVATIONS for s in SIZES if s <= options.largest
    ]
    cases += LENETS[: options.lenets]
    rows = []
    for act, width, size in cases:
        found = [measure(act, width, size, seed, images, labels) for seed in range(options.batches)]
        errors = [f["error"] for f in found if "error" in f]
        rows.append(
            {
                "model": "perceptron" if width is None else f"LeNet of width {width}",
                "activation": act,
                "examples": size,
                "batches": len(found),
                "solved": len(errors),
                "features not proved": sum("proved features" in f.get("stopped", "") for f in found),
                "median of the worst MSE": statistics.median(errors) if errors else None,
                "worst MSE": max(errors) if errors else None,
                "processor s": statistics.median(f["seconds"] for f in found),
            }
        )
        print(rows[-1], flush=True)
    groups = [
        (
            lenets,
            act,
            [(w, row) for (a, w, _), row in zip(cases, rows, strict=True) if (w is not None, a) == (lenets, act)],
        )
        for lenets in (False, True)
        for act in ACTIVATIONS
    ]
    summary = [
        {
            "what": "whole batches by linear algebra, "
            f"{'LeNet' if lenets else 'perceptron with two hidden layers'}, {act}: batches solved",
            "target": "–",
            "measured": "; ".join(
                (f"width {width}, " if lenets else "")
                + f"{r['examples']} images: {r['solved']} of {r['batches']}"
                + (f", MSE ≤ {r['worst MSE']:.0e}, {r['processor s']:.2g} s" if r["solved"] else "")
                for width, r in group
            ),
            "met": None,
        }
        for lenets, act, group in groups
        if group
    ]
    write_result("recursion_batches", rows, summary=summary)


if __name__ == "__main__":
    main()
