"""The answer in plain words, with the figures behind it, what it proves, and what it does not."""

from __future__ import annotations

import math
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
        verdict = _from_update(subject, outcome, match, certificate)
    return Verdict(verdict.grade, verdict.headline, verdict.reason, unfinished + verdict.meaning, _REMEDIES)


def _level(example: Example, is_image: bool) -> int:
    """Return 4 (identical on a screen), 3 (hard to tell apart), 2 (recognizable), 1 (coarse) or 0."""
    if not is_image and example.relative_error is not None:
        return sum(example.better and example.relative_error <= limit for limit in (1e-1, 1e-2, 1e-3))
    if example.mse is None:
        return 0
    if example.psnr is None or not is_image:  # scored without a relative error, as earlier versions did
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
    3: "The values agree to about a thousandth of their size.",
    2: "The values agree to about a hundredth of their size.",
    1: "The values agree only roughly.",
    0: "The values do not agree.",
}
_NO_BETTER = "That is not clearly better than a guess without the update: zeros, or a mean of the private values."


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

    def error(example: Example) -> float:
        value = example.mse if image or example.relative_error is None else example.relative_error
        return float("inf") if value is None else value

    worst = max(examples, key=error)
    if worst.mse is None:
        return "The worst example has no usable reconstruction."
    if not image and worst.relative_error is not None:
        figures = f"Relative error {sig(worst.relative_error)}"
        phrase = _PHRASES_VALUES[_level(worst, image)] if worst.better else _NO_BETTER
        return f"{'Worst example: ' if len(examples) > 1 else ''}{figures}. {phrase}"
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


def _from_update(
    subject: Subject, outcome: Outcome, match: Match | None, certificate: CertificateRecord | None
) -> Verdict:
    plural = subject.batch_size > 1
    noun = "image" if subject.input_kind == "image" else "example"
    nouns = f"{noun}s" if plural else noun
    if outcome.shows == "features":
        return _of_features(subject, certificate)
    if certificate is not None and certificate.verdict == "proved":
        return _proved(subject, nouns, certificate)
    # The attack's own measurement of what the client's rounding adds up to, where there is one.
    known = certificate is not None and math.isfinite(certificate.residual) and certificate.floor > 0
    floor = certificate.floor if certificate is not None and known else None if match is None else match.floor
    residual = match.residual if match is not None else certificate.residual if certificate and known else None
    figures = "" if residual is None or floor is None else f"residual {sig(residual)}, noise floor {sig(floor)}"
    matched = certificate is not None and certificate.verdict == "matched"
    if matched or (certificate is None and match is not None and _is_matched(match)):
        factor = 1.0 if certificate is None else certificate.factor
        return Verdict(
            "matched",
            f"The update is fully explained by the reconstructed {nouns}.",
            f"Training on the reconstruction causes the captured update{_times(factor)}, down to the noise of its "
            f"number format ({_figures(certificate) if certificate is not None and factor != 1 else figures}).",
            (
                "This proves that the attacker found data which explain everything the client shared. It does not "
                "prove that they are the only such data: uniqueness was "
                + ("not established." if matched else "not checked."),
                *((certificate.reason,) if certificate is not None and certificate.reason else ()),
                _LOOK,
            ),
        )
    if outcome.status == "exact":
        why = next((f" {n}" for n in outcome.notes if n.startswith("The solved inputs run")), "")
        near = residual is not None and residual <= _CLOSE
        return Verdict(
            "solved",
            f"The private {nouns} {'were' if plural else 'was'} read off the update"
            + ("." if near else ", which does not fit the rest of what was stated."),
            f"The gradients determine the {nouns} by linear algebra, and fit down to rounding, whatever loss, label, "
            "sign or step size the client had. Simulated with the stated training, the reconstruction causes "
            f"{'nearly the captured' if near else 'another'} update{f' ({figures})' if figures else ''}.{why}",
            (
                "Look at it: what is shown is what the client trained on, up to the range and normalization stated.",
                "Check what was stated: normalization, loss and label smoothing, labels, gradient or weight delta, "
                "learning rate, dropout and mode.",
                _LOOK,
            ),
        )
    if residual is None:
        return Verdict(
            "unmatched",
            "Whether private data came back cannot be told.",
            "The update of the reconstruction could not be computed, and no ground truth was given."
            + (f" {certificate.reason}" if certificate is not None and certificate.reason else ""),
            (_LOOK,),
        )
    below = floor is not None and residual <= floor
    more = f" {certificate.reason}" if certificate is not None and certificate.reason and below else ""
    if residual <= _CLOSE:
        return Verdict(
            "close",
            "The update is explained closely, but not completely.",
            (
                f"Training on the reconstruction causes the captured update up to {residual:.1%} of its length "
                f"({figures})."
                if residual >= 5e-4
                else f"Training on the reconstruction causes nearly the captured update ({figures})."
            )
            + more,
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
        "The update is not explained: this attack found no data that cause it.",
        f"Training on the reconstruction causes another update than the captured one ({figures}).",
        (
            "That is no evidence of protection: a stronger attack, more time, another seed or the right training "
            "procedure may succeed.",
            "Check first that model, weights, loss, normalization and number of examples are those of the client.",
            _LOOK,
        ),
    )


