"""What one evaluation of matching and one recursion cost, against batch, image size and width, and what limits them.

One evaluation is the objective of ``dlg()`` and its gradient on the paper's LeNet, eager, one candidate: a forward
pass, a backward pass, and a backward pass through both. Its floating-point operations are counted, and divided by the
rate of a large matrix product on the same machine: the share of the arithmetic limit. The limit is called starting
operations where the smallest case takes more than half as long, else arithmetic from a share of 10 %, else memory
traffic. Peak memory is that of a fresh process, without what torch itself takes.

The recursion's time and memory are set beside its largest matrix, n x n for n unknowns.

Run: ``python benchmarks/cost.py [--threads N] [--repeats 5]``; a run that is stopped goes on where it was. With one
thread, times are processor time. The picture is docs/pictures/cost.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "cost.png"
PLAIN = (1, 32, 12)
CASES = {
    "batch": tuple((n, 32, 12) for n in (1, 2, 4, 8, 16, 32)),
    "image side": tuple((1, side, 12) for side in (32, 64, 128)),
    "width": tuple((1, 32, width) for width in (12, 24, 48, 96)),
}
SIDES = (16, 24, 32, 40)
BOUND = 0.1


def peak_mib() -> float:
    """Return the highest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def clock(threads: int) -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


def product(threads: int) -> float:
    """Return the operations per second of a large float32 matrix product."""
    a = torch.rand(1536, 1536)
    a @ a
    best = min(_timed(lambda: a @ a, threads) for _ in range(5))
    return 2 * 1536**3 / best


def _timed(call: Any, threads: int) -> float:
    began = clock(threads)
    call()
    return clock(threads) - began


def evaluation(n: int, side: int, width: int, repeats: int, threads: int) -> dict[str, Any]:
    """Measure one evaluation in this process."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from gradleak.models import lenet

    model = lenet(width=width, image_size=side, seed=0)
    params = list(model.parameters())
    x = torch.rand(n, 3, side, side)
    y = torch.arange(n) % 100
    observed = [g.detach() for g in torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), params)]
    soft = torch.full((n, 100), 0.01)

    def evaluate() -> None:
        leaf, logits = torch.rand(n, 3, side, side).requires_grad_(), soft.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(leaf), logits.softmax(-1))
        gradient = torch.autograd.grad(loss, params, create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(gradient, observed, strict=True)]).sum()
        torch.autograd.grad(distance, [leaf, logits])

    operations = 0

    class Counter(TorchDispatchMode):
        """Adds up operations; FlopCounterMode's hooks on modules do not bear a backward pass through another."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal operations
            out = function(*args, **(kwargs or {}))
            count = flop_registry.get(function.overloadpacket)
            operations += count(*args, **(kwargs or {}), out_val=out) if count else 0
            return out

    before = peak_mib()
    evaluate()
    memory = peak_mib() - before
    with Counter():
        evaluate()
    calls = max(1, int(0.2 / max(_timed(evaluate, threads), 1e-4)))
    best = min(_timed(lambda: [evaluate() for _ in range(calls)], threads) for _ in range(repeats)) / calls
    rate = product(threads)
    return {"seconds": best, "mib": memory, "operations": operations, "product": rate}


def recursion(side: int, quick: bool, repeats: int, threads: int) -> dict[str, Any]:
    """Measure one recursion in this process, without matrices where ``quick`` serves, or with them."""
    import gradleak as gl
    from gradleak.errors import NotApplicable

    model = gl.models.lenet(image_size=side, seed=0)
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    client = gl.Client(model, gl.Batch(x, torch.tensor([3])))
    space = gl.ImageSpace((3, side, side))
    seen = gl.ThreatModel().observe(model, client.send(), space=space, training=client.training, batch_size=1)
    before, began = peak_mib(), clock(threads)
    attack = gl.attacks.recursion(quick=quick)
    try:
        found = attack.reconstruct(seen)
    except NotApplicable as reason:
        return {"stopped": str(reason)}
    seconds = clock(threads) - began
    mib, unknowns = peak_mib() - before, 3 * side**2
    for _ in range(1, repeats):
        seconds = min(seconds, _timed(lambda: attack.reconstruct(seen), threads))
    rate = product(threads)
    return {
        "seconds": seconds,
        "mib": mib,
        "unknowns": unknowns,
        "matrices": found.iterations > 0,
        "mse": float((found.inputs - x).square().mean()),
        "factorization": unknowns**3 / 3 * 2 / rate,
        "matrix mib": unknowns**2 * 4 / 2**20,
        "product": rate,
    }


