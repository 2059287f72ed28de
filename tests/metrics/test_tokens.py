from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradleak.audit.scores import score
from gradleak.errors import InvalidInput
from gradleak.metrics import (
    Metric,
    assign,
    exact_match,
    pair_costs,
    rouge_1,
    rouge_2,
    rouge_l,
    token_accuracy,
    token_precision,
    token_recall,
)
from gradleak.spaces import TokenSpace
from gradleak.types import Batch, Reconstruction

ALL = (token_accuracy, token_recall, rouge_1, rouge_2, rouge_l, token_precision, exact_match)


def ids(*rows: str) -> Tensor:
    """Read words as ids: equal letters are equal tokens, "." counts for nothing, "_" stands behind the end."""
    return torch.tensor([[{".": -1, "_": -2}.get(c, ord(c)) for c in row] for row in rows])


@pytest.mark.parametrize(
    ("guess", "truth", "expected"),
    [
        # accuracy, recall, ROUGE-1, ROUGE-2, ROUGE-L, counted by hand
        ("abcd", "abcd", (1, 1, 1, 1, 1)),
        ("wxyz", "abcd", (0, 0, 0, 0, 0)),
        ("dcba", "abcd", (0, 1, 1, 0, 1 / 4)),
        ("bcda", "abcd", (0, 1, 1, 2 / 3, 3 / 4)),  # bc, cd; bcd
        ("aaab", "abab", (3 / 4, 1, 3 / 4, 1 / 3, 3 / 4)),  # a twice and b once; ab once of ab, ba, ab; aab or abb
        ("abxcd", "abcdx", (2 / 5, 1, 1, 2 / 4, 4 / 5)),  # ab, cd of ab, bc, cd, dx; abcd
        ("axbc", "abbc", (3 / 4, 1, 3 / 4, 1 / 3, 3 / 4)),  # bc of ab, bb, bc
        ("aaaa", "abcd", (1 / 4, 1 / 4, 1 / 4, 0, 1 / 4)),
        ("xabcdx", ".abcd.", (1, 1, 1, 1, 1)),  # told or special positions are left out
        ("babab", ".bc..", (0, 1 / 2, 1 / 2, 0, 1 / 2)),  # "ab" against "bc"
    ],
)
def test_by_hand(guess: str, truth: str, expected: tuple[float, ...]) -> None:
    values = [float(m(ids(guess), ids(truth))) for m in ALL[:5]]
    assert values == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("guess", "truth", "expected"),
    [
        # accuracy, recall, ROUGE-1, ROUGE-2, ROUGE-L, precision, exact, counted by hand
        ("abc_", "abc_", (1, 1, 1, 1, 1, 1, 1)),
        ("abcd", "abc_", (3 / 4, 1, 6 / 7, 4 / 5, 6 / 7, 3 / 4, 0)),  # 2·3 of 4 + 3; 2·2 of 3 + 2
        ("abc_", "abcd", (3 / 4, 3 / 4, 6 / 7, 4 / 5, 6 / 7, 1, 0)),
        ("bcd_", "abcd", (0, 3 / 4, 6 / 7, 4 / 5, 6 / 7, 1, 0)),  # one word short at the beginning
        ("____", "abcd", (0, 0, 0, 0, 0, 0, 0)),
        ("aab_", "ab__", (1 / 3, 1, 4 / 5, 2 / 3, 4 / 5, 1, 0)),
    ],
)
def test_sentences_of_unequal_length_by_hand(guess: str, truth: str, expected: tuple[float, ...]) -> None:
    assert [float(m(ids(guess), ids(truth))) for m in ALL] == pytest.approx(expected, abs=1e-15)


def test_what_cannot_be_counted_is_nan() -> None:
    assert all(math.isnan(float(m(ids("ab"), ids("..")))) for m in ALL)
    assert math.isnan(float(rouge_2(ids("ab"), ids("a."))))
    assert float(rouge_1(ids("ab"), ids("a."))) == 1


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), min_size=6, max_size=6), st.lists(st.integers(0, 5), min_size=6, max_size=6)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_bounds_and_independence(rows: list[tuple[list[int], list[int]]]) -> None:
    guess, truth = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    for metric in ALL:
        values = metric(guess, truth)
        assert values.shape == (len(rows),)
        assert bool(((values >= 0) & (values <= 1)).all())
        assert torch.equal(metric(truth, truth), torch.ones(len(rows), dtype=torch.float64))
        assert torch.equal(values, torch.cat([metric(g[None], t[None]) for g, t in zip(guess, truth, strict=True)]))
    # A token in its place is in a common subsequence, and each of its tokens occurs.
    assert bool((token_accuracy(guess, truth) <= rouge_l(guess, truth)).all())
    assert bool((rouge_l(guess, truth) <= rouge_1(guess, truth)).all())


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_only_ids_are_read(metric: Metric) -> None:
    with pytest.raises(InvalidInput, match="token ids"):
        metric(torch.rand(2, 3), torch.rand(2, 3))
    with pytest.raises(InvalidInput, match="token ids"):
        metric(torch.arange(3), torch.arange(3))


def test_sentences_are_assigned_by_wrong_tokens() -> None:
    truth = torch.tensor([[100, 7, 9], [1, 8, 3]])
    guess = torch.tensor([[2, 8, 3], [100, 7, 10]])
    assert torch.allclose(pair_costs(guess, truth), torch.tensor([[1.0, 1 / 3], [1 / 3, 1.0]], dtype=torch.float64))
    # By squares of ids the first guess would lie nearer to nothing in particular: names are no numbers.
    far = torch.tensor([[2, 7000, 9000], [1, 2, 3]])
    assert assign(torch.tensor([[1, 2, 9], [2, 7000, 1]]), far).tolist() == [1, 0]
    assert assign(guess[:1], truth).tolist() == [-1, 0]


def test_scores_of_sentences() -> None:
    truth = Batch(torch.tensor([[5, 6, 7, 8], [5, 9, 9, 8]]), torch.zeros(2, 4, dtype=torch.long))
    space = TokenSpace(torch.eye(10), 4)
    found = Reconstruction(torch.tensor([[5, 9, 9, 8], [5, 6, 6, 8]]), None, 0.0)
    scores = score(found, truth, space)
    assert scores.assignment == (1, 0)
    assert scores.successes == 1
    assert [e.index for e in scores.examples] == [0, 1]  # the worst first
    assert scores.aggregate("token_accuracy").mean == pytest.approx(7 / 8)
    assert "mse" not in {a.metric for a in scores.aggregates}
    assert scores.lifts == ()
    assert scores.success.guess.startswith("the most frequent token")
    assert scores.aggregate("rouge_1").guessed == pytest.approx(1 / 4)  # 5, 8 and 9 twice each: the least of them
    alone = score(Reconstruction(found.inputs[:1], None, 0.0), truth, space)
    assert alone.successes == 1
    assert alone.examples[0].guess is None
    assert alone.aggregate("token_accuracy").minimum == 0
