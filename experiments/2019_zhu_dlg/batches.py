"""Batches of 1, 2, 4, 8 and more: error, iterations, and what rank allows.

The paper: larger batches need more iterations and show few artifacts, in any order. Here: PSNR and evaluations against
the batch size for LeNets of width 12 to 64 and for the paper's ResNet (sigmoid, no strides), with the bound on the rank
of the gradient's Jacobian in the same plot: below one no attacker without a prior can be exact, however long he runs.
Our attacker separates the batch at the head first, where its features come out exact, and solves the layers before it
as far as they are determined; what is left is matched with one target an image.
Cost of the default scale: about twenty-five minutes of one core, most of it at width 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import gradleak as gl
from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, mean, share
from gradleak.structure.ranks import rank_bound
from gradleak.training import parameters

from . import _shared  # noqa: TID252

NAME = "batches"
NEEDS = ("cifar100.npz",)
VERSION = 2


@dataclass(frozen=True)
class Setting:
    """One model and batch size, and what is spent on it.

    Attributes:
        model: "lenet" with ``width``, or "resnet" with ``width`` and ``depth``.
        width: channels.
        size: batch size N.
        iterations: evaluations for ours.
        budget: evaluations after which the published algorithm ends.
        depth: of the ResNet.

    """

    model: str
    width: int
    size: int
    iterations: int
    budget: int
    depth: int = 3

    @property
    def title(self) -> str:
        """The model's name for a reader."""
        return f"LeNet, width {self.width}" if self.model == "lenet" else f"ResNet-{self.depth}, width {self.width}"


@dataclass(frozen=True)
class Config:
    settings: tuple[Setting, ...]
    batches: int


def _lenets(widths: tuple[int, ...], sizes: tuple[int, ...], iterations: int, budget: int) -> tuple[Setting, ...]:
    return tuple(Setting("lenet", w, n, iterations, budget) for w in widths for n in sizes)


SMOKE = Config((*_lenets((12,), (1, 2), 40, 40), Setting("resnet", 4, 1, 3, 20, 8)), 1)
DEFAULT = Config(
    (
        *_lenets((12,), (1, 2, 4, 8), 2000, 2000),
        *_lenets((24,), (1, 2), 4000, 2000),
        *_lenets((24,), (4, 8, 16), 12_000, 2000),
        *_lenets((64,), (1, 2), 2500, 1000),
        *_lenets((64,), (8,), 6000, 1000),
        *(Setting("resnet", 8, n, 400, 400, 8) for n in (1, 2)),
    ),
    1,
)
FULL = Config(
    (
        *_lenets((12, 24, 32, 48, 64), (1, 2, 4, 8, 16, 32), 20_000, 6000),
        *(Setting("resnet", 16, n, 20_000, 6000, 20) for n in (1, 2, 4, 8)),
        *(Setting("resnet", 16, n, 20_000, 6000, 56) for n in (1, 2, 4, 8)),
    ),
    10,
)


def victim(model: str, width: int, depth: int, seed: int) -> nn.Module:
    """Return the model that was sent out; BatchNorm is in evaluation mode, with fresh statistics."""
    if model == "lenet":
        return gl.models.lenet(width=width, seed=seed)
    return gl.models.dlg_resnet(depth=depth, width=width, seed=seed).eval()


def ours(lab: Lab, *, model: str, width: int, depth: int, images: list[int], iterations: int) -> Mapping[str, Any]:
    """Reconstruct one batch with our attacker."""
    batch = _shared.held_out(lab, _shared.images("cifar100"), images)
    net = victim(model, width, depth, images[0])
    bound = rank_bound(net, parameters(net), (3, 32, 32), len(batch))
    found = _shared.attack_gradients([_shared.observe(net, batch)], [batch], iterations=iterations)[0]
    return {**found, "rank": bound.rank, "unknowns": bound.unknowns, "bound": bound.reason}


def published(lab: Lab, *, model: str, width: int, depth: int, images: list[int], budget: int) -> Mapping[str, Any]:
    """Reconstruct the same batch with the published algorithm."""
    batch = _shared.held_out(lab, _shared.images("cifar100"), images)
    net = victim(model, width, depth, images[0])
    observation = _shared.observe(net, batch)
    return _shared.attack_published(net, batch, observation, classes=100, seed=images[0], budget=budget)


Found = list[tuple[Setting, list[Measured], list[Measured]]]


