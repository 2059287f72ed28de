"""What the experiments on images share: victims, the two attackers on one update, errors, pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.metrics import mse
from gradleak.metrics.assignment import assign
from gradleak.papers.experiment import Lab

from . import _ours, _published  # noqa: TID252

__all__ = [
    "HIT", "Images", "attack_gradients", "attack_published", "best_effort", "chunks", "errors", "first_hit",
    "gradients", "held_out", "images", "merged", "observe", "pictures", "proved", "psnr", "record", "series", "total",
]  # fmt: skip

HIT = 1e-4
"""Largest mean squared error of an image that counts as recovered."""


@dataclass(frozen=True)
class Images:
    """A data set of images and the LeNet that goes with it.

    Attributes:
        name: its file.
        title: as a reader knows it.
        classes: number of classes of the model.
        shape: of one image.

    """

    name: str
    title: str
    classes: int
    shape: tuple[int, int, int]

    def lenet(self, seed: int, *, width: int = 12) -> nn.Module:
        """Return the paper's LeNet for these images, with random weights."""
        return gl.models.lenet(
            width=width, classes=self.classes, in_channels=self.shape[0], image_size=self.shape[1:], seed=seed
        )


def images(name: str) -> Images:
    """Return the data set of the file ``name``."""
    known = (
        Images("mnist", "MNIST", 10, (1, 28, 28)),
        Images("cifar100", "CIFAR-100", 100, (3, 32, 32)),
        Images("svhn_mini", "SVHN", 10, (3, 32, 32)),
        Images("lfw", "LFW", 5749, (3, 32, 32)),
    )
    return {d.name: d for d in known}[name]


def held_out(lab: Lab, data: Images, chosen: Sequence[int]) -> gl.Batch:
    """Return test examples by number; of the faces, those of the people set aside as View 1, DevTest."""
    x, y = lab.images(data.name, "test")
    if data.name == "lfw":
        rows = torch.from_numpy(np.flatnonzero(lab.arrays("lfw.npz", ["view1"])["view1"] == 1))
        x, y = x[rows], y[rows]
    index = torch.tensor(list(chosen))
    return gl.Batch(x[index].float(), y[index])


def total(name: str) -> int:
    """Return how many test examples there are to draw from."""
    return {"mnist": 2000, "cifar100": 1200, "svhn_mini": 45, "lfw": 1860}[name]


def observe(
    model: nn.Module, batch: gl.Batch, training: gl.LocalTraining | None = None, update: gl.Update | None = None
) -> gl.Observation:
    """Return what the honest-but-curious server sees of one client: batch size and training known, labels not."""
    training = gl.FedSGD() if training is None else training
    update = training(model, batch) if update is None else update
    space = gl.ImageSpace(tuple(batch.inputs.shape[1:]))
    return gl.ThreatModel().observe(model, update, space=space, training=training, batch_size=len(batch))


def errors(guess: Tensor, truth: Tensor) -> list[float]:
    """Return the mean squared error of every true image with the guess assigned to it, images clamped to [0, 1].

    An image that is not finite has an infinite error.
    """
    guess = torch.where(torch.isfinite(guess), guess.clamp(0, 1), torch.nan)
    order = assign(guess, truth)
    values = mse(guess[order], truth.to(guess)).tolist()
    return [math.inf if math.isnan(v) else v for v in values]


def psnr(error: float) -> float:
    """Return −10 log₁₀ of a mean squared error, in dB, at most 200."""
    return -10 * math.log10(max(error, 1e-20)) if math.isfinite(error) else 0.0


def record(inputs: Tensor, truth: gl.Batch, **values: Any) -> dict[str, Any]:
    """Return errors and pictures of one reconstructed batch, in the order of the truth, beside further values."""
    guess = torch.where(torch.isfinite(inputs), inputs.clamp(0, 1), torch.nan)
    ordered = guess[assign(guess, truth.inputs)]
    return {
        "mse": errors(inputs, truth.inputs),
        "images": torch.nan_to_num(ordered, nan=0.5).to(torch.float16),
        "truth": truth.inputs.to(torch.float16),
        **values,
    }


