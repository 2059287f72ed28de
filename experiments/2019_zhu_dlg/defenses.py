"""Defenses: what noise, rounding, pruning, clipping and signs cost in accuracy, and what they keep private (Table 3).

The paper's attacker does not know of the defense. Ours does: the noise level, the rounding cells, what pruning says
about the numbers that were not sent. It cleans the head's gradient, which is an outer product whatever was added to
it, solves the network backward (least squares on the update), and, where that leaves more than one percent of the
gradient unexplained, matches under the known defense with the prior weight that the noise level implies; among its
candidates it takes the more probable one. The truth is not consulted, and nothing was tuned on test images.

A defense holds ("defended") against an attacker who recovers, at PSNR 20 dB, fewer than half of the images that the
same attacker recovers without any defense: the published algorithm fails on many images even then, and that is no
merit of a defense. 20 dB is an error of a tenth of the pixel range, at which a person recognizes the picture; the
strict threshold, MSE 1e-4, is beside it.
Every model whose accuracy is given was trained under its defense: each minibatch is a client's defended update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gradleak as gl
from gradleak.attacks.matching import LBFGS, GradientMatching, SquaredError, TotalVariation
from gradleak.errors import InvalidUpdate, NotApplicable
from gradleak.papers.experiment import Estimate, Figure, Lab, Measured, Result, Row, median, share
from gradleak.training import Adam

from . import _cohort, _shared  # noqa: TID252
from ._published import published  # noqa: TID252

NAME = "defenses"
NEEDS = ("cifar100.npz",)
VERSION = 1

VISIBLE = 1e-2  # mean squared error of a PSNR of 20 dB
STRICT = 1e-4
UNEXPLAINED = 1e-4  # relative squared residual: one percent of the gradient
EDGE = 0.056  # mean absolute difference of neighboring pixels in the CIFAR-100 training images
FLOOR = 1e-3  # least prior weight, for what pruning and signs leave open; chosen on two training images

# Name in the tables → kind of defense and its strength.
GRID: dict[str, tuple[str, float]] = {
    "none": ("none", 0.0),
    **{f"Gaussian 1e-{k}": ("gaussian", 10.0**-k) for k in (4, 3, 2, 1)},
    **{f"Laplacian 1e-{k}": ("laplacian", 10.0**-k) for k in (4, 3, 2, 1)},
    "FP-16": ("half", 0.0),
    "bfloat16": ("bfloat16", 0.0),
    "8 bit": ("int8", 0.0),
    **{f"pruning {p} %": ("prune", p / 100) for p in range(10, 100, 10)},
    "clipping to norm 1": ("clip", 1.0),
    "sign": ("sign", 0.0),
}

# Table 3, and the pruning ratios of the paper's Section 5.2 ("defended" above a fifth).
PAPER: dict[str, tuple[str, bool | None]] = {
    "none": ("76.3 %", False),
    "Gaussian 1e-4": ("75.6 %", False),
    "Gaussian 1e-3": ("73.3 %", False),
    "Gaussian 1e-2": ("45.3 %", True),
    "Gaussian 1e-1": ("≤ 1 %", True),
    "Laplacian 1e-4": ("75.6 %", False),
    "Laplacian 1e-3": ("73.4 %", False),
    "Laplacian 1e-2": ("46.2 %", True),
    "Laplacian 1e-1": ("≤ 1 %", True),
    "FP-16": ("76.1 %", False),
    "8 bit": ("53.7 %", True),
    "pruning 10 %": ("", False),
    "pruning 20 %": ("", False),
    **{f"pruning {p} %": ("", True) for p in range(30, 100, 10)},
}


@dataclass(frozen=True)
class Config:
    """Scale: test images per attacker, and the budgets."""

    names: tuple[str, ...]
    images: int
    matching: int
    outer: int
    train: int
    epochs: int


SMOKE = Config(("none", "Gaussian 1e-3", "8 bit"), 1, 20, 3, 640, 1)
DEFAULT = Config(tuple(n for n in GRID if n not in {f"pruning {p} %" for p in (20, 40, 60, 80)}), 3, 400, 120, 5000, 10)
FULL = Config(tuple(GRID), 100, 3000, 300, 5000, 40)


def defense(name: str) -> gl.defenses.Defense | None:
    """Return the defense of that name, None for none."""
    kind, strength = GRID[name]
    make: dict[str, Any] = {
        "none": lambda: None,
        "gaussian": lambda: gl.defenses.gaussian_noise(strength),
        "laplacian": lambda: gl.defenses.laplacian_noise(strength),
        "half": gl.defenses.half_precision,
        "bfloat16": gl.defenses.bfloat16,
        "int8": gl.defenses.int8,
        "prune": lambda: gl.defenses.prune(strength),
        "clip": lambda: gl.defenses.clip(strength),
        "sign": gl.defenses.sign,
    }
    chosen: gl.defenses.Defense | None = make[kind]()
    return chosen


def client(name: str, seed: int = 0) -> gl.LocalTraining:
    """Return one gradient under the defense of that name; ``seed`` draws the client's noise."""
    chosen = defense(name)
    return gl.FedSGD() if chosen is None else chosen.wrap(gl.FedSGD(), seed=seed)


