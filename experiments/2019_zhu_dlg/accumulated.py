"""Gradients accumulated over batches, and averaged over clients (the referee's question).

k clients of N examples each send a gradient, and the server (or secure aggregation) sees only the average; one client
that accumulates over k batches before sending shares the same numbers. Averaging mean losses gives the gradient of the
mean loss of all k·N examples, so this is a batch of k·N: the sum hides who owned which image, not the images. (Where
the model changes between the batches see ``federated``.) Cost of the default scale: about ten minutes of one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gradleak as gl
from gradleak.papers.experiment import Figure, Lab, Result, Row, median, share
from gradleak.structure.ranks import rank_bound
from gradleak.training import parameters

from . import _shared  # noqa: TID252

NAME = "accumulated"
NEEDS = ("cifar100.npz",)
VERSION = 2


@dataclass(frozen=True)
class Config:
    """Scale: ``settings`` are pairs (clients or batches k, examples N of each)."""

    width: int
    settings: tuple[tuple[int, int], ...]
    groups: int
    iterations: int
    budget: int


SMOKE = Config(12, ((1, 1), (2, 1)), 1, 40, 40)
DEFAULT = Config(24, ((1, 1), (2, 1), (4, 1), (2, 2)), 2, 10_000, 3200)
FULL = Config(64, ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4), (16, 1)), 10, 20_000, 6000)


def average(model: nn.Module, batches: list[gl.Batch]) -> gl.Update:
    """Return the average of the clients' gradients, which is all that leaves a secure aggregation."""
    updates = [gl.Client(model, batch).send() for batch in batches]
    names = updates[0].tensors
    return gl.Update({k: torch.stack([u.tensors[k] for u in updates]).mean(0) for k in names})


def _exchange(lab: Lab, images: list[int], clients: int, width: int) -> tuple[nn.Module, gl.Batch, gl.Observation]:
    data = _shared.images("cifar100")
    whole, model = _shared.held_out(lab, data, images), data.lenet(images[0], width=width)
    parts = [gl.Batch(x, y) for x, y in zip(whole.inputs.chunk(clients), whole.labels.chunk(clients), strict=True)]
    return model, whole, _shared.observe(model, whole, update=average(model, parts))


def ours(lab: Lab, *, images: list[int], clients: int, width: int, iterations: int) -> Mapping[str, Any]:
    """Reconstruct all examples behind one averaged gradient with our attacker."""
    model, whole, observation = _exchange(lab, images, clients, width)
    bound = rank_bound(model, parameters(model), tuple(whole.inputs.shape[1:]), len(whole))
    found = _shared.attack_gradients([observation], [whole], iterations=iterations)[0]
    return {**found, "rank": bound.rank, "unknowns": bound.unknowns}


def published(lab: Lab, *, images: list[int], clients: int, width: int, budget: int) -> Mapping[str, Any]:
    """Reconstruct all examples behind one averaged gradient with the published algorithm."""
    model, whole, observation = _exchange(lab, images, clients, width)
    return _shared.attack_published(model, whole, observation, classes=100, seed=images[0], budget=budget)


def run(config: Config, lab: Lab) -> Result:
    largest = max(k * n for k, n in config.settings)
    order = lab.sample(_shared.total("cifar100"), largest * config.groups, seed=0)
    rows: list[Row] = []
    lines: list[tuple[str, list[Any]]] = []
    for clients, size in config.settings:
        count = clients * size
        groups = [order[g * largest : g * largest + count] for g in range(config.groups)]
        fixed = {"clients": clients, "width": config.width}
        mine = lab.measure(ours, [{"images": g, **fixed, "iterations": config.iterations} for g in groups])
        theirs = lab.measure(published, [{"images": g, **fixed, "budget": config.budget} for g in groups])
        errors = [_shared.series(r, "mse") for r in (mine, theirs)]
        hits = [share([e <= _shared.HIT for e in column]) for column in errors]
        title = f"{clients} × {size} examples, width {config.width}"
        room = "not excluded by rank" if mine[0]["rank"] >= mine[0]["unknowns"] else "excluded by rank"
        cost = f"{median([r.seconds for r in mine]).value:.0f} s, {mine[0]['evaluations']} evaluations"
        rows.append(Row(f"median MSE, {title}", *map(median, errors), cost=cost, note=f"exactness {room}"))
        rows.append(Row(f"success at MSE 1e-4, {title}", *hits, note=_shared.proved(mine)))
        lines += [
            (f"truth, {clients} × {size}", list(mine[0]["truth"])[:8]),
            ("ours", list(mine[0]["images"])[:8]),
            ("published", list(theirs[0]["images"])[:8]),
        ]
    figure = Figure(
        "grid", "What the average over k clients (or k batches) of N examples gives away; order is free.",
        lambda f: _shared.pictures(f, lines), (6.0, 1.0 * len(lines)),
    )  # fmt: skip
    scaled = f"width {config.width} instead of {FULL.width}, {config.groups} group of images instead of {FULL.groups}"
    return Result(rows, [figure], scaled="" if config == FULL else scaled)
