"""How close a reconstruction came: scores per example, worst first, and the lift over guessing without an update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch
from torch import Tensor

import gradleak.metrics
from gradleak.audit.intervals import wilson
from gradleak.audit.records import BETTER
from gradleak.errors import InvalidInput
from gradleak.metrics import Metric, assign, mse, psnr, scales
from gradleak.types import Batch, Reconstruction, Trace

__all__ = ["Baseline", "ErrorCurve", "ExampleScore", "Scores", "error_curve", "score", "wilson"]

_DRAWS = 16


@final
@dataclass(frozen=True)
class ExampleScore:
    """The scores of one private example.

    Attributes:
        index: its position in the private batch.
        reconstruction: position of the reconstruction assigned to it, None where there were too few.
        values: metric name → value; None where it cannot be computed (nothing assigned, not finite, no labels).
        success: whether its MSE, squared relative error (values) or share of wrong tokens is at most the threshold;
            values must be clearly better than every null guess besides.
        label: its class index.
        guessed_label: the reconstruction's, None where the attack says nothing about labels.

    """

    index: int
    reconstruction: int | None
    values: Mapping[str, float | None]
    success: bool
    label: int | None = None
    guessed_label: int | None = None

    @property
    def label_correct(self) -> bool | None:
        """Whether the labels agree, None where the attack says nothing about them."""
        return None if self.guessed_label is None else self.guessed_label == self.label

    def to_dict(self) -> dict[str, Any]:
        """Return one flat JSON-safe mapping: index, reconstruction, every metric, success, labels."""
        return {
            "index": self.index,
            "reconstruction": self.reconstruction,
            **self.values,
            "success": self.success,
            "label": self.label,
            "guessed_label": self.guessed_label,
            "label_correct": self.label_correct,
        }


@final
@dataclass(frozen=True)
class Baseline:
    """A guess that needs no update, and how much better the reconstruction is.

    Attributes:
        name: "gray", "mean_image", "random_public", or "best_random_public".
        description: what was guessed, for a reader.
        oracle: whether the guess was chosen by the truth, which no attacker can do.
        psnr: mean over examples of the guess's PSNR, dB.
        lift: mean over examples of the reconstruction's PSNR less the guess's, dB; None where an example has no score.
        worst_lift: the smallest lift of any example, dB.

    """

    name: str
    description: str
    oracle: bool
    psnr: float
    lift: float | None
    worst_lift: float | None


@final
@dataclass(frozen=True)
class Scores:
    """How close one reconstruction came to one private batch.

    Attributes:
        examples: one record per private example, the worst first.
        units: metric name → unit.
        threshold: largest MSE, squared relative error (values) or share of wrong tokens that counts as success.
        successes: number of successful examples.
        interval: Wilson 95 % interval of the success rate.
        means: metric name → mean over examples, None where an example has no value.
        medians: metric name → median over examples, an absent value counting as worst.
        worst: metric name → worst value over examples, None where an example has no value.
        labels_recovered: share of the batch's labels that the reconstruction names, in whatever order; None without.
        baselines: guesses that need no update; empty unless the inputs are images.
        unassigned: number of reconstructions beyond the batch size, which were left out.
        notes: plain sentences a reader must know.

    """

    examples: tuple[ExampleScore, ...]
    units: Mapping[str, str]
    threshold: float
    successes: int
    interval: tuple[float, float]
    means: Mapping[str, float | None]
    medians: Mapping[str, float | None]
    worst: Mapping[str, float | None]
    labels_recovered: float | None = None
    baselines: tuple[Baseline, ...] = ()
    unassigned: int = 0
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def success_rate(self) -> float:
        """Share of successful examples."""
        return self.successes / len(self.examples)

    @property
    def assignment(self) -> tuple[int | None, ...]:
        """For each private example in its original order the position of its reconstruction."""
        return tuple(e.reconstruction for e in sorted(self.examples, key=lambda e: e.index))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-safe mapping: no tensors, no NaN, no infinity."""
        return {
            "examples": [example.to_dict() for example in self.examples],
            "units": dict(self.units),
            "success": {
                "threshold_mse": self.threshold,
                "successes": self.successes,
                "n": len(self.examples),
                "rate": self.success_rate,
                "wilson_95": list(self.interval),
            },
            "mean": dict(self.means),
            "median": dict(self.medians),
            "worst": dict(self.worst),
            "labels_recovered": self.labels_recovered,
            "baselines": [asdict(baseline) for baseline in self.baselines],
            "unassigned": self.unassigned,
            "notes": list(self.notes),
        }


