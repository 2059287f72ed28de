"""The exact attack on single examples: random CIFAR-100 test images, the paper's LeNet drawn anew for each, no label.

Targets: float32 updates 64 of 64 at MSE 1e-10; float64 updates MSE 1e-16; time per success at most 1/100 of the
published algorithm, which runs beside it on the first ``--published`` of the same float32 gradients (30 to 80 s each).
For one core, set OMP_NUM_THREADS=1 as well as --threads 1: the factorizations have threads of their own.
"""

from __future__ import annotations

import time

import torch
from _common import arguments, cifar100, spread, victim, write_result
from _published import published_dlg
from torch import Tensor

import gradleak as gl
from gradleak.attacks.auto import Auto
from gradleak.attacks.base import Attack


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", images=64, auto=64, published=4, double=64)
    images, labels = cifar100(options.data)
    _, warm = victim(images[-1:], labels[-1:], seed=1)
    gl.attacks.recursion().reconstruct(warm)
    solve, choose = gl.attacks.recursion(), gl.attacks.auto()
    rows = [
        exact("recursion(), float32 update", solve, images, labels, options.images, torch.float32, 1e-10),
        exact("auto(), float32 update", choose, images, labels, options.auto, torch.float32, 1e-10),
        exact("recursion(), float64 update", solve, images, labels, options.double, torch.float64, 1e-16),
    ]
    rows = [row for row in rows if row["images"]]
    if options.published:
        rows.append(published(images, labels, options.published))
        base = float(str(rows[-1]["processor seconds per success"]))
        for line in rows[:-1]:
            line["published's time per success"] = base / float(str(line["processor seconds per success"]))
    write_result("recursion", rows, target="64 of 64 at 1e-10 (float32) and 1e-16 (float64), 1/100 of the time")


def exact(
    name: str,
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    count: int,
    dtype: torch.dtype,
    goal: float,
) -> dict[str, object]:
    """Return one line for our attack; the reconstruction never sees the image."""
    errors: list[float] = []
    walls: list[float] = []
    cores: list[float] = []
    right = claimed = certified = 0
    for i in range(count):
        _, seen = victim(images[i : i + 1], labels[i : i + 1], seed=i, dtype=dtype)
        wall, core = time.perf_counter(), time.process_time()
        found = attack.reconstruct(seen)
        walls.append(time.perf_counter() - wall)
        cores.append(time.process_time() - core)
        errors.append(float((found.inputs.double() - images[i].to(dtype).double()).square().mean()))
        right += int(found.labels is not None and found.labels[0] == labels[i])
        claimed += found.status == "exact"
        certified += found.certificate is not None and found.certificate.verdict == "proved"
    counts = {"called exact": claimed, "certified": certified if isinstance(attack, Auto) else None}
    return row(name, errors, goal, right, walls, cores) | counts


def published(images: Tensor, labels: Tensor, count: int) -> dict[str, object]:
    """Return one line for the published algorithm on the same gradients; its success is MSE 1e-4."""
    errors: list[float] = []
    walls: list[float] = []
    cores: list[float] = []
    right = 0
    for i in range(count):
        client, seen = victim(images[i : i + 1], labels[i : i + 1], seed=i)
        wall, core = time.perf_counter(), time.process_time()
        x, y, _ = published_dlg(client.model, list(seen.update.tensors.values()), (3, 32, 32), 100, seed=i)
        walls.append(time.perf_counter() - wall)
        cores.append(time.process_time() - core)
        errors.append(float((x.double().clamp(0, 1) - images[i]).square().mean().nan_to_num(nan=1.0)))
        right += int(y.argmax() == labels[i])
    return row("published algorithm, float32", errors, 1e-4, right, walls, cores)


def row(
    name: str, errors: list[float], goal: float, right: int, walls: list[float], cores: list[float]
) -> dict[str, object]:
    """Return one line of the table."""
    if not errors:
        return {"attacker": name, "images": 0}
    hits = sum(e <= goal for e in errors)
    return {
        "attacker": name,
        "images": len(errors),
        "goal": goal,
        "successes": hits,
        **{f"MSE {k}": v for k, v in spread(errors).items()},
        "labels right": right,
        **{f"seconds {k}": v for k, v in spread(walls).items()},
        "processor seconds median": spread(cores)["median"],
        "seconds per success": sum(walls) / hits if hits else float("inf"),
        "processor seconds per success": sum(cores) / hits if hits else float("inf"),
    }


if __name__ == "__main__":
    main()
