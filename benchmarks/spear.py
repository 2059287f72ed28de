"""Whole batches through a first layer with ReLU: ``spear()`` on pictures.

Random CIFAR-100 test images as they are, in [0, 1], with their own labels, through a perceptron of the SPEAR paper's
width and depth (3,072-200-200-200-200-200-100, PyTorch's initialization), a fresh random model per batch, float32
gradients, labels unknown. A batch counts as exact where no value is off by more than 1e-4. Times are the processor's,
certificate included. Rows of a table are measured by ``tables.py``.

Run: ``python benchmarks/spear.py [--data DIR] [--threads N] [--batches 20] [--largest 20] [--beyond 1]``.
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

EXACT = 1e-4
SIZES = (1, 2, 4, 8, 12, 16, 20)
BEYOND = (32, 48, 64)


def measure(size: int, seed: int, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return whether one batch came back exactly, whether that was proved, and the time."""
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * size + seed))[:size]
    truth, classes = images[pick], labels[pick]
    model = gl.models.perceptron(width=200, depth=5, seed=seed)
    _, seen = observe(gl.Client(model, gl.Batch(truth.float(), classes)))
    began = time.process_time()
    try:
        found = gl.attacks.spear().reconstruct(seen, seed=seed)
    except NotApplicable:
        return {"exact": False, "proved": False, "labels": False, "seconds": time.process_time() - began}
    seconds = time.process_time() - began
    error = float((found.inputs.double()[assign(found.inputs, truth)] - truth).abs().max())
    return {
        "exact": error <= EXACT,
        "error": error,
        "proved": found.certificate is not None and found.certificate.verdict == "proved",
        "labels": found.labels is not None and found.labels.sort().values.equal(classes.sort().values),
        "seconds": seconds,
    }


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", batches=20, largest=20, beyond=1)
    images, labels = cifar100(options.data)
    rows = []
    sizes = tuple(s for s in SIZES if s <= options.largest)
    for size in (*sizes, *(BEYOND if options.beyond else ())):
        count = options.batches if size in sizes else min(options.batches, 5)
        found = [measure(size, seed, images, labels) for seed in range(count)]
        rows.append(
            {
                "examples": size,
                "batches": count,
                "exact": sum(f["exact"] for f in found),
                "labels right": sum(f["labels"] for f in found),
                "proved": sum(f["proved"] for f in found),
                "proved wrongly": sum(f["proved"] and not f["exact"] for f in found),
                "worst error": max((f["error"] for f in found if f["exact"]), default=None),
                "processor s": statistics.median(f["seconds"] for f in found),
                "slowest s": max(f["seconds"] for f in found),
            }
        )
        print(rows[-1], flush=True)
    write_result("spear", rows, summary=summary(rows, options.batches >= 20))


def summary(rows: list[dict[str, Any]], enough: bool) -> list[dict[str, Any]]:
    """Return the lines of the table of targets."""
    few, more = [r for r in rows if r["examples"] in SIZES], [r for r in rows if r["examples"] in BEYOND]
    eight = [r for r in few if r["examples"] == 8]
    least = min(few, key=lambda r: r["exact"])
    net = "`spear()`, ReLU perceptron of width 200 and six layers"
    wrong, proved = sum(r["proved wrongly"] for r in rows), sum(r["proved"] for r in rows)
    lines = [
        (
            f"{net}, N = {', '.join(str(r['examples']) for r in few)}: batches exact",
            "≥ 95 % each",
            f"{sum(r['exact'] for r in few)} of {sum(r['batches'] for r in few)}, fewest {least['exact']} of "
            f"{least['batches']} at N = {least['examples']}; at most {max(r['slowest s'] for r in few):.2g} s",
            all(r["exact"] >= 0.95 * r["batches"] for r in few) if enough else None,
        ),
        *(
            (
                f"{net}, N = 8: time",
                "≤ 2 s",
                f"{r['processor s']:.2g} processor s, slowest {r['slowest s']:.2g}",
                r["slowest s"] <= 2 if enough else None,
            )
            for r in eight
        ),
        *(
            (
                f"{net}, N = {r['examples']}: batches exact",
                "–",
                f"{r['exact']} of {r['batches']}, {r['processor s']:.2g} processor s",
                None,
            )
            for r in more
        ),
        (f"{net}: proved wrongly", "0", f"{wrong} of {proved} proofs", wrong == 0),
    ]
    return [dict(zip(("what", "target", "measured", "met"), line, strict=True)) for line in lines]


if __name__ == "__main__":
    main()
