"""Distance per layer while the image appears (Figure 5), and what some layers alone give away.

The first figure is the paper's: squared gradient distance of every layer against the error of the image, along one
run of matching on all layers. The ablation shares the gradients of the first or the last k layers only; the others
stay with the client. Cost of the default scale: about eight minutes of one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import gradleak as gl
from gradleak.papers.experiment import Figure, Lab, Result, Row, median, share
from gradleak.structure.ranks import rank_bound
from gradleak.training import parameters

from . import _shared  # noqa: TID252

NAME = "layers"
NEEDS = ("cifar100.npz",)
VERSION = 1
LAYERS = ("body.0", "body.2", "body.4", "fc.0")
TITLES = ("convolution 1", "convolution 2", "convolution 3", "linear")
SHARES = (("first", 1), ("first", 2), ("first", 3), ("last", 1), ("last", 2), ("last", 3), ("all", 4))


@dataclass(frozen=True)
class Config:
    images: int
    iterations: int
    budget: int
    shares: tuple[tuple[str, int], ...] = SHARES


SMOKE = Config(1, 60, 40, (("first", 1), ("last", 2), ("all", 4)))
DEFAULT = Config(4, 6000, 3200)
FULL = Config(100, 6000, 6000)


def shared_layers(side: str, count: int) -> tuple[str, ...]:
    """Return the layers whose gradients are shared."""
    return LAYERS[-count:] if side == "last" else LAYERS[:count]


def _victim(image: int, side: str, count: int) -> nn.Module:
    model = _shared.images("cifar100").lenet(image)
    kept = shared_layers(side, count)
    for name, p in model.named_parameters():
        p.requires_grad_(name.rpartition(".")[0] in kept)
    return model


def curves(lab: Lab, *, image: int, iterations: int) -> Mapping[str, Any]:
    """Match the whole gradient of one image and record the distance of every layer."""
    batch = _shared.held_out(lab, _shared.images("cifar100"), [image])
    observation = _shared.observe(_victim(image, "all", 4), batch)
    result = gl.attacks.dlg(iterations=iterations).reconstruct(observation, seed=image)
    trace = result.trace
    assert trace is not None and trace.snapshots is not None  # noqa: PT018
    distance = {
        title: [sum(v) for v in zip(*(trace.layers[f"{layer}.{k}"] for k in ("weight", "bias")), strict=True)]
        for title, layer in zip(TITLES, LAYERS, strict=True)
    }
    image_errors = [_shared.errors(s, batch.inputs)[0] for s in trace.snapshots]
    return {"iterations": list(trace.iterations), "distance": distance, "errors": image_errors}


def ours(lab: Lab, *, images: list[int], side: str, count: int, iterations: int) -> Mapping[str, Any]:
    """Reconstruct from some layers with our attacker."""
    batches = [_shared.held_out(lab, _shared.images("cifar100"), [i]) for i in images]
    models = [_victim(i, side, count) for i in images]
    observations = [_shared.observe(m, b) for m, b in zip(models, batches, strict=True)]
    results = _shared.attack_gradients(observations, batches, iterations=iterations)
    bound = rank_bound(models[0], parameters(models[0]), (3, 32, 32), 1)
    return {**_shared.merged(results), "rank": bound.rank, "unknowns": bound.unknowns}


def published(lab: Lab, *, image: int, side: str, count: int, budget: int) -> Mapping[str, Any]:
    """Reconstruct from some layers with the published algorithm."""
    batch, model = _shared.held_out(lab, _shared.images("cifar100"), [image]), _victim(image, side, count)
    observation = _shared.observe(model, batch)
    return _shared.attack_published(model, batch, observation, classes=100, seed=image, budget=budget)


def run(config: Config, lab: Lab) -> Result:
    chosen = lab.sample(_shared.total("cifar100"), config.images, seed=0)
    traced = lab.measure(curves, [{"image": chosen[0], "iterations": config.iterations}])[0]
    rows: list[Row] = []
    lines: list[tuple[str, list[Any]]] = []
    for side, count in config.shares:
        fixed = {"side": side, "count": count}
        mine = lab.measure(
            ours, [{"images": part, **fixed, "iterations": config.iterations} for part in _shared.chunks(chosen, 8)]
        )
        theirs = lab.measure(published, [{"image": i, **fixed, "budget": config.budget} for i in chosen])
        errors = [_shared.series(r, "mse") for r in (mine, theirs)]
        hits = [share([e <= _shared.HIT for e in column]) for column in errors]
        label = "all layers" if side == "all" else f"{side} {count} of 4 layers"
        rank, unknowns = mine[0]["rank"], mine[0]["unknowns"]
        note = f"median MSE {median(errors[0]).value:.1e} and {median(errors[1]).value:.1e}; " + (
            "counting rank does not exclude exactness" if rank >= unknowns else f"rank at most {rank:,} of {unknowns:,}"
        )
        seconds = sum(r.seconds for r in mine) / len(chosen)
        rows.append(Row(f"success at MSE 1e-4, {label}", *hits, cost=f"{seconds:.0f} s an image", note=note))
        lines.append((f"ours, {label}", [i for r in mine for i in r["images"]][:8]))
        lines.append((f"published, {label}", [r["images"][0] for r in theirs][:8]))
        truth = [i for r in mine for i in r["truth"]][:8]
    lines.insert(0, ("truth", truth))
    fall = traced["errors"]
    rows.insert(0, Row("image error at the end of the traced run", f"{fall[-1]:.1e} (from {fall[0]:.1e})"))
    scaled = (
        f"{config.images} instead of {FULL.images} images; published algorithm ends at {config.budget:,} evaluations"
    )
    figures = [
        Figure("curves", "Squared gradient distance per layer, and the image's own error, along one run.",
               _curves(traced)),
        Figure("some layers", "What the gradients of some layers show of random test images.",
               lambda f: _shared.pictures(f, lines), (7.0, 10.0)),
    ]  # fmt: skip
    return Result(rows, figures, scaled="" if config == FULL else scaled)


def _curves(traced: Any) -> Any:
    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        steps = [s + 1 for s in traced["iterations"]]
        for title, values in traced["distance"].items():
            left.loglog(steps, values, label=title)
            right.loglog(traced["errors"], values, label=title)
        left.loglog(steps, traced["errors"], "k--", label="image (MSE)")
        left.set_xlabel("evaluation")
        left.set_ylabel("squared distance")
        right.set_xlabel("error of the image (MSE)")
        right.invert_xaxis()
        left.legend(fontsize=7)

    return draw
