from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from gradleak.audit.scores import error_curve, score, wilson
from gradleak.errors import InvalidInput
from gradleak.metrics import psnr
from gradleak.spaces import ImageSpace, TensorSpace, TokenSpace
from gradleak.types import Batch, Reconstruction

SPACE = ImageSpace((3, 12, 12))


def images(n, seed=0, size=12):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(truth, sigma, seed=9):
    """Return ``truth`` with example i disturbed by sigma[i]."""
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=truth.dtype)
    return truth + torch.tensor(sigma, dtype=truth.dtype).view(-1, 1, 1, 1) * noise


def result(inputs, labels=None, **options):
    return Reconstruction(inputs, None if labels is None else torch.tensor(labels), 0.0, **options)


@pytest.fixture
def truth():
    return Batch(images(4), torch.tensor([5, 6, 7, 7]))


def test_worst_first_with_both_indices(truth):
    order = [2, 0, 3, 1]
    guess = noisy(truth.inputs, [1e-3, 0.2, 1e-5, 1e-2])[order]
    scores = score(result(guess, truth.labels[order].tolist()), truth, SPACE)
    assert [e.index for e in scores.examples] == [1, 3, 0, 2]
    assert [order[e.guess] for e in scores.examples] == [1, 3, 0, 2]
    assert scores.assignment == (1, 3, 0, 2)
    errors = [e.values["mse"] for e in scores.examples]
    assert errors == sorted(errors, reverse=True)
    first = scores.examples[0]
    expected = float(((guess[3] - truth.inputs[1]) ** 2).mean())
    assert first.values["mse"] == pytest.approx(expected, rel=1e-12)
    assert first.values["psnr"] == pytest.approx(float(psnr(guess[3:4], truth.inputs[1:2])))
    assert set(first.values) == {"mse", "psnr", "ssim", "label_accuracy"}
    assert scores.aggregate("psnr").unit == "dB"
    assert "decibels" not in scores.aggregate("psnr").meaning


def test_success_rate_and_interval(truth):
    scores = score(result(noisy(truth.inputs, [0, 1e-3, 0.1, 0.5])), truth, SPACE)
    assert scores.successes == 2
    assert (scores.success.low, scores.success.high) == wilson(2, 4)
    assert (scores.success.n, scores.success.error) == (4, "MSE")
    assert [e.success for e in scores.examples] == [False, False, True, True]
    assert score(result(noisy(truth.inputs, [0, 1e-3, 0.1, 0.5])), truth, SPACE, threshold=0.02).successes == 3


def test_threshold_is_thirty_decibels(truth):
    for error, success in ((0.999e-3, True), (1.001e-3, False)):
        scores = score(result(truth.inputs + error**0.5), truth, SPACE)
        assert scores.successes == 4 * success
        assert (scores.aggregate("psnr").minimum >= 30) is success


def test_means_medians_and_worst(truth):
    scores = score(result(noisy(truth.inputs, [1e-4, 1e-3, 1e-2, 1e-1])), truth, SPACE)
    values = sorted(e.values["psnr"] for e in scores.examples)
    of = scores.aggregate("psnr")
    assert of.mean == pytest.approx(sum(values) / 4)
    assert of.median == pytest.approx((values[1] + values[2]) / 2)
    assert (of.n, of.minimum) == (4, values[0])
    assert scores.aggregate("mse").maximum == scores.examples[0].values["mse"]
    whole_batch = -10 * torch.log10(torch.tensor(scores.aggregate("mse").mean)).item()
    assert abs(of.mean - whole_batch) > 10  # never one PSNR of the whole batch


def test_how_close_is_said_in_words(truth):
    levels = {
        e.index: (e.level, e.words)
        for e in score(result(noisy(truth.inputs, [0, 1e-2, 0.06, 0.5])), truth, SPACE).examples
    }
    assert [levels[i][0] for i in range(4)] == [4, 3, 2, 0]
    assert "the same picture" in levels[0][1]
    assert "not recognize" in levels[3][1]


