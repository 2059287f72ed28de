from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from gradleak import metrics
from gradleak.audit.records import (
    Aggregate,
    AttackRun,
    Curves,
    Example,
    Lift,
    Match,
    Outcome,
    Pictures,
    Record,
    Subject,
    Success,
    Threat,
    Verdict,
)
from gradleak.audit.verdict import judge
from gradleak.report import picture
from gradleak.spaces import ImageSpace


@dataclass(frozen=True)
class Case:
    record: Record
    pictures: Pictures
    inputs: Any
    truth: Any
    snapshots: Any


def _photograph(side: int, shift: int) -> np.ndarray:
    """Return a smooth colorful picture, different for each shift, shape (3, side, side)."""
    y, x = np.mgrid[0:side, 0:side] / side
    channels = [np.sin(5 * x + shift) * np.cos(4 * y), np.cos(3 * x * y + shift), np.sin(6 * y - 2 * x + 2 * shift)]
    return 0.5 + 0.45 * np.stack(channels)


def _values(mse: float) -> dict[str, float | None]:
    return {"mse": mse, "psnr": float(-10 * np.log10(mse)), "ssim": 1 - mse * 8}


def make_case(n: int = 1, *, truth: bool = True, frames: int = 24, side: int = 32) -> Case:
    """Return a realistic record of a reconstruction that went well on the first examples, badly on the last."""
    rng = np.random.default_rng(0)
    private = np.stack([_photograph(side, i) for i in range(n)])
    start = rng.normal(0.5, 0.25, private.shape)
    share = np.linspace(0, 1, frames) ** 0.5
    ends = np.array([1 - 1e-4 if i == 0 else 1 - 0.12 * i for i in range(n)]).reshape(n, 1, 1, 1)
    snapshots = np.stack([np.clip(start + s * ends * (private - start), 0, 1) for s in share])
    inputs = snapshots[-1]
    errors = ((snapshots - private) ** 2).mean(axis=(2, 3, 4))
    iterations = tuple(int(1.35**k) if k else 0 for k in range(frames))
    layers = {
        f"body.{i}.{kind}": tuple(float(v * 10.0**-i) for v in errors.mean(1))
        for i in (0, 2, 4)
        for kind in ("weight", "bias")
    }
    layers |= {f"fc.0.{kind}": tuple(float(v * 30) for v in errors.mean(1)) for kind in ("weight", "bias")}
    examples = tuple(
        sorted(
            (
                Example(
                    i,
                    i,
                    10 + i,
                    10 + i if i != 2 else 99,
                    _values(float(errors[-1, i])),
                    bool(errors[-1, i] <= 1e-3),
                    *ImageSpace().closeness(_values(float(errors[-1, i]))),
                )
                for i in range(n)
            ),
            key=lambda e: -(e.values["mse"] or 0.0),
        )
    )
    aggregates = tuple(
        Aggregate(
            name,
            unit,
            n,
            float(np.mean(v)),
            float(np.std(v, ddof=1)) if n > 1 else None,
            min(v),
            float(np.median(v)),
            max(v),
            meaning,
        )
        for name, unit, meaning, v in (
            ("mse", "", metrics.mse.meaning, [e.values["mse"] or 0.0 for e in examples]),
            ("psnr", "dB", metrics.psnr.meaning, [e.values["psnr"] or 0.0 for e in examples]),
            ("ssim", "", metrics.ssim.meaning, [e.values["ssim"] or 0.0 for e in examples]),
        )
    )
    subject = Subject(
        "lenet (classes=100, width=12)",
        "gradleak.models.lenets.LeNet",
        90_812,
        8,
        "image",
        (3, side, side),
        100,
        n,
        "gradient",
        "float32",
        "one gradient of the mean cross-entropy over the whole batch (FedSGD)",
        noun="image",
        nouns="images",
        display="pictures",
        quoted=("mse", "psnr", "ssim"),
    )
    outcome = Outcome(
        "converged",
        3.2e-14,
        iterations[-1],
        iterations[-1] + 40,
        12.4,
        tuple(10 + i for i in range(n)),
        ("The dummy label was optimized together with the image.",),
    )
    lifts = (
        Lift("mid-gray image", 11.2, aggregates[1].mean - 11.2),
        Lift("best of 100 public images", 13.0, aggregates[1].mean - 13.0),
    )
    match = Match(2.1e-7, 1.2e-7)
    record = Record(
        subject=subject,
        threat=Threat(("BATCH_SIZE", "TRAINING"), ("LABELS", "DEFENSE", "PUBLIC_DATA")),
        attack=AttackRun(
            "dlg", {"solver": "lbfgs", "iterations": 3000, "restarts": 1, "init_std": 0.1, "tolerance": 1e-13}, 0
        ),
        outcome=outcome,
        verdict=judge(subject, outcome, examples if truth else None, lifts if truth else (), match),
        match=match,
        examples=examples if truth else None,
        aggregates=aggregates if truth else (),
        lifts=lifts if truth else (),
        curves=Curves(
            iterations,
            tuple(float(v) ** 2 * 50 for v in errors.mean(1)),
            layers,
            tuple(float(v) for v in errors.mean(1)) if truth else (),
        ),
        success=Success(1e-3, 1, n, 0.2, 1.0, 1.0) if truth else None,
        command="gradleak attack --model lenet --weights weights.safetensors --update update.safetensors "
        "--input-shape 3,32,32 --classes 100 --batch-size 1 --attack dlg --truth private.npz --out audit",
        environment={"gradleak": "0.1.0", "Python": "3.11.7", "torch": "2.13.0", "machine": "Linux x86_64, 2 CPUs"},
        created="2026-11-21T03:00:00+00:00",
    )
    shown = private if truth else None
    return Case(record, picture(record, inputs, shown, snapshots), inputs, shown, snapshots)


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    return make_case


