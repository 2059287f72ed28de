"""Pixel-accurate leakage from one example: MNIST, CIFAR-100, SVHN and LFW, random held-out images.

Every image has a LeNet of its own with fresh random weights, and both attackers see the same float32 gradient. Cost
of the default scale: about fifteen minutes of one core, most of it the published algorithm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, median, share

from . import _shared  # noqa: TID252

NAME = "images"
NEEDS = ("mnist.npz", "cifar100.npz", "svhn_mini.npz", "lfw.npz")
VERSION = 1
NAMES = ("mnist", "cifar100", "svhn_mini", "lfw")


@dataclass(frozen=True)
class Config:
    """Scale: images for ours and for the published algorithm; ``faces`` of LFW, whose 5,749 labels make it slow."""

    images: int
    published: int
    faces: int
    outer: int
    names: tuple[str, ...] = NAMES


SMOKE = Config(1, 1, 1, 5)
DEFAULT = Config(45, 12, 4, 300)
FULL = Config(1000, 1000, 1000, 300)


def ours(lab: Lab, *, name: str, image: int, iterations: int) -> Mapping[str, Any]:
    """Reconstruct one image from its gradient with our attacker."""
    data = _shared.images(name)
    batch, model = _shared.held_out(lab, data, [image]), data.lenet(image)
    return _shared.attack_gradients([_shared.observe(model, batch)], [batch], iterations=iterations)[0]


def published(lab: Lab, *, name: str, image: int, outer: int) -> Mapping[str, Any]:
    """Reconstruct one image from the same gradient with the published algorithm."""
    data = _shared.images(name)
    batch, model = _shared.held_out(lab, data, [image]), data.lenet(image)
    observation = _shared.observe(model, batch)
    return _shared.attack_published(model, batch, observation, classes=data.classes, seed=image, outer=outer)


def run(config: Config, lab: Lab) -> Result:
    rows: list[Row] = []
    grids: list[Figure] = []
    for name in config.names:
        data = _shared.images(name)
        chosen = lab.sample(_shared.total(name), min(config.images, _shared.total(name)), seed=0)
        mine = lab.measure(ours, [{"name": name, "image": i, "iterations": 3000} for i in chosen])
        few = chosen[: config.faces if name == "lfw" else config.published]
        theirs = lab.measure(published, [{"name": name, "image": i, "outer": config.outer} for i in few])
        rows += _rows(data.title, mine, theirs)
        grids.append(Figure(f"grid {name}", _caption(data.title, mine, theirs), _grid(mine, theirs), (9.0, 2.6)))
    scaled = (
        f"{config.images} images of each data set for ours, {config.published} for the published algorithm (LFW "
        f"{config.faces}), instead of {FULL.images:,}; SVHN is cut from full-number images, 45 of them"
    )
    return Result(rows, grids, scaled="" if config == FULL else scaled)


def _rows(title: str, mine: list[Measured], theirs: list[Measured]) -> list[Row]:
    errors = [_shared.series(r, "mse") for r in (mine, theirs)]
    hits = [share([e <= _shared.HIT for e in column]) for column in errors]
    states = [r["status"] for r in theirs]
    seconds, evaluations = median([r.seconds for r in mine]).value, median([r["evaluations"] for r in theirs]).value
    ended = ", ".join(f"{states.count(s)} {s}" for s in sorted(set(states)))
    note = f"{_shared.proved(mine)}; published, n = {len(theirs)}: {ended}, {evaluations:.0f} evaluations in the median"
    return [
        Row(f"success at MSE 1e-4, {title}", *hits, cost=f"{seconds:.1f} s an image", note=note),
        Row(f"median MSE, {title}", *map(median, errors)),
    ]


def _caption(title: str, mine: list[Measured], theirs: list[Measured]) -> str:
    return (
        f"{title}: the first {min(len(mine), 12)} of {len(mine)} random held-out images, none rejected; "
        f"truth, our reconstruction, and what the published algorithm returned ({len(theirs)} runs)."
    )


def _grid(mine: list[Measured], theirs: list[Measured]) -> Any:
    def draw(figure: Any) -> None:
        lines = [("truth", [r["truth"][0] for r in mine[:12]]), ("ours", [r["images"][0] for r in mine[:12]])]
        _shared.pictures(figure, [*lines, ("published", [r["images"][0] for r in theirs[:12]])])

    return draw