class TestLabels:
    def test_follow_the_assignment(self, truth):
        scores = score(result(truth.inputs[[1, 0, 2, 3]], [6, 5, 7, 0]), truth, SPACE)
        by_index = {e.index: e for e in scores.examples}
        assert [(by_index[i].label, by_index[i].recovered) for i in range(4)] == [(5, 5), (6, 6), (7, 7), (7, 0)]
        assert scores.aggregate("label_accuracy").mean == 0.75
        assert scores.success.labels == 0.75

    def test_recovered_in_any_order_with_multiplicity(self, truth):
        assert score(result(truth.inputs, [7, 7, 5, 6]), truth, SPACE).success.labels == 1
        assert score(result(truth.inputs, [7, 7, 7, 7]), truth, SPACE).success.labels == 0.5
        assert score(result(truth.inputs, [7, 7, 7, 7]), truth, SPACE).aggregate("label_accuracy").mean == 0.5

    def test_may_be_absent(self, truth):
        scores = score(result(truth.inputs), truth, SPACE)
        assert "label_accuracy" not in {a.metric for a in scores.aggregates}
        assert scores.success.labels is None
        assert {e.recovered for e in scores.examples} == {None}
        assert sorted(e.label for e in scores.examples) == [5, 6, 7, 7]

    def test_may_be_probabilities(self, truth):
        soft = torch.nn.functional.one_hot(truth.labels, 10).double() * 0.9 + 0.01
        assert score(result(truth.inputs, [5, 6, 7, 7]), Batch(truth.inputs, soft), SPACE).success.labels == 1

    def test_unknown_ones_are_not_scored(self, truth):
        scores = score(result(truth.inputs, [5, 6, 7, 7]), Batch(truth.inputs, torch.full((4,), -1)), SPACE)
        assert {e.label for e in scores.examples} == {None}
        assert scores.success.labels is None
        assert "label_accuracy" not in scores.examples[0].values


class TestFailures:
    def test_not_finite_examples_fail_and_come_first(self, truth):
        guess = truth.inputs.clone()
        guess[2, 0, 0, 0] = torch.nan
        scores = score(result(guess, [5, 6, 7, 7]), truth, SPACE)
        assert scores.examples[0].index == 2
        assert scores.examples[0].values["mse"] is None
        assert scores.examples[0].success is False
        assert scores.successes == 3
        assert scores.examples[0].level == 0
        assert scores.aggregate("mse").n == 3
        assert scores.lifts[0].lift is None
        assert any("count as failures" in note for note in scores.notes)

    def test_too_few_reconstructions(self, truth):
        scores = score(result(truth.inputs[[3]], [7]), truth, SPACE)
        assert scores.assignment == (None, None, None, 0)
        assert scores.successes == 1
        assert [e.recovered for e in scores.examples] == [None, None, None, 7]
        assert scores.aggregate("label_accuracy").mean == 0.25
        assert scores.success.labels == 0.25
        assert scores.aggregate("mse").n == 1

    def test_too_many_reconstructions(self, truth):
        scores = score(result(torch.cat([images(2, 5), truth.inputs])), truth, SPACE)
        assert scores.assignment == (2, 3, 4, 5)
        assert scores.unassigned == 2
        assert scores.successes == 4

    def test_all_fail(self, truth):
        scores = score(result(torch.full_like(truth.inputs, torch.inf)), truth, SPACE)
        assert scores.successes == 0
        assert all(v is None for e in scores.examples for v in e.values.values())

    def test_unusable_truth(self, truth):
        with pytest.raises(InvalidInput, match="truth"):
            score(result(truth.inputs), Batch(truth.inputs * torch.nan, truth.labels), SPACE)
        with pytest.raises(InvalidInput, match="attacked"):
            score(result(truth.inputs[:, :, :5]), truth, SPACE)