@pytest.fixture(scope="session")
def hostile() -> Case:
    """A record whose every string tries to break out of the page."""
    good = make_case(2)
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}"
    r = good.record
    record = replace(
        r,
        subject=replace(r.subject, model=evil, model_class=evil, dtype=evil, training=evil, normalization=evil),
        attack=replace(r.attack, name=evil, options={evil: evil}),
        outcome=replace(r.outcome, status=evil, notes=(evil,)),
        verdict=Verdict("leaked", evil, evil, (evil,), (evil,)),
        curves=replace(r.curves, layers={evil: r.curves.objectives}) if r.curves else None,
        lifts=(Lift(evil, 1.0, 1.0),),
        command=evil,
        environment={evil: evil},
        created=evil,
    )
    return replace(good, record=record)


def make_evidence(trials: int = 3, *, word: str = "ward", back: int = 1) -> dict[str, Any]:
    """Return evidence of one case with so many trials; ``back`` of them gave their example away."""
    got = {"count": back, "share": back / trials, "low": 0.01, "high": 0.9}
    row = {
        "case": word,
        "filters": [word],
        "stage": 2,
        "batch_size": 1,
        "attack": "auto",
        "nouns": "images",
        "error": "MSE",
        "batches": trials,
        "examples": trials,
        "recovered": got,
        "proved": got,
        "batches_hit": back,
        "proved_but_not_recovered": 0,
        "null": {"guess": word, "recovered": 0},
        "findings": {"labels": {"count": 1, "of": 2}},
        "ways": {},
        "out_of_time": 0,
        "refused": 0,
        "why_refused": "",
        "failed": 1,
    }
    spread = {"mean": 0.7, "low": 0.6, "high": 0.8, "trainings": 2}
    trial = {
        "id": "0" * 24,
        "kind": "attack",
        "case": word,
        "filters": [word],
        "stage": 0,
        "batch_size": 1,
        "attack": "auto",
        "seconds": 1.0,
        "status": "exact",
    }
    examples = [{"index": 0, "recovered": True, "proved": True, "error": 1e-9, "words": word}]
    return {
        "schema": "gradleak-evidence-1",
        "verdict": {
            "grade": "above",
            "headline": f"Above the target: {word}.",
            "reason": [word, word],
            "target": 0.05,
            "tolerance": 1e-3,
            "created": "2026-11-21T03:00:00+00:00",
            "failed_trials": 1,
            "not_tried": [word],
            "attacker": {"knows": [word], "does_not_know": []},
            "remedies": [
                {
                    "case": word,
                    "remedy": word,
                    "examples": 3,
                    "recovered": got,
                    "reached": True,
                    "sure": False,
                    "utility": spread,
                }
            ],
        },
        "lower_bound": [row, {**row, "batches": 0, "why_refused": word}],
        "upper_bound": [
            {
                "case": word,
                "filters": [word],
                "share": 0.3,
                "text": word,
                "epsilon": 4.0,
                "delta": 1e-5,
                "prior": 0.01,
                "prior_source": word,
            }
        ],
        "utility": [
            {
                "case": word,
                "filters": [word],
                "metric": word,
                "before": 0.1,
                "with": spread,
                "without": spread,
                "telling": False,
            }
        ],
        "trials": [{**trial, "seed": i, "examples": examples} for i in range(trials)]
        + [{**trial, "seed": 0, "error": word}],
        "plan": {
            "title": word,
            "file": word,
            "sha256": "0" * 64,
            "text": word,
            "command": word,
            "cases": [
                {
                    "name": word,
                    "model": word,
                    "parameters": 10,
                    "model_sha256": "0" * 64,
                    "inputs": word,
                    "data": word,
                    "data_sha256": "1" * 64,
                }
            ],
        },
        "versions": {"gradleak": "0.1.0"},
    }


@pytest.fixture(scope="session")
def evidence() -> Callable[..., dict[str, Any]]:
    return make_evidence
