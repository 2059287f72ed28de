"""How close a reconstruction came: scores per example, worst first, and the lift over guessing without an update."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import final

import torch
from scipy.special import ndtri
from torch import Tensor

from gradleak.audit.records import Aggregate, ColumnScore, Example, Lift, Success
from gradleak.errors import InvalidInput
from gradleak.metrics import Metric, label_accuracy, mse, psnr
from gradleak.spaces import InputSpace
from gradleak.spaces.base import NullGuess
from gradleak.types import Batch, Reconstruction

__all__ = ["Scores", "error_curve", "score", "wilson"]

_DRAWS = 16


@final
@dataclass(frozen=True)
class Scores:
    """How close one reconstruction came to one private batch.

    Attributes:
        examples: one record per private example, the worst first.
        lifts: guesses that need no update, and how much better the reconstruction is; of pictures only.
        unassigned: number of reconstructions beyond the batch size, which were left out.
        notes: sentences that a reader must know.
        columns: how many cells of each column are right, of tables only.
        found: which cells (N, C) of the private rows, in their original order, are right; of tables only.
    """

    examples: tuple[Example, ...]
    aggregates: tuple[Aggregate, ...]
    success: Success
    lifts: tuple[Lift, ...] = ()
    unassigned: int = 0
    notes: tuple[str, ...] = ()
    columns: tuple[ColumnScore, ...] = ()
    found: tuple[tuple[bool, ...], ...] | None = None

    @property
    def successes(self) -> int:
        """Number of successful examples."""
        return self.success.successes

    @property
    def assignment(self) -> tuple[int | None, ...]:
        """For each private example in its original order the position of its reconstruction."""
        return tuple(e.guess for e in sorted(self.examples, key=lambda e: e.index))

    def aggregate(self, metric: str) -> Aggregate:
        """Return one metric over the examples that have a value."""
        return next(a for a in self.aggregates if a.metric == metric)


def score(
    reconstruction: Reconstruction,
    truth: Batch,
    space: InputSpace,
    *,
    public: Tensor | None = None,
    threshold: float = 1e-3,
    seed: int = 0,
) -> Scores:
    """Compare a reconstruction with the private batch, example by example.

    The space assigns examples one to one once, says which metrics fit, and decides what counts as success.

    Args:
        reconstruction: what the attack returned.
        truth: the private batch, decoded (images in [0, 1]), with class indices or probabilities; −1 is no known class.
        space: what one input looks like.
        public: decoded public examples (M, *shape) for the guesses to compare with.
        threshold: largest error (``space.error_name``) of a successful example, which must be clearly better than every
            guess without the update besides; the default is PSNR ≥ 30 dB, a relative error of 3 %, every token right.
        seed: of the draws of public examples.

    Raises:
        InvalidInput: shapes do not fit, or the truth is not finite.
    """
    read = space.restored(reconstruction.inputs, reconstruction.labels)
    guesses, inputs = space.alike(space.prepare(read), space.prepare(truth.inputs))
    if not bool(torch.isfinite(inputs).all()):
        raise InvalidInput("The truth has NaN or infinite values; score against the batch that was attacked.")
    assignment = space.assign(guesses, inputs)
    assigned = _assigned(guesses, assignment)
    columns = {m.name: _numbers(m(assigned, inputs)) for m in space.metrics}
    used: list[Metric] = list(space.metrics)
    labels, found = _labels(truth, reconstruction)
    recovered: list[int | None] = [None] * len(truth)
    if found is not None and labels is not None:
        recovered = [found[a] if a >= 0 else None for a in assignment.tolist()]
        # An example that got nothing has its label not recovered, so it is compared with an impossible class.
        hits = label_accuracy(torch.tensor([-1 if r is None else r for r in recovered]), torch.tensor(labels))
        if all(label >= 0 for label in labels):
            columns[label_accuracy.name] = _numbers(hits)
            used.append(label_accuracy)
    errors = _numbers(space.errors(assigned, inputs))
    better = space.better(assigned, inputs, public).tolist()
    examples = []
    for i, a in enumerate(assignment.tolist()):
        values = {name: column[i] for name, column in columns.items()}
        level, words = _closeness(space, values, better[i], errors[i])
        label = labels[i] if labels is not None and labels[i] >= 0 else None
        success = better[i] and _or_infinite(errors[i]) <= threshold
        examples.append(Example(i, a if a >= 0 else None, label, recovered[i], values, success, level, words))
    examples.sort(key=lambda e: (-_or_infinite(errors[e.index]), e.index))
    successes = sum(e.success for e in examples)
    known = found is not None and labels is not None and all(label >= 0 for label in labels)
    share = _overlap(found, labels) if known and found is not None and labels is not None else None
    lifts, notes = _lifts(space, inputs, columns[psnr.name], public, seed) if psnr.name in columns else ((), ())
    if any(error is None for error in errors):
        notes = (*notes, "Some examples have no usable reconstruction; they count as failures.")
    cells = space.cells(assigned, inputs)
    null = None if lifts or cells is not None else _best_guess(space, inputs, public)
    return Scores(
        examples=tuple(examples),
        aggregates=tuple(a for m in used if (a := _aggregate(m, columns[m.name], null, inputs)) is not None),
        success=Success(
            threshold,
            successes,
            len(examples),
            *wilson(successes, len(examples)),
            share,
            space.error_name,
            "" if null is None else null.description,
        ),
        lifts=lifts,
        unassigned=max(0, len(guesses) - len(truth)),
        notes=notes,
        columns=() if cells is None else _columns(space, cells, inputs, public),
        found=None if cells is None else tuple(map(tuple, cells.tolist())),
    )


def wilson(successes: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate (Wilson 1927), within [0, 1]; (0, 1) for n = 0.

    Trials may succeed in part: a mean of shares varies no more than one of zeros and ones, so the interval holds.

    Raises:
        InvalidInput: more successes than trials, or a confidence outside (0, 1).

    >>> [round(bound, 3) for bound in wilson(31, 32)]
    [0.843, 0.994]
    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise InvalidInput(
            f"There is no interval for {successes} of {n} at confidence {confidence}; "
            "pass 0 ≤ successes ≤ n and a confidence in (0, 1)."
        )
    if n == 0:
        return 0.0, 1.0
    z = float(ndtri((1 + confidence) / 2))
    rate = successes / n
    center = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the formula gives exactly 0 or 1, up to rounding.
    low = 0.0 if successes == 0 else (center - spread) / scale
    high = 1.0 if successes == n else (center + spread) / scale
    return low, high


def error_curve(
    snapshots: Tensor, truth: Batch, space: InputSpace, *, final: Tensor | None = None
) -> tuple[float, ...]:
    """Return the MSE over the batch of each of K snapshots; NaN where one is not finite, empty where MSE means nothing.

    Snapshots are decoded candidates (K, N, *shape), and ``truth`` is decoded; the returned candidates ``final``
    decide the assignment, or the last snapshot if it is None.

    Raises:
        InvalidInput: shapes do not fit.
    """
    if mse not in space.metrics or len(snapshots) == 0:
        return ()
    inputs = space.prepare(truth.inputs)
    assignment = space.assign(space.prepare(snapshots[-1] if final is None else final), inputs)
    return tuple(float(mse(_assigned(space.prepare(s), assignment), inputs).mean()) for s in snapshots)


def _assigned(guesses: Tensor, assignment: Tensor) -> Tensor:
    """Return the guess of each example; NaN, or −1 of integers, for none: every metric says that this is no guess."""
    none = torch.full((1, *guesses.shape[1:]), torch.nan if guesses.is_floating_point() else -1, dtype=guesses.dtype)
    return torch.cat([guesses, none])[assignment]


def _closeness(
    space: InputSpace, values: dict[str, float | None], better: bool, error: float | None
) -> tuple[int, str]:
    level, words = space.closeness(values)
    if level == 0 or better or error is None:
        return level, words
    return 0, "That is not clearly better than a guess without the update."


def _labels(truth: Batch, reconstruction: Reconstruction) -> tuple[list[int] | None, list[int] | None]:
    """Return the true and the recovered class indices; None where targets are no classes."""
    labels, found = truth.labels.detach().cpu(), reconstruction.labels
    labels = labels.argmax(-1) if labels.is_floating_point() and labels.ndim > 1 else labels
    if labels.ndim != 1 or labels.is_floating_point():
        return None, None
    usable = found is not None and found.ndim == 1 and not found.is_floating_point()
    return labels.tolist(), found.detach().cpu().tolist() if usable and found is not None else None


def _numbers(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _best_guess(space: InputSpace, truth: Tensor, public: Tensor | None) -> NullGuess | None:
    """Return the guess without the update that comes closest over the whole batch."""
    nulls = space.null_guesses(truth, public)
    return min(nulls, key=lambda null: float(space.errors(null.inputs, truth).nanmean()), default=None)


def _aggregate(metric: Metric, column: list[float | None], null: NullGuess | None, truth: Tensor) -> Aggregate | None:
    values = [v for v in column if v is not None]
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    mean, median = statistics.fmean(values), statistics.median(values)
    name, unit = metric.name, metric.unit
    guessed = None if null is None or metric is label_accuracy else float(metric(null.inputs, truth).nanmean())
    return Aggregate(name, unit, len(values), mean, sd, min(values), median, max(values), metric.meaning, guessed)


def _overlap(found: list[int], labels: list[int]) -> float:
    """Return the share of ``labels``, with multiplicity, that ``found`` contains."""
    remaining = list(found)
    hits = 0
    for label in labels:
        if label in remaining:
            remaining.remove(label)
            hits += 1
    return hits / len(labels)


def _columns(space: InputSpace, cells: Tensor, truth: Tensor, public: Tensor | None) -> tuple[ColumnScore, ...]:
    """Return the cells that are right by column, beside those of the best guess without the update."""
    n, nulls = len(truth), []
    for null in space.null_guesses(truth, public):
        guessed = space.cells(null.inputs, truth)
        assert guessed is not None
        nulls.append((int(guessed.sum()), guessed.sum(0).tolist(), null.description))
    _, known, guess = max(nulls, default=(0, [0] * len(space.names), ""))
    counted = zip(space.names, cells.sum(0).tolist(), known, strict=True)
    return tuple(ColumnScore(name, found, guessed, n, guess) for name, found, guessed in counted)


def _lifts(
    space: InputSpace, truth: Tensor, values: list[float | None], public: Tensor | None, seed: int
) -> tuple[tuple[Lift, ...], tuple[str, ...]]:
    """Return how many decibels the reconstruction is better than guesses without the update, and notes."""

    def lift(description: str, guess: Tensor, oracle: bool = False) -> Lift:
        gains = [v - g for v, g in zip(values, guess.tolist(), strict=True) if v is not None]
        return Lift(
            description, float(guess.mean()), statistics.fmean(gains) if len(gains) == len(truth) else None, oracle
        )

    results = [
        lift(null.description, psnr(null.inputs, truth), null.oracle) for null in space.null_guesses(truth, public)
    ]
    if public is None:
        return tuple(results), (
            f"No public {space.nouns} were given, so only flat gray serves as a guess without an update.",
        )
    public = space.prepare(public)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(_DRAWS):
        # Without replacement where there are enough; assigned one to one, as a reconstruction is.
        order = torch.randperm(max(len(public), len(truth)), generator=generator)[: len(truth)] % len(public)
        guess = public[order]
        draws.append(psnr(guess[space.assign(guess, truth)], truth))
    best = max(draws, key=lambda values: float(values.mean()))
    drawn = f"random public {space.nouns}, assigned one to one, mean over {_DRAWS} draws"
    results.append(lift(drawn, torch.stack(draws).mean(0)))
    results.append(lift(f"the best of those {_DRAWS} draws, chosen by the truth (oracle)", best, oracle=True))
    short = f"Only {len(public)} public {space.nouns} for {len(truth)} examples: the random guesses repeat some."
    return tuple(results), (short,) if len(public) < len(truth) else ()