class TestLift:
    def test_gray_without_public_images(self, truth):
        scores = score(result(noisy(truth.inputs, [0.01] * 4)), truth, SPACE)
        gray, flat = scores.lifts
        expected = psnr(torch.full_like(truth.inputs, 0.5), truth.inputs)
        assert (gray.oracle, flat.oracle) == (False, True)
        assert gray.psnr == pytest.approx(float(expected.mean()))
        assert gray.lift == pytest.approx(scores.aggregate("psnr").mean - gray.psnr)
        assert any("No public images" in note for note in scores.notes)

    def test_public_images(self, truth):
        public = images(50, 77)
        scores = score(result(noisy(truth.inputs, [0.01] * 4)), truth, SPACE, public=public)
        _, _, mean_image, random, best = scores.lifts
        assert [lift.oracle for lift in scores.lifts] == [False, True, False, False, True]
        expected = psnr(public.mean(0, keepdim=True).expand_as(truth.inputs), truth.inputs).mean()
        assert mean_image.psnr == pytest.approx(float(expected))
        assert best.psnr > random.psnr
        assert best.lift < random.lift
        assert mean_image.psnr > random.psnr  # of independent noise the mean is the better guess by 3 dB
        assert random.psnr == pytest.approx(mean_image.psnr - 3, abs=0.5)

    def test_the_guess_itself_has_no_lift(self, truth):
        public = images(30, 3)
        mean_image = public.mean(0, keepdim=True).expand_as(truth.inputs)
        scores = score(result(mean_image), truth, SPACE, public=public)
        assert scores.lifts[2].lift == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("public", [False, True])
    def test_words_never_beat_a_null_guess(self, public):
        """A nearly flat image: gray, or the public mean, is 34 dB close, and so is a guess that learned nothing."""
        base = images(1, 3) if public else torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64)
        truth = Batch(base + 0.02 * (images(1, 5) - 0.5) * 12**0.5, torch.tensor([0]))
        others = base + 0.02 * (images(40, 6) - 0.5) if public else None
        scores = score(result(base), truth, SPACE, public=others)
        assert scores.examples[0].values["psnr"] > 30
        assert (scores.successes, scores.examples[0].level) == (0, 0)
        assert "not clearly better than a guess" in scores.examples[0].words
        assert score(result(truth.inputs + 1e-3), truth, SPACE, public=others).examples[0].level == 4

    def test_draws_are_seeded_and_leave_the_global_generator_alone(self, truth):
        before = torch.get_rng_state()
        scores = [score(result(truth.inputs), truth, SPACE, public=images(50, 77), seed=s) for s in (0, 0, 1)]
        assert torch.equal(before, torch.get_rng_state())
        assert scores[0] == scores[1] != scores[2]

    def test_few_public_images_repeat(self, truth):
        scores = score(result(truth.inputs), truth, SPACE, public=images(2, 3))
        assert any("repeat" in note for note in scores.notes)

    def test_public_images_must_fit(self, truth):
        for public in (images(3, size=5), images(3)[:0]):
            with pytest.raises(InvalidInput, match="public images"):
                score(result(truth.inputs), truth, SPACE, public=public)


def test_other_inputs_than_images():
    truth = Batch(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.5, 2.5]))
    scores = score(result(truth.inputs[[2, 1, 0]]), truth, TensorSpace((7,)))
    assert {a.metric for a in scores.aggregates} == {"mse", "null_guess_ratio", "relative_error"}
    assert scores.lifts == ()
    assert scores.assignment == (2, 1, 0)
    assert {e.label for e in scores.examples} == {None}
    assert scores.success.error == "squared relative error"