def rms(tensors: Mapping[str, Tensor]) -> float:
    """Return the root mean square over all coordinates together."""
    return float(torch.cat([t.flatten() for t in tensors.values()]).square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------- accuracy


def trained(lab: Lab, *, name: str, train: int, epochs: int) -> Mapping[str, Any]:
    """Train the paper's LeNet under one defense; accuracy on held-out images, and the size of its gradients."""
    x, y = (t[:train] for t in lab.images("cifar100", "train"))
    test, labels = lab.images("cifar100", "test")
    x, test, model = x.float(), test.float(), gl.models.lenet(seed=0)
    try:
        model = _cohort.fit(model, x, y, client(name), epochs=epochs, batch_size=64, optimizer=Adam(lr=3e-3), seed=1)
    except InvalidUpdate:  # the defense destroyed training: what is left is the model before it
        return {"accuracy": 0.0, "right": 0, "n": len(test), "one": math.nan, "batch": math.nan, "diverged": True}
    accuracy = _cohort.accuracy(model, test, labels)
    sizes = {k: rms(gl.FedSGD()(model, gl.Batch(x[:k], y[:k])).tensors) for k in (1, 64)}
    right = round(accuracy * len(test))
    return {
        "accuracy": accuracy,
        "right": right,
        "n": len(test),
        "one": sizes[1],
        "batch": sizes[64],
        "diverged": False,
    }


# -------------------------------------------------------------------------------------------------------- attacks


def victim(lab: Lab, name: str, image: int) -> tuple[gl.Batch, torch.nn.Module, gl.LocalTraining, gl.Update]:
    """Return a test image, the model with the paper's random weights, the defended client and what it sends."""
    x, y = lab.images("cifar100", "test")
    batch = gl.Batch(x[image : image + 1].float(), y[image : image + 1])
    model, training = gl.models.lenet(seed=0), client(name, seed=1000 + image)
    return batch, model, training, training(model, batch)


def unaware(lab: Lab, *, name: str, image: int, outer: int) -> Mapping[str, Any]:
    """Let the published algorithm match one defended gradient as if it were none."""
    batch, model, _, update = victim(lab, name, image)
    start = time.perf_counter()
    found = published(model, update.tensors, (3, 32, 32), 100, seed=image, outer=outer)
    seconds = time.perf_counter() - start
    return _scored(found.inputs, batch) | {"evaluations": found.evaluations, "status": found.status, "time": seconds}


def aware(lab: Lab, *, name: str, image: int, iterations: int) -> Mapping[str, Any]:
    """Let the attacker who knows the defense try the recursion, then matching, and take the more probable result."""
    batch, model, training, update = victim(lab, name, image)
    knows = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE
    start = time.perf_counter()

    def observe(seen: gl.Update) -> gl.Observation:
        space = gl.ImageSpace((3, 32, 32))
        return gl.ThreatModel(knows=knows).observe(model, seen, space=space, training=training, batch_size=1)

    plain, noise = observe(update), noise_share(name, update)
    weight = max(prior_weight(noise, update), FLOOR)
    candidates: list[gl.Reconstruction] = []
    try:
        candidates.append(gl.attacks.recursion().reconstruct(observe(outer_product_head(update)), seed=image))
        exact, word = candidates[0].inputs, candidates[0].status
    except NotApplicable:
        exact, word = torch.full_like(batch.inputs, math.nan), "not applicable"
    evaluations = 0
    if not candidates or candidates[0].objective > UNEXPLAINED:
        attack = GradientMatching(
            SquaredError(), LBFGS(iterations=iterations), (TotalVariation(weight),), labels="joint", trace=False
        )
        candidates.append(attack.reconstruct(plain, seed=image))
        evaluations = candidates[-1].evaluations
    costs = [_cost(plain, c, weight) for c in candidates]
    best = candidates[costs.index(min(costs))]
    alone = float(_shared.errors(exact, batch.inputs)[0])
    return _scored(best.inputs, batch) | {
        "evaluations": evaluations,
        "status": best.status,
        "recursion": alone if math.isfinite(alone) else None,
        "recursion_status": word,
        "chosen": "matching" if evaluations and best is candidates[-1] else "recursion",
        "noise": noise,
        "rms": rms(gl.FedSGD()(model, batch).tensors),
        "time": time.perf_counter() - start,
    }


def outer_product_head(update: gl.Update) -> gl.Update:
    """Return the update with the linear head's gradient replaced by the nearest outer product (Eckart and Young 1936).

    One example's gradient of weight and bias is g ⊗ (h, 1): all else in there is the defense's.
    """
    weight, bias = update.tensors["fc.0.weight"].double(), update.tensors["fc.0.bias"].double()
    left, size, right = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1), full_matrices=False)
    g, h = left[:, 0] * size[0] * right[0, -1], right[0, :-1] / right[0, -1]
    like = update.tensors["fc.0.weight"]
    return gl.Update(
        {**update.tensors, "fc.0.weight": torch.outer(g, h).to(like), "fc.0.bias": g.to(like)}, update.kind
    )