def child(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Measure, draw and store the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, default=max(SIDES), help="largest image side of the recursion")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *what = json.loads(options.child)
        torch.set_num_threads(what[-1])
        print(json.dumps(evaluation(*what) if kind == "evaluation" else recursion(*what)))
        return
    from _common import write_result  # Not at the top: the measured processes stay small.
    from _journal import Journal

    torch.set_num_threads(options.threads)
    tail, journal, rows = (options.repeats, options.threads), Journal("cost"), []
    for axis, cases in CASES.items():
        for case in cases:
            found = journal.row(f"evaluation {case} {tail}", lambda case=case: child("evaluation", *case, *tail))
            share = found["operations"] / found["seconds"] / found["product"]
            rows.append(
                {
                    "against": axis,
                    "N": case[0],
                    "side": case[1],
                    "width": case[2],
                    "seconds": found["seconds"],
                    "MiB": found["mib"],
                    "share of arithmetic limit": share,
                    "limit": limit(found["seconds"], share, rows),
                }
            )
    for quick, side in itertools.product((True, False), (s for s in SIDES if s <= options.largest)):
        against = "recursion, quick" if quick else "recursion"
        key, what = f"{against} {side} {tail}", (side, quick, *tail)
        found = journal.row(key, lambda what=what: child("recursion", *what))
        if "stopped" in found:
            rows.append({"against": against, "N": 1, "side": side, "width": 12, "limit": "not determined"} | found)
            continue
        share = found["factorization"] / found["seconds"]
        with_matrices = "building and factorizing matrices" if share >= BOUND else "building matrices"
        rows.append(
            {
                "against": against,
                "N": 1,
                "side": side,
                "width": 12,
                "seconds": found["seconds"],
                "MiB": found["mib"],
                "unknowns": found["unknowns"],
                "matrix MiB": found["matrix mib"],
                "one factorization, share of time": share,
                "MSE": found["mse"],
                "limit": with_matrices if found["matrices"] else "starting operations (conjugate gradients)",
            }
        )
    draw(rows)
    write_result("cost", rows, clock="processor" if options.threads == 1 else "wall", summary=summary(rows))
    journal.finish()


def limit(seconds: float, share: float, rows: list[dict[str, Any]]) -> str:
    """Name what an evaluation waits for; the first row is the smallest case."""
    if not rows or seconds < 2 * rows[0]["seconds"]:
        return "starting operations"
    return "arithmetic" if share >= BOUND else "memory traffic"


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw time and memory against every axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
    keys = {"batch": "N", "image side": "side", "width": "width", "recursion": "side"}
    for place, (axis, key) in zip(places, keys.items(), strict=True):
        mine = [r for r in rows if r["against"] == axis and "seconds" in r]
        if not mine:
            continue
        at = [r[key] for r in mine]
        place.plot(at, [1000 * r["seconds"] for r in mine], "o-", color="#1f5fa8")
        other = place.twinx()
        other.plot(at, [r["MiB"] for r in mine], "s--", color="#b4552d")
        place.set_ylim(0)
        other.set_ylim(0)
        place.set_xticks(at, [str(a) for a in at])
        place.set_xlabel({"recursion": "recursion with matrices: side"}.get(axis, f"matching: {axis}"))
        place.tick_params(axis="y", labelcolor="#1f5fa8")
        other.tick_params(axis="y", labelcolor="#b4552d")
    places[0].set_ylabel("ms", color="#1f5fa8")
    figure.text(0.995, 1.0, "MiB", color="#b4552d", ha="right", va="top")
    figure.savefig(PICTURE, dpi=90, metadata={"Software": None})


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per axis: what the last step of it costs, and the limit at both ends."""
    found = []
    for axis in dict.fromkeys(r["against"] for r in rows):
        every = [r for r in rows if r["against"] == axis]
        mine = [r for r in every if "seconds" in r]
        first, last = mine[0], mine[-1]
        key = {"batch": "N", "width": "width"}.get(axis, "side")
        calls = {"recursion": "one `recursion(quick=False)`", "recursion, quick": "one `recursion()`"}
        what = calls.get(axis, "one evaluation of matching")
        times = f"{1000 * first['seconds']:.0f} ms to {1000 * last['seconds']:.0f} ms"
        memory = f"{max(first['MiB'], 0):.0f} to {last['MiB']:.0f} MiB"
        limits = " → ".join(dict.fromkeys(r["limit"] for r in every))
        if every != mine:
            limits += f" (from {every[len(mine)]['side']})"
        found.append(
            {
                "what": f"{what}, LeNet, {key} = {first[key]} to {last[key]}",
                "target": "curve, limit named",
                "measured": f"{times}, {memory}; limit: {limits}",
                "met": True,
            }
        )
    return found


if __name__ == "__main__":
    main()
