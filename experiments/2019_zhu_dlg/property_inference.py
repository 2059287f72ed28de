"""Property inference: does an update tell that a face wears glasses, or looks Asian? (Table 2).

The shared model learns to tell men from women. Passive property inference (Melis et al. 2019, Section 4.3, "passive
property inference") computes updates of the same model on its own faces, with and without the property, and trains a
classifier on these gradients; DLG reconstructs the face and asks a classifier of faces. Both look at the same updates
of people whom neither has seen (View 1). The face classifier on the true images is the ceiling of the second way:
an exact reconstruction reaches it and nothing passes it.

Labels are machine labels of unknown people's looks, with errors: for measuring leakage only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import vmap

import gradleak as gl
from gradleak.papers.experiment import Estimate, Figure, Lab, Measured, Result, Row, median
from gradleak.training import Adam, gradient, parameters

from . import _cohort, _ours, _shared  # noqa: TID252
from ._published import published  # noqa: TID252

NAME = "property_inference"
NEEDS = ("lfw.npz", "lfw.json")
VERSION = 1

# Property → columns that say yes, and columns that say no: confident labels of both sides only.
PROPERTIES = {"Eyeglasses": (("Eyeglasses",), ("No Eyewear",)), "Asian": (("Asian",), ("White", "Black"))}
MEMBERS = 8  # size of the batches of the batch row; half of them have the property, or none
PENALTIES = tuple(10.0**k for k in (-3, -2, -1, 0))  # of the classifier on gradients, chosen by cross-validation


@dataclass(frozen=True)
class Config:
    """Scale: the attacker's own faces, test updates (ours and published), budgets."""

    own: int
    ours: int
    published: int
    batches: int
    outer: int
    epochs: int


SMOKE = Config(160, 4, 2, 20, 2, 2)
DEFAULT = Config(1500, 80, 16, 200, 60, 25)
FULL = Config(3000, 1000, 200, 1000, 300, 40)


# ---------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, eq=False)
class Faces:
    """Faces (M, 3, 32, 32) in [0, 1], gender (M,) as main task, and each property: 1, 0, or −1 where not certain."""

    x: Tensor
    gender: Tensor
    properties: Mapping[str, np.ndarray]

    def certain(self) -> np.ndarray:
        """Return the numbers of the faces all of whose properties are certain."""
        return np.flatnonzero(np.all([p >= 0 for p in self.properties.values()], axis=0))


def faces(lab: Lab, view: int) -> Faces:
    """Return the faces of View 1, 0 (DevTrain people) or 1 (DevTest people), whose gender is certain."""
    names = json.loads(lab.text("lfw.json"))["kumar_attributes"]
    stored = lab.arrays("lfw.npz", ["x", "kumar", "view1"])
    x, kumar, views = stored["x"], stored["kumar"], stored["view1"]

    def column(name: str) -> np.ndarray:
        values: np.ndarray = kumar[:, names.index(name)] == 1
        return values

    def two_sided(yes: Sequence[str], no: Sequence[str]) -> np.ndarray:
        y, n = (np.any([column(c) for c in side], axis=0) for side in (yes, no))
        return np.where(y & ~n, 1, np.where(n & ~y, 0, -1))

    gender = two_sided(("Male",), ("Female",))
    kept = (views == view) & (gender >= 0)
    images = torch.from_numpy(x[kept].transpose(0, 3, 1, 2) / 255.0).float()
    found = {name: two_sided(yes, no)[kept] for name, (yes, no) in PROPERTIES.items()}
    return Faces(images, torch.from_numpy(gender[kept].astype(np.int64)), found)


# -------------------------------------------------------------------------------------------- models and classifiers


def task(lab: Lab, *, epochs: int) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Train the shared model: the paper's LeNet, male or female."""
    own, test = faces(lab, 0), faces(lab, 1)
    model = gl.models.lenet(classes=2, seed=0)
    model = _cohort.fit(model, own.x, own.gender, epochs=epochs, batch_size=64, optimizer=Adam(lr=2e-3), seed=2)
    return model.state_dict(), {"accuracy": _cohort.accuracy(model, test.x, test.gender)}


def shared_model(lab: Lab, epochs: int) -> tuple[nn.Module, float]:
    """Return the trained shared model and its accuracy."""
    tensors, notes = lab.tensors(task, epochs=epochs)
    model = gl.models.lenet(classes=2, seed=0)
    model.load_state_dict(tensors)
    return model, float(notes["accuracy"])


