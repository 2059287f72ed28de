"""Is the certificate ever wrong? Random small clients, honest and distorted updates, good and bad reconstructions.

A trial draws a model, a batch, a client and what an attacker came up with; the certificate sees the update and the
reconstruction only. In a "hidden batch" the attacker takes several examples for one; a "captured delta" is the
difference of two rounded models; "limited inputs" pass a clamp, a rectifier or an absolute value before the first
layer. It is *wrong* where it says "proved" of an example whose true error (best permutation) exceeds the bound the
certificate states. Calling an exact answer to a clean update "unproved" is counted by itself.

Run: ``python benchmarks/certificate.py [--trials 1000] [--first 0]``
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak import defenses
from gradleak.attacks import auto, gauss_newton
from gradleak.errors import NotApplicable
from gradleak.proof.certify import certify
from gradleak.proof.explained import Explanation
from gradleak.spaces import TensorSpace
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.training import CrossEntropy, FedAvg, FedSGD, LocalTraining, Simulator, Tensors
from gradleak.types import Batch, Reconstruction, Update, Verdict

SCENARIOS = (
    "clean",
    "near duplicates",
    "exact duplicates",
    "saturated",
    "dead units",
    "wrong reduction",
    "wrong steps",
    "noised",
    "pruned",
    "wrong labels",
    "rounded to 16 bits",
    "known noise",
    "known rounding",
    "known pruning",
    "unknown training",
    "hidden batch",
    "captured delta",
    "limited inputs",
    "unstated size",
    "zero weights",
    "tiny weights",
    "one-unit bottleneck",
    "scaled tensors",
    "one class in bfloat16",
    "noise above the update",
    "two clients averaged",
    "sure of a wrong class",
    "even in the input",
    "alike, unstated size",
)
CLEAN = (
    "clean",
    "near duplicates",
    "exact duplicates",
    "saturated",
    "dead units",
    "unknown training",
    "captured delta",
)
CANDIDATES = ("truth", "near", "fitted", "fitted", "random start", "auto", "auto, a batch")


@dataclass(frozen=True)
class Trial:
    """What was drawn and what came out.

    ``error`` and ``bound`` belong to the example closest to breaking its bound (or, with nothing proved, the worst).
    """

    seed: int
    scenario: str
    candidate: str
    model: str
    dtype: str
    examples: int
    verdict: str
    proved: int
    error: float
    bound: float
    wrong: bool
    exact: bool
    reason: str


class _Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def one(self, items: tuple[Any, ...]) -> Any:
        return items[int(torch.randint(len(items), (), generator=self.generator))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def ints(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator)


class _Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


HIDDEN = (
    "hidden batch",
    "unstated size",
    "zero weights",
    "tiny weights",
    "one-unit bottleneck",
    "one class in bfloat16",
    "sure of a wrong class",
    "alike, unstated size",
)
"""Scenarios in which several examples may be taken for one."""
ONE_CLASS = ("zero weights", "tiny weights", "one class in bfloat16", "sure of a wrong class")


def _model(draw: _Draw, scenario: str) -> tuple[str, nn.Module, tuple[int, ...], int]:
    shape: tuple[int, ...]
    kind = "relu" if scenario == "dead units" else draw.one(("sigmoid", "tanh", "softplus", "relu"))
    act = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus, "relu": nn.ReLU}[kind]
    classes = draw.one((2, 3, 5, 10))
    family = draw.uniform(0, 1)
    if family < 0.1:
        inputs = draw.one((6, 12, 30))
        model, shape, name = nn.Sequential(nn.Linear(inputs, classes)), (inputs,), f"linear {inputs}-{classes}"
    elif family < 0.5:
        width, inputs = draw.one((8, 16, 32)), draw.one((6, 12))
        bias = draw.uniform(0, 1) < 0.8
        layers = [nn.Linear(inputs, width, bias), act(), nn.Linear(width, width, bias), act()]
        model = nn.Sequential(*layers, nn.Linear(width, classes))
        shape = (inputs,)
        name = f"mlp {inputs}-{width}-{width}-{classes} {kind}{'' if bias else ' without bias'}"
    elif family < 0.75:
        # Pooling stops the recursion, so that all layers are solved together.
        width = draw.one((2, 4))
        layers = [nn.Conv2d(1, width, 3, padding=1), act(), nn.AvgPool2d(2), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(4 * width, 8), act(), nn.Linear(8, classes))
        shape, name = (1, 4, 4), f"conv {width} pooled {kind}"
    else:
        width = draw.one((2, 4))
        layers = [nn.Conv2d(1, width, 3, padding=1, stride=2), act(), nn.Conv2d(width, width, 3, padding=1), act()]
        model, shape = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes)), (1, 4, 4)
        name = f"conv {width} {kind}"
    if scenario == "one-unit bottleneck":
        inputs, width = draw.one((6, 12)), draw.one((8, 16))
        layers = [nn.Linear(inputs, width), act(), nn.Linear(width, 1), nn.Tanh(), nn.Linear(1, classes)]
        model, shape, name = nn.Sequential(*layers), (inputs,), f"mlp {inputs}-{width}-1-{classes} {kind}"
    gain = draw.uniform(5, 40) if scenario == "saturated" else draw.uniform(0.5, 2)
    gain = {"zero weights": 0.0, "tiny weights": 10 ** draw.uniform(-9, -2)}.get(scenario, gain)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(gain * draw.normal(*p.shape) / math.sqrt(p[0].numel() if p.ndim > 1 else 4))
        if scenario == "dead units":
            for layer in model:
                if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None and layer is not model[-1]:
                    layer.bias -= draw.uniform(0, 6) * (draw.normal(*layer.bias.shape) > 0)
        if scenario == "sure of a wrong class" and model[-1].bias is not None:
            model[-1].bias[0] += 10 ** draw.uniform(1, 2)
    if scenario == "even in the input":
        model, name = nn.Sequential(_Square(), *model), f"square before {name}"
    if scenario == "limited inputs":
        limit = draw.one((nn.Hardtanh, nn.ReLU, nn.Tanh, _Absolute))()
        model, name = nn.Sequential(limit, *model), f"{type(limit).__name__} before {name}"
    return name, model, shape, classes


def _inputs(draw: _Draw, scenario: str, count: int, shape: tuple[int, ...]) -> Tensor:
    x = draw.normal(count, *shape)
    if scenario in ("near duplicates", "alike, unstated size"):
        x[1:] = x[:1] + 10 ** draw.uniform(-9, -1) * draw.normal(count - 1, *shape)
    if scenario == "exact duplicates":
        x[1] = x[0]
    return 3 * x if scenario == "limited inputs" else x


def _client(draw: _Draw, scenario: str) -> LocalTraining:
    loss = CrossEntropy(draw.one(("mean", "sum")), draw.one((0.0, 0.0, 0.1)))
    if scenario not in ("wrong steps", "captured delta") and (
        scenario == "unknown training" or draw.uniform(0, 1) < 0.7
    ):
        return FedSGD(CrossEntropy() if scenario == "unknown training" else loss)
    return FedAvg(lr=10 ** draw.uniform(-2, -0.5), steps=draw.one((1, 2, 3)), loss=loss)


def _believed(draw: _Draw, scenario: str, training: LocalTraining) -> LocalTraining:
    """Return the training as the attacker believes it to be."""
    if scenario == "wrong reduction":
        other = "sum" if training.loss.reduction == "mean" else "mean"  # type: ignore[attr-defined]
        return replace(training, loss=replace(training.loss, reduction=other))  # type: ignore[type-var]
    if scenario == "wrong steps" and isinstance(training, FedAvg):
        return replace(training, steps=(training.steps or 1) + draw.one((1, 2)))
    return training


def _captured(model: nn.Module, update: Update) -> Update:
    """Return a weight delta as it is captured: the difference of two rounded models."""
    before = {k: p.detach() for k, p in model.named_parameters()}
    return Update({k: (before[k] + d) - before[k] for k, d in update.tensors.items()}, kind=update.kind)


def _defended(draw: _Draw, scenario: str, training: LocalTraining, clean: Update, seed: int) -> LocalTraining:
    size = math.sqrt(float(torch.cat([t.flatten() for t in clean.tensors.values()]).double().square().mean()))
    if scenario in ("noised", "known noise"):
        return defenses.gaussian_noise(10 ** draw.uniform(-9, -1) * size).wrap(training, seed=seed)
    if scenario == "noise above the update":
        return defenses.gaussian_noise(10 ** draw.uniform(-1, 1) * size).wrap(training, seed=seed)
    if scenario in ("pruned", "known pruning"):
        return defenses.prune(10 ** draw.uniform(-2.5, -0.1)).wrap(training)
    if scenario in ("rounded to 16 bits", "known rounding"):
        return draw.one((defenses.half_precision, defenses.bfloat16))().wrap(training)
    return training


def _fit(observation: Observation, start: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return what an attacker gets from ``start``: Gauss–Newton where the model is smooth, else ``start``."""
    try:
        found = Reconstruction(start, labels, math.inf)
        return gauss_newton(iterations=12).polish(observation, found, seed=seed).inputs.detach()
    except NotApplicable:
        return start


