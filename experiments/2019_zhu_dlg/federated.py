"""Federated averaging: 1 to 10 local steps, taken as one gradient and unrolled (Table 1).

The client takes k SGD steps on one example and sends the weight delta. The paper's attacker divides it by −lr·k and
treats it as one gradient; ours differentiates through the k steps, because local training *is* the forward map. A
second table has k steps on k examples, reported like a batch of k. The paper names neither step size nor model; here
it is the LeNet with lr 0.01, and 1e-4 for the paper's argument that small weight changes look like one gradient.
Further rows take what real clients do: momentum, Adam, and several epochs over shuffled minibatches, with the order
told to the attacker and with it withheld.
Cost of the default scale: about an hour of one core, which grows in proportion to k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import gradleak as gl
from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, median, share
from gradleak.structure.ranks import rank_bound
from gradleak.training import SGD, Adam, parameters

from . import _shared  # noqa: TID252

NAME = "federated"
NEEDS = ("cifar100.npz",)
VERSION = 1


@dataclass(frozen=True)
class Config:
    """Scale: ``together`` is the number of vmapped images; ``small`` the number of images at the small step size."""

    steps: tuple[int, ...]
    images: int
    together: int
    iterations: int
    budget: int
    small: tuple[int, ...]
    momentum: tuple[int, ...]
    several: tuple[int, ...]
    several_width: int
    several_iterations: int
    adam: tuple[int, ...]
    epochs: tuple[int, ...]


SMOKE = Config((1, 2), 1, 1, 60, 40, (2,), (), (2,), 12, 20, (), (2,))
DEFAULT = Config((1, 2, 3, 4, 10), 4, 4, 5000, 3200, (4,), (4,), (2, 4), 24, 5000, (1, 4), (2,))
FULL = Config(
    (1, 2, 3, 4, 10), 100, 50, 6000, 6000, (1, 2, 3, 4, 10), (2, 3, 4, 10), (2, 3, 4, 10), 64, 10_000, (1, 2, 4), (2, 5)
)
EPOCH_EXAMPLES = 4
"""Examples of a client that trains for several epochs; its minibatches hold two."""


def training(steps: int, lr: float, momentum: float, examples: int = 1) -> gl.FedAvg:
    """Return the client's training: ``steps`` steps on one example, or one step on each of ``examples``."""
    rule = SGD(lr, momentum=momentum) if momentum else SGD(lr)
    return gl.FedAvg(optimizer=rule, steps=steps, batch_size=1 if examples > 1 else None)


def _alone(lab: Lab, images: list[int], local: gl.FedAvg, iterations: int) -> Mapping[str, Any]:
    """Unroll ``local`` on one example each; images of one case advance together."""
    data = _shared.images("cifar100")
    batches = [_shared.held_out(lab, data, [i]) for i in images]
    observations = [_shared.observe(data.lenet(i), b, local) for i, b in zip(images, batches, strict=True)]
    return _shared.merged(_shared.attack_gradients(observations, batches, iterations=iterations))


def _victim(lab: Lab, images: list[int], width: int = 12) -> tuple[gl.Batch, nn.Module]:
    """Return the examples of one client and the model that it was sent."""
    data = _shared.images("cifar100")
    return _shared.held_out(lab, data, images), data.lenet(images[0], width=width)


def _as_one_gradient(
    lab: Lab, local: gl.FedAvg, images: list[int], lr: float, budget: int, width: int = 12
) -> Mapping[str, Any]:
    """Divide the delta of ``local`` by −lr·k and run the published algorithm on it."""
    batch, model = _victim(lab, images, width)
    return _shared.attack_published(
        model, batch, _shared.observe(model, batch, local), classes=100, seed=images[0], budget=budget, lr=lr,
        steps=local.count(len(batch)),
    )  # fmt: skip


def ours(lab: Lab, *, steps: int, lr: float, momentum: float, images: list[int], iterations: int) -> Mapping[str, Any]:
    """Unroll k steps of SGD on one example each."""
    return _alone(lab, images, training(steps, lr, momentum), iterations)


