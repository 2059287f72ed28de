from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gradleak.audit.records import CertificateRecord, Example, Lift, Match, Outcome, Subject
from gradleak.audit.verdict import HALF_GRAY, judge

SUBJECT = Subject("lenet", "LeNet", 10, 2, "image", (3, 32, 32), 100, 1, "gradient", "float32", "FedSGD")
OUTCOME = Outcome("converged", 1e-9, 100, 120, 12.0)


def example(psnr: float, ssim: float = 0.9) -> Example:
    return Example(0, 0, 1, 1, {"mse": 10 ** (-psnr / 10), "psnr": psnr, "ssim": ssim})


def test_half_a_gray_level() -> None:
    assert pytest.approx(-20 * math.log10(0.5 / 255), abs=0.01) == HALF_GRAY


@pytest.mark.parametrize(
    ("psnr", "ssim", "grade", "phrase"),
    [
        (70, 1.0, "leaked", "the same picture"),
        (40, 0.99, "leaked", "at once"),
        (22, 0.7, "leaked", "visible errors"),
        (22, 0.1, "partly", "hardly recognize"),
        (17, 0.5, "partly", "hardly recognize"),
        (9, 0.1, "not_recovered", "not recognize"),
    ],
)
def test_one_image(psnr: float, ssim: float, grade: str, phrase: str) -> None:
    verdict = judge(SUBJECT, OUTCOME, [example(psnr, ssim)])
    assert verdict.grade == grade
    assert phrase in verdict.reason


def test_a_batch_counts_and_names_the_worst() -> None:
    subject = replace(SUBJECT, batch_size=3)
    verdict = judge(subject, OUTCOME, [example(9), example(35), example(60)])
    assert verdict.headline == "2 of 3 private images came back."
    assert "Worst example: MSE 0.13" in verdict.reason
    assert judge(subject, OUTCOME, [example(40)] * 3).headline == "All 3 private images came back."
    assert judge(subject, OUTCOME, [example(9)] * 3).headline == "None of the 3 private images came back."


def test_no_better_than_a_guess_is_said_and_an_oracle_is_no_guess() -> None:
    guess = Lift("gray", 12.0, 0.5)
    assert "no better than a guess" in judge(SUBJECT, OUTCOME, [example(12.5)], [guess]).reason
    assert (
        "no better than a guess" not in judge(SUBJECT, OUTCOME, [example(12.5)], [replace(guess, oracle=True)]).reason
    )
    assert "no better than a guess" not in judge(SUBJECT, OUTCOME, [example(18)], [replace(guess, lift=6.0)]).reason


def test_a_failed_attack_is_no_evidence_of_protection() -> None:
    assert any("no evidence of protection" in s for s in judge(SUBJECT, OUTCOME, [example(9)]).meaning)
    assert any("no evidence of protection" in s for s in judge(SUBJECT, OUTCOME, None, (), Match(0.5, 1e-7)).meaning)


def test_an_example_without_a_usable_reconstruction_is_the_worst() -> None:
    lost = Example(0, None, 1, None, {"mse": None, "psnr": None, "ssim": None})
    verdict = judge(replace(SUBJECT, batch_size=2), OUTCOME, [example(40), lost])
    assert verdict.headline == "1 of 2 private images came back."
    assert "no usable reconstruction" in verdict.reason


@pytest.mark.parametrize(
    ("residual", "floor", "grade"),
    [(5e-7, 1.2e-7, "matched"), (1e-4, 1.2e-7, "close"), (0.3, 1.2e-7, "unmatched"), (0.3, 7.8e-3, "unmatched")],
)
def test_without_truth_the_update_decides(residual: float, floor: float, grade: str) -> None:
    verdict = judge(SUBJECT, OUTCOME, None, (), Match(residual, floor))
    assert verdict.grade == grade
    assert any("--truth" in s for s in verdict.meaning)


def test_matched_without_uniqueness_is_not_proved() -> None:
    verdict = judge(SUBJECT, OUTCOME, None, (), Match(1e-8, 1e-7))
    assert any("does not prove" in s for s in verdict.meaning)
    assert "prove" not in verdict.headline


def test_a_certificate_that_proves_is_quoted_as_proof() -> None:
    certificate = CertificateRecord("proved", 1e-8, 1e-7, 100, 100)
    assert judge(SUBJECT, OUTCOME, None, (), Match(1e-8, 1e-7), certificate).grade == "proved"


def test_an_unproved_certificate_is_never_called_matched() -> None:
    certificate = CertificateRecord("unproved", 1e-8, 1e-7)
    assert judge(SUBJECT, OUTCOME, None, (), Match(1e-8, 1e-7), certificate).grade == "close"