def _excess(simulator: Simulator, update: Tensors, inputs: Tensor, labels: Tensor, seed: int) -> float:
    """Return by how many deviations of its noise the update differs from that of ``inputs``, root mean square."""
    fit = Explanation(simulator, update, inputs, labels, seed=seed).fit()
    return math.inf if fit is None else fit.excess


def _errors(found: Tensor, truth: Tensor) -> list[float]:
    """Return root mean square errors per example under the permutation with the least total."""
    distance = (found[:, None] - truth[None]).flatten(2).square().mean(-1).sqrt()
    count = len(truth)
    if len(found) < count:  # One example is said to be all; it should be one of those that there are.
        return [float(row.min()) for row in distance]
    best = min(itertools.permutations(range(count)), key=lambda p: max(float(distance[i, p[i]]) for i in range(count)))
    return [float(distance[i, best[i]]) for i in range(count)]


def trial(seed: int) -> Trial:
    """Run one trial; equal seeds give equal trials."""
    draw = _Draw(seed)
    scenario = SCENARIOS[seed % len(SCENARIOS)]
    candidate = draw.one(CANDIDATES)
    count = draw.one((1, 2, 3))
    if scenario in ("near duplicates", "exact duplicates"):
        count = max(count, 2)
        candidate = "fitted" if candidate == "auto" else candidate
    if candidate.startswith("auto"):
        count = 1 if candidate == "auto" else max(count, 2)
    name, model, shape, classes = _model(draw, scenario)
    dtype = draw.one((torch.float32, torch.float32, torch.float64))
    hidden = count
    if scenario in HIDDEN:
        hidden = draw.one((2, 3, 8)) if scenario == "hidden batch" else draw.one((1, 2, 3, 8))
        count = 1
        candidate = draw.one((candidate, "mean", "auto"))
    model, x = model.to(dtype), _inputs(draw, scenario, hidden, shape).to(dtype)
    y = draw.ints(classes, hidden)
    if scenario in ONE_CLASS:
        y[:] = y[0] if scenario != "sure of a wrong class" else classes - 1
    if scenario == "alike, unstated size" and draw.uniform(0, 1) < 0.7:
        y[:] = y[0]
    if "duplicates" in scenario and draw.uniform(0, 1) < 0.7:
        y[1] = y[0]
    training = _client(draw, scenario)
    defended = _defended(draw, scenario, training, training(model, Batch(x, y)), seed)
    update = defended(model, Batch(x, y))
    if scenario == "captured delta":
        update = _captured(model, update)
    elif scenario == "scaled tensors":
        update = replace(update, tensors={k: draw.uniform(0.2, 2) * t for k, t in update.tensors.items()})
    elif scenario == "one class in bfloat16":
        update = replace(update, tensors={k: t.bfloat16().to(t.dtype) for k, t in update.tensors.items()})
    elif scenario == "two clients averaged":
        others = training(model, Batch(_inputs(draw, scenario, count, shape).to(dtype), draw.ints(classes, count)))
        update = replace(update, tensors={k: (t + others.tensors[k]) / 2 for k, t in update.tensors.items()})
    if not any(bool(t.any()) for t in update.tensors.values()):
        # Refused before any attack.
        kind, why = str(dtype).removeprefix("torch."), "The update is zero or not finite."
        return Trial(seed, scenario, candidate, name, kind, count, "unproved", 0, 0.0, math.nan, False, False, why)
    aware = defended if scenario.startswith(("known", "noise above")) else training
    stated = "unstated size" not in scenario
    belief = _believed(draw, scenario, aware).known()
    labels = y[:count].clone()
    if scenario == "wrong labels":
        labels[0] = (labels[0] + 1 + int(draw.ints(classes - 1, 1))) % classes
    observation = ThreatModel(Knowledge.BATCH_SIZE | Knowledge.TRAINING | Knowledge.LABELS | Knowledge.DEFENSE).observe(
        model,
        update,
        space=TensorSpace(shape),
        training=belief,
        batch_size=count,
        labels=labels,
        batch_size_stated=stated,
    )
    truth = x.double()
    start = truth[:count].clone()
    if candidate == "mean":
        start = truth.mean(0, keepdim=True)
    if candidate in ("near", "fitted"):
        start = start + 10 ** draw.uniform(-9 if candidate == "near" else -4, -0.5) * draw.normal(count, *shape)
    if candidate == "random start":
        start = 0.3 * draw.normal(count, *shape)
    fitted = candidate in ("fitted", "random start", "mean")
    found = _fit(observation, start, labels, seed) if fitted else start
    known = None if scenario == "unknown training" else belief
    simulator = Simulator(model, known)
    if candidate.startswith("auto"):
        result = auto(iterations=1, polish=False).reconstruct(observation, seed=seed)
        assert result.certificate is not None
        certificate, found = result.certificate, result.inputs.double()
    else:
        certificate = certify(simulator, update.tensors, found, labels, stated=stated, granted=True, seed=seed)
    errors = _errors(found.double(), truth)
    if scenario == "even in the input":  # The model cannot tell the signs, and a proof is local.
        errors = _errors(found.double().abs(), truth.abs())
    proved = [i for i, v in enumerate(certificate.examples) if v is Verdict.PROVED]
    bound = math.nan if certificate.bound is None else certificate.bound
    # The permutation of examples with nearly equal errors is the only freedom; bounds are compared in order.
    place = max(proved or range(len(errors)), key=errors.__getitem__)
    # As good an answer as the truth: equal up to rounding, or explaining the update no worse.
    own, theirs = (_excess(simulator, update.tensors, x, labels, seed) for x in (found, truth[:count]))
    tight = 4 * torch.finfo(dtype).eps * float(truth.square().mean().sqrt())
    return Trial(
        seed=seed,
        scenario=scenario,
        candidate=candidate,
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        examples=count,
        verdict=certificate.verdict,
        proved=len(proved),
        error=errors[place],
        bound=bound,
        wrong=bool(proved) and not errors[place] <= bound,
        exact=max(errors) <= tight or (candidate == "fitted" and own <= theirs),
        reason=certificate.reason,
    )


