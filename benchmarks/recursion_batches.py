"""Whole batches by linear algebra: ``recursion()`` on perceptrons with two hidden layers, errors and time.

Random CIFAR-100 test images with their own labels (classes may repeat), a fresh random model per batch
(3,072-256-256-100, PyTorch's initialization), float32 gradients. A batch counts as solved where the attack returns it;
errors are mean squared errors of the worst example, in images of [0, 1]. There is no target: the table says how far it
leads.

Run: ``python benchmarks/recursion_batches.py [--data DIR] [--threads N] [--batches 20] [--largest 48]``.
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


def measure(act: Activation, size: int, seed: int, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return error and time of one batch."""
    model = gl.models.perceptron(activation=act, seed=seed)
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * size + seed))[:size]
    truth = images[pick]
    _, seen = observe(gl.Client(model, gl.Batch(truth.float(), labels[pick])))
    began = time.process_time()
    try:
        found = gl.attacks.recursion().reconstruct(seen)
    except NotApplicable as reason:
        return {"stopped": str(reason), "seconds": time.process_time() - began}
    seconds = time.process_time() - began
    inputs = found.inputs.double()[assign(found.inputs, truth)]
    return {"error": float((inputs - truth).square().mean((1, 2, 3)).max()), "seconds": seconds}


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", batches=20, largest=SIZES[-1])
    images, labels = cifar100(options.data)
    rows = []
    for act in ACTIVATIONS:
        for size in (s for s in SIZES if s <= options.largest):
            found = [measure(act, size, seed, images, labels) for seed in range(options.batches)]
            errors = [f["error"] for f in found if "error" in f]
            rows.append(
                {
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
            print(rows[-1])
    solved = {act: [r for r in rows if r["activation"] == act] for act in ACTIVATIONS}
    summary = [
        {
            "what": f"whole batches by linear algebra, perceptron with two hidden layers, {name}: batches solved",
            "target": "–",
            "measured": "; ".join(
                f"{r['examples']} images: {r['solved']} of {r['batches']}"
                + (f", MSE ≤ {r['worst MSE']:.0e}, {r['processor s']:.2f} s" if r["solved"] else "")
                for r in group
            ),
            "short": name == "relu",
            "met": None,
        }
        for name, group in solved.items()
    ]
    write_result("recursion_batches", rows, summary=summary)


if __name__ == "__main__":
    main()
