"""The answer in plain words, with the figures behind it, what it proves, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence

from gradleak.audit.numbers import duration, sig
from gradleak.audit.records import CertificateRecord, Example, Lift, Match, Outcome, Subject, Verdict

__all__ = ["HALF_GRAY", "judge"]

HALF_GRAY = 54.15
"""PSNR in dB at which the root-mean-square error is half a gray level of an 8-bit screen, −20·log10(0.5 / 255)."""
_HARD_TO_SEE = 30.0
_RECOGNIZABLE = 20.0
_COARSE = 15.0
# A blurred or constant picture of the right brightness may pass 20 dB, but never this structural similarity.
_SSIM = 0.4
_FLOOR = 10.0
_CLOSE = 1e-2

_REMEDIES = (
    "Secure aggregation, so that the server only ever sees sums over many clients and never the update of one.",
    "Differentially private training (clip the gradient of each example, add calibrated noise): its guarantee holds "
    "against every attacker, not only against the one tried here, at a cost in accuracy that must be measured.",
    "Larger batches, more local steps and rounded numbers make an attack slower, but are no protection by themselves.",
    "Measure the remedy: protect the update as planned, capture it again, and run the same attack on it.",
)


def judge(
    subject: Subject,
    outcome: Outcome,
    examples: Sequence[Example] | None,
    lifts: Sequence[Lift] = (),
    match: Match | None = None,
    certificate: CertificateRecord | None = None,
) -> Verdict:
    """Return the verdict: against the private data where they are known, otherwise from the update alone.

    The thresholds in dB are rules of thumb of the field, not properties of people; the report says so.
    """
    if outcome.status == "interrupted":
        unfinished: tuple[str, ...] = ("The attack was interrupted; left to run, it may have come closer.",)
    else:
        unfinished = ()
    if examples:
        verdict = _against_truth(subject, outcome, examples, lifts)
    else:
        verdict = _from_update(subject, match, certificate)
    return Verdict(verdict.grade, verdict.headline, verdict.reason, unfinished + verdict.meaning, _REMEDIES)


def _level(example: Example, is_image: bool) -> int:
    """Return 4 (identical on a screen), 3 (hard to tell apart), 2 (recognizable), 1 (coarse) or 0."""
    if example.mse is None:
        return 0
    if example.psnr is None or not is_image:
        return 3 if example.mse <= 1e-6 else 2 if example.mse <= 1e-4 else 1 if example.mse <= 1e-2 else 0
    if example.psnr >= HALF_GRAY:
        return 4
    similar = example.ssim is None or example.ssim >= _SSIM
    levels = (_COARSE, _RECOGNIZABLE if similar else _HARD_TO_SEE, _HARD_TO_SEE)
    return sum(example.psnr >= threshold for threshold in levels)


_PHRASES = {
    4: "The difference is smaller than half a gray level of a screen: to a person the two are the same picture.",
    3: "Differences are hard to see: a person would recognize it at once.",
    2: "A person would recognize it, with visible errors.",
    1: "Coarse shapes and colors came back; a person would hardly recognize it.",
    0: "A person would not recognize it.",
}
_PHRASES_VALUES = {
    3: "The values agree to about three decimal places.",
    2: "The values agree to about two decimal places.",
    1: "The values agree only roughly.",
    0: "The values do not agree.",
}


def _against_truth(subject: Subject, outcome: Outcome, examples: Sequence[Example], lifts: Sequence[Lift]) -> Verdict:
    image, n = subject.input_kind == "image", len(examples)
    noun = "image" if image else "example"
    private = f"private {noun}{'s' if n > 1 else ''}"
    levels = [_level(e, image) for e in examples]
    back = sum(level >= 2 for level in levels)
    sentences = [_worst(examples, image)]
    if back and outcome.seconds > 0:
        sentences.append(f"It took {duration(outcome.seconds)} and one update; the attacker never saw the {private}.")
    useless = [lift for lift in lifts if not lift.oracle and lift.lift is not None and lift.lift < 1]
    if back == 0 and useless:
        best = max(lift.psnr for lift in useless)
        sentences.append(f"It is no better than a guess that never saw the update ({sig(best, 3)}\u202fdB).")
    reason = " ".join(sentences)
    if back:
        everything = f"The {private} came back." if n == 1 else f"All {n} {private} came back."
        return Verdict("leaked", everything if back == n else f"{back} of {n} {private} came back.", reason, _LEAKED)
    if max(levels) == 1:
        return Verdict("partly", f"Only a coarse impression of the {private} came back.", reason, _FAILED)
    headline = f"The {private} did not come back." if n == 1 else f"None of the {n} {private} came back."
    return Verdict("not_recovered", headline, reason, _FAILED)


def _worst(examples: Sequence[Example], image: bool) -> str:
    """Return the figures of the worst example and what they mean to a person."""
    worst = max(examples, key=lambda e: float("inf") if e.mse is None else e.mse)
    if worst.mse is None:
        return "The worst example has no usable reconstruction."
    figures = f"MSE {sig(worst.mse)}"
    figures += f", PSNR {sig(worst.psnr, 3)}\u202fdB" if worst.psnr is not None else ""
    figures += f", SSIM {sig(worst.ssim, 3)}" if worst.ssim is not None else ""
    phrase = (_PHRASES if image else _PHRASES_VALUES)[_level(worst, image)]
    return f"{'Worst example: ' if len(examples) > 1 else ''}{figures}. {phrase}"


_LEAKED = (
    "Whoever can read this one update – the operator of the server, or anyone with access to its traffic, memory or "
    "logs – can reconstruct the private data behind it.",
    "The score compares the result with the private data after the attack was over; the attacker saw only what is "
    "listed under “What was attacked”.",
    "This is one batch and one seed. How often it happens is a question for an audit over many.",
)
_FAILED = (
    "This attack did not succeed on this update. That is no evidence of protection: a stronger attack, more time, "
    "another seed or better knowledge of the training procedure may succeed.",
    "The score compares the result with the private data after the attack was over; the attacker saw only what is "
    "listed under “What was attacked”.",
)


def _from_update(subject: Subject, match: Match | None, certificate: CertificateRecord | None) -> Verdict:
    noun = "image" if subject.input_kind == "image" else "example"
    it, its = ("this " + noun, "It") if subject.batch_size == 1 else (f"these {subject.batch_size} {noun}s", "They")
    if certificate is not None and certificate.verdict == "proved":
        return Verdict(
            "proved",
            f"The update proves that the client trained on {it}.",
            f"{its} cause exactly the captured update, down to the noise floor of its number format "
            f"(residual {sig(certificate.residual)}, floor {sig(certificate.floor)}), and no nearby batch does."
            if its == "They"
            else f"It causes exactly the captured update, down to the noise floor of its number format "
            f"(residual {sig(certificate.residual)}, floor {sig(certificate.floor)}), and no nearby one does.",
            (
                "No ground truth was needed: anyone with this update can obtain the same result and know that it is "
                "right.",
                "The proof is local: a second, entirely different batch with the same update is not excluded by it.",
                "It holds for the model and the training procedure stated below; if the client trained otherwise, the "
                "match would be a coincidence.",
            ),
        )
    if match is None:
        return Verdict(
            "unmatched",
            "Whether private data came back cannot be told.",
            "The update of the reconstruction could not be computed, and no ground truth was given.",
            (_LOOK,),
        )
    figures = f"residual {sig(match.residual)}, noise floor {sig(match.floor)}"
    matched = certificate is not None and certificate.verdict == "matched"
    if matched or (certificate is None and _is_matched(match)):
        return Verdict(
            "matched",
            f"The update is fully explained by the reconstructed {noun}{'s' if subject.batch_size > 1 else ''}.",
            f"Training on the reconstruction causes the captured update, down to the noise of its number format "
            f"({figures}).",
            (
                "This proves that the attacker found data which explain everything the client shared. It does not "
                "prove that they are the only such data: uniqueness was "
                + ("not established." if matched else "not checked."),
                _LOOK,
            ),
        )
    if match.residual <= _CLOSE:
        return Verdict(
            "close",
            "The update is explained closely, but not completely.",
            f"Training on the reconstruction causes the captured update up to {match.residual:.1%} of its length "
            f"({figures})."
            if match.residual >= 5e-4
            else f"Training on the reconstruction causes nearly the captured update ({figures}).",
            (
                "A close match usually shows a recognizable picture, yet nothing is proved: different data may cause "
                "nearly the same update.",
                "The rest may be noise in the update, a training procedure that differs from the stated one, or an "
                "attack that stopped early.",
                _LOOK,
            ),
        )
    return Verdict(
        "unmatched",
        "The update is not explained: this attack found no private data.",
        f"Training on the reconstruction causes another update than the captured one ({figures}).",
        (
            "That is no evidence of protection: a stronger attack, more time, another seed or the right training "
            "procedure may succeed.",
            "Check first that model, weights, loss and number of examples are those of the client.",
            _LOOK,
        ),
    )


_LOOK = (
    "No ground truth was given, so no score is possible; look at the reconstruction, or run again with the private "
    "data as --truth."
)


def _is_matched(match: Match) -> bool:
    """Say whether the residual is rounding: a network's arithmetic accumulates some, a coarse format dominates it."""
    return match.residual <= min(_FLOOR * match.floor, max(2 * match.floor, 1e-5))
