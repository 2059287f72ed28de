from __future__ import annotations

import json
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
from gradleak.types import Batch, Reconstruction, Trace


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
    scores = score(result(guess, truth.labels[order].tolist()), truth)
    assert [e.index for e in scores.examples] == [1, 3, 0, 2]
    assert [order[e.reconstruction] for e in scores.examples] == [1, 3, 0, 2]
    assert scores.assignment == (1, 3, 0, 2)
    errors = [e.values["mse"] for e in scores.examples]
    assert errors == sorted(errors, reverse=True)
    first = scores.examples[0]
    expected = float(((guess[3] - truth.inputs[1]) ** 2).mean())
    assert first.values["mse"] == pytest.approx(expected, rel=1e-12)
    assert first.values["psnr"] == pytest.approx(float(psnr(guess[3:4], truth.inputs[1:2])))
    assert set(first.values) == {"mse", "psnr", "ssim", "label_accuracy"}
    assert scores.units["psnr"] == "dB"


def test_success_rate_and_interval(truth):
    scores = score(result(noisy(truth.inputs, [0, 1e-3, 0.1, 0.5])), truth)
    assert scores.successes == 2
    assert scores.success_rate == 0.5
    assert scores.interval == wilson(2, 4)
    assert [e.success for e in scores.examples] == [False, False, True, True]
    assert score(result(noisy(truth.inputs, [0, 1e-3, 0.1, 0.5])), truth, threshold=0.02).successes == 3


def test_threshold_is_thirty_decibels(truth):
    for error, success in ((0.999e-3, True), (1.001e-3, False)):
        scores = score(result(truth.inputs + error**0.5), truth)
        assert scores.success_rate == float(success)
        assert (scores.worst["psnr"] >= 30) is success


def test_means_medians_and_worst(truth):
    scores = score(result(noisy(truth.inputs, [1e-4, 1e-3, 1e-2, 1e-1])), truth)
    values = sorted(e.values["psnr"] for e in scores.examples)
    assert scores.means["psnr"] == pytest.approx(sum(values) / 4)
    assert scores.medians["psnr"] == pytest.approx((values[1] + values[2]) / 2)
    assert scores.worst["psnr"] == values[0]
    assert scores.worst["mse"] == scores.examples[0].values["mse"]
    whole_batch = -10 * torch.log10(torch.tensor(scores.means["mse"])).item()
    assert abs(scores.means["psnr"] - whole_batch) > 10  # never one PSNR of the whole batch


class TestLabels:
    def test_follow_the_assignment(self, truth):
        scores = score(result(truth.inputs[[1, 0, 2, 3]], [6, 5, 7, 0]), truth)
        by_index = {e.index: e for e in scores.examples}
        assert [by_index[i].label_correct for i in range(4)] == [True, True, True, False]
        assert by_index[3].to_dict()["guessed_label"] == 0
        assert scores.means["label_accuracy"] == 0.75
        assert scores.labels_recovered == 0.75

    def test_recovered_in_any_order_with_multiplicity(self, truth):
        assert score(result(truth.inputs, [7, 7, 5, 6]), truth).labels_recovered == 1
        assert score(result(truth.inputs, [7, 7, 7, 7]), truth).labels_recovered == 0.5
        assert score(result(truth.inputs, [7, 7, 7, 7]), truth).means["label_accuracy"] == 0.5

    def test_may_be_absent(self, truth):
        scores = score(result(truth.inputs), truth)
        assert "label_accuracy" not in scores.means
        assert scores.labels_recovered is None
        assert {e.label_correct for e in scores.examples} == {None}
        assert sorted(e.label for e in scores.examples) == [5, 6, 7, 7]

    def test_may_be_probabilities(self, truth):
        soft = torch.nn.functional.one_hot(truth.labels, 10).double() * 0.9 + 0.01
        assert score(result(truth.inputs, [5, 6, 7, 7]), Batch(truth.inputs, soft)).means["label_accuracy"] == 1