def run(config: Config, lab: Lab) -> Result:
    largest = max(s.size for s in config.settings)
    order = lab.sample(_shared.total("cifar100"), largest * config.batches, seed=0)
    found: Found = []
    for setting in config.settings:
        groups = [order[g * largest : g * largest + setting.size] for g in range(config.batches)]
        fixed = {"model": setting.model, "width": setting.width, "depth": setting.depth}
        mine = lab.measure(ours, [{**fixed, "images": g, "iterations": setting.iterations} for g in groups])
        theirs = lab.measure(published, [{**fixed, "images": g, "budget": setting.budget} for g in groups])
        found.append((setting, mine, theirs))
    rows = [row for item in found for row in _rows(*item)]
    for title in dict.fromkeys(s.title for s, _, _ in found):
        chosen = [f for f in found if f[0].title == title]
        rows.append(Row(f"largest batch recovered, {title}", *_limits(chosen), note=_qualities(chosen)))
    budgets = [s.budget for s in config.settings]
    caps = f"published algorithm ends at {min(budgets):,} to {max(budgets):,} evaluations"
    scaled = f"{config.batches} batch a setting instead of {FULL.batches}, width 64 up to N = 8, small ResNet; {caps}"
    figures = [
        Figure("batch size", "PSNR, evaluations and rank bound against batch size; hollow: rank excludes exactness.",
               _plots(found), (12.0, 4.0)),
        Figure("grid", "Random test images, none rejected, as batches show them (assigned to the truth).", _grid(found),
               (8.0, 1.0 * 3 * len(found))),
    ]  # fmt: skip
    return Result(rows, figures, scaled="" if config == FULL else scaled)


def _rows(setting: Setting, mine: list[Measured], theirs: list[Measured]) -> list[Row]:
    errors = [_shared.series(r, "mse") for r in (mine, theirs)]
    quality = [mean([_shared.psnr(e) for e in column]) for column in errors]
    hits = [share([e <= _shared.HIT for e in column]) for column in errors]
    rank, unknowns = mine[0]["rank"], mine[0]["unknowns"]
    room = "rank does not exclude exactness" if rank >= unknowns else f"rank at most {rank:,} of {unknowns:,}"
    spent = f"{max(r['evaluations'] for r in mine)} evaluations, {mean([r.seconds for r in mine]).value:.0f} s a batch"
    title = f"N = {setting.size}, {setting.title}"
    note = f"{room}; published: at most {setting.budget:,} evaluations, {theirs[0]['status']}"
    return [
        Row(f"PSNR, {title}", *quality, unit="dB", cost=spent, note=note),
        Row(f"success at MSE 1e-4, {title}", *hits, note=room),
    ]


def _limits(found: Found) -> tuple[str, str]:
    """Return in words up to which batch size every image was recovered, for ours and the published algorithm."""
    words = []
    for k in (1, 2):
        good = [s.size for s, *r in found if max(_shared.series(r[k - 1], "mse")) <= _shared.HIT]
        bad = [s.size for s, *r in found if s.size not in good]
        up_to = f"N = {max(good)}" if good else "none"
        words.append(up_to + (f", fails at N = {min(bad)}" if bad else ", no failure up to there"))
    return words[0], words[1]


def _qualities(found: Found) -> str:
    """Return in words how well every batch size came back."""
    measured = [(s.size, mean([_shared.psnr(e) for e in _shared.series(mine, "mse")]).value) for s, mine, _ in found]
    return "mean PSNR of ours: " + ", ".join(f"{value:.3g} dB at N = {size}" for size, value in measured)


def _plots(found: Found) -> Any:
    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        titles = list(dict.fromkeys(s.title for s, _, _ in found))
        for k, title in enumerate(titles):
            chosen = [f for f in found if f[0].title == title]
            sizes = [s.size for s, _, _ in chosen]
            for place, style, label in ((1, "o-", f"{title}, ours"), (2, "x:", "published" if not k else None)):
                quality = [mean([_shared.psnr(e) for e in _shared.series(f[place], "mse")]).value for f in chosen]
                left.plot(sizes, quality, style, color=f"C{k}", label=label)
                if place == 1:
                    excluded = [j for j, f in enumerate(chosen) if f[1][0]["rank"] < f[1][0]["unknowns"]]
                    hollow = {"mfc": "white", "color": f"C{k}", "markersize": 9, "linestyle": "none"}
                    left.plot([sizes[j] for j in excluded], [quality[j] for j in excluded], "o", **hollow)
            spent = [f[1][0]["first_hit"] if f[1][0]["first_hit"] >= 0 else f[1][0]["evaluations"] for f in chosen]
            middle.plot(sizes, [max(s, 1) for s in spent], "o-", color=f"C{k}")
            right.plot(sizes, [f[1][0]["rank"] / f[1][0]["unknowns"] for f in chosen], "s-", color=f"C{k}", label=title)
        left.set_ylabel("mean PSNR, dB")
        left.axhline(40, color="gray", linestyle="--", linewidth=1)
        middle.set_ylabel("evaluations to MSE 1e-4, or all that were spent")
        middle.set_yscale("log")
        right.set_ylabel("rank bound / unknowns (below 1: not exact)")
        right.set_ylim(0, 1.05)
        right.axhline(1, color="gray", linestyle="--", linewidth=1)
        for axis in (left, middle, right):
            axis.set_xlabel("batch size N")
            axis.set_xscale("log", base=2)
        left.legend(fontsize=6)

    return draw


def _grid(found: Found) -> Any:
    def draw(figure: Any) -> None:
        lines: list[tuple[str, list[Any]]] = []
        for setting, mine, theirs in found:
            lines += [
                (f"truth, N = {setting.size}\n{setting.title}", list(mine[0]["truth"])[:8]),
                ("ours", list(mine[0]["images"])[:8]),
                ("published", list(theirs[0]["images"])[:8]),
            ]
        _shared.pictures(figure, lines)

    return draw
