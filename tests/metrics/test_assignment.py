from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.errors import InvalidInput
from gradleak.metrics import assign, pair_costs


def images(n, seed=0):
    return torch.rand(n, 3, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(order=st.permutations(range(6)), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_finds_any_order(order, seed):
    truth = images(6, seed)
    guess = truth[list(order)] + 0.01 * images(6, seed + 1)
    assert torch.equal(truth[assign(guess, truth).argsort()], truth[list(order)])


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_is_optimal(seed):
    guess, truth = images(4, seed), images(4, seed + 5000)
    costs = pair_costs(guess, truth)
    best = min(sum(float(costs[i, p[i]]) for i in range(4)) for p in itertools.permutations(range(4)))
    assert float(costs[range(4), assign(guess, truth)].sum()) == pytest.approx(best, rel=1e-12)


def test_costs_are_pairwise_errors():
    guess, truth = images(3), images(2, 1)
    costs = pair_costs(guess, truth)
    assert costs.shape == (2, 3)
    assert float(costs[1, 2]) == pytest.approx(float(((guess[2] - truth[1]) ** 2).mean()), rel=1e-12)


def test_one_to_one_even_where_one_guess_is_nearest_to_all():
    truth = images(3)
    guess = torch.stack([truth.mean(0), torch.zeros(3, 6, 5), torch.ones(3, 6, 5)])
    assert sorted(assign(guess, truth).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_guesses_never_displace_usable_ones(bad):
    truth = images(4)
    guess = truth[[2, 0, 3, 1]].clone()
    guess[1] = bad  # would have been example 0
    assert assign(guess, truth).tolist() == [1, 3, 0, 2]
    spare = torch.cat([torch.full((1, 3, 6, 5), bad, dtype=torch.float64), truth])
    assert assign(spare, truth).tolist() == [1, 2, 3, 4]


def test_all_unusable():
    assert sorted(assign(torch.full((3, 3, 6, 5), float("nan")), images(3)).tolist()) == [0, 1, 2]


def test_unequal_numbers():
    truth = images(3)
    assert assign(truth[[2]], truth).tolist() == [-1, -1, 0]
    assert assign(torch.cat([images(2, 9), truth]), truth).tolist() == [2, 3, 4]


def test_large_values_keep_their_order():
    truth = images(2) * 1e12
    assert assign(truth[[1, 0]], truth).tolist() == [1, 0]


def test_shapes_are_checked():
    with pytest.raises(InvalidInput, match="attacked"):
        assign(torch.zeros(2, 3), torch.zeros(2, 4))