def test_a_scaled_update_is_proved_up_to_its_factor() -> None:
    certificate = CertificateRecord("proved", 1e-8, 1e-7, 100, 100, factor=7.0)
    verdict = judge(SUBJECT, OUTCOME, None, (), Match(0.86, 1e-7), certificate)
    assert verdict.grade == "proved"
    assert "up to a common factor of 7.00" in verdict.reason
    assert any("clipping" in s for s in verdict.meaning)
    assert "factor" not in judge(SUBJECT, OUTCOME, None, (), None, replace(certificate, factor=1.0)).reason


def test_an_input_that_was_solved_is_a_leak_whatever_was_stated() -> None:
    certificate = CertificateRecord("unproved", 0.9, 1e-7)
    solved = replace(OUTCOME, status="exact")
    verdict = judge(SUBJECT, solved, None, (), Match(0.9, 1e-7), certificate)
    assert verdict.grade == "solved"
    assert "does not fit the rest" in verdict.headline
    assert judge(SUBJECT, OUTCOME, None, (), Match(0.9, 1e-7), certificate).grade == "unmatched"
    assert judge(SUBJECT, solved, None, (), None, None).grade == "solved"


def test_features_are_not_called_images() -> None:
    shown = replace(OUTCOME, status="exact", shows="features")
    several = replace(SUBJECT, batch_size=4)
    proved = CertificateRecord("proved", 1e-8, 1e-7, None, 16, ("exact",) * 4, "Of the features.")
    verdict = judge(several, shown, None, (), None, proved)
    assert (verdict.grade, "last layer" in verdict.headline) == ("proved", True)
    assert "image" not in verdict.headline
    some = replace(proved, verdict="matched", examples=("exact", "exact", "not identifiable", "not identifiable"))
    assert "2 of 4" in judge(several, shown, None, (), None, some).headline
    none = replace(proved, verdict="unproved", examples=("not identifiable",) * 4)
    assert judge(several, shown, None, (), None, none).grade == "unmatched"


def test_one_floor_is_stated() -> None:
    certificate = CertificateRecord("unproved", 1.6e-3, 6.5e-3, reason="Most differs 'head'.")
    verdict = judge(SUBJECT, OUTCOME, None, (), Match(1.6e-3, 7.8e-3), certificate)
    assert verdict.grade == "close"
    assert "0.0065" in verdict.reason
    assert "0.0078" not in verdict.reason
    assert "Most differs" in verdict.reason  # Below the floor on the whole, so what differs must be said.


def test_no_match_at_all() -> None:
    assert judge(SUBJECT, OUTCOME, None).grade == "unmatched"


def test_interruption_is_said_first() -> None:
    verdict = judge(SUBJECT, replace(OUTCOME, status="interrupted"), [example(9)])
    assert "interrupted" in verdict.meaning[0]


VALUES = replace(SUBJECT, input_kind="tensor", input_shape=(7,))


def row(error: float, ratio: float = 1e-3, mse: float = 62.0) -> Example:
    return Example(0, 0, None, None, {"mse": mse, "relative_error": error, "null_guess_ratio": ratio})


@pytest.mark.parametrize(
    ("error", "grade", "phrase"),
    [
        (6e-4, "leaked", "a thousandth"),
        (6e-3, "leaked", "a hundredth"),
        (6e-2, "partly", "only roughly"),
        (0.6, "not_recovered", "do not agree"),
    ],
)
def test_values_count_by_their_relative_error(error: float, grade: str, phrase: str) -> None:
    for mse in (62.0, 1e-12):
        verdict = judge(VALUES, OUTCOME, [row(error, mse=mse)])
        assert verdict.grade == grade
        assert phrase in verdict.reason
        assert "Relative error" in verdict.reason
        assert "MSE" not in verdict.reason


@pytest.mark.parametrize("error", [1e-5, 5e-3, 5e-2, 100.0])
@pytest.mark.parametrize("ratio", [0.9, 1.0, 100.0])
def test_what_a_null_guess_reaches_never_came_back(error: float, ratio: float) -> None:
    verdict = judge(VALUES, OUTCOME, [row(error, ratio)])
    assert verdict.grade == "not_recovered"
    assert "not clearly better than a guess" in verdict.reason


def test_the_worst_values_are_worst_by_their_relative_error() -> None:
    verdict = judge(replace(VALUES, batch_size=2), OUTCOME, [row(0.5, mse=1e-6), row(1e-4, mse=62.0)])
    assert "Worst example: Relative error 0.50" in verdict.reason
    assert verdict.headline == "1 of 2 private examples came back."


def test_values_that_are_no_images_are_not_called_images() -> None:
    subject = replace(SUBJECT, input_kind="tensor", input_shape=(7,))
    verdict = judge(subject, OUTCOME, [Example(0, 0, None, None, {"mse": 1e-9})])
    assert verdict.headline == "The private example came back."
    assert "picture" not in verdict.reason