def published(lab: Lab, *, steps: int, lr: float, momentum: float, image: int, budget: int) -> Mapping[str, Any]:
    """Treat the same delta as one gradient and run the published algorithm."""
    return _as_one_gradient(lab, training(steps, lr, momentum), [image], lr, budget)


def adam(lab: Lab, *, steps: int, lr: float, images: list[int], iterations: int) -> Mapping[str, Any]:
    """Unroll k steps of Adam on one example each."""
    return _alone(lab, images, gl.FedAvg(optimizer=Adam(lr), steps=steps), iterations)


def adam_published(lab: Lab, *, steps: int, lr: float, image: int, budget: int) -> Mapping[str, Any]:
    """Treat Adam's delta as one gradient and run the published algorithm."""
    return _as_one_gradient(lab, gl.FedAvg(optimizer=Adam(lr), steps=steps), [image], lr, budget)


def _shuffled(count: int, lr: float, seed: int) -> gl.FedAvg:
    return gl.FedAvg(lr, epochs=count, batch_size=2, shuffle=seed)


def epochs(
    lab: Lab, *, count: int, lr: float, width: int, images: list[int], iterations: int, order: bool
) -> Mapping[str, Any]:
    """Unroll several epochs over shuffled minibatches of two, with the order granted or withheld."""
    local, (batch, model) = _shuffled(count, lr, images[0]), _victim(lab, images, width)
    threat = gl.ThreatModel(gl.ThreatModel().knows | gl.Knowledge.ORDER) if order else gl.ThreatModel()
    space = gl.ImageSpace(tuple(batch.inputs.shape[1:]))
    seen = threat.observe(model, local(model, batch), space=space, training=local, batch_size=len(batch))
    return _shared.attack_gradients([seen], [batch], iterations=iterations)[0]


def epochs_published(
    lab: Lab, *, count: int, lr: float, width: int, images: list[int], budget: int
) -> Mapping[str, Any]:
    """Treat the delta of several epochs as one gradient of the whole batch."""
    return _as_one_gradient(lab, _shuffled(count, lr, images[0]), images, lr, budget, width)


def several(lab: Lab, *, examples: int, lr: float, width: int, images: list[int], iterations: int) -> Mapping[str, Any]:
    """Unroll one step on each of k examples."""
    batch, model = _victim(lab, images, width)
    bound = rank_bound(model, parameters(model), tuple(batch.inputs.shape[1:]), examples)
    seen = _shared.observe(model, batch, training(examples, lr, 0.0, examples))
    found = _shared.attack_gradients([seen], [batch], iterations=iterations)[0]
    return {**found, "rank": bound.rank, "unknowns": bound.unknowns}


def several_published(
    lab: Lab, *, examples: int, lr: float, width: int, images: list[int], budget: int
) -> Mapping[str, Any]:
    """Treat the delta of k steps on k examples as one gradient of a batch of k."""
    return _as_one_gradient(lab, training(examples, lr, 0.0, examples), images, lr, budget, width)


