"""Leakage at every stage of training, from a model that is really trained (Table 4).

The paper's LeNet learns MNIST (10,000 digits, Adam); its checkpoints after 0, 30, 70 and 100 % of the epochs are sent
out, and random test digits, which the model has never seen, are reconstructed from float32 gradients. A fitted example
has a tiny gradient: whoever matches its absolute size has nothing left to match. Cost of the default scale: about a
minute of training and eight minutes of attacks on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, median, share
from gradleak.training import Adam

from . import _cohort, _shared  # noqa: TID252

NAME = "training_stage"
NEEDS = ("mnist.npz",)
VERSION = 1
STAGES = (0, 30, 70, 100)


@dataclass(frozen=True)
class Config:
    examples: int
    epochs: int
    images: int
    published: int
    outer: int


SMOKE = Config(1000, 10, 1, 1, 10)
DEFAULT = Config(10_000, 20, 20, 5, 300)
FULL = Config(10_000, 100, 500, 500, 300)


def trained(lab: Lab, *, examples: int, epochs: int) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Train the LeNet and return its parameters at every stage, named ``stage/parameter``."""
    data = _shared.images("mnist")
    x, y = lab.images("mnist", "train")
    xt, yt = lab.images("mnist", "test")
    kept: dict[str, Tensor] = {}
    notes: dict[str, Any] = {"accuracy": {}}
    wanted = {round(epochs * s / 100): s for s in STAGES}

    def keep(epoch: int, model: nn.Module) -> None:
        if epoch in wanted:
            kept.update({f"{wanted[epoch]}/{k}": p.detach() for k, p in model.named_parameters()})
            notes["accuracy"][str(wanted[epoch])] = _cohort.accuracy(model, xt.float(), yt)

    _cohort.fit(
        data.lenet(0), x[:examples].float(), y[:examples], epochs=epochs, batch_size=64, optimizer=Adam(3e-3),
        callback=keep,
    )  # fmt: skip
    return kept, notes


def _victim(lab: Lab, stage: int, examples: int, epochs: int) -> nn.Module:
    tensors, _ = lab.tensors(trained, examples=examples, epochs=epochs)
    model = _shared.images("mnist").lenet(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"{stage}/{name}"])
    return model


def ours(lab: Lab, *, stage: int, image: int, examples: int, epochs: int, iterations: int) -> Mapping[str, Any]:
    """Reconstruct one test digit at one stage with our attacker."""
    batch = _shared.held_out(lab, _shared.images("mnist"), [image])
    model = _victim(lab, stage, examples, epochs)
    observation = _shared.observe(model, batch)
    norm = float(torch.stack([v.square().sum() for v in observation.update.tensors.values()]).sum().sqrt())
    return {**_shared.attack_gradients([observation], [batch], iterations=iterations)[0], "gradient_norm": norm}


def published(lab: Lab, *, stage: int, image: int, examples: int, epochs: int, outer: int) -> Mapping[str, Any]:
    """Reconstruct one test digit at one stage with the published algorithm."""
    data = _shared.images("mnist")
    batch, model = _shared.held_out(lab, data, [image]), _victim(lab, stage, examples, epochs)
    observation = _shared.observe(model, batch)
    return _shared.attack_published(model, batch, observation, classes=data.classes, seed=image, outer=outer)


def run(config: Config, lab: Lab) -> Result:
    fixed = {"examples": config.examples, "epochs": config.epochs}
    _, notes = lab.tensors(trained, **fixed)
    chosen = lab.sample(_shared.total("mnist"), config.images, seed=0)
    rows: list[Row] = []
    all_errors: list[list[list[float]]] = []
    lines: list[tuple[str, list[Any]]] = []
    for stage in STAGES:
        mine = lab.measure(ours, [{"stage": stage, "image": i, "iterations": 3000, **fixed} for i in chosen])
        theirs = lab.measure(
            published,
            [{"stage": stage, "image": i, "outer": config.outer, **fixed} for i in chosen[: config.published]],
        )
        errors = [_shared.series(r, "mse") for r in (mine, theirs)]
        all_errors.append(errors)
        note = f"test accuracy {100 * notes['accuracy'][str(stage)]:.1f} %; published on {len(theirs)} of the images"
        cost = f"{median([r.seconds for r in mine]).value:.1f} s an image"
        hits = [share([e <= _shared.HIT for e in column]) for column in errors]
        rows.append(Row(f"median MSE at {stage} % of training", *map(median, errors), cost=cost, note=note))
        rows.append(
            Row(f"success at MSE 1e-4, {stage} % of training", *hits, note=f"{_sizes(mine)}; {_shared.proved(mine)}")
        )
        lines.append((f"ours, {stage} %", [r["images"][0] for r in mine[:10]]))
        lines.append((f"published, {stage} %", [r["images"][0] for r in theirs[:10]]))
    lines.insert(0, ("truth", [r["truth"][0] for r in mine[:10]]))
    figures = [
        Figure("grid", "Random test digits, none rejected, at every stage of training.",
               lambda f: _shared.pictures(f, lines), (9.0, 7.0)),
        Figure("errors", "Error of every image at every stage; the dashed line is MSE 1e-4.", _scatter(all_errors)),
    ]  # fmt: skip
    scaled = f"MNIST, {config.images} images a stage for ours, {config.published} for the published algorithm"
    return Result(rows, figures, scaled="" if config == FULL else scaled)


def _sizes(mine: list[Measured]) -> str:
    norms = sorted(r["gradient_norm"] for r in mine)
    return f"gradient norms {norms[0]:.1e} to {norms[-1]:.1e}"


def _scatter(errors: list[list[list[float]]]) -> Any:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for k, (label, color) in enumerate((("ours", "C0"), ("published", "C1"))):
            for place, columns in enumerate(errors):
                values = [min(max(e, 1e-16), 1.0) for e in columns[k]]
                axis.scatter([place + 0.2 * k] * len(values), values, color=color, s=12, alpha=0.7,
                             label=label if place == 0 else None)  # fmt: skip
        axis.set_yscale("log")
        axis.set_xticks([p + 0.1 for p in range(len(STAGES))], [f"{s} %" for s in STAGES])
        axis.axhline(_shared.HIT, color="gray", linestyle="--", linewidth=1)
        axis.set_xlabel("share of training done")
        axis.set_ylabel("mean squared error")
        axis.legend()

    return draw
