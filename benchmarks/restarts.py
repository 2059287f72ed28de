"""32 restarts together against 32 in a loop: the paper's LeNet, one CIFAR-100 image, equal numbers of evaluations.

The loop runs one restart after another with the same solver, eagerly. Together, they run eagerly by vmap, and compiled.
Racing is off, so that all of them do the same work. Compilation is timed apart. Times are processor times. Targets: at
most 0.3 x the loop eagerly, 0.12 x compiled.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from _common import arguments, cifar100, spread, victim, write_result

import gradleak as gl
from gradleak.attacks.matching import GradientMatching


def seconds(attack: GradientMatching, seen: gl.Observation, seeds: int = 1) -> float:
    """Return the processor time of ``seeds`` runs."""
    began = time.process_time()
    for seed in range(seeds):
        attack.reconstruct(seen, seed=seed)
    return time.process_time() - began


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", restarts=32, evaluations=50, repeats=5)
    images, labels = cifar100(options.data)
    _, seen = victim(images[:1], labels[:1])
    # One number type, no tolerance: every candidate makes exactly as many evaluations.
    one = replace(
        gl.attacks.dlg(iterations=options.evaluations, tolerance=0.0, trace=False),
        warm_dtype=None,
        dtype=next(iter(seen.params.values())).dtype,
        race=False,
    )
    together = replace(one, restarts=options.restarts)
    made = replace(together, backend="compile")
    compiling = seconds(made, seen) - seconds(made, seen)
    ways = {
        "loop, eager": (one, options.restarts),
        "together, eager": (together, 1),
        "together, compiled": (made, 1),  # What is compiled already costs nothing more.
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):  # In turn, so that other work on the machine disturbs all alike.
        for name, (attack, seeds) in ways.items():
            spent[name].append(seconds(attack, seen, seeds))
    rows = [row(name, options, found, spent["loop, eager"]) for name, found in spent.items()]
    rows[2]["compile s"] = compiling
    summary = [
        line(rows[1], "eager", 0.3),
        line(rows[2], "compiled", 0.12),
    ]
    write_result("restarts", rows, target="together <= 0.3 x loop eagerly, <= 0.12 x compiled", summary=summary)


def row(name: str, options: argparse.Namespace, spent: list[float], loop: list[float]) -> dict[str, object]:
    """Return one line of the table, medians over the repeats."""
    shares = [a / b for a, b in zip(spent, loop, strict=True)]
    return {
        "how": name,
        "s": spread(spent)["median"],
        "ms per evaluation": 1e3 * spread(spent)["median"] / options.restarts / options.evaluations,
        "share of the loop": spread(shares)["median"],
        "range": f"{min(shares):.3f}-{max(shares):.3f}",
    }


def line(found: dict[str, object], how: str, limit: float) -> dict[str, object]:
    """Return what a table of targets says."""
    share = float(str(found["share of the loop"]))
    return {
        "what": f"32 restarts together, {how}, against 32 in a loop, LeNet",
        "target": f"≤ {limit} ×",
        "measured": f"{share:.2f} × ({found['range']}; {found['ms per evaluation']:.2f} ms an evaluation)",
        "met": share <= limit,
    }


if __name__ == "__main__":
    main()