def run(config: Config, lab: Lab) -> Result:
    chosen = lab.sample(_shared.total("cifar100"), max(config.images, *config.several, EPOCH_EXAMPLES), seed=0)
    images = chosen[: config.images]
    rows: list[Row] = []
    lines: list[tuple[str, list[Any]]] = []
    plotted: list[tuple[int, list[float], list[float]]] = []

    def both(steps: int, lr: float, momentum: float) -> tuple[list[Measured], list[Measured]]:
        fixed = {"steps": steps, "lr": lr, "momentum": momentum}
        parts = _shared.chunks(images, config.together)
        mine = lab.measure(ours, [{**fixed, "images": part, "iterations": config.iterations} for part in parts])
        return mine, lab.measure(published, [{**fixed, "image": i, "budget": config.budget} for i in images])

    for steps in config.steps:
        mine, theirs = both(steps, 0.01, 0.0)
        rows += _rows(f"{steps} local step{'s' * (steps > 1)}", mine, theirs, len(images))
        plotted.append((steps, _shared.series(mine, "mse"), _shared.series(theirs, "mse")))
        lines.append((f"ours, k = {steps}", [i for r in mine for i in r["images"]][:8]))
        lines.append((f"published, k = {steps}", [r["images"][0] for r in theirs][:8]))
    lines.insert(0, ("truth", [i for r in mine for i in r["truth"]][:8]))
    for steps in config.small:
        rows += _rows(f"{steps} local steps of size 1e-4", *both(steps, 1e-4, 0.0), len(images))[:1]
    for steps in config.momentum:
        rows += _rows(f"{steps} local steps with momentum 0.9", *both(steps, 0.01, 0.9), len(images))[:1]
    for count in config.several:
        fixed = {"examples": count, "lr": 0.01, "width": config.several_width, "images": chosen[:count]}
        mine = lab.measure(several, [{**fixed, "iterations": config.several_iterations}])
        theirs = lab.measure(several_published, [{**fixed, "budget": config.budget}])
        room = f"rank at most {mine[0]['rank']:,} of {mine[0]['unknowns']:,}" * (mine[0]["rank"] < mine[0]["unknowns"])
        title = f"{count} steps on {count} examples, width {config.several_width}"
        rows += _rows(title, mine, theirs, count, room)
    for steps in config.adam:
        fixed = {"steps": steps, "lr": 1e-3}
        parts = _shared.chunks(images, config.together)
        mine = lab.measure(adam, [{**fixed, "images": part, "iterations": config.iterations} for part in parts])
        theirs = lab.measure(adam_published, [{**fixed, "image": i, "budget": config.budget} for i in images])
        rows += _rows(f"{steps} local step{'s' * (steps > 1)} of Adam", mine, theirs, len(images))
    for count in config.epochs:
        group = chosen[:EPOCH_EXAMPLES]
        fixed = {"count": count, "lr": 0.01, "width": config.several_width, "images": group}
        theirs = lab.measure(epochs_published, [{**fixed, "budget": config.budget}])
        for order in (True, False):
            mine = lab.measure(epochs, [{**fixed, "iterations": config.several_iterations, "order": order}])
            known = "known" if order else "withheld"
            title = f"{count} epochs over {len(group)} shuffled examples, width {config.several_width}, order {known}"
            rows += _rows(title, mine, theirs, len(group))
    figures = [
        Figure("errors", "Error of every image against the number of local steps, lr 0.01.", _errors(plotted)),
        Figure("grid", "Random test images after k local steps, none rejected.", lambda f: _shared.pictures(f, lines),
               (6.0, 10.0)),
    ]  # fmt: skip
    scaled = f"{len(images)} instead of {FULL.images} images a row; published algorithm ends at {config.budget:,} "
    scaled += "evaluations"
    return Result(rows, figures, scaled="" if config == FULL else scaled)


def _rows(title: str, mine: list[Measured], theirs: list[Measured], examples: int, note: str = "") -> list[Row]:
    errors = [_shared.series(r, "mse") for r in (mine, theirs)]
    hits = [share([e <= _shared.HIT for e in column]) for column in errors]
    seconds = sum(r.seconds for r in mine) / examples
    evaluations = median([float(e) for e in _shared.series(mine, "evaluations")]).value
    cost = f"{seconds:.0f} s an image, {evaluations:.0f} evaluations"
    return [
        Row(f"median MSE, {title}", *map(median, errors), cost=cost, note=note),
        Row(f"success at MSE 1e-4, {title}", *hits, note=_shared.proved(mine)),
    ]


def _errors(plotted: list[tuple[int, list[float], list[float]]]) -> Any:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        paper = {1: 3.3e-6, 2: 3.5e-3, 3: 3.0e-3, 4: 1.8e-2}
        axis.plot(list(paper), list(paper.values()), "k_", markersize=16, label="the paper's Table 1")
        for k, mine, theirs in plotted:
            for values, color, label in (
                (mine, "C0", "unrolled (ours)"),
                (theirs, "C1", "as one gradient (published)"),
            ):
                y = [min(max(e, 1e-16), 1.0) for e in values]
                axis.scatter([k] * len(y), y, color=color, s=14, label=label if k == plotted[0][0] else None)
        axis.axhline(_shared.HIT, color="gray", linestyle="--", linewidth=1)
        axis.set_yscale("log")
        axis.set_xlabel("local steps")
        axis.set_ylabel("mean squared error")
        axis.legend(fontsize=8)

    return draw