def noise_share(name: str, update: gl.Update) -> float:
    """Return the share of the update's squared norm that the known noise explains, in [0, 1]."""
    kind, strength = GRID[name]
    variance = {"gaussian": strength**2, "laplacian": 2 * strength**2}.get(kind, 0.0)
    return min(1.0, variance / max(rms(update.tensors) ** 2, 1e-30))


def prior_weight(noise: float, update: gl.Update) -> float:
    """Return the weight of total variation beside the relative squared distance that the noise level implies.

    −log posterior = ‖∇W′ − ∇W‖² / 2σ² + Σ|neighbor differences| / EDGE, times 2σ² / ‖∇W‖².
    """
    coordinates = sum(t.numel() for t in update.tensors.values())
    return 2 * noise / coordinates * 3 * 32 * 32 / EDGE


def _cost(observation: gl.Observation, found: gl.Reconstruction, weight: float) -> float:
    """Return what the defense leaves unexplained, relative, plus the prior: the attacker's own choice."""
    training, space = observation.training, observation.space
    assert training is not None
    if not bool(torch.isfinite(found.inputs).all()) or found.labels is None:
        return math.inf
    inputs = space.encode(found.inputs).float()
    labels = found.label_probabilities.float() if found.label_probabilities is not None else found.labels
    simulated = training.undefended.tensors(observation.model, observation.params, inputs, labels)
    residual = training.residual(simulated, observation.update.tensors)
    observed = sum(float(t.square().sum()) for t in observation.update.tensors.values())
    left = sum(float(t.detach().square().sum()) for t in residual.values())
    return left / observed + float(TotalVariation(weight)(inputs))


def _scored(inputs: Tensor, batch: gl.Batch) -> dict[str, Any]:
    scored = _shared.record(inputs, batch)
    error = float(scored["mse"][0])
    return {"mse": error if math.isfinite(error) else None, "image": scored["images"][0], "truth": scored["truth"][0]}


# ----------------------------------------------------------------------------------------------------------- table


def recovered(records: Sequence[Measured], threshold: float, value: str = "mse") -> Estimate:
    """Return the share of images within the threshold."""
    return share([r[value] is not None and r[value] <= threshold for r in records])


