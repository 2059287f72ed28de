"""Width and depth of the model against success (the referee's question).

The LeNet at several widths, and with more convolutions of the same kind between its last one and the head (the client
may use any ``nn.Module``). Where the rank of the gradient's Jacobian excludes an exact image, the row says so. Depth is
where sigmoid networks lose the gradient of their first layers, width is where equations come from. Cost of the default
scale: about ten minutes of one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, median, share
from gradleak.structure.ranks import rank_bound
from gradleak.training import parameters

from . import _shared  # noqa: TID252

NAME = "model_size"
NEEDS = ("cifar100.npz",)
VERSION = 2


@dataclass(frozen=True)
class Config:
    """Scale: widths at depth 3, and depths (number of convolutions) at width 12."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    images: int
    published: int
    iterations: int
    budget: int


SMOKE = Config((12,), (4,), 1, 1, 60, 40)
DEFAULT = Config((4, 8, 12, 24), (4, 6), 6, 3, 2000, 3200)
FULL = Config((4, 8, 12, 16, 24, 32, 48, 64), (4, 5, 6, 8, 10), 100, 100, 6000, 6000)


def deep_lenet(width: int, depth: int, seed: int) -> nn.Module:
    """Return the LeNet with ``depth`` convolutions, all weights and biases U(−0.5, 0.5)."""
    base = _shared.images("cifar100").lenet(seed, width=width)
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    more: list[nn.Module] = []
    for _ in range(depth - 3):
        layer = nn.utils.skip_init(nn.Conv2d, width, width, 5, padding=2)
        with torch.no_grad():
            for p in layer.parameters():
                p.uniform_(-0.5, 0.5, generator=generator)
        more += [layer, nn.Sigmoid()]
    children = dict(base.named_children())
    return nn.Sequential(children["body"], *more, nn.Flatten(), children["fc"])


def ours(lab: Lab, *, width: int, depth: int, image: int, iterations: int) -> Mapping[str, Any]:
    """Reconstruct one image from a model of this size with our attacker."""
    batch, model = _shared.held_out(lab, _shared.images("cifar100"), [image]), deep_lenet(width, depth, image)
    found = _shared.attack_gradients([_shared.observe(model, batch)], [batch], iterations=iterations)[0]
    return {**found, "parameters": sum(p.numel() for p in model.parameters())}


def published(lab: Lab, *, width: int, depth: int, image: int, budget: int) -> Mapping[str, Any]:
    """Reconstruct one image from a model of this size with the published algorithm."""
    batch, model = _shared.held_out(lab, _shared.images("cifar100"), [image]), deep_lenet(width, depth, image)
    observation = _shared.observe(model, batch)
    return _shared.attack_published(model, batch, observation, classes=100, seed=image, budget=budget)


def run(config: Config, lab: Lab) -> Result:
    chosen = lab.sample(_shared.total("cifar100"), config.images, seed=0)
    sizes = [(w, 3) for w in config.widths] + [(12, d) for d in config.depths]
    rows: list[Row] = []
    found: list[tuple[int, int, list[Measured], list[Measured]]] = []
    for width, depth in sizes:
        fixed = {"width": width, "depth": depth}
        mine = lab.measure(ours, [{**fixed, "image": i, "iterations": config.iterations} for i in chosen])
        few = chosen[: config.published]
        theirs = lab.measure(published, [{**fixed, "image": i, "budget": config.budget} for i in few])
        found.append((width, depth, mine, theirs))
        errors = [_shared.series(r, "mse") for r in (mine, theirs)]
        hits = [share([e <= _shared.HIT for e in column]) for column in errors]
        exact = sum(r["verdict"] == "proved" for r in mine)
        net = deep_lenet(width, depth, 0)
        bound = rank_bound(net, parameters(net), (3, 32, 32), 1)
        room = f"rank at most {bound.rank:,} of {bound.unknowns:,}; " * (bound.rank < bound.unknowns)
        rows.append(
            Row(
                f"success at MSE 1e-4, width {width}, {depth} convolutions",
                *hits,
                cost=f"{median([r.seconds for r in mine]).value:.0f} s an image",
                note=f"{mine[0]['parameters']:,} parameters; {room}median MSE {median(errors[0]).value:.1e} and "
                f"{median(errors[1]).value:.1e}; {exact} of {len(mine)} of ours proved by their certificate",
            )
        )
    scaled = (
        f"{config.images} images for ours, {config.published} for the published algorithm, instead of {FULL.images}"
    )
    figure = Figure("errors", "Error of every image; the dashed line is MSE 1e-4.", _errors(found))
    return Result(rows, [figure], scaled="" if config == FULL else scaled)


def _errors(found: list[tuple[int, int, list[Measured], list[Measured]]]) -> Any:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, (_, _, mine, theirs) in enumerate(found):
            for shift, records, color, label in ((0.0, mine, "C0", "ours"), (0.25, theirs, "C1", "published")):
                values = [min(max(e, 1e-18), 1.0) for e in _shared.series(records, "mse")]
                axis.scatter([place + shift] * len(values), values, s=14, color=color, label=None if place else label)
        axis.set_yscale("log")
        axis.axhline(_shared.HIT, color="gray", linestyle="--", linewidth=1)
        axis.set_xticks([p + 0.12 for p in range(len(found))], [f"width {w}\n{d} conv." for w, d, _, _ in found])
        axis.set_ylabel("mean squared error")
        axis.legend()

    return draw
