from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradleak.metrics import null_guess_ratio, relative_error, scales


def rows(n=5, width=7, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROW = torch.tensor([[39, 77516, 13, 2174, 0, 40]], dtype=torch.float64)


def test_a_scale_for_each_position() -> None:
    truth = torch.tensor([[3.0, 0.0, 0.1, -8.0], [4.0, 0.0, 0.1, 8.0]], dtype=torch.float64)
    root = 12.5**0.5
    assert scales(truth).tolist() == pytest.approx([root, root, 0.1, 8.0])  # the middle one of 0.1, 3.5 and 8
    assert scales(ROW).tolist() == [39, 77516, 13, 2174, 40, 40]
    assert scales(torch.tensor([[2.0, 4.0, 0.0]])).tolist() == [2, 4, 3]  # halfway between two middle ones
    assert scales(torch.zeros(2, 3)).tolist() == [1, 1, 1]


@given(st.integers(0, 1000), st.lists(st.floats(-0.5, 1.5), min_size=6, max_size=6))
def test_units_do_not_matter(seed: int, exponents: list[float]) -> None:
    truth, units = rows(seed=seed), 10 ** torch.tensor([4, *exponents], dtype=torch.float64)
    guess = truth + 0.01 * rows(seed=seed + 1)
    for metric in (relative_error, null_guess_ratio):
        once = metric(guess, truth)
        same = metric(2.0**-20 * guess, 2.0**-20 * truth)
        assert torch.allclose(once, same, rtol=1e-9)
    # One large column decides what the whole is, so that the others keep their own units.
    each = ((guess - truth) / truth.square().mean(0).sqrt()).square().mean(1).sqrt()
    assert torch.allclose(relative_error(units * guess, units * truth), each, rtol=1e-9)


@pytest.mark.parametrize("error", [1e-7, 1e-3])
@pytest.mark.parametrize("n", [1, 3])
def test_a_flat_base_line_is_measured_in_units_of_the_whole(n: int, error: float) -> None:
    time = torch.linspace(0, 1, 96, dtype=torch.float64)
    beat = sum(
        a * torch.exp(-(((time - c) / w) ** 2)) for a, c, w in ((0.2, 0.2, 0.03), (1, 0.37, 0.03), (0.3, 0.6, 0.05))
    )
    truth = torch.stack([(1 + i) * beat for i in range(n)])
    guess = truth + error * rows(n, 96)
    assert float(truth[:, 90:].abs().max()) < 1e-12  # the base line
    whole = truth.square().mean().sqrt()
    assert float(relative_error(guess, truth).max()) < 20 * error / whole
    assert float(null_guess_ratio(guess, truth).max()) < 0.1
    assert float(null_guess_ratio(torch.zeros_like(truth), truth).min()) >= 1


def test_zeros_score_one() -> None:
    truth = rows() * torch.tensor([1e-1, 1, 1e4, 3, 1, 7, 0.2], dtype=torch.float64)
    assert float(relative_error(torch.zeros_like(truth), truth).square().mean()) == pytest.approx(1)
    assert float(relative_error(torch.zeros(1, 7), truth[:1])) == pytest.approx(1)


def test_a_row_of_raw_columns() -> None:
    guess = torch.tensor([[39.04, 77551, 12.99, 2173.8, 0, 40.015]], dtype=torch.float64)
    parts = [0.04 / 39, 35 / 77516, 0.01 / 13, 0.2 / 2174, 0, 0.015 / 40]
    assert float(relative_error(guess, ROW)) == pytest.approx((sum(p * p for p in parts) / 6) ** 0.5, rel=1e-6)
    assert float(null_guess_ratio(guess, ROW)) < 1e-3


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3), (4, 3, 5, 5)])
def test_any_shape_and_unusable_guesses(shape) -> None:
    truth = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    guess = truth.clone()
    guess[2] = torch.nan
    for metric in (relative_error, null_guess_ratio):
        values = metric(guess, truth)
        assert values.dtype == torch.float64
        assert torch.isnan(values).tolist() == [False, False, True, False]
    assert relative_error(truth, truth).tolist() == [0, 0, 0, 0]


class TestNullGuesses:
    @pytest.mark.parametrize("truth", [rows(), 0.005 * rows(), rows() + 100, rows(2), rows(1) + 100, ROW, torch.eye(4)])
    def test_are_no_better_than_themselves(self, truth) -> None:
        guesses = [torch.zeros_like(truth), torch.full_like(truth, float(truth.double().mean()))]
        guesses += [truth.mean(0).expand_as(truth)] if len(truth) > 1 else []
        for guess in guesses:
            assert float(null_guess_ratio(guess, truth).min()) >= 1 - 1e-6

    def test_a_constant_near_almost_constant_values(self) -> None:
        truth = 100 + 0.01 * rows(4, 50)
        assert float(relative_error(torch.full_like(truth, 100), truth).max()) < 1e-3
        assert float(null_guess_ratio(torch.full_like(truth, 100), truth).min()) > 0.9
        assert float(null_guess_ratio(truth + 1e-5, truth).max()) < 0.01

    def test_a_mean_that_is_the_batch_is_no_guess(self) -> None:
        for truth in (torch.full((1, 1), 5.0), torch.full((3, 2), 5.0), rows(1).expand(3, 7)):
            assert null_guess_ratio(truth + 1e-4, truth).max() < 0.01

    def test_an_example_that_a_guess_hits_counts_with_its_batch(self) -> None:
        steps = torch.arange(12.0).view(3, 4)  # the second row is the mean
        assert null_guess_ratio(steps + 1e-6, steps).max() < 1e-4
        padded = torch.cat([torch.zeros(1, 7), rows(3)])
        assert null_guess_ratio(padded, padded).tolist() == [0, 0, 0, 0]
        assert null_guess_ratio(torch.zeros(4, 7), padded).min() >= 1

    def test_zeros_cannot_be_told_from_the_guess(self) -> None:
        assert null_guess_ratio(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [1, 1]

    def test_an_example_smaller_than_the_others(self) -> None:
        truth = rows(4)
        truth[1] *= 1e-4
        guess = truth.clone()
        guess[1] = 0
        assert relative_error(guess, truth)[1] < 1e-3
        assert null_guess_ratio(guess, truth)[1] == pytest.approx(1)