def run(config: Config, lab: Lab) -> Result:
    """Measure accuracy and leakage under every defense."""
    images = lab.sample(1200, config.images, seed=0)
    rows, lines, pictures, marks = [], [], [], []
    aware_of = {
        name: lab.measure(aware, [{"name": name, "image": i, "iterations": config.matching} for i in images])
        for name in config.names
    }
    models = {
        name: lab.measure(trained, [{"name": name, "train": config.train, "epochs": config.epochs}])[0]
        for name in config.names
    }
    unaware_of = {
        name: lab.measure(unaware, [{"name": name, "image": i, "outer": config.outer} for i in images])
        for name in config.names
    }
    bare: tuple[float, float] | None = None  # shares without a defense, the first of the names
    for name in config.names:
        model, ours, theirs = models[name], aware_of[name], unaware_of[name]
        said, mark = PAPER.get(name, ("", None))
        visible = recovered(ours, VISIBLE), recovered(theirs, VISIBLE)
        bare = bare or (visible[0].value, visible[1].value)
        holds = defended(visible[0].value, bare[0]), defended(visible[1].value, bare[1])
        sure = all(
            share_without == 0 or decided(under, share_without)
            for under, share_without in zip(visible, bare, strict=True)
        )
        verdict = fate(mark, *holds, n=visible[0].n, sure=sure)
        seconds = median([r["time"] for r in ours]).value
        alone = recovered(ours, VISIBLE, "recursion").value
        note = f"{verdict}. Recursion alone: {alone:.2f} of the images" if name != "none" else ""
        size, noise = median([r["rms"] for r in ours]).value, median([r["noise"] for r in ours]).value
        if GRID[name][0] in ("gaussian", "laplacian"):
            note += f". Gradient rms {size:.2g}; noise is {noise:.2g} of the sent energy"
        rows += [
            Row(f"PSNR 20 dB, {name}", *visible, cost=f"{seconds:.0f} s each", note=note),
            Row(f"MSE 1e-4, {name}", recovered(ours, STRICT), recovered(theirs, STRICT)),
            Row(
                f"accuracy, {name}",
                share([k < model["right"] for k in range(model["n"])]),
                note="Training diverged" if model["diverged"] else "",
            ),
        ]
        errors = [median([math.inf if r["mse"] is None else r["mse"] for r in side]).value for side in (ours, theirs)]
        lines.append(
            f"{name:<20}{said or '-':>8}{100 * model['accuracy']:>8.1f} %{_mark(mark):>8}{_mark(holds[1]):>11}"
            f"{_mark(holds[0]):>7}{errors[1]:>11.1e}{errors[0]:>10.1e}{model['one']:>10.1e}{model['batch']:>10.1e}"
            f"  {verdict}"
        )
        pictures.append((name, [r["image"] for r in theirs[:3]] + [r["image"] for r in ours[:3]]))
        marks.append((name, model["accuracy"], errors))
    before = f"{'':<20}{'accuracy':>18}{'defended':>26}{'median MSE':>21}{'trained gradient rms':>22}\n"
    head = (
        before + f"{'defense':<20}{'paper':>8}{'here':>10}{'paper':>8}{'published':>11}{'ours':>7}{'published':>11}"
        f"{'ours':>10}{'1 image':>10}{'64':>10}"
    )
    size = median([r["rms"] for r in ours]).value
    foot = (
        f"Gradient of one image at the random weights that are attacked: rms {size:.2g} per coordinate. "
        "yes: fewer than half of the images that the same attacker recovers at PSNR 20 dB without a defense."
    )
    return Result(
        rows=rows,
        figures=[
            Figure(
                "trade-off",
                "Accuracy of a model trained under each defense, and the error of the images recovered through it.",
                lambda figure: _trade_off(figure, marks),
            ),
            Figure(
                "images",
                "Random test images, none rejected. Left: the published algorithm; right: ours, on the same updates.",
                lambda figure: _shared.pictures(figure, pictures),
                (8.0, 0.9 * len(pictures)),
            ),
        ],
        texts={"Table 3, with pruning, clipping and signs": "\n".join([head, *lines, "", foot])},
        scaled=""
        if config is FULL
        else f"{config.images} instead of {FULL.images} images, up to {20 * config.outer} instead of "
        f"{20 * FULL.outer} evaluations of the published algorithm, {config.matching} instead of {FULL.matching} of "
        "our matching. LeNet on 5,000 CIFAR-100 images: accuracies compare with each other only, not with the paper's",
    )


def defended(share_under: float, share_without: float) -> bool | None:
    """Return whether a defense leaves less than half of the success; None where there was none to begin with."""
    return None if share_without == 0 else share_under < share_without / 2


def decided(under: Estimate, share_without: float) -> bool:
    """Return whether the interval around the share leaves no doubt about :func:`defended`."""
    return not under.low <= share_without / 2 <= under.high


def fate(paper: bool | None, ours: bool | None, theirs: bool | None, *, n: int, sure: bool) -> str:
    """Return in words what becomes of the paper's mark on ``n`` images; True means defended."""
    images = f"{n} image{'' if n == 1 else 's'}"
    return f"{_fate(paper, ours, theirs)} ({images}{'' if sure else ', too few to be sure'})"


def _fate(paper: bool | None, ours: bool | None, theirs: bool | None) -> str:
    if ours is None:
        return "Nothing follows: ours recovers nothing without a defense"
    if paper is None:
        return "Holds against ours" if ours else "Falls to ours" + (", not to the published" if theirs else "")
    if not paper:
        return "The paper's ✗ stands" if not ours else "The paper's ✗ was not reached here"
    if ours:
        return "The paper's ✓ stands"
    return "The paper's ✓ falls to the stronger attacker" + (", and to the published one" if theirs is False else "")


def _mark(defended: bool | None) -> str:
    return "-" if defended is None else "yes" if defended else "no"


def _trade_off(figure: Any, marks: Sequence[tuple[str, float, Sequence[float]]]) -> None:
    axis = figure.subplots()
    for j, (label, symbol) in enumerate((("ours, defense-aware", "o"), ("published, unaware", "x"))):
        points = [(100 * accuracy, _shared.psnr(errors[j])) for _, accuracy, errors in marks]
        axis.scatter(*zip(*points, strict=True), marker=symbol, label=label)
    for name, accuracy, errors in marks:
        axis.annotate(name, (100 * accuracy, _shared.psnr(errors[0])), fontsize=6)
    axis.axhline(20, color="gray", linewidth=0.8)
    axis.set_xlabel("accuracy of the model trained under the defense, %")
    axis.set_ylabel("PSNR of the median image, dB")
    axis.legend()
