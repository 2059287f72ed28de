from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gradleak.audit.records import (
    CertificateRecord,
    Example,
    FindingRecord,
    Lift,
    Match,
    Outcome,
    Subject,
    Success,
    Verdict,
)
from gradleak.audit.verdict import judge, judge_refusal
from gradleak.spaces import ImageSpace, TensorSpace
from gradleak.spaces.images import HALF_GRAY

SUBJECT = Subject(
    "lenet",
    "LeNet",
    10,
    2,
    "image",
    (3, 32, 32),
    100,
    1,
    "gradient",
    "float32",
    "FedSGD",
    noun="image",
    nouns="images",
    display="pictures",
    quoted=("mse", "psnr", "ssim"),
)
OUTCOME = Outcome("converged", 1e-9, 100, 120, 12.0)


def example(psnr: float, ssim: float = 0.9) -> Example:
    values = {"mse": 10 ** (-psnr / 10), "psnr": psnr, "ssim": ssim}
    level, words = ImageSpace().closeness(values)
    return Example(0, 0, 1, 1, values, level=level, words=words)


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
    assert "Worst example: MSE 0.13, PSNR 9.00" in verdict.reason
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
    verdict = judge(replace(SUBJECT, batch_size=2), OUTCOME, [lost, example(40)])
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
    unchecked = judge(SUBJECT, solved, None, (), None, None)
    assert (unchecked.grade, unchecked.headline) == ("solved", "The private image was read off the update.")
    assert "could not be checked" in unchecked.reason
    free = judge(SUBJECT, solved, None, (), None, replace(certificate, residual=math.nan, factors={"fc.weight": 2.0}))
    assert free.headline == "The private image was read off the update, up to a factor."
    ranged = replace(solved, notes=("The solved inputs run from 0 to 300.",), note_kinds=("range",))
    assert "run from 0 to 300" in judge(SUBJECT, ranged, None, (), Match(0.9, 1e-7), certificate).reason
    unkind = replace(ranged, note_kinds=("method",))
    assert "run from" not in judge(SUBJECT, unkind, None, (), Match(0.9, 1e-7), certificate).reason


def test_features_are_not_called_images() -> None:
    shown = replace(OUTCOME, status="exact", shows="features")
    several = replace(SUBJECT, batch_size=4)
    proved = CertificateRecord("proved", 1e-8, 1e-7, None, 16, ("proved",) * 4, "Of the features.")
    verdict = judge(several, shown, None, (), None, proved)
    assert (verdict.grade, "last layer" in verdict.headline) == ("proved", True)
    assert verdict.headline == "The update proves what the last layer saw of all 4 images."
    some = replace(proved, verdict="matched", examples=("proved", "proved", "unproved", "unproved"))
    assert "2 of 4" in judge(several, shown, None, (), None, some).headline
    none = replace(proved, verdict="unproved", examples=("unproved",) * 4)
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


VALUES = replace(
    SUBJECT,
    input_kind="tensor",
    input_shape=(7,),
    noun="example",
    nouns="examples",
    display="numbers",
    quoted=("relative_error",),
)


def row(error: float, mse: float = 62.0) -> Example:
    values = {"mse": mse, "relative_error": error, "null_guess_ratio": error}
    level, words = TensorSpace((7,)).closeness(values)
    return Example(0, 0, None, None, values, level=level, words=words)


