"""One image from one gradient: dlg() with default options on 32 random CIFAR-100 test images, labels unknown.

Target: at least 31 of 32 reach MSE 1e-4, median MSE at most 1e-6 (the paper: 3.3e-6), labels 32 of 32. The published
algorithm runs beside it, on the first ``--published`` of the same gradients.
"""

from __future__ import annotations

import time

from _common import arguments, cifar100, spread, victim, write_result
from _published import published_dlg

import gradleak as gl
from gradleak.audit.scores import wilson


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", images=32, published=32)
    images, labels = cifar100(options.data)
    victims = [victim(images[i : i + 1], labels[i : i + 1], seed=i) for i in range(options.images)]
    began = time.perf_counter()
    found = gl.attacks.dlg().reconstruct_all([seen for _, seen in victims])
    seconds = time.perf_counter() - began
    errors = [float((r.inputs - images[i]).square().mean()) for i, r in enumerate(found)]
    right = sum(int(r.labels[0] == labels[i]) for i, r in enumerate(found) if r.labels is not None)
    rows = [row("gradleak dlg()", errors, right, [r.evaluations for r in found], seconds)]
    errors, right, evaluations, began = [], 0, [], time.perf_counter()
    for i, (client, seen) in enumerate(victims[: options.published]):
        x, y, count = published_dlg(client.model, list(seen.update.tensors.values()), (3, 32, 32), 100, seed=i)
        errors.append(float((x.double().clamp(0, 1) - images[i]).square().mean().nan_to_num(nan=1.0)))
        right += int(y.argmax() == labels[i])
        evaluations.append(count)
    if errors:
        rows.append(row("published algorithm", errors, right, evaluations, time.perf_counter() - began))
    write_result("dlg", rows, target="successes >= 31 of 32, median MSE <= 1e-6, labels 32 of 32")


def row(name: str, errors: list[float], right: int, evaluations: list[int], seconds: float) -> dict[str, object]:
    """Return one line of the table."""
    hits = sum(e <= 1e-4 for e in errors)
    low, high = wilson(hits, len(errors))
    return {
        "attacker": name,
        "images": len(errors),
        "MSE <= 1e-4": hits,
        "95 % interval": f"{low:.2f}-{high:.2f}",
        "median MSE": spread(errors)["median"],
        "worst MSE": max(errors),
        "labels right": right,
        "median evaluations": spread(evaluations)["median"],
        "seconds": seconds,
        "seconds per success": seconds / hits if hits else float("inf"),
    }


if __name__ == "__main__":
    main()
