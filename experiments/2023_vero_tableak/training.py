"""Rows of Adult from the gradients of 32, during training: cells that are right, and whole rows.

Fifty clients with 32 rows each train a perceptron (100-100-2, ReLU) by FedSGD with step size 0.5; all inputs are
standardized, one-hot groups too. Before rounds 1, 5, 10 and 15 (the paper counts a pass over the clients as an epoch) a
client's gradient is attacked. A cell is right if its category is the same, or its number within 0.319 standard
deviations; a row is exact if all its cells are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.matching import Adam, Coordinates, Cosine, GradientMatching
from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, mean, median
from gradleak.spaces import Category, Number, TableSpace

NAME = "training"
NEEDS = ("adult.npz", "adult.json")
VERSION = 1
ROUNDS = (1, 5, 10, 15)
CLIENTS, SIZE, STEP = 50, 32, 0.5
TOLERANCE = 0.319
"""In standard deviations of the column, as the paper has it."""


@dataclass(frozen=True)
class Config:
    clients: int
    members: int
    iterations: int


SMOKE = Config(1, 2, 20)
DEFAULT = Config(4, 30, 1500)
FULL = Config(50, 30, 1500)


class Standardized(nn.Module):
    """The paper's perceptron, which standardizes every input first."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.body = gl.models.perceptron(width=100, classes=2, in_channels=1, image_size=(1, len(mean)), seed=0)

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits (N, 2)."""
        logits: Tensor = self.body((rows - self.mean) / self.std)
        return logits


@dataclass(frozen=True, eq=False)
class Seen(Coordinates):
    """Rows as the paper's network sees them, every input standardized."""

    mean: Tensor
    std: Tensor

    def inputs(self, z: Tensor, space: gl.InputSpace) -> Tensor:
        """Return the rows before they are standardized."""
        return self.mean.to(z) + self.std.to(z) * z


def adult(lab: Lab) -> tuple[TableSpace, Tensor, Tensor]:
    """Return the table with the paper's tolerances, its training rows (M, 14) decoded, and their labels."""
    arrays = lab.arrays("adult.npz", ("x_train_num", "x_train_cat", "y_train"))
    told = json.loads(lab.text("adult.json"))
    numbers = arrays["x_train_num"].astype(np.float64)
    columns: list[Number | Category] = [
        Number(name, "", float(v.min()), float(v.max()), float(v.mean()), float(v.std()), 0, TOLERANCE * float(v.std()))
        for name, v in zip(told["numeric_columns"], numbers.T, strict=True)
    ]
    columns += [Category(n, tuple(told["categories"][n])) for n in told["categorical_columns"]]
    rows = torch.tensor(np.concatenate([numbers, arrays["x_train_cat"]], 1))
    return TableSpace(tuple(columns)), rows, torch.tensor(arrays["y_train"]).long()