def _proved(subject: Subject, nouns: str, certificate: CertificateRecord) -> Verdict:
    plural = subject.batch_size > 1
    it, causes = (f"these {subject.batch_size} {nouns}", "They cause") if plural else (f"this {nouns}", "It causes")
    scaled = _times(certificate.factor)
    return Verdict(
        "proved",
        f"The update proves that the client trained on {it}.",
        f"{causes} exactly the captured update{scaled}, down to the noise floor of its number format "
        f"({_figures(certificate)}), and no nearby {'batch' if plural else 'one'} does.",
        (
            "No ground truth was needed: anyone with this update can obtain the same result and know that it is right.",
            "The proof is local: a second, entirely different batch with the same update is not excluded by it.",
            "It holds for the model and the training procedure stated below; if the client trained otherwise, the "
            "match would be a coincidence."
            if not scaled
            else "The scale is not that of the stated training, so check loss reduction, batch size, learning rate and "
            "clipping; the proof does not depend on it.",
        ),
    )


def _times(factor: float) -> str:
    """Return how the captured update differs in scale from what the stated training gives."""
    return "" if abs(factor - 1) <= 1e-3 else f" up to a common factor of {sig(factor, 3)}"


def _figures(certificate: CertificateRecord) -> str:
    return f"residual {sig(certificate.residual)}, floor {sig(certificate.floor)}"


def _of_features(subject: Subject, certificate: CertificateRecord | None) -> Verdict:
    count = subject.batch_size
    whose = f"all {count} examples" if count > 1 else "the example"
    sure = () if certificate is None else [e for e in certificate.examples if e in ("proved", "exact")]
    next_ = (
        "Features are no pictures, but they name the classes and serve every further attack: auto and feature_matching "
        "go on from them to the inputs.",
        "Labels and number of examples follow from them.",
    )
    reason = "" if certificate is None else certificate.reason
    if certificate is not None and certificate.verdict == "proved":
        return Verdict("proved", f"The update proves what the last layer saw of {whose}.", reason, next_)
    if sure:
        headline = f"The update shows what the last layer saw of {len(sure)} of {count} examples."
        return Verdict("matched", headline, reason, next_)
    headline = "What the last layer saw of the examples could not be told apart."
    return Verdict("unmatched", headline, reason or "The head's gradient is not explained.", (_LOOK,))


_LOOK = (
    "No ground truth was given, so no score is possible; look at the reconstruction, or run again with the private "
    "data as --truth."
)


def _is_matched(match: Match) -> bool:
    """Say whether the residual is rounding: a network's arithmetic accumulates some, a coarse format dominates it."""
    return match.residual <= min(_FLOOR * match.floor, max(2 * match.floor, 1e-5))
