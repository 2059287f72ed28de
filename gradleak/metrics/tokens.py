"""Sentences as token ids: how many stand where they stood, how many occur at all, and ROUGE.

Examples are ids (N, T). Positions at which the truth is negative count for nothing in any of these metrics: set it to
−1 where a token is special, or was told to the attacker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = ["rouge_1", "rouge_2", "rouge_l", "token_accuracy", "token_recall"]

Sentence = list[int]


def _each(measure: Callable[[Sentence, Sentence], float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``measure`` (guess, truth) of every pair of sentences, ignored positions left out of both."""

    def values(guess: Tensor, truth: Tensor) -> Tensor:
        counted = truth >= 0
        pairs = ((g[c].tolist(), t[c].tolist()) for g, t, c in zip(guess, truth, counted, strict=True))
        return torch.tensor([measure(g, t) if t else float("nan") for g, t in pairs], dtype=torch.float64)

    return values


def _in_place(guess: Sentence, truth: Sentence) -> float:
    return sum(g == t for g, t in zip(guess, truth, strict=True)) / len(truth)


def _occurring(guess: Sentence, truth: Sentence) -> float:
    return len(set(truth) & set(guess)) / len(set(truth))


def _overlap(order: int) -> Callable[[Sentence, Sentence], float]:
    def rouge(guess: Sentence, truth: Sentence) -> float:
        ours, theirs = (Counter(zip(*(s[i:] for i in range(order)), strict=False)) for s in (guess, truth))
        # A sentence too short for a single n-gram has none to find.
        return (ours & theirs).total() / theirs.total() if theirs else float("nan")

    return rouge


def _longest(guess: Sentence, truth: Sentence) -> float:
    """Return the length of the longest common subsequence, row by row, as a share of the truth."""
    row = [0] * (len(truth) + 1)
    for g in guess:
        before = row
        row = [0]
        for j, t in enumerate(truth):
            row.append(before[j] + 1 if g == t else max(before[j + 1], row[j]))
    return row[-1] / len(truth)


def _metric(name: str, fn: Callable[[Tensor, Tensor], Tensor], meaning: str) -> Metric:
    return Metric(name, "", higher_is_better=True, fn=fn, reads="tokens", meaning=meaning)


token_accuracy = _metric("token_accuracy", _each(_in_place), "share of the tokens that stand where they stood")
"""Share of positions at which the right token stands, in [0, 1]."""

token_recall = _metric(
    "token_recall", _each(_occurring), "share of the different tokens that were read, wherever they stand"
)
"""Share of a sentence's distinct tokens that occur in the guess, wherever, in [0, 1]."""

rouge_1 = _metric("rouge_1", _each(_overlap(1)), "share of the tokens that were read, counted as often as they occur")
"""Share of a sentence's tokens, with multiplicity, that the guess contains (Lin 2004, Section 2), in [0, 1].

Both sentences are equally long, so that recall, precision and F-measure of all three ROUGE metrics are the same number.
"""

rouge_2 = _metric("rouge_2", _each(_overlap(2)), "share of the pairs of neighbors that were read")
"""Share of a sentence's pairs of neighbors that the guess contains (Lin 2004, Section 2); NaN below two tokens."""

rouge_l = _metric(
    "rouge_l",
    _each(_longest),
    "length of the longest sequence of tokens in the right order, as a share of the sentence",
)
"""Longest common subsequence as a share of the sentence's length (Lin 2004, Section 3.1), in [0, 1]."""