def summary(trials: list[Trial]) -> dict[str, Any]:
    """Return counts of verdicts by scenario, wrong proofs, and exact answers to clean updates called unproved."""
    table: dict[str, collections.Counter[str]] = {s: collections.Counter() for s in SCENARIOS}
    for t in trials:
        table[t.scenario].update([t.verdict, *["wrong"] * t.wrong])
    clean = [t for t in trials if t.scenario in CLEAN and t.exact]
    missed = [t for t in clean if t.verdict == "unproved" and "is zero or not finite" not in t.reason]
    used = sorted(t.error / max(t.bound, 1e-300) for t in trials if t.proved)
    return {
        "trials": len(trials),
        "wrong": sum(t.wrong for t in trials),
        "proofs": sum(t.proved > 0 for t in trials),
        "exact_answers_to_clean_updates": len(clean),
        "of_these_unproved": len(missed),
        "of_these_proved": sum(t.verdict == "proved" for t in clean),
        "largest_share_of_bound_used": used[-1] if used else math.nan,
        "median_share_of_bound_used": used[len(used) // 2] if used else math.nan,
        "verdicts": {s: dict(c) for s, c in table.items()},
        "wrong_trials": [asdict(t) for t in trials if t.wrong],
        "missed_trials": [asdict(t) for t in missed][:20],
    }


def main() -> None:
    """Run the trials, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first trial")
    options = parser.parse_args()
    from _common import write_result

    begin = time.perf_counter()
    trials = [trial(seed) for seed in range(options.first, options.first + options.trials)]
    found = {**summary(trials), "first": options.first, "seconds": time.perf_counter() - begin}
    rows = [
        {"scenario": s, **{v: c.get(v, 0) for v in ("proved", "matched", "unproved")}, "wrong": c.get("wrong", 0)}
        for s, c in found.pop("verdicts").items()
    ]
    write_result("certificate", rows, target="no wrong proof in 5,000 trials", **found)
    for key, value in found.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