def score(
    reconstruction: Reconstruction,
    truth: Batch,
    *,
    public: Tensor | None = None,
    threshold: float = 1e-3,
    seed: int = 0,
    images: bool | None = None,
) -> Scores:
    """Compare a reconstruction with the private batch, example by example.

    Examples are assigned one to one once (by MSE); every metric of ``gradleak.metrics`` that fits the inputs follows.
    Inputs that are no images have units of their own: the squared relative error takes the place of the MSE. Integer
    inputs are token ids: there it is the share of wrong tokens.

    Args:
        reconstruction: what the attack returned.
        truth: the private batch, decoded (images in [0, 1]), with class indices or probabilities.
        public: decoded public examples (M, *shape) for the guesses to compare with; without them a flat gray 0.5.
        threshold: largest MSE of a successful example; the default is PSNR ≥ 30 dB, or a relative error of 3 %.
        seed: of the draws of public images.
        images: whether the inputs are images in [0, 1]; if None, all of shape (N, C, H, W) are.

    Raises:
        InvalidInput: shapes do not fit, or the truth is not finite.

    """
    tokens = not truth.inputs.is_floating_point() and not reconstruction.inputs.is_floating_point()
    inputs, guesses = (
        x.detach().to("cpu", torch.long if tokens else torch.float64) for x in (truth.inputs, reconstruction.inputs)
    )
    if not bool(torch.isfinite(inputs).all()):
        raise InvalidInput("The truth has NaN or infinite values; score against the batch that was attacked.")
    images = not tokens and (inputs.ndim == 4 if images is None else images)
    values = not tokens and not images
    assignment = _assign(guesses, inputs, values)
    # An example without a reconstruction is compared with NaN, which every metric answers with NaN, or with no token.
    padded = torch.cat([guesses, torch.full_like(inputs[:1], -1 if tokens else torch.nan)])
    assigned = padded[assignment]
    labels = truth.labels.detach().cpu()
    labels = labels.argmax(-1) if labels.is_floating_point() and labels.ndim > 1 else labels
    found = None if reconstruction.labels is None else reconstruction.labels.detach().cpu()
    if labels.ndim != 1 or labels.is_floating_point():
        found = None  # regression targets and token sequences are no classes

    columns: dict[str, list[float | None]] = {}
    fitting = {"tokens"} if tokens else {"inputs", "images"} if images else {"inputs", "values"}
    metrics = [m for m in _metrics() if m.reads in fitting]
    for metric in metrics:
        columns[metric.name] = [v if math.isfinite(v) else None for v in metric(assigned, inputs).tolist()]
    guessed_labels: list[int | None] = [None] * len(truth)
    if found is not None:
        guessed_labels = [int(found[a]) if a >= 0 else None for a in assignment.tolist()]
        # An example that got nothing has its label not recovered, so it is compared with an impossible class.
        numbers = torch.tensor([-1 if guess is None else guess for guess in guessed_labels])
        for metric in _metrics():
            if metric.reads == "labels":
                columns[metric.name] = list(metric(numbers, labels).tolist())
                metrics.append(metric)
    if tokens:
        errors = [None if v is None else 1 - v for v in columns["token_accuracy"]]
    elif values:
        errors = [None if v is None else v**2 for v in columns["relative_error"]]
    else:
        errors = columns["mse"]
    better = [_error(v) <= BETTER for v in columns["null_guess_ratio"]] if values else [True] * len(truth)
    examples = [
        ExampleScore(
            index=i,
            reconstruction=a if a >= 0 else None,
            values={name: column[i] for name, column in columns.items()},
            success=better[i] and _at_most(errors[i], threshold),
            label=int(labels[i]) if labels.ndim == 1 and not labels.is_floating_point() else None,
            guessed_label=guessed_labels[i],
        )
        for i, a in enumerate(assignment.tolist())
    ]
    examples.sort(key=lambda e: (-_error(errors[e.index]), e.index))
    successes = sum(e.success for e in examples)
    baselines, notes = _baselines(inputs, columns.get("psnr"), public, seed) if images else ((), ())
    if any(error is None for error in errors):
        notes = (*notes, "Some examples have no usable reconstruction; they count as failures.")
    return Scores(
        examples=tuple(examples),
        units={metric.name: metric.unit for metric in metrics},
        threshold=threshold,
        successes=successes,
        interval=wilson(successes, len(examples)),
        means={m.name: _mean(columns[m.name]) for m in metrics},
        medians={m.name: _median(columns[m.name], m) for m in metrics},
        worst={m.name: _worst(columns[m.name], m) for m in metrics},
        labels_recovered=None if found is None else _overlap(found.tolist(), labels.tolist()),
        baselines=baselines,
        unassigned=max(0, len(guesses) - len(truth)),
        notes=notes,
    )


def _metrics() -> list[Metric]:
    return [getattr(gradleak.metrics, name) for name in gradleak.metrics.__all__]


def _assign(guess: Tensor, truth: Tensor, values: bool) -> Tensor:
    """Return the assignment; of ``values`` in units of each position, so that no large column decides alone."""
    if not values or guess.shape[1:] != truth.shape[1:]:  # assign refuses those that differ
        return assign(guess, truth)
    sizes = scales(truth)
    return assign(guess.detach().to("cpu", torch.float64) / sizes, truth / sizes)


def _error(value: float | None) -> float:
    return math.inf if value is None else value