class TestValues:
    def test_success_is_relative(self):
        truth = torch.tensor([[39, 77516, 13, 2174, 0, 40]], dtype=torch.float64)
        guess = torch.tensor([[39.04, 77551, 12.99, 2173.8, 0, 40.015]], dtype=torch.float64)
        close = score(result(guess), Batch(truth, torch.tensor([0])), TensorSpace((6,)))
        assert close.aggregate("mse").mean > 100
        assert close.successes == 1
        space = TensorSpace((4,))
        for error, success in ((0.031, True), (0.032, False)):
            full = Batch(truth[:, :4], torch.tensor([0]))
            assert score(result(full.inputs * (1 + error)), full, space).successes == success
        assert score(result(full.inputs * 1.1), full, space, threshold=0.011).successes == 1

    def test_small_values_are_not_recovered_by_being_small(self):
        truth = Batch(0.005 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(4))
        for guess in (torch.zeros(4, 9), truth.inputs * -100, truth.inputs.mean(0).expand(4, 9)):
            assert score(result(guess), truth, TensorSpace((9,))).successes == 0

    def test_a_constant_is_no_success(self):
        truth = Batch(100 + 0.01 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(4))
        scores = score(result(torch.full((4, 9), 100.0)), truth, TensorSpace((9,)))
        assert scores.aggregate("relative_error").maximum < 1e-3
        assert (scores.successes, {e.level for e in scores.examples}) == (0, {0})
        assert score(result(truth.inputs + 1e-4), truth, TensorSpace((9,))).successes == 4

    def test_zeros_cannot_be_told_from_a_guess(self):
        zeros = Batch(torch.zeros(2, 3), torch.zeros(2))
        assert score(result(zeros.inputs), zeros, TensorSpace((3,))).successes == 0

    def test_a_sensor_reading_with_a_flat_base_line_came_back(self):
        """Scores by position used to divide by the base line's own size, 1e-30, and said that nothing came back."""
        time = torch.linspace(0, 1, 96, dtype=torch.float64)
        beat = torch.exp(-(((time - 0.4) / 0.02) ** 2)) + 0.3 * torch.exp(-(((time - 0.6) / 0.05) ** 2))
        for n in (1, 2):
            truth = Batch(torch.stack([torch.stack([beat, 0.6 * beat]) * (1 + i) for i in range(n)]), torch.zeros(n))
            noise = 3e-8 * torch.randn(truth.inputs.shape, generator=torch.Generator().manual_seed(0))
            scores = score(result(truth.inputs + noise), truth, TensorSpace((2, 96)))
            assert scores.successes == n
            assert {e.level for e in scores.examples} == {4}

    def test_a_large_column_does_not_assign_alone(self):
        truth = torch.tensor([[1e6, 1, 0], [1e6 + 10, 0, 1]], dtype=torch.float64)
        guess = torch.tensor([[1e6 + 9, 1, 0], [1e6 + 1, 0, 1]], dtype=torch.float64)
        batch = Batch(truth, torch.tensor([0, 1]))
        assert score(result(guess), batch, TensorSpace((3,))).assignment == (0, 1)
        assert error_curve(guess[None], batch, TensorSpace((3,))) == pytest.approx((27,))

    def test_the_worst_relative_error_comes_first(self):
        truth = torch.tensor([[1e6, 1.0], [1e6, 2.0]], dtype=torch.float64)
        guess = truth + torch.tensor([[0, 0.5], [1000, 0]], dtype=torch.float64)
        scores = score(result(guess), Batch(truth, torch.tensor([0, 1])), TensorSpace((2,)))
        assert [e.index for e in scores.examples] == [0, 1]
        assert scores.examples[0].values["mse"] < scores.examples[1].values["mse"]

    def test_of_the_shape_of_images(self, truth):
        large = Batch(truth.inputs * 1000, truth.labels)
        scores = score(result(large.inputs + 1), large, TensorSpace((3, 12, 12)))
        assert {a.metric for a in scores.aggregates} == {"mse", "null_guess_ratio", "relative_error"}
        assert scores.lifts == ()
        assert scores.successes == 4

    def test_shapes_that_would_broadcast_are_refused(self):
        with pytest.raises(InvalidInput, match="attacked"):
            score(result(torch.ones(3, 1)), Batch(torch.ones(3, 7), torch.zeros(3)), TensorSpace((7,)))