class TestFailures:
    def test_not_finite_examples_fail_and_come_first(self, truth):
        guess = truth.inputs.clone()
        guess[2, 0, 0, 0] = torch.nan
        scores = score(result(guess, [5, 6, 7, 7]), truth)
        assert scores.examples[0].index == 2
        assert scores.examples[0].values["mse"] is None
        assert scores.examples[0].success is False
        assert scores.successes == 3
        assert scores.means["mse"] is None
        assert scores.worst["psnr"] is None
        assert scores.medians["psnr"] == 200
        assert scores.baselines[0].lift is None
        assert any("count as failures" in note for note in scores.notes)

    def test_too_few_reconstructions(self, truth):
        scores = score(result(truth.inputs[[3]], [7]), truth)
        assert scores.assignment == (None, None, None, 0)
        assert scores.successes == 1
        assert [e.label_correct for e in scores.examples] == [None, None, None, True]
        assert scores.means["label_accuracy"] == 0.25
        assert scores.labels_recovered == 0.25
        assert scores.medians["mse"] is None

    def test_too_many_reconstructions(self, truth):
        scores = score(result(torch.cat([images(2, 5), truth.inputs])), truth)
        assert scores.assignment == (2, 3, 4, 5)
        assert scores.unassigned == 2
        assert scores.successes == 4

    def test_all_fail(self, truth):
        scores = score(result(torch.full_like(truth.inputs, torch.inf)), truth)
        assert scores.successes == 0
        json.dumps(scores.to_dict(), allow_nan=False)

    def test_unusable_truth(self, truth):
        with pytest.raises(InvalidInput, match="truth"):
            score(result(truth.inputs), Batch(truth.inputs * torch.nan, truth.labels))
        with pytest.raises(InvalidInput, match="attacked"):
            score(result(truth.inputs[:, :, :5]), truth)


class TestLift:
    def test_gray_without_public_images(self, truth):
        scores = score(result(noisy(truth.inputs, [0.01] * 4)), truth)
        (gray,) = scores.baselines
        expected = psnr(torch.full_like(truth.inputs, 0.5), truth.inputs)
        assert (gray.name, gray.oracle) == ("gray", False)
        assert gray.psnr == pytest.approx(float(expected.mean()))
        assert gray.lift == pytest.approx(scores.means["psnr"] - gray.psnr)
        lifts = [e.values["psnr"] - float(expected[e.index]) for e in scores.examples]
        assert gray.worst_lift == pytest.approx(min(lifts))
        assert any("No public images" in note for note in scores.notes)

    def test_public_images(self, truth):
        public = images(50, 77)
        scores = score(result(noisy(truth.inputs, [0.01] * 4)), truth, public=public)
        mean_image, random, best = scores.baselines
        assert [b.name for b in scores.baselines] == ["mean_image", "random_public", "best_random_public"]
        assert [b.oracle for b in scores.baselines] == [False, False, True]
        expected = psnr(public.mean(0, keepdim=True).expand_as(truth.inputs), truth.inputs).mean()
        assert mean_image.psnr == pytest.approx(float(expected))
        assert best.psnr > random.psnr
        assert best.lift < random.lift
        assert mean_image.psnr > random.psnr  # of independent noise the mean is the better guess by 3 dB
        assert random.psnr == pytest.approx(mean_image.psnr - 3, abs=0.5)

    def test_the_guess_itself_has_no_lift(self, truth):
        public = images(30, 3)
        mean_image = public.mean(0, keepdim=True).expand_as(truth.inputs)
        assert score(result(mean_image), truth, public=public).baselines[0].lift == pytest.approx(0, abs=1e-9)

    def test_draws_are_seeded_and_leave_the_global_generator_alone(self, truth):
        before = torch.get_rng_state()
        scores = [score(result(truth.inputs), truth, public=images(50, 77), seed=s) for s in (0, 0, 1)]
        assert torch.equal(before, torch.get_rng_state())
        assert scores[0] == scores[1] != scores[2]

    def test_few_public_images_repeat(self, truth):
        scores = score(result(truth.inputs), truth, public=images(2, 3))
        assert any("repeat" in note for note in scores.notes)

    def test_public_images_must_fit(self, truth):
        for public in (images(3, size=5), images(3)[:0]):
            with pytest.raises(InvalidInput, match="public images"):
                score(result(truth.inputs), truth, public=public)


def test_other_inputs_than_images():
    truth = Batch(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.5, 2.5]))
    scores = score(result(truth.inputs[[2, 1, 0]]), truth)
    assert set(scores.means) == {"mse", "null_guess_ratio", "relative_error"}
    assert scores.baselines == ()
    assert scores.assignment == (2, 1, 0)
    assert {e.label for e in scores.examples} == {None}
    json.dumps(scores.to_dict(), allow_nan=False)


