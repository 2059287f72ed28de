"""The atlas: what leaks, and what does not, by model, batch size, local steps and filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradleak as gl
from gradleak.audit.scores import score
from gradleak.bounds import upper_bound
from gradleak.errors import GradleakError
from gradleak.papers.experiment import Figure, Lab, Measured, Result, Row, share

from ._models import MODELS  # noqa: TID252 - experiments share files beside them

NAME = "leakage"
NEEDS = (
    "adult.npz",
    "adult.json",
    "cifar10.npz",
    "cifar100.npz",
    "mnist.npz",
    "cola.csv",
    "bert_base_uncased_vocab.txt",
)
VERSION = 1
LR = 0.05
"""Step size of the client's SGD."""
NORM = 0.1
"""Norm to which an update is clipped before noise is added."""
PRIOR = 0.01
"""Probability of success without the update, of which the bound is stated."""
FILTERS = ("none", "percentile", "noise 0.1", "noise 1")
"""Nothing; NVFlare's PercentilePrivacy as it ships; clipping, and noise of so many times the norm."""


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    filters: tuple[str, ...]
    trials: int
    budget: float


SMOKE = Config(("logistic regression", "Adult MLP"), (1,), (1,), ("none", "noise 1"), 1, 5)
DEFAULT = Config(tuple(MODELS), (1, 8), (1, 4), FILTERS, 1, 10)
FULL = Config(tuple(MODELS), (1, 2, 4, 8, 16, 32), (1, 4), FILTERS, 20, 300)


def _defense(name: str) -> gl.defenses.UpdateDefense | None:
    if name == "none":
        return None
    if name == "percentile":
        return gl.defenses.percentile_privacy()
    noise = gl.defenses.gaussian_noise(float(name.split()[1]) * NORM)
    return gl.defenses.compose(gl.defenses.clip(NORM), noise)


def attack(
    lab: Lab, *, model: str, size: int, steps: int, filtered: str, trial: int, budget: float
) -> Mapping[str, Any]:
    """Attack one update by an attacker who knows of the filter, and count what came back."""
    network, batch, space, loss = MODELS[model](lab, size, trial)
    defense = _defense(filtered)
    plain = gl.FedAvg(lr=LR, steps=steps, loss=loss)
    training = plain if defense is None else defense.wrap(plain)
    bound = upper_bound(
        training,
        examples=size,
        prior=PRIOR,
        coordinates=sum(p.numel() for p in network.parameters() if p.requires_grad),
    )
    answer: dict[str, Any] = {"recovered": 0, "proved": 0, "of": size, "bound": bound.value, "epsilon": bound.epsilon}
    update = training(network, batch)
    knows = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE
    seen = gl.ThreatModel(knows).observe(network, update, space=space, training=training, batch_size=size)
    answer["predicted"] = str(gl.inspect(seen, seconds=0.5 * budget).prediction)
    try:
        found = gl.attacks.auto(budget=budget).reconstruct(seen, seed=trial)
    except GradleakError as refusal:
        return {**answer, "attack": "refused", "status": type(refusal).__name__, "reason": str(refusal)[:300]}
    proof = found.certificate
    proved = [] if proof is None else [v is gl.Verdict.PROVED for v in proof.examples or (proof.verdict,)]
    scores = score(found, gl.Batch(space.decode(batch.inputs), batch.labels), space)
    return {
        **answer,
        "recovered": scores.successes,
        "proved": sum(proved) if scores.successes else 0,
        "attack": found.attack,
        "status": str(found.status),
        "reason": "" if proof is None else proof.reason[:300],
    }


def run(config: Config, lab: Lab) -> Result:
    """Return one row for each model, batch size and number of steps: the share recovered under each filter."""
    rows: list[Row] = []
    table: dict[str, list[float]] = {}
    told: list[bool] = []
    for model in config.models:
        for size in config.sizes:
            for steps in config.steps:
                line = f"{model}, N = {size}, {steps} step{'s' if steps > 1 else ''}"
                for filtered in config.filters:
                    fixed = {"model": model, "size": size, "steps": steps, "filtered": filtered}
                    cases = [{**fixed, "trial": t, "budget": config.budget} for t in range(config.trials)]
                    measured = lab.measure(attack, cases)
                    told += map(_held, measured)
                    rows.append(_row(f"{line}, {filtered}", measured))
                    table.setdefault(line, []).append(_share(measured))
    rows.append(
        Row(
            "what inspect predicts comes true",
            share(told),
            note="exact: all recovered; nothing or matching only: not all",
        )
    )
    figure = Figure(
        "atlas",
        "Share of examples recovered; the attacker knows the model, the filter and the batch size.",
        _draw(table, config.filters),
        (8.0, 1.2 + 0.24 * len(table)),
    )
    updates = "one update" if config.trials == 1 else f"{config.trials} updates"
    most = f"{updates} a cell and {config.budget:g} s each, so that a 0 says little; weights as initialized"
    return Result(rows, [figure], scaled="" if config == FULL else most)


def _held(record: Measured) -> bool:
    """Tell whether what was predicted came true: whole batches where exact, none of them whole otherwise."""
    whole = record["recovered"] == record["of"]
    return whole if record["predicted"] == "exact" else not whole


def _share(measured: Sequence[Measured]) -> float:
    return sum(r["recovered"] for r in measured) / sum(r["of"] for r in measured)


def _row(name: str, measured: Sequence[Measured]) -> Row:
    hits = [k < r["recovered"] for r in measured for k in range(r["of"])]
    proved = sum(r["proved"] for r in measured)
    bound = measured[0]["bound"]
    attacks = sorted({str(r["attack"]) for r in measured})
    note = f"proved: {proved} of {len(hits)}; by {', '.join(attacks)}; "
    note += "no bound exists" if bound is None else f"no attacker above {bound:.3g} (from {PRIOR:g} without the update)"
    seconds = sum(r.seconds for r in measured) / len(measured)
    return Row(name, share(hits), cost=f"{seconds:.0f} s an update", note=note)


def _draw(table: Mapping[str, Sequence[float]], filters: Sequence[str]) -> Any:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        values = list(table.values())
        axis.imshow(values, vmin=0, vmax=1, cmap="Reds", aspect="auto")
        axis.set_xticks(range(len(filters)), filters)
        axis.set_yticks(range(len(table)), list(table))
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black")
        figure.set_layout_engine("constrained")

    return draw