def federation(lab: Lab, *, rounds: int) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return the weights before each attacked round, named ``round/parameter``, and the rows of every client."""
    space, rows, labels = adult(lab)
    inputs = space.encode(rows)
    std = inputs.std(0)
    model = Standardized(inputs.mean(0).float(), torch.where(std > 0, std, 1.0).float())
    own = torch.tensor(lab.sample(len(rows), CLIENTS * SIZE, seed=0))
    x, y = inputs[own].float(), labels[own]
    kept: dict[str, Tensor] = {"rows": own}
    for number in range(1, rounds + 1):
        if number in ROUNDS:
            kept |= {f"{number}/{k}": v.clone() for k, v in model.state_dict().items()}
        # Clients of equal size, one step each: the server's mean is one step on all rows.
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= STEP * g
    return kept, {"loss": float(loss.detach())}


def attack(lab: Lab, *, attacker: str, number: int, client: int, members: int, iterations: int) -> Mapping[str, Any]:
    """Reconstruct the rows of one client before one round."""
    space, rows, labels = adult(lab)
    kept, _ = lab.tensors(federation, rounds=ROUNDS[-1])
    prefix = f"{number}/"
    model = Standardized(kept[prefix + "mean"], kept[prefix + "std"])
    model.load_state_dict({k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)})
    own = kept["rows"][client * SIZE : (client + 1) * SIZE]
    sender = gl.Client(model, gl.Batch(space.encode(rows[own]).float(), labels[own]))
    knows = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.LABELS
    chosen: Any = gl.attacks.tableak(members=members, iterations=iterations)
    if attacker == "baseline":
        solver, seen = Adam(iterations=iterations, lr=0.06, signed=True), Seen(model.mean, model.std)
        chosen = GradientMatching(
            Cosine(), solver, init_std=0.58, dtype=None, coordinates=seen, backend="trace", trace=False
        )
    found = gl.simulate(sender, chosen, threat=gl.ThreatModel(knows), space=space, seed=client).reconstruction
    # The baseline's numbers may leave their range, where the paper clamps them.
    truth, guess = rows[own], space.decode(space.project(space.encode(found.inputs.double())))
    right = space.cells(guess[space.assign(guess, truth)], truth)
    # What the other clients' rows show: the commonest row, which needs no gradient.
    public = rows[torch.cat([kept["rows"][: client * SIZE], kept["rows"][(client + 1) * SIZE :]])]
    null = space.null_guesses(truth, public)[0].inputs
    sure = found.confidence
    return {
        "cells": float(right.double().mean()),
        "exact": float(right.all(1).double().mean()),
        "guessed": float(space.cells(null, truth).double().mean()),
        "columns": right.double().mean(0).tolist(),
        "sure": float("nan") if sure is None else float(right[sure >= 0.9].double().mean()),
    }


def run(config: Config, lab: Lab) -> Result:
    rows: list[Row] = []
    curves: list[tuple[float, float, float]] = []
    for number in ROUNDS:
        fixed = {"number": number, "iterations": config.iterations}

        def cases(attacker: str, members: int, fixed: Mapping[str, int] = fixed) -> list[dict[str, Any]]:
            return [{"attacker": attacker, "client": c, "members": members, **fixed} for c in range(config.clients)]

        ours = lab.measure(attack, cases("ours", config.members))
        published = lab.measure(attack, cases("baseline", 1))
        cells = [mean(_series(r, "cells")) for r in (ours, published)]
        exact = [mean(_series(r, "exact")) for r in (ours, published)]
        guessed = mean(_series(ours, "guessed")).value
        cost = f"{median([r.seconds for r in ours]).value:.0f} s a batch of {SIZE}"
        sure = [v for v in _series(ours, "sure") if v == v]
        note = f"{guessed:.1%} by the commonest row of the other clients, without the gradient"
        if sure:
            note += f"; of the cells that the ensemble is sure of, {mean(sure).value:.1%} are right"
        rows.append(Row(f"cells right, epoch {number}", cells[0], cells[1], cost=cost, note=note))
        rows.append(Row(f"rows exact, epoch {number}", exact[0], exact[1]))
        curves.append((cells[0].value, cells[1].value, guessed))
    figure = Figure("training", "Share of right cells during training.", _draw(curves))
    scaled = f"{config.clients} of {CLIENTS} clients attacked"
    return Result(rows, [figure], scaled="" if config == FULL else scaled)


def _series(records: list[Measured], key: str) -> list[float]:
    return [float(r[key]) for r in records]


def _draw(curves: list[tuple[float, float, float]]) -> Any:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        labels = ("tableak()", "published baseline", "commonest row")
        for k, label in enumerate(labels):
            axis.plot(ROUNDS, [c[k] for c in curves], marker="o", label=label)
        axis.set_xlabel("epoch")
        axis.set_ylabel("share of right cells")
        axis.set_ylim(0, 1)
        axis.legend()

    return draw