class TestSentences:
    SPACE = TokenSpace(torch.eye(12), 5)

    def test_in_another_order_all_came_back(self):
        truth = Batch(torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [7, 8, 9, 10, 11]]), torch.zeros(3, 5).long())
        scores = score(result(truth.inputs[[2, 0, 1]]), truth, self.SPACE)
        assert scores.assignment == (1, 2, 0)
        assert scores.aggregate("token_accuracy").minimum == 1
        assert scores.aggregate("rouge_2").minimum == 1
        assert (scores.successes, {e.level for e in scores.examples}) == (3, {4})
        assert scores.success.error == "share of wrong tokens"

    def test_levels(self):
        truth = Batch(torch.tensor([[1, 2, 3, 4, 5]]), torch.zeros(1, 5).long())
        for guess, level in (([1, 2, 3, 9, 9], 2), ([5, 1, 2, 3, 4], 1), ([9, 9, 9, 9, 9], 0)):
            assert score(result(torch.tensor([guess])), truth, self.SPACE).examples[0].level == level

    def test_lengths_order_and_special_tokens(self):
        space = TokenSpace(torch.eye(12), 5, special=(0, 1))  # padding, beginning
        truth = Batch(torch.tensor([[1, 2, 3, 0, 0], [1, 4, 5, 6, 7]]), torch.zeros(2, 5).long())
        scores = score(result(torch.tensor([[1, 4, 5, 6, 7], [1, 2, 3, 0, 0]])), truth, space)
        assert {a.metric: a.minimum for a in scores.aggregates}.keys() >= {"exact_match", "token_precision"}
        assert all(a.minimum == 1 for a in scores.aggregates)
        longer = score(result(torch.tensor([[1, 4, 5, 6, 7], [1, 2, 3, 8, 0]])), truth, space)
        assert longer.aggregate("token_precision").minimum == pytest.approx(2 / 3)
        assert (longer.successes, longer.aggregate("token_recall").minimum) == (1, 1)

    def test_what_the_model_writes_is_a_guess(self):
        truth = Batch(torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]), torch.zeros(2, 5).long())
        space = TokenSpace(torch.eye(12), 5, samples=torch.tensor([[7, 8, 9, 1, 1], [1, 2, 3, 1, 1]]))
        scores = score(result(truth.inputs), truth, space)
        assert (scores.success.guess, scores.successes) == ("sentences that the model itself writes", 2)
        assert scores.aggregate("token_accuracy").guessed == pytest.approx(3 / 5)
        # What the model writes anyway is no success of an attack.
        assert score(result(space.samples), truth, space).examples[0].level == 0

    def test_embeddings_are_decoded(self):
        truth = Batch(torch.tensor([[1, 2, 3, 4, 5]]), torch.zeros(1, 5).long())
        assert score(result(self.SPACE.encode(truth.inputs) * 2), truth, self.SPACE).successes == 1
        assert score(result(truth.inputs[:0]), truth, self.SPACE).successes == 0


class TestErrorCurve:
    def test_follows_the_final_assignment(self, truth):
        order = [1, 2, 3, 0]
        steps = torch.stack([noisy(truth.inputs[order], [s] * 4) for s in (1.0, 0.1, 0.0)])
        curve = error_curve(steps, truth, SPACE)
        expected = [float(((steps[0, order.index(i)] - truth.inputs[i]) ** 2).mean()) for i in range(4)]
        assert curve[0] == pytest.approx(sum(expected) / 4)
        assert curve[2] == 0

    def test_the_returned_candidates_decide(self, truth):
        steps = truth.inputs[[1, 0, 2, 3]][None]
        assert error_curve(steps, truth, SPACE, final=truth.inputs)[0] > 0.01
        assert error_curve(steps, truth, SPACE) == (0.0,)

    def test_not_finite_snapshots(self, truth):
        first, second = error_curve(torch.stack([truth.inputs * torch.nan, truth.inputs]), truth, SPACE)
        assert math.isnan(first)
        assert second == 0

    def test_of_tokens_is_empty(self):
        truth = Batch(torch.tensor([[1, 2, 3, 4, 5]]), torch.zeros(1, 5).long())
        assert error_curve(truth.inputs[None], truth, TestSentences.SPACE) == ()


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 32), (16, 32), (31, 32), (32, 32), (3, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(successes, n, confidence):
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence=confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_within_the_unit_interval(pair):
    low, high = wilson(*pair)
    rate = pair[0] / pair[1] if pair[1] else 0.5
    assert 0 <= low <= rate <= high <= 1


def test_wilson_refuses():
    for successes, n, confidence in ((2, 1, 0.95), (-1, 1, 0.95), (1, 2, 1.0)):
        with pytest.raises(InvalidInput):
            wilson(successes, n, confidence=confidence)


def test_the_package_itself_does_not_load_torch():
    code = "import sys, gradleak.audit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