def gradients(model: nn.Module, update: gl.Update, lr: float = 1.0, steps: int = 1) -> Mapping[str, Tensor]:
    """Return the update as the one gradient that the published attacker takes it for."""
    if update.kind is gl.UpdateKind.GRADIENT:
        return update.tensors
    return {k: -v / (lr * steps) for k, v in update.tensors.items()}


def attack_published(
    model: nn.Module, batch: gl.Batch, observation: gl.Observation, *, classes: int, seed: int,
    outer: int = _published.OUTER, budget: int | None = None, lr: float = 1.0, steps: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Run the published algorithm on one observation and score it."""
    start = time.perf_counter()
    result = _published.published(
        model,
        gradients(model, observation.update, lr, steps),
        tuple(batch.inputs.shape[1:]),
        classes,
        batch_size=len(batch),
        seed=seed,
        outer=outer,
        budget=budget,
    )
    return record(
        result.inputs,
        batch,
        evaluations=result.evaluations,
        iterations=result.outer,
        status=result.status,
        seconds=time.perf_counter() - start,
        labels=int((result.labels == batch.labels).sum()) if len(batch) == 1 else -1,
    )


def attack_gradients(
    observations: Sequence[gl.Observation], batches: Sequence[gl.Batch], *, iterations: int, seed: int = 0,
    restarts: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run our attacker on observations of equal shape and score each."""
    results = _ours.reconstruct(observations, iterations=iterations, seed=seed, restarts=restarts)
    return [best_effort(r, b) for r, b in zip(results, batches, strict=True)]


def best_effort(result: gl.Reconstruction, batch: gl.Batch) -> dict[str, Any]:
    """Score one reconstruction of ours, with the iteration at which it first had every image."""
    return record(
        result.inputs,
        batch,
        evaluations=result.evaluations,
        iterations=result.iterations,
        first_hit=first_hit(result, batch),
        status=result.status,
        seconds=result.seconds,
        objective=result.objective,
        verdict="" if result.certificate is None else result.certificate.verdict,
        labels=int((result.labels == batch.labels).sum()) if result.labels is not None and len(batch) == 1 else -1,
    )


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the records of several observations as one: lists of numbers, pictures along the first axis."""
    whole: dict[str, Any] = {}
    for name in results[0]:
        values = [r[name] for r in results]
        if isinstance(values[0], Tensor):
            whole[name] = torch.cat(values)
        else:
            whole[name] = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return whole


def first_hit(result: gl.Reconstruction, batch: gl.Batch) -> int:
    """Return the first recorded evaluation from which every image was within ``HIT``; −1 where none was.

    The metric looks at the trace after the attack has returned; the attack itself never learns of it.
    """
    trace = result.trace
    if trace is None or trace.snapshots is None:
        return -1
    for step, snapshot in zip(trace.iterations, trace.snapshots, strict=True):
        if max(errors(snapshot, batch.inputs)) <= HIT:
            return step
    return -1


def chunks(items: Sequence[int], size: int) -> list[list[int]]:
    """Return ``items`` in lists of at most ``size``."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def series(records: Sequence[Any], name: str) -> list[Any]:
    """Return one value from every example of all records, in order."""
    return [v for r in records for v in (r[name] if isinstance(r[name], list) else [r[name]])]


def proved(records: Sequence[Any]) -> str:
    """Return in words how many reconstructions their own certificates prove exact, without the truth."""
    verdicts = series(records, "verdict")
    return f"ours: {verdicts.count('proved')} of {len(verdicts)} proved exact by their certificate"


def pictures(figure: Any, rows: Sequence[tuple[str, Sequence[Any]]]) -> None:
    """Draw labelled rows of images (C, H, W) in [0, 1]; None leaves a place empty."""
    columns = max(len(items) for _, items in rows)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, items) in zip(axes, rows, strict=True):
        for j, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            if j < len(items) and items[j] is not None:
                picture = np.asarray(items[j], dtype=np.float64).clip(0, 1).transpose(1, 2, 0)
                axis.imshow(picture.squeeze(), cmap="gray" if picture.shape[-1] == 1 else None, vmin=0, vmax=1)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
