"""One iteration of inverting_gradients() against the same attack of breaching 0.1.2, on ResNet-18 at 32x32.

breaching is the de-facto standard of the field. It runs in an environment of its own (``--python``), which this script
makes where none is named: ``python -m venv``, then the packages of ``REQUIREMENTS``. Both sides see the same model, the
same images and the same gradient; breaching runs its ``invertinggradients`` configuration as it ships, shortened to the
measured number of steps. A worker in the other environment takes turns with this process, so that a slow phase of the
machine hits both alike, and the ratio is taken pair by pair, of processor time where one thread is measured.

Two things are bent so that it runs at all beside a torch of today, neither on the path that is timed: torchvision's
operators ``nms`` and ``qnms`` get empty declarations before its import (a wheel built for another torch fails without),
and the metadata are a plain object with the attributes that breaching reads.

Run: ``python benchmarks/breaching.py [--threads 1] [--pairs 7] [--steps 6] [--python PATH]``. Target: at most 0.85.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.85
SIZES = (1, 8)
REQUIREMENTS = ("torch==2.13.0", "hydra-core>=1.1", "scipy", "numpy", "pillow", "tqdm")
WITHOUT_DEPENDENCIES = ("breaching==0.1.2", "lpips", "torchvision==0.28.0")
"""Installed with --no-deps, since torchvision's own pin would replace the torch that is measured."""


def environment(folder: Path) -> Path:
    """Make an environment with breaching and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    return python


def victim(n: int) -> tuple[Any, Any, Any]:
    """Return model, images and labels, the same in both environments."""
    import torch

    from gradleak.models import resnet18

    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return resnet18(seed=0).eval(), images, torch.arange(n)


def difference(run: Any, steps: int) -> dict[str, float]:
    """Return wall and processor seconds of one step: the difference of two lengths leaves the set-up out."""
    took = []
    for length in (1, 1 + steps):
        wall, busy = time.perf_counter(), time.process_time()
        run(length)
        took.append((time.perf_counter() - wall, time.process_time() - busy))
    return {"wall": (took[1][0] - took[0][0]) / steps, "busy": (took[1][1] - took[0][1]) / steps}


def worker(threads: int) -> None:
    """Serve "n steps" lines on standard input with the time of one step of breaching (runs in its environment)."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Only for the model.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]  # This file's name.
    import torch
    from torch import library

    torch.set_num_threads(threads)
    operators = library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import breaching

    class Metadata:
        shape, modality = (3, 32, 32), "vision"

    import contextlib

    out, sys.stdout = sys.stdout, sys.stderr  # breaching prints.
    print(json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]}), file=out, flush=True)
    for line in sys.stdin:
        n, steps = map(int, line.split())
        model, images, labels = victim(n)
        loss = torch.nn.CrossEntropyLoss()
        gradient = torch.autograd.grad(loss(model(images), labels), list(model.parameters()))
        payload = {
            "parameters": [p.detach() for p in model.parameters()],
            "buffers": list(model.buffers()),
            "metadata": Metadata(),
        }
        shared = {
            "gradients": [g.detach() for g in gradient],
            "buffers": None,
            "metadata": {"num_data_points": n, "labels": labels, "local_hyperparams": None},
        }

        def run(
            length: int, shared: Any = shared, payload: Any = payload, model: Any = model, loss: Any = loss
        ) -> None:
            with contextlib.redirect_stdout(sys.stderr):
                settings = breaching.get_attack_config(
                    "invertinggradients", overrides=[f"optim.max_iterations={length}"]
                )
                attack = breaching.attacks.prepare_attack(model, loss, settings)
                attack.reconstruct([payload], [shared], {})

        print(json.dumps(difference(run, steps)), file=out, flush=True)


def main() -> None:
    """Measure both in turn and store the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--python", type=Path, help="Python of an environment with breaching (made where none is named)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        python = options.python or environment(Path(folder) / "breaching")
        compare(python, options.threads, options.pairs, options.steps)


def compare(python: Path, threads: int, pairs: int, steps: int) -> None:
    """Take turns with a worker in the other environment."""
    import torch
    from _common import observe, spread, write_result

    import gradleak as gl

    torch.set_num_threads(threads)
    other = subprocess.Popen(
        [str(python), __file__, "--worker", "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None

    def ask(question: str) -> dict[str, Any]:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(question + "\n")
        other.stdin.flush()
        return answer()

    def answer() -> dict[str, Any]:
        assert other.stdout is not None
        line = other.stdout.readline()
        if not line:
            raise SystemExit("breaching did not run in its environment; its error stands above.")
        return dict(json.loads(line))

    versions = answer()
    rows = []
    for n in SIZES:
        model, images, labels = victim(n)
        _, seen = observe(gl.Client(model, gl.Batch(images, labels)))

        def run(length: int, seen: gl.Observation = seen) -> None:
            gl.attacks.inverting_gradients(iterations=length, trace=False).reconstruct(seen)

        found = [(difference(run, steps), ask(f"{n} {steps}")) for _ in range(pairs + 1)][1:]  # The first warms up.
        clock = "busy" if threads == 1 else "wall"
        ratios = [ours[clock] / theirs[clock] for ours, theirs in found]
        rows.append(
            {
                "batch": n,
                "gradleak s/iteration": spread([o["wall"] for o, _ in found])["median"],
                "breaching s/iteration": spread([t["wall"] for _, t in found])["median"],
                "gradleak processor s/iteration": spread([o["busy"] for o, _ in found])["median"],
                "breaching processor s/iteration": spread([t["busy"] for _, t in found])["median"],
                "ratio (median of pairs)": spread(ratios)["median"],
                "ratio range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    other.stdin.close()
    other.wait()
    summary = [
        {
            "what": f"`inverting_gradients()`, ResNet-18, N = {row['batch']}: one iteration against `breaching` 0.1.2",
            "target": f"≤ {TARGET} ×",
            "measured": f"{row['ratio (median of pairs)']:.2f} × ({row['ratio range']})",
            "met": row["ratio (median of pairs)"] <= TARGET,
        }
        for row in rows
    ]
    write_result("breaching", rows, breaching={"version": "0.1.2", **versions}, summary=summary)


if __name__ == "__main__":
    main()