def _at_most(value: float | None, threshold: float) -> bool:
    return value is not None and value <= threshold


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _ordered(values: list[float | None], metric: Metric) -> list[float]:
    """Return the values from best to worst, absent ones last."""
    sign = -1.0 if metric.higher_is_better else 1.0
    return sorted(math.inf if v is None else sign * v for v in values)


def _median(values: list[float | None], metric: Metric) -> float | None:
    ordered = _ordered(values, metric)
    half = len(ordered) // 2
    middle = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return None if math.isinf(middle) else (-middle if metric.higher_is_better else middle)


def _worst(values: list[float | None], metric: Metric) -> float | None:
    last = _ordered(values, metric)[-1]
    return None if math.isinf(last) else (-last if metric.higher_is_better else last)


def _overlap(found: list[int], labels: list[int]) -> float:
    """Return the share of ``labels``, with multiplicity, that ``found`` contains."""
    remaining = list(found)
    hits = 0
    for label in labels:
        if label in remaining:
            remaining.remove(label)
            hits += 1
    return hits / len(labels)


def _baselines(
    truth: Tensor, values: list[float | None] | None, public: Tensor | None, seed: int
) -> tuple[tuple[Baseline, ...], tuple[str, ...]]:
    values = values or [None] * len(truth)

    def baseline(name: str, description: str, guess: Tensor, *, oracle: bool = False) -> Baseline:
        """Compare with ``guess``: the PSNR of each example, (N,), averaged over draws where there are several."""
        lifts = [None if v is None else v - g for v, g in zip(values, guess.tolist(), strict=True)]
        known = [lift for lift in lifts if lift is not None]
        complete = len(known) == len(lifts)
        return Baseline(name, description, oracle, float(guess.mean()), _mean(lifts), min(known) if complete else None)

    if public is None:
        gray = psnr(torch.full_like(truth, 0.5), truth)
        note = "No public images were given, so only a flat gray image serves as the guess without an update."
        return (baseline("gray", "the same flat gray 0.5 for every example", gray),), (note,)
    if public.shape[1:] != truth.shape[1:] or len(public) == 0:
        raise InvalidInput(
            f"The public images have shape {tuple(public.shape)}, the private ones {tuple(truth.shape)}; "
            "pass public images of the same channels, height and width."
        )
    public = public.detach().to("cpu", torch.float64)
    mean_image = public.mean(0, keepdim=True).expand_as(truth)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(_DRAWS):
        # Without replacement where there are enough; assigned one to one, as a reconstruction is.
        order = torch.randperm(max(len(public), len(truth)), generator=generator)[: len(truth)] % len(public)
        guess = public[order]
        draws.append(psnr(guess[assign(guess, truth)], truth))
    best = max(draws, key=lambda values: float(values.mean()))
    results = (
        baseline("mean_image", f"the mean of {len(public)} public images", psnr(mean_image, truth)),
        baseline(
            "random_public",
            f"random public images, assigned one to one, mean over {_DRAWS} draws",
            torch.stack(draws).mean(0),
        ),
        baseline(
            "best_random_public", f"the best of those {_DRAWS} draws, chosen by the truth (oracle)", best, oracle=True
        ),
    )
    short = f"Only {len(public)} public images for {len(truth)} examples: the random guesses repeat some."
    return results, (short,) if len(public) < len(truth) else ()


@final
@dataclass(frozen=True)
class ErrorCurve:
    """How the error fell while the attack ran.

    Attributes:
        iterations: K recorded iterations.
        examples: N tuples, in the batch's order, of K mean squared errors each; None where a value is not finite.
        means: K means over the examples.

    """

    iterations: tuple[int, ...]
    examples: tuple[tuple[float | None, ...], ...]
    means: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-safe mapping."""
        return {
            "iterations": list(self.iterations),
            "examples": [list(values) for values in self.examples],
            "means": list(self.means),
        }


def error_curve(
    trace: Trace, truth: Batch, *, final: Tensor | None = None, images: bool | None = None
) -> ErrorCurve | None:
    """Return the MSE of every recorded snapshot, each example following its final assignment.

    Args:
        trace: of a reconstruction; None is returned where it recorded no snapshots.
        truth: the private batch, decoded.
        final: the returned candidates, which decide the assignment; the last snapshot if None.
        images: as in :func:`score`.

    Raises:
        InvalidInput: shapes do not fit.

    """
    if trace.snapshots is None or len(trace.snapshots) == 0:
        return None
    inputs = truth.inputs.detach().to("cpu", torch.float64)
    images = inputs.ndim == 4 if images is None else images
    values = truth.inputs.is_floating_point() and not images
    assignment = _assign(trace.snapshots[-1] if final is None else final, inputs, values)
    columns = []
    for snapshot in trace.snapshots:
        padded = torch.cat([snapshot.detach().to("cpu", torch.float64), torch.full_like(inputs[:1], torch.nan)])
        columns.append([v if math.isfinite(v) else None for v in mse(padded[assignment], inputs).tolist()])
    return ErrorCurve(
        iterations=tuple(trace.iterations),
        examples=tuple(zip(*columns, strict=True)),
        means=tuple(_mean(column) for column in columns),
    )