@pytest.mark.parametrize(
    ("error", "grade", "phrase"),
    [
        (6e-6, "leaked", "five digits"),
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


def test_the_worst_values_are_worst_by_their_relative_error() -> None:
    verdict = judge(replace(VALUES, batch_size=2), OUTCOME, [row(0.5, mse=1e-6), row(1e-4, mse=62.0)])
    assert "Worst example: Relative error 0.50" in verdict.reason
    assert verdict.headline == "1 of 2 private examples came back."


LABELS = FindingRecord("labels", "The classes of 58 of 64 examples were read off the update.", True, 58, 64)


class TestFindings:
    """What was read although the inputs did not come back is the headline: 58 of 64 diagnoses are a leak."""

    FOUND = replace(OUTCOME, findings=(FindingRecord("batch_size", "It has 64.", True, 64, 64), LABELS))
    MANY = replace(SUBJECT, batch_size=64)

    def test_without_truth(self) -> None:
        verdict = judge(self.MANY, self.FOUND, None, (), Match(0.9, 1e-7), CertificateRecord("unproved", 0.9, 1e-7))
        assert (verdict.grade, verdict.headline) == ("partly", LABELS.text)
        assert "The update is not explained" in verdict.reason
        assert any("a leak of its own" in s for s in verdict.meaning)

    def test_an_estimate_is_called_one(self) -> None:
        guessed = replace(self.FOUND, findings=(replace(LABELS, proved=False),))
        headline = judge(self.MANY, guessed, None, (), Match(0.9, 1e-7)).headline
        assert headline == "The classes of 58 of 64 examples were read off the update (an estimate, not proved)."

    def test_with_truth_only_what_is_right_counts(self) -> None:
        def verdict(share: float):
            return judge(self.MANY, self.FOUND, [example(9)] * 64, success=Success(1e-3, 0, 64, 0.0, 0.1, share))

        assert verdict(0.5).headline == "The classes of 32 of 64 images were read off the update."
        assert verdict(0.5).grade == "partly"
        assert "None of the 64 private images came back." in verdict(0.5).reason
        assert verdict(1.0).headline.startswith("The classes of 58 of 64")
        assert verdict(0.0).grade == "not_recovered"

    def test_do_not_hide_what_came_back(self) -> None:
        verdict = judge(self.MANY, self.FOUND, [*[example(9)] * 60, *[example(40)] * 4])
        assert (verdict.grade, verdict.headline) == ("leaked", "4 of 64 private images came back.")
        assert LABELS.text in verdict.reason
        whole = judge(self.MANY, self.FOUND, [example(40)] * 64)
        assert whole.headline == "All 64 private images came back."
        assert LABELS.text not in whole.reason  # whoever has the images has the classes
        coarse = judge(self.MANY, self.FOUND, [example(17)] * 64)
        assert "coarse impression" in coarse.headline
        assert LABELS.text in coarse.reason

    def test_nothing_found_and_a_size_alone_are_no_leak(self) -> None:
        for finding in (replace(LABELS, count=0), self.FOUND.findings[0]):
            alone = replace(OUTCOME, findings=(finding,))
            assert judge(self.MANY, alone, None, (), Match(0.9, 1e-7)).grade == "unmatched"

    @pytest.mark.parametrize("status", ["not_applicable", "missing_knowledge"])
    def test_a_refusal(self, status: str) -> None:
        refused = Outcome(status, math.nan, 0, 0, 0.0)
        verdict = judge_refusal(refused, "The model has two outputs; name one.")
        assert (verdict.grade, verdict.reason) == (status, "The model has two outputs; name one.")
        assert any("no evidence of protection" in s for s in verdict.meaning)
        assert verdict.remedies == ()
        found = judge_refusal(replace(refused, findings=(LABELS,)), "The model has two outputs; name one.")
        assert (found.grade, found.headline) == ("partly", LABELS.text)
        assert "two outputs" in found.reason


class TestWhatIsProved:
    PROOF = CertificateRecord("proved", 1e-8, 1e-7, 100, 100)

    def headline(self, certificate: CertificateRecord, **changes: object) -> str:
        return judge(replace(SUBJECT, **changes), OUTCOME, None, (), Match(1e-8, 1e-7), certificate).headline

    def test_this_one_or_one_that_the_model_cannot_tell_from_it(self) -> None:
        local = replace(self.PROOF, local=True)
        assert self.headline(self.PROOF) == "The update proves that the client trained on this image."
        assert self.headline(local).endswith("this image, or on one that the model cannot tell from it.")
        assert "others that the model cannot tell from them" in self.headline(local, batch_size=4)

    def test_a_sentence_is_a_sentence(self) -> None:
        subject = {"noun": "sentence", "nouns": "sentences", "input_kind": "tokens"}
        assert self.headline(self.PROOF, batch_size=2, **subject).endswith("trained on these 2 sentences.")

    def test_a_batch_size_that_nobody_stated_is_named(self) -> None:
        assumed = self.headline(self.PROOF, batch_size_source="assumed")
        assert assumed == "Assuming one image, the update proves that the client trained on this image."

    def test_a_mean_of_several_is_not_called_the_input(self) -> None:
        mixed = CertificateRecord("matched", 1e-8, 1e-7, mixture=True, reason="A mean explains it as well.")
        assert self.headline(mixed) == "The update comes from this image or a mean of several."
        assert "mixtures of several" in self.headline(mixed, batch_size=3)
        assert "Assuming" not in self.headline(mixed, batch_size_source="assumed")

    def test_some_of_a_batch(self) -> None:
        some = CertificateRecord("unproved", 0.1, 1e-7, examples=("proved", "unproved", "proved"))
        verdict = judge(replace(SUBJECT, batch_size=3), OUTCOME, None, (), Match(0.1, 1e-7), some)
        assert (verdict.grade, verdict.headline) == ("partly", "The update proves 2 of the 3 images.")
        solved = replace(OUTCOME, solved=(0, 2))
        verdict = judge(replace(SUBJECT, batch_size=3), solved, None, (), Match(0.1, 1e-7))
        assert (verdict.grade, verdict.headline) == ("partly", "2 of 3 private images were read off the update.")

    def test_factors_of_tensors_are_named(self) -> None:
        free = replace(self.PROOF, factors={"fc.weight": 0.5, "fc.bias": 0.1})
        reason = judge(SUBJECT, OUTCOME, None, (), Match(0.5, 1e-7), free).reason
        assert "up to a factor for each of 2 tensors" in reason

    @pytest.mark.parametrize("said", ["proved", "matched", "unproved"])
    def test_noise_above_the_update_matches_nothing(self, said: str) -> None:
        hidden = CertificateRecord(said, 0.99, 1.02)
        verdict = judge(SUBJECT, OUTCOME, None, (), Match(0.99, 1e-7), hidden)
        assert verdict.grade == "unmatched"
        assert verdict.headline == ("The stated noise hides the update: no attack can tell this guess from another.")


def test_what_linear_algebra_solved_is_no_guess_that_noise_could_hide() -> None:
    solved = replace(OUTCOME, status="exact")
    hidden = CertificateRecord("unproved", 0.99, 1.02)
    assert judge(SUBJECT, solved, None, (), Match(0.99, 1e-7), hidden).grade == "solved"


def test_a_close_match_stays_close_beside_what_was_found() -> None:
    verdict = judge(SUBJECT, replace(OUTCOME, findings=(LABELS,)), None, (), Match(1e-4, 1e-7))
    assert verdict.grade == "close"
    assert LABELS.text in verdict.reason


def test_a_bound_and_what_is_proved_of_a_matched_batch_are_stated() -> None:
    proof = CertificateRecord("proved", 1e-8, 1e-7, bound=3e-7)
    assert "root mean square error is at most 3.0" in judge(SUBJECT, OUTCOME, None, (), None, proof).reason
    some = CertificateRecord("matched", 1e-8, 1e-7, examples=("proved", "matched"))
    verdict = judge(replace(SUBJECT, batch_size=2), OUTCOME, None, (), Match(1e-8, 1e-7), some)
    assert (verdict.grade, "1 of the 2 images is proved" in verdict.reason) == ("matched", True)


def test_a_budget_is_said_first() -> None:
    assert "used up" in judge(SUBJECT, replace(OUTCOME, status="budget"), [example(9)]).meaning[0]
    assert "used up" not in judge(SUBJECT, replace(OUTCOME, status="budget"), [example(60)]).meaning[0]


def test_a_proof_that_the_truth_contradicts_is_questioned() -> None:
    proof = CertificateRecord("proved", 1e-8, 1e-7)
    assert "check that the private data" in judge(SUBJECT, OUTCOME, [example(9)], certificate=proof).reason


class TestPart:
    """Some tensors determine the input whatever the rest is: nothing may be said of the rest."""

    NAMED = CertificateRecord("proved", 1e-7, 4e-7, bound=1e-4, reason="It follows.", part=("patch.weight",))

    def told(self, status: str = "exact", **changes: object) -> Verdict:
        certificate = replace(self.NAMED, **changes)  # type: ignore[arg-type]
        return judge(SUBJECT, replace(OUTCOME, status=status), None, (), None, certificate)

    def test_a_proof_names_what_it_compared(self) -> None:
        verdict = self.told()
        assert (verdict.grade, verdict.headline) == (
            "proved",
            "The update proves that the client trained on this image.",
        )
        assert "'patch.weight'" in verdict.reason
        assert "whatever loss, label and dropout masks" in verdict.reason
        assert "captured update" not in verdict.reason

    def test_less_than_a_proof(self) -> None:
        assert "up to a factor" in self.told(verdict="matched", factors={"patch.weight": 0.5}).headline
        assert "a mean of several" in self.told("converged", verdict="matched", mixture=True).headline
        assert self.told(verdict="unproved").grade == "solved"
        assert self.told("converged", verdict="unproved").grade == "unmatched"