def looks(lab: Lab, *, name: str, epochs: int) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Train the classifier of one property on the attacker's own faces, mirrored copies among them."""
    own = faces(lab, 0)
    kept = np.flatnonzero(own.properties[name] >= 0)
    x, y = own.x[kept], torch.from_numpy(own.properties[name][kept].astype(np.int64))
    x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
    trained = _cohort.fit(_looker(), x, y, epochs=epochs // 2 + 1, batch_size=64, optimizer=Adam(lr=1e-3), seed=3)
    return trained.state_dict(), {"faces": len(x)}


def _looker() -> nn.Module:
    # Chosen on a fifth of the attacker's own faces (SiLU 0.966, ReLU 0.959 after 8 passes over Eyeglasses).
    return gl.models.lenet(classes=2, width=24, activation="silu", init="he", seed=3)


def judge(lab: Lab, name: str, epochs: int, images: Tensor) -> list[float]:
    """Return the face classifier's score for the property, one per image."""
    tensors, _ = lab.tensors(looks, name=name, epochs=epochs)
    model = _looker()
    model.load_state_dict(tensors)
    with torch.no_grad():
        logits = model(torch.nan_to_num(images.float(), nan=0.5, posinf=1.0, neginf=0.0).clamp(0, 1))
    return [float(v) for v in logits[:, 1] - logits[:, 0]]


# ------------------------------------------------------------------------------------------------ passive inference


def features(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of every example (or, for x of five dimensions, of every batch) as a row."""
    params, loss = parameters(model), gl.CrossEntropy()
    single = x.ndim == 4

    def one(inputs: Tensor, labels: Tensor) -> Tensor:
        inputs, labels = (inputs[None], labels[None]) if single else (inputs, labels)
        return torch.cat([v.flatten() for v in gradient(model, loss, params, inputs, labels)[0].values()])

    return torch.cat([vmap(one)(a, b).detach() for a, b in zip(x.split(64), y.split(64), strict=True)])


def logistic(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Return weights and bias of a logistic regression, mean loss + penalty · ‖w‖² / 2, classes weighted equally."""
    w = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    weight = torch.where(y > 0, 0.5 / y.mean().clamp_min(1e-9), 0.5 / (1 - y.mean()).clamp_min(1e-9))
    solver = torch.optim.LBFGS([w], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y, weight=weight)
        loss = loss + penalty * w[:-1].square().sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return w.detach()


def fitted(x: Tensor, y: Tensor, test: Tensor) -> list[float]:
    """Return scores of ``test`` by a logistic regression on gradients, its penalty chosen by 4-fold cross-validation.

    Every row is divided by its norm first (how badly the model does on a face says nothing of glasses), every column
    by its spread; the rows are expressed in the basis of the training rows, in which the problem is the same and small.
    """
    x, test = F.normalize(x.double(), dim=1), F.normalize(test.double(), dim=1)
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-12)
    x, test = (x - mean) / spread, (test - mean) / spread
    values, vectors = torch.linalg.eigh(x @ x.T)
    kept = values > 1e-9 * values[-1]
    basis = x.T @ (vectors[:, kept] / values[kept].sqrt())
    x, test = x @ basis, test @ basis
    scale = x.square().sum(1).mean().sqrt()
    x, test, target = x / scale, test / scale, y.double()
    folds = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % 4

    def held_out(penalty: float) -> float:
        scores = torch.zeros(len(x), dtype=x.dtype)
        for fold in range(4):
            w = logistic(x[folds != fold], target[folds != fold], penalty)
            scores[folds == fold] = x[folds == fold] @ w[:-1] + w[-1]
        return area(scores.tolist(), y.tolist())

    w = logistic(x, target, max(PENALTIES, key=held_out))
    return [float(v) for v in test @ w[:-1] + w[-1]]


def aligned(rows: Tensor) -> Tensor:
    """Return gradients of single examples with a positive last coordinate, the head's last bias.

    Everything in such a gradient is multiplied by p − y, whose sign tells the main task's label and nothing else: no
    linear classifier could look through it.
    """
    return rows * torch.where(rows[:, -1:] < 0, -1.0, 1.0)


def passive_single(lab: Lab, *, name: str, own: int, images: list[int], epochs: int) -> Mapping[str, Any]:
    """Score the property of each test face from its update alone."""
    model, accuracy = shared_model(lab, epochs)
    mine, test = faces(lab, 0), faces(lab, 1)
    kept = _balanced(mine.properties[name], own)
    labels = torch.from_numpy(mine.properties[name][kept])
    known = aligned(features(model, mine.x[kept], mine.gender[kept]))
    scores = fitted(known, labels, aligned(features(model, test.x[images], test.gender[images])))
    return {"scores": scores, "truth": test.properties[name][images].tolist(), "accuracy": accuracy}


def passive_batches(lab: Lab, *, name: str, own: int, batches: int, epochs: int) -> Mapping[str, Any]:
    """Score whether a batch of eight has faces with the property in it (four of them) or none."""
    model, _ = shared_model(lab, epochs)
    rows = {}
    for view, count in ((0, own), (1, batches)):
        held = faces(lab, view)
        chosen, truth = _mixed(held.properties[name], count, seed=view)
        rows[view] = features(model, held.x[chosen], held.gender[chosen]), truth
    return {"scores": fitted(rows[0][0], torch.from_numpy(rows[0][1]), rows[1][0]), "truth": rows[1][1].tolist()}


def _balanced(labels: np.ndarray, most: int) -> np.ndarray:
    """Return the numbers of random certain faces, as many with the property as without where there are enough."""
    rng = np.random.default_rng(5)
    sides = [rng.permutation(np.flatnonzero(labels == v))[: most // 2] for v in (0, 1)]
    return rng.permutation(np.concatenate(sides))


def _mixed(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return batches (count, 8) of face numbers, and whether four of each have the property."""
    rng = np.random.default_rng(seed)
    yes, no = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    truth = np.arange(count) % 2
    half = MEMBERS // 2
    rows = [
        np.concatenate([rng.choice(yes if t else no, half, replace=False), rng.choice(no, half, replace=False)])
        for t in truth
    ]
    return np.array(rows), truth


# --------------------------------------------------------------------------------------------- reconstruct and judge


def reconstruct(lab: Lab, *, image: int, attacker: str, outer: int, epochs: int) -> Mapping[str, Any]:
    """Reconstruct one test face from its update, and let the face classifiers judge it and the true one."""
    model, _ = shared_model(lab, epochs)
    test = faces(lab, 1)
    batch = gl.Batch(test.x[image : image + 1], test.gender[image : image + 1])
    seen = _shared.observe(model, batch)
    start = time.perf_counter()
    if attacker == "published":
        result = published(model, seen.update.tensors, (3, 32, 32), 2, seed=image, outer=outer)
        inputs, status = result.inputs, result.status
    else:
        found = _ours.reconstruct([seen], seed=image)[0]
        inputs, status = found.inputs, found.status
    seconds = time.perf_counter() - start
    error = _shared.errors(inputs, batch.inputs)[0]
    scores = {f"score {n}": judge(lab, n, epochs, inputs)[0] for n in PROPERTIES}
    ceiling = {f"ceiling {n}": judge(lab, n, epochs, batch.inputs)[0] for n in PROPERTIES}
    truth = {f"truth {n}": int(test.properties[n][image]) for n in PROPERTIES}
    shown = torch.nan_to_num(inputs[0], nan=0.5).clamp(0, 1).to(torch.float16)
    return {
        **scores,
        **ceiling,
        **truth,
        "mse": error if math.isfinite(error) else None,
        "status": status,
        "time": seconds,
        "image": shown,
        "face": batch.inputs[0].to(torch.float16),
    }


# ------------------------------------------------------------------------------------------------ area under the curve


def area(scores: Sequence[float], truth: Sequence[int]) -> float:
    """Return the area under the receiver operating characteristic (ties count half); NaN if one side is empty."""
    ranks, yes = rankdata(scores), np.asarray(truth) == 1
    m, n = int(yes.sum()), int((~yes).sum())
    return float((ranks[yes].sum() - m * (m + 1) / 2) / (m * n)) if m and n else math.nan


def auc(scores: Sequence[float], truth: Sequence[int]) -> Estimate:
    """Return the area under the curve with the score-type 95 % interval of Newcombe (2006, Method 5).

    The areas θ whose distance to the estimate is at most 1.96 standard errors at θ (variance of Hanley and McNeil
    1982, with (m + n)/2 in place of each count). Unlike DeLong's or a bootstrap's it does not shrink to a point at
    an area of 1, which is the value in question here.
    """
    found = area(scores, truth)
    m = sum(1 for t in truth if t == 1)
    n = len(truth) - m
    if math.isnan(found):
        return Estimate(math.nan, 0.0, 1.0, len(truth))
    star = (m + n) / 2 - 1

    def variance(theta: float) -> float:
        return theta * (1 - theta) * (1 + star * (1 - theta) / (2 - theta) + star * theta / (1 + theta)) / (m * n)

    def outside(theta: float) -> float:
        return (theta - found) ** 2 - 1.959963984540054**2 * variance(theta)

    near = 1e-9  # an end of the range is a root itself, but not the wanted one
    low = 0.0 if found <= near else float(brentq(outside, 0.0, found - near))
    high = 1.0 if found >= 1 - near else float(brentq(outside, found + near, 1.0))
    return Estimate(found, low, high, m + n)


# ----------------------------------------------------------------------------------------------------------- table


def sample(lab: Lab, n: int) -> list[int]:
    """Return ``n`` random test faces, as many Asian as not: of those alone whose properties are all certain."""
    test = faces(lab, 1)
    certain, rng = test.certain(), np.random.default_rng(0)
    asian = test.properties["Asian"][certain]
    sides = [rng.permutation(certain[asian == v])[: n // 2] for v in (0, 1)]
    return [int(i) for pair in zip(*sides, strict=False) for i in pair]


def run(config: Config, lab: Lab) -> Result:
    """Compare the areas under the curve on the same updates."""
    images = sample(lab, config.ours)
    shared = {"outer": config.outer, "epochs": config.epochs}
    ours = lab.measure(reconstruct, [{"image": i, "attacker": "ours", **shared} for i in images])
    theirs = lab.measure(
        reconstruct, [{"image": i, "attacker": "published", **shared} for i in images[: config.published]]
    )
    rows, curves = [], {}
    for name in PROPERTIES:
        asked = {"name": name, "own": config.own, "epochs": config.epochs}
        direct = lab.measure(passive_single, [asked | {"images": images}])[0]
        mixed = lab.measure(
            passive_batches,
            [asked | {"batches": config.batches}],
        )[0]
        truth = [r[f"truth {name}"] for r in ours]
        ceiling = auc([r[f"ceiling {name}"] for r in ours], truth)
        rows += [
            Row(
                f"AUC, {name}, reconstruction and face classifier",
                auc([r[f"score {name}"] for r in ours], truth),
                auc([r[f"score {name}"] for r in theirs], [r[f"truth {name}"] for r in theirs]),
                cost=f"{median([r['time'] for r in ours]).value:.0f} s each",
                note=f"The face classifier on the true images: {ceiling.value:.3f} "
                f"[{ceiling.low:.3f}, {ceiling.high:.3f}], which no reconstruction can be expected to pass",
            ),
            Row(f"AUC, {name}, property inference from one update", None, auc(direct["scores"], direct["truth"])),
            Row(
                f"AUC, {name}, property inference from a batch of {MEMBERS}",
                None,
                auc(mixed["scores"], mixed["truth"]),
                note="Four of eight faces have the property, or none; a batch of eight is beyond the exact "
                "reconstruction on this LeNet (see batches)",
            ),
        ]
        curves[name] = {
            "reconstruction + classifier": ([r[f"score {name}"] for r in ours], truth),
            "true images + classifier": ([r[f"ceiling {name}"] for r in ours], truth),
            "property inference, one update": (direct["scores"], direct["truth"]),
            "property inference, batch of 8": (mixed["scores"], mixed["truth"]),
        }
        accuracy = direct["accuracy"]
    errors = [median([math.inf if r["mse"] is None else r["mse"] for r in side]) for side in (ours, theirs)]
    rows.append(Row("MSE of the reconstructed faces", *errors))
    return Result(
        rows=rows,
        figures=[
            Figure("curves", "Receiver operating characteristics on people nobody trained on.", _curves(curves)),
            Figure(
                "faces",
                "Random test faces, none rejected: true, ours, published.",
                lambda figure: _shared.pictures(figure, _faces(ours, theirs)),
                (9.0, 3.5),
            ),
        ],
        texts={"Shared model": f"male or female, accuracy on other people {100 * accuracy:.1f} %"},
        scaled=""
        if config is FULL
        else f"{len(images)} test faces ({config.published} for the published algorithm) instead of up to {FULL.ours} "
        f"({FULL.published}), the attacker's own {config.own} instead of {FULL.own}",
    )


def _faces(ours: Sequence[Measured], theirs: Sequence[Measured]) -> list[tuple[str, list[Any]]]:
    shown = ours[:8]
    return [
        ("true", [r["face"] for r in shown]),
        ("ours", [r["image"] for r in shown]),
        ("published", [r["image"] for r in theirs[:8]]),
    ]


def _curves(curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[int]]]]) -> Any:
    def draw(figure: Any) -> None:
        for axis, (name, lines) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
            for label, (scores, truth) in lines.items():
                yes = np.asarray(truth)[np.argsort(-np.asarray(scores), kind="stable")] == 1
                hits, alarms = np.cumsum(yes) / max(yes.sum(), 1), np.cumsum(~yes) / max((~yes).sum(), 1)
                axis.plot([0, *alarms], [0, *hits], label=f"{label}: {area(scores, truth):.2f}", linewidth=1)
            axis.set_title(name)
            axis.set_xlabel("false positive rate")
            axis.set_ylabel("true positive rate")
            axis.legend(fontsize=6)

    return draw