class TestValues:
    def test_success_is_relative(self):
        truth = torch.tensor([[39, 77516, 13, 2174, 0, 40]], dtype=torch.float64)
        guess = torch.tensor([[39.04, 77551, 12.99, 2173.8, 0, 40.015]], dtype=torch.float64)
        close = score(result(guess), Batch(truth, torch.tensor([0])))
        assert close.means["mse"] > 100
        assert close.successes == 1
        for error, success in ((0.031, True), (0.032, False)):
            full = Batch(truth[:, :4], torch.tensor([0]))
            assert score(result(full.inputs * (1 + error)), full).success_rate == float(success)
        assert score(result(full.inputs * 1.1), full, threshold=0.011).successes == 1

    def test_small_values_are_not_recovered_by_being_small(self):
        truth = Batch(0.005 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(4))
        for guess in (torch.zeros(4, 9), truth.inputs * -100, truth.inputs.mean(0).expand(4, 9)):
            assert score(result(guess), truth).successes == 0

    def test_a_constant_is_no_success(self):
        truth = Batch(100 + 0.01 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(4))
        scores = score(result(torch.full((4, 9), 100.0)), truth)
        assert scores.worst["relative_error"] < 1e-3
        assert scores.successes == 0
        assert score(result(truth.inputs + 1e-4), truth).successes == 4

    def test_a_large_column_does_not_assign_alone(self):
        truth = torch.tensor([[1e6, 1, 0], [1e6 + 10, 0, 1]], dtype=torch.float64)
        guess = torch.tensor([[1e6 + 9, 1, 0], [1e6 + 1, 0, 1]], dtype=torch.float64)
        batch = Batch(truth, torch.tensor([0, 1]))
        assert score(result(guess), batch).assignment == (0, 1)
        curve = error_curve(Trace((0,), (1.0,), snapshots=guess[None]), batch)
        assert [e[0] for e in curve.examples] == pytest.approx([27, 27])

    def test_the_worst_relative_error_comes_first(self):
        truth = torch.tensor([[1e6, 1.0], [1e6, 2.0]], dtype=torch.float64)
        guess = truth + torch.tensor([[0, 0.5], [1000, 0]], dtype=torch.float64)
        scores = score(result(guess), Batch(truth, torch.tensor([0, 1])))
        assert [e.index for e in scores.examples] == [0, 1]
        assert scores.examples[0].values["mse"] < scores.examples[1].values["mse"]

    def test_of_the_shape_of_images(self, truth):
        large = Batch(truth.inputs * 1000, truth.labels)
        scores = score(result(large.inputs + 1), large, images=False)
        assert set(scores.means) == {"mse", "null_guess_ratio", "relative_error"}
        assert scores.baselines == ()
        assert scores.successes == 4

    def test_shapes_that_would_broadcast_are_refused(self):
        with pytest.raises(InvalidInput, match="attacked"):
            score(result(torch.ones(3, 1)), Batch(torch.ones(3, 7), torch.zeros(3)))


def test_to_dict_is_json_safe(truth):
    scores = score(result(truth.inputs, [5, 6, 7, 7]), truth, public=images(20, 4))
    content = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert content["success"] == {
        "threshold_mse": 1e-3, "successes": 4, "n": 4, "rate": 1.0, "wilson_95": list(wilson(4, 4))
    }  # fmt: skip
    assert content["examples"][0]["psnr"] == 200
    assert content["mean"]["ssim"] == pytest.approx(1)
    assert len(content["baselines"]) == 3


class TestErrorCurve:
    def test_follows_the_final_assignment(self, truth):
        order = [1, 2, 3, 0]
        steps = torch.stack([noisy(truth.inputs[order], [s] * 4) for s in (1.0, 0.1, 0.0)])
        curve = error_curve(Trace((0, 10, 20), (1.0, 0.5, 0.0), snapshots=steps), truth)
        assert curve.iterations == (0, 10, 20)
        expected = [float(((steps[0, order.index(i)] - truth.inputs[i]) ** 2).mean()) for i in range(4)]
        assert [e[0] for e in curve.examples] == pytest.approx(expected)
        assert [e[2] for e in curve.examples] == [0, 0, 0, 0]
        assert curve.means[0] == pytest.approx(sum(expected) / 4)
        json.dumps(curve.to_dict(), allow_nan=False)

    def test_the_returned_candidates_decide(self, truth):
        trace = Trace((0,), (1.0,), snapshots=truth.inputs[[1, 0, 2, 3]][None])
        swapped = error_curve(trace, truth, final=truth.inputs)
        assert [e[0] == 0 for e in swapped.examples] == [False, False, True, True]
        assert error_curve(trace, truth).means == (0.0,)

    def test_not_finite_snapshots(self, truth):
        steps = torch.stack([truth.inputs * torch.nan, truth.inputs])
        curve = error_curve(Trace((0, 1), (1.0, 0.0), snapshots=steps), truth)
        assert curve.means == (None, 0.0)
        json.dumps(curve.to_dict(), allow_nan=False)

    def test_without_snapshots(self, truth):
        assert error_curve(Trace(), truth) is None


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
