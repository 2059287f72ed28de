"""Peak memory and time of inverting 20 local steps: stored against recomputed (target: 4 × one step, 3 × the time).

Each row runs in a process of its own, since a process cannot lower its own peak. The quantity is one gradient of
‖simulated − observed‖² with respect to the images, which is what every step of an attack costs.

Run: ``python benchmarks/fedavg_memory.py [--steps 20] [--threads 1]`` (Linux or macOS); a run that is stopped goes on
where it was. With one thread the times are compared in processor time, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.models import lenet, resnet20
from gradleak.training import FedAvg, parameters

MEMORY_TARGET, TIME_TARGET = 4.0, 3.0
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lenet width 64, batch 64": (lambda: lenet(width=64, seed=0), 64),
    "lenet width 12, batch 256": (lambda: lenet(width=12, seed=0), 256),
    "resnet20, batch 16": (lambda: resnet20(seed=0).eval(), 16),
}
MODES = ("autograd", "func")


def peak_mib() -> float:
    """Return the highest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def objective(model: nn.Module, training: FedAvg, batch: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    params = parameters(model)

    def distance(inputs: Tensor) -> Tensor:
        moved = training.tensors(model, params, inputs, labels)
        return torch.stack([t.square().sum() for t in moved.values()]).sum()

    return distance, x


def differentiate(distance: Callable[[Tensor], Tensor], x: Tensor, mode: str) -> Tensor:
    if mode == "func":
        return torch.func.grad(distance)(x)
    x = x.clone().requires_grad_()
    return torch.autograd.grad(distance(x), x)[0]


def measure(case: str, steps: int, recompute: bool, mode: str) -> dict[str, Any]:
    build, batch = CASES[case]
    model, training = build(), FedAvg(0.01, epochs=steps, checkpoint=recompute)
    # Load kernels and code paths on a batch too small to count.
    differentiate(*objective(model, FedAvg(0.01, epochs=2, checkpoint=recompute), 1), mode)
    distance, x = objective(model, training, batch)
    before, start, busy = peak_mib(), time.perf_counter(), time.process_time()
    found = differentiate(distance, x, mode)
    return {
        "seconds": time.perf_counter() - start,
        "processor seconds": time.process_time() - busy,
        "mib": peak_mib() - before,
        "norm": float(found.double().norm()),
    }


def child(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        *what, threads = json.loads(options.child)
        torch.set_num_threads(threads)
        print(json.dumps(measure(*what)))
        return
    from _common import write_result  # Not at the top: the measured processes stay small.
    from _journal import Journal

    torch.set_num_threads(options.threads)
    clock = "processor seconds" if options.threads == 1 else "seconds"
    journal, rows = Journal("fedavg_memory"), []
    for case in CASES:
        for mode in MODES:
            one, stored, recomputed = (
                journal.row(
                    f"{case}, {mode}, {steps} steps, checkpoint {recompute}, {options.threads} threads",
                    lambda case=case, mode=mode, steps=steps, recompute=recompute: child(
                        case, steps, recompute, mode, options.threads
                    ),
                )
                for steps, recompute in ((1, False), (options.steps, False), (options.steps, True))
            )
            rows.append(
                {
                    "case": case,
                    "outer": mode,
                    "steps": options.steps,
                    "MiB one step": one["mib"],
                    "MiB stored": stored["mib"],
                    "MiB recomputed": recomputed["mib"],
                    "memory ratio": recomputed["mib"] / one["mib"],
                    "seconds stored": stored["seconds"],
                    "seconds recomputed": recomputed["seconds"],
                    "processor seconds stored": stored["processor seconds"],
                    "processor seconds recomputed": recomputed["processor seconds"],
                    "time ratio": recomputed[clock] / stored[clock],
                    "relative difference": abs(stored["norm"] - recomputed["norm"]) / stored["norm"],
                }
            )
    write_result("fedavg_memory", rows, clock=clock, summary=summary(rows, options.steps, clock))
    journal.finish()


def summary(rows: list[dict[str, Any]], steps: int, clock: str) -> list[dict[str, Any]]:
    """Return the worst case of both targets."""
    found = []
    for key, what, limit, unit in (
        ("memory ratio", "peak memory against one step", MEMORY_TARGET, "MiB"),
        ("time ratio", "time against storing every step", TIME_TARGET, clock),
    ):
        worst = max(rows, key=lambda row: row[key])
        values = f"{worst[f'{unit} recomputed']:.3g} {unit} in {worst['case']}, {worst['outer']}"
        found.append(
            {
                "what": f"`FedAvg(checkpoint=True)`, {steps} local steps: {what}, worst of {len(rows)} cases",
                "target": f"≤ {limit:.0f} ×",
                "measured": f"{worst[key]:.2f} × ({values})",
                "met": bool(worst[key] <= limit) if steps >= 20 else None,
            }
        )
    return found


if __name__ == "__main__":
    main()
