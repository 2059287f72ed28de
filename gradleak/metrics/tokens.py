"""Sentences as token ids: exact match, tokens in their places, precision and recall of tokens, and ROUGE.

Examples are ids (N, T). A negative id is no token: −1 in the truth is a place that counts for nothing in any of these
metrics (a token that is special, or was told to the attacker), −1 in a guess a token that was not read, and −2 in
either the end of a sentence shorter than the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.metrics.base import Metric

__all__ = [
    "exact_match", "rouge_1", "rouge_2", "rouge_l", "token_accuracy", "token_precision", "token_recall",
]  # fmt: skip

_IGNORED = -1
Sentence = list[int]


def _each(measure: Callable[[Sentence, Sentence], float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``measure`` (guess, truth) of every pair of sentences, ignored places left out of both."""

    def values(guess: Tensor, truth: Tensor) -> Tensor:
        counted = truth != _IGNORED
        pairs = ((g[c].tolist(), t[c].tolist()) for g, t, c in zip(guess, truth, counted, strict=True))
        return torch.tensor([measure(g, t) if _tokens(t) else math.nan for g, t in pairs], dtype=torch.float64)

    return values


def _tokens(sentence: Sentence) -> Sentence:
    return [token for token in sentence if token >= 0]


def _equal(guess: Sentence, truth: Sentence) -> float:
    return float(_tokens(guess) == _tokens(truth))


def _in_place(guess: Sentence, truth: Sentence) -> float:
    places = [(g, t) for g, t in zip(guess, truth, strict=True) if g >= 0 or t >= 0]
    return sum(g == t for g, t in places) / len(places)


def _shared(guess: Sentence, truth: Sentence) -> float:
    return len(set(_tokens(truth)) & set(_tokens(guess)))


def _occurring(guess: Sentence, truth: Sentence) -> float:
    return _shared(guess, truth) / len(set(_tokens(truth)))


def _precise(guess: Sentence, truth: Sentence) -> float:
    return _shared(guess, truth) / max(1, len(set(_tokens(guess))))


def _f_measure(shared: int, ours: int, theirs: int) -> float:
    # A sentence too short for a single n-gram has none to find.
    return 2 * shared / (ours + theirs) if theirs else math.nan


def _overlap(order: int) -> Callable[[Sentence, Sentence], float]:
    def rouge(guess: Sentence, truth: Sentence) -> float:
        words = (_tokens(guess), _tokens(truth))
        ours, theirs = (Counter(zip(*(w[i:] for i in range(order)), strict=False)) for w in words)
        return _f_measure((ours & theirs).total(), ours.total(), theirs.total())

    return rouge


def _longest(guess: Sentence, truth: Sentence) -> float:
    """Return the F-measure of the longest common subsequence, found row by row."""
    guess, truth = _tokens(guess), _tokens(truth)
    row = [0] * (len(truth) + 1)
    for g in guess:
        before = row
        row = [0]
        for j, t in enumerate(truth):
            row.append(before[j] + 1 if g == t else max(before[j + 1], row[j]))
    return _f_measure(row[-1], len(guess), len(truth))


def _metric(name: str, fn: Callable[[Tensor, Tensor], Tensor], meaning: str) -> Metric:
    return Metric(name, "", higher_is_better=True, fn=fn, reads="tokens", meaning=meaning)


exact_match = _metric("exact_match", _each(_equal), "1 where every token of the sentence was read, in its order")
"""1 where the guess is the sentence, token for token, else 0."""

token_accuracy = _metric("token_accuracy", _each(_in_place), "share of the tokens that stand where they stood")
"""Share of the places, of the longer of both sentences, at which the right token stands, in [0, 1]."""

token_recall = _metric(
    "token_recall", _each(_occurring), "share of the different tokens that were read, wherever they stand"
)
"""Share of a sentence's distinct tokens that occur in the guess, wherever, in [0, 1]."""

token_precision = _metric(
    "token_precision", _each(_precise), "share of the different tokens read that the sentence has, wherever they stand"
)
"""Share of a guess's distinct tokens that occur in the sentence, wherever, in [0, 1]; 0 of an empty guess."""

rouge_1 = _metric("rouge_1", _each(_overlap(1)), "tokens that were read, counted as often as they occur")
"""F-measure of the tokens, with multiplicity, that sentence and guess share (Lin 2004, Section 2), in [0, 1].

Of equally long sentences recall, precision and F-measure are the same number. Deviation from Lin: tokens in place of
words, and no stemming.
"""

rouge_2 = _metric("rouge_2", _each(_overlap(2)), "pairs of neighbors that were read")
"""F-measure of the pairs of neighbors that both share (Lin 2004, Section 2); NaN below two tokens."""

rouge_l = _metric("rouge_l", _each(_longest), "the longest sequence of tokens that both have in the same order")
"""F-measure of the longest common subsequence (Lin 2004, Section 3.1), in [0, 1]."""
