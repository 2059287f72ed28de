"""L-BFGS, Adam, SGD and our best: evaluations and time to MSE 1e-4 in one run.

The paper: L-BFGS needs 5 minutes, SGD 30, on a V100. Here each runs once from one start on the same images and one
core, without restarts; the step sizes of Adam and SGD are chosen beforehand by the matching objective on two training
images. Matching is the paper's objective with the label optimized jointly; the recursion has no iterations. Times are
those of a shared machine: compare them with one another. Cost of the default scale: about fifteen minutes of one core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import gradleak as gl
from gradleak.attacks.matching import LBFGS, Adam, GradientDescent, GradientMatching, Solver
from gradleak.papers.experiment import Estimate, Figure, Lab, Measured, Result, Row, median, share

from . import _ours, _published, _shared  # noqa: TID252

NAME = "optimizers"
NEEDS = ("cifar100.npz",)
VERSION = 1
TITLES = {
    "published": "L-BFGS as published",
    "adam": "Adam",
    "sgd": "SGD with momentum 0.9",
    "lbfgs": "L-BFGS with strong-Wolfe search, float64",
    "ours": "our best (recursion)",
}


@dataclass(frozen=True)
class Config:
    images: int
    first_order: int
    second_order: int
    outer: int
    rates: tuple[float, ...]
    tuning: int


SMOKE = Config(1, 30, 30, 3, (0.1,), 5)
DEFAULT = Config(4, 6000, 6000, 300, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 300)
FULL = Config(100, 100_000, 10_000, 300, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 2000)


def _matching(solver: str, iterations: int, rate: float) -> GradientMatching:
    """Return the paper's objective from the paper's start with another solver."""
    chosen: Solver
    if solver == "lbfgs":
        chosen = LBFGS(iterations=iterations)
    elif solver == "adam":
        chosen = Adam(iterations=iterations, lr=rate)
    else:
        chosen = GradientDescent(iterations=iterations, lr=rate)
    exact = solver == "lbfgs"
    return GradientMatching(
        solver=chosen, init_std=0.1 if exact else 1.0, tolerance=1e-13, dtype=torch.float64 if exact else None
    )


def tune(lab: Lab, *, solver: str, rate: float, iterations: int) -> Mapping[str, Any]:
    """Return the objective that a step size reaches on two training images."""
    x, y = lab.images("cifar100", "train")
    scores = []
    for i in lab.sample(len(x), 2, seed=1):
        batch = gl.Batch(x[i : i + 1].float(), y[i : i + 1])
        observation = _shared.observe(_shared.images("cifar100").lenet(i), batch)
        scores.append(_matching(solver, iterations, rate).reconstruct(observation, seed=i).objective)
    return {"objective": [s if math.isfinite(s) else 1e300 for s in scores]}


def matching(lab: Lab, *, solver: str, rate: float, image: int, iterations: int) -> Mapping[str, Any]:
    """Run one solver on one image and report its error along the way."""
    batch = _shared.held_out(lab, _shared.images("cifar100"), [image])
    observation = _shared.observe(_shared.images("cifar100").lenet(image), batch)
    result = _matching(solver, iterations, rate).reconstruct(observation, seed=image)
    assert result.trace is not None and result.trace.snapshots is not None  # noqa: PT018
    errors = [_shared.errors(s, batch.inputs)[0] for s in result.trace.snapshots]
    final = _shared.errors(result.inputs, batch.inputs)[0]
    steps = [*(s + 1 for s in result.trace.iterations), result.evaluations]
    return {"steps": steps, "errors": [*errors, final], "seconds": result.seconds, "evaluations": result.evaluations}


def as_published(lab: Lab, *, image: int, outer: int) -> Mapping[str, Any]:
    """Run the published L-BFGS on one image and report its error after every outer iteration."""
    data = _shared.images("cifar100")
    batch, model = _shared.held_out(lab, data, [image]), data.lenet(image)
    gradient = _shared.observe(model, batch).update.tensors
    iterates: list[tuple[int, torch.Tensor]] = []
    start = time.perf_counter()
    result = _published.published(
        model,
        gradient,
        data.shape,
        data.classes,
        seed=image,
        outer=outer,
        watch=lambda _, n, x: iterates.append((n, x)),
    )
    seconds = time.perf_counter() - start
    errors = [_shared.errors(x, batch.inputs)[0] for _, x in iterates]
    return {"steps": [n for n, _ in iterates], "errors": errors, "seconds": seconds, "evaluations": result.evaluations}


def best(lab: Lab, *, image: int) -> Mapping[str, Any]:
    """Run our best attacker on one image."""
    data = _shared.images("cifar100")
    batch = _shared.held_out(lab, data, [image])
    observation = _shared.observe(data.lenet(image), batch)
    start = time.perf_counter()
    result = _ours.reconstruct([observation], seed=image)[0]
    seconds = time.perf_counter() - start
    error = _shared.errors(result.inputs, batch.inputs)[0]
    evaluations = max(1, result.evaluations)
    return {"steps": [evaluations], "errors": [error], "seconds": seconds, "evaluations": evaluations}


def reached(steps: list[int], errors: list[float], seconds: float, evaluations: int) -> tuple[float, float]:
    """Return evaluations and seconds to the first error within 1e-4; infinite where there is none."""
    for step, error in zip(steps, errors, strict=True):
        if error <= _shared.HIT:
            return float(step), seconds * step / max(1, evaluations)
    return math.inf, math.inf


def run(config: Config, lab: Lab) -> Result:
    chosen = lab.sample(_shared.total("cifar100"), config.images, seed=0)
    rates = {}
    for solver in ("adam", "sgd"):
        cases = [{"solver": solver, "rate": r, "iterations": config.tuning} for r in config.rates]
        tried = lab.measure(tune, cases)
        rates[solver] = min(tried, key=lambda r: sum(r["objective"])).case["rate"]
    found: dict[str, list[Measured]] = {
        "published": lab.measure(as_published, [{"image": i, "outer": config.outer} for i in chosen]),
    }
    for solver in ("adam", "sgd", "lbfgs"):
        budget = config.second_order if solver == "lbfgs" else config.first_order
        fixed = {"solver": solver, "rate": rates.get(solver, 1.0), "iterations": budget}
        found[solver] = lab.measure(matching, [{**fixed, "image": i} for i in chosen])
    found["ours"] = lab.measure(best, [{"image": i} for i in chosen])
    rows = [row for name, records in found.items() for row in _rows(name, records, rates.get(name))]
    scaled = f"{config.images} images, {config.first_order:,} first-order steps instead of {FULL.first_order:,}"
    figure = Figure("errors", "Error of every image along the evaluations of each solver.", _curves(found))
    return Result(rows, [figure], scaled="" if config == FULL else scaled)


def _rows(name: str, records: list[Measured], rate: float | None) -> list[Row]:
    goals = [reached(r["steps"], r["errors"], r["seconds"], r["evaluations"]) for r in records]
    hits = share([math.isfinite(e) for e, _ in goals])
    spent = sum(r["seconds"] for r in records) / len(records)
    budget = max(r["evaluations"] for r in records)
    note = f"at most {budget:,} evaluations, {spent:.0f} s an image in all"
    note = note if rate is None else f"lr {rate:g}; {note}"
    title = TITLES[name]

    def place(value: Estimate | str) -> dict[str, Estimate | str | None]:
        return {"ours": None, "published": value} if name == "published" else {"ours": value, "published": None}

    rows = [Row(f"success at MSE 1e-4, {title}", **place(hits), note=note)]
    for k, (what, unit) in enumerate((("evaluations", ""), ("time", "s"))):
        middle = median([g[k] for g in goals])
        words = "not reached by half of the images"
        rows.append(
            Row(f"{what} to MSE 1e-4, {title}", **place(middle if math.isfinite(middle.value) else words), unit=unit)
        )
    return rows


def _curves(found: dict[str, list[Measured]]) -> Any:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for k, (name, records) in enumerate(found.items()):
            for n, r in enumerate(records):
                steps, errors = r["steps"], [min(max(e, 1e-16), 10.0) for e in r["errors"]]
                label = None if n else TITLES[name]
                axis.plot(steps, errors, "o-" if len(steps) == 1 else "-", color=f"C{k}", alpha=0.7, label=label)
        axis.axhline(_shared.HIT, color="gray", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("evaluations of the objective and its gradient")
        axis.set_ylabel("mean squared error")
        axis.legend(fontsize=7)

    return draw
