"""The answer in plain words, with the figures behind it, what it proves, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from gradleak.audit.numbers import duration, metric_name, sig
from gradleak.audit.records import (
    REFUSED,
    CertificateRecord,
    ColumnScore,
    Example,
    FindingRecord,
    Lift,
    Match,
    Outcome,
    Subject,
    Success,
    Verdict,
)

__all__ = ["judge", "judge_refusal"]

_FLOOR = 10.0
_CLOSE = 1e-2
_HIDES = 0.5
"""Relative noise floor from which on nearly every guess explains the update: a guess of zero misses it by 1."""
_UNITS = {"psnr": "\u202fdB"}
_TELLING = ("rows", "tokens", "columns", "features", "labels", "counts")
"""Findings that a headline may name, the most telling first; a batch size alone is no leak."""

_REMEDIES = (
    "Secure aggregation, so that the server only ever sees sums over many clients and never the update of one.",
    "Differentially private training (clip the gradient of each example, add calibrated noise): its guarantee holds "
    "against every attacker, not only against the one tried here, at a cost in accuracy that must be measured.",
    "Larger batches, more local steps and rounded numbers make an attack slower, but are no protection by themselves.",
    "Measure the remedy: protect the update as planned, capture it again, and run the same attack on it.",
)
_UNFINISHED = {
    "interrupted": ("The attack was interrupted; left to run, it may have come closer.",),
    "budget": ("The attack used up its iterations or time; with more of them, it may have come closer.",),
}


def judge(
    subject: Subject,
    outcome: Outcome,
    examples: Sequence[Example] | None,
    lifts: Sequence[Lift] = (),
    match: Match | None = None,
    certificate: CertificateRecord | None = None,
    success: Success | None = None,
    columns: Sequence[ColumnScore] = (),
) -> Verdict:
    """Return the verdict: against the private data where they are known, otherwise from the update alone.

    ``examples`` are the scores of each private example, the worst first; None without ground truth.
    """
    if examples:
        verdict = _against_truth(subject, outcome, examples, lifts, certificate, columns)
        found = [] if all(e.level >= 2 for e in examples) else _checked(subject, outcome, examples, success)
        verdict = _with_findings(verdict, found, ("not_recovered", "partly"))
    else:
        verdict = _from_update(subject, outcome, match, certificate)
        found = [] if verdict.grade == "proved" and outcome.shows == "inputs" else _named(outcome)
        verdict = _with_findings(verdict, found, ("unmatched",))
        # A mean of several and noise that hides the update are no statements about one number of examples.
        if certificate is None or not (certificate.mixture or certificate.floor >= _HIDES):
            verdict = replace(verdict, headline=_with_batch_size(verdict.headline, subject))
    unfinished = () if verdict.grade in ("leaked", "proved") else _UNFINISHED.get(outcome.status, ())
    return replace(verdict, meaning=unfinished + verdict.meaning, remedies=_REMEDIES)


def judge_refusal(outcome: Outcome, reason: str) -> Verdict:
    """Return the verdict on an attack that did not run, with what was found all the same."""
    assert outcome.status in REFUSED, outcome.status
    told = outcome.status == "not_applicable"
    verdict = Verdict(
        outcome.status,
        "This attack does not apply here." if told else "The attacker was not told what this attack needs.",
        reason,
        (
            "Nothing was reconstructed. That is no evidence of protection: "
            + ("another attack may apply." if told else "an attacker who knows more may succeed."),
        ),
    )
    return _with_findings(verdict, _named(outcome), REFUSED)


def _named(outcome: Outcome) -> list[FindingRecord]:
    """Return the findings that a headline may name, the most telling first, estimates marked as such."""
    found = [f for f in outcome.findings if f.kind in _TELLING and f.count > 0]
    marked = [f if f.proved else replace(f, text=f"{f.text.rstrip('.')} (an estimate, not proved).") for f in found]
    return sorted(marked, key=lambda f: _TELLING.index(f.kind))


def _checked(
    subject: Subject, outcome: Outcome, examples: Sequence[Example], success: Success | None
) -> list[FindingRecord]:
    """Return the findings as the private data confirm them: of labels, only as many as are right."""
    n, result = len(examples), []
    for finding in _named(outcome):
        if finding.kind == "labels" and success is not None and success.labels is not None:
            right = min(finding.count, round(success.labels * n))
            if right == 0:
                continue
            text = (
                f"The class of the {subject.noun} was"
                if n == 1
                else f"The classes of {right} of {n} {subject.nouns} were"
            )
            finding = replace(finding, text=f"{text} read off the update.", count=right, of=n)
        result.append(finding)
    return result


def _with_findings(verdict: Verdict, findings: Sequence[FindingRecord], weak: Sequence[str]) -> Verdict:
    """Return the verdict with what was found: in the headline where the grade is a ``weak`` one, else behind it."""
    if not findings:
        return verdict
    texts = [f.text for f in findings]
    if verdict.grade not in weak:
        return replace(verdict, reason=" ".join([verdict.reason, *texts]).strip())
    if verdict.grade == "partly":  # a coarse impression came back besides
        return replace(verdict, reason=f"{' '.join(texts)} {verdict.reason}".strip())
    reason = " ".join([*texts[1:], verdict.headline, verdict.reason])
    read = "This much was read off the update, whatever became of the inputs: it is a leak of its own."
    return Verdict("partly", texts[0], reason.strip(), (read, *verdict.meaning), verdict.remedies)


def _with_batch_size(headline: str, subject: Subject) -> str:
    """Return the headline with the number of examples where nobody stated it."""
    if subject.batch_size_source == "stated":
        return headline
    one = f"one {subject.noun}" if subject.batch_size == 1 else subject.counted(subject.batch_size)
    return f"Assuming {one}, {headline[:1].lower()}{headline[1:]}"


def _against_truth(
    subject: Subject,
    outcome: Outcome,
    examples: Sequence[Example],
    lifts: Sequence[Lift],
    certificate: CertificateRecord | None,
    columns: Sequence[ColumnScore],
) -> Verdict:
    n = len(examples)
    private = f"private {subject.nouns if n > 1 else subject.noun}"
    back = sum(e.level >= 2 for e in examples)
    sentences = [_worst(subject, examples)]
    if columns:
        found, guessed, cells = (sum(getattr(c, k) for c in columns) for k in ("found", "guessed", "n"))
        guess = f"; {columns[0].guess} alone: {guessed:,}" if columns[0].guess else ""
        sentences.append(f"{found:,} of {cells:,} cells are right{guess}.")
    if back and outcome.seconds > 0:
        sentences.append(f"It took {duration(outcome.seconds)} and one update; the attacker never saw the {private}.")
    useless = [lift for lift in lifts if not lift.oracle and lift.lift is not None and lift.lift < 1]
    if back == 0 and useless:
        best = max(lift.psnr for lift in useless)
        sentences.append(f"It is no better than a guess that never saw the update ({sig(best, 3)}\u202fdB).")
    if back == 0 and certificate is not None and certificate.verdict == "proved":
        sentences.append(
            "Yet the result explains the update completely: check that the private data given are those of this update."
        )
    reason = " ".join(sentences)
    if back:
        everything = f"{('The', 'Both')[n - 1] if n <= 2 else f'All {n}'} {private} came back"
        headline = everything if back == n else f"{back} of {n} {private} came back"
        return Verdict("leaked", headline + _word_for_word(subject, examples, back), reason, _LEAKED)
    if any(e.level == 1 for e in examples):
        return Verdict("partly", f"Only a coarse impression of the {private} came back.", reason, _FAILED)
    headline = f"The {private} did not come back." if n == 1 else f"None of the {n} {private} came back."
    return Verdict("not_recovered", headline, reason, _FAILED)


def _word_for_word(subject: Subject, examples: Sequence[Example], back: int) -> str:
    """Return the end of a headline: of sentences it says how many have no wrong word."""
    if subject.display != "text":
        return "."
    exact = sum(e.success for e in examples)
    some = f"{exact} of them word for word" if exact else "with wrong words"
    return ", word for word." if exact == back else f", {some}."


def _worst(subject: Subject, examples: Sequence[Example]) -> str:
    """Return the figures of the worst example and what they mean to a person."""
    worst = examples[0]
    figures = ", ".join(
        f"{metric_name(name)} {sig(value, 2 if name in ('mse', 'relative_error') else 3)}{_UNITS.get(name, '')}"
        for name in subject.quoted
        if (value := worst.values.get(name)) is not None
    )
    if worst.guess is None or not figures:
        return "The worst example has no usable reconstruction."
    prefix = "Worst example: " if len(examples) > 1 else ""
    return f"{prefix}{figures[:1].upper()}{figures[1:]}. {worst.words}".strip()


_SCORED = (
    "The score compares the result with the private data after the attack was over; the attacker saw only what is "
    "listed under “What was attacked”."
)
_LEAKED = (
    "Whoever can read this one update – the operator of the server, or anyone with access to its traffic, memory or "
    "logs – can reconstruct the private data behind it.",
    _SCORED,
    "This is one batch and one seed. How often it happens is a question for an audit over many.",
)
_FAILED = (
    "This attack did not succeed on this update. That is no evidence of protection: a stronger attack, more time, "
    "another seed or better knowledge of the training procedure may succeed.",
    _SCORED,
)

_LOOK = (
    "No ground truth was given, so no score is possible; look at the reconstruction, or run again with the private "
    "data as --truth."
)


def _from_update(
    subject: Subject, outcome: Outcome, match: Match | None, certificate: CertificateRecord | None
) -> Verdict:
    if outcome.shows == "features":
        return _of_features(subject, certificate)
    if certificate is not None and certificate.part:
        return _of_part(subject, outcome, certificate)
    hidden = certificate is not None and certificate.floor >= _HIDES
    if certificate is not None and hidden and outcome.status != "exact":
        return _hidden(certificate)
    if certificate is not None and certificate.verdict == "proved" and not hidden:
        return _proved(subject, certificate)
    # The attack's own measurement of what the client's rounding adds up to, where there is one.
    known = certificate is not None and math.isfinite(certificate.residual) and certificate.floor > 0
    floor = certificate.floor if certificate is not None and known else None if match is None else match.floor
    residual = match.residual if match is not None else certificate.residual if certificate and known else None
    figures = "" if residual is None or floor is None else f"residual {sig(residual)}, noise floor {sig(floor)}"
    certain = [] if certificate is None else [e for e in certificate.examples if e == "proved"]
    if certificate is not None and certain and certificate.verdict != "matched":
        return Verdict(
            "partly",
            f"The update proves {len(certain)} of the {subject.counted(subject.batch_size)}.",
            f"The others are not proved{f' ({figures})' if figures else ''}. {certificate.reason}".strip(),
            ("What is marked as proved needs no ground truth; the rest may be wrong.", _LOOK),
        )
    matched = certificate is not None and certificate.verdict == "matched" and not hidden
    if matched or (certificate is None and match is not None and _is_matched(match)):
        return _matched(subject, certificate, figures)
    near = residual is not None and residual <= _CLOSE
    if outcome.status == "exact" or outcome.solved:
        return _solved(subject, outcome, certificate, residual, figures)
    reason = f" {certificate.reason}" if certificate is not None and certificate.reason else ""
    if residual is None:
        return Verdict(
            "unmatched",
            "Whether private data came back cannot be told.",
            f"The update of the reconstruction could not be computed, and no ground truth was given.{reason}",
            (_LOOK,),
        )
    if near:
        return Verdict(
            "close",
            "The update is explained closely, but not completely.",
            (
                f"Training on the reconstruction causes the captured update up to {residual:.1%} of its length "
                f"({figures})."
                if residual >= 5e-4
                else f"Training on the reconstruction causes nearly the captured update ({figures})."
            )
            # Below the floor on the whole, so what differs must be said.
            + (reason if floor is not None and residual <= floor else ""),
            (
                "A close match usually shows a recognizable result, yet nothing is proved: different data may cause "
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


def _hidden(certificate: CertificateRecord) -> Verdict:
    return Verdict(
        "unmatched",
        "The stated noise hides the update: no attack can tell this guess from another.",
        f"Noise and rounding as stated amount to {sig(certificate.floor)} of the update's length, so that nearly every "
        f"guess explains it equally well (residual {sig(certificate.residual)}).",
        (
            "It says that nothing can be concluded from this one update, not that nothing leaks: over many updates of "
            "one client noise averages out, and only the accounting of differential privacy says what remains.",
            "If the client did not add the noise that was stated, attack again without it.",
        ),
    )


def _proved(subject: Subject, certificate: CertificateRecord) -> Verdict:
    plural = subject.batch_size > 1
    it, causes = (
        (f"these {subject.counted(subject.batch_size)}", "They cause")
        if plural
        else (f"this {subject.noun}", "It causes")
    )
    twin = (
        ("others that the model cannot tell from them" if plural else "one that the model cannot tell from it")
        if certificate.local
        else ""
    )
    scaled = _times(certificate)
    unique = "no nearby" if certificate.local else "no other"
    bound = certificate.bound
    error = f" Its root mean square error is at most {sig(bound)} in units of the model's inputs." if bound else ""
    return Verdict(
        "proved",
        f"The update proves that the client trained on {it}{f', or on {twin}' if twin else ''}.",
        f"{causes} exactly the captured update{scaled}, down to its noise floor ({_figures(certificate)}), and "
        f"{unique} {'batch' if plural else subject.noun} does.{error}",
        (
            "No ground truth was needed: anyone with this update can obtain the same result and know that it is right.",
            *(
                (
                    "The proof is local: it excludes everything nearby, but not an entirely different "
                    f"{'batch' if plural else subject.noun} with the same update.",
                )
                if certificate.local
                else ()
            ),
            "It holds for the model and the training procedure stated below; if the client trained otherwise, the "
            "match would be a coincidence."
            if not scaled
            else "The scale is not that of the stated training, so check loss reduction, batch size, learning rate and "
            "clipping; the proof does not depend on it.",
        ),
    )


def _matched(subject: Subject, certificate: CertificateRecord | None, figures: str) -> Verdict:
    plural = subject.batch_size > 1
    scaled = "" if certificate is None else _times(certificate)
    if certificate is not None and certificate.mixture:
        these = f"these {subject.nouns} or mixtures" if plural else f"this {subject.noun} or a mean"
        headline = f"The update comes from {these} of several."
    else:
        headline = f"The update is fully explained by the reconstructed {subject.nouns if plural else subject.noun}."
    unique = "not checked" if certificate is None else "not established"
    sure = 0 if certificate is None else sum(e == "proved" for e in certificate.examples)
    some = (
        f" {sure} of the {subject.counted(subject.batch_size)} {'is' if sure == 1 else 'are'} proved." if sure else ""
    )
    return Verdict(
        "matched",
        headline,
        f"Training on the reconstruction causes the captured update{scaled}, down to its noise floor "
        f"({_figures(certificate) if certificate is not None and scaled else figures}).{some}",
        (
            "This proves that the attacker found data which explain everything the client shared. It does not "
            f"prove that they are the only such data: uniqueness was {unique}.",
            *((certificate.reason,) if certificate is not None and certificate.reason else ()),
            _LOOK,
        ),
    )


def _solved(
    subject: Subject,
    outcome: Outcome,
    certificate: CertificateRecord | None,
    residual: float | None,
    figures: str,
) -> Verdict:
    some, n = len(outcome.solved), subject.batch_size
    part, near = 0 < some < n, residual is not None and residual <= _CLOSE
    private = f"private {subject.nouns if n > 1 else subject.noun}"
    who = f"{some} of {n} {private} were" if part else f"The {private} {'were' if n > 1 else 'was'}"
    factor = ", up to a factor" if certificate is not None and certificate.factors else ""
    misfit = (
        ", which does not fit the rest of what was stated" if residual is not None and not near and not part else ""
    )
    if residual is None:
        simulated = "What else was stated could not be checked: the reconstruction's own update could not be computed."
    else:
        update = f"{'nearly the captured' if near else 'another'} update ({figures})"
        simulated = f"Simulated with the stated training, the reconstruction causes {update}."
    return Verdict(
        "partly" if part else "solved",
        f"{who} read off the update{misfit or factor}.",
        f"The gradients determine {'these' if part or n > 1 else 'the'} {subject.nouns if n > 1 else subject.noun} by "
        f"linear algebra{factor}, and fit down to rounding, whatever loss, label, sign or step size the client had. "
        + " ".join((simulated, *outcome.told("range"))),
        (
            "Look at it: what is shown is what the client trained on, up to the range and normalization stated"
            f"{' and a factor' if factor else ''}.",
            "Check what was stated: normalization, loss and label smoothing, labels, gradient or weight delta, "
            "learning rate, dropout and mode.",
            _LOOK,
        ),
    )


def _of_part(subject: Subject, outcome: Outcome, certificate: CertificateRecord) -> Verdict:
    """Return the verdict where some tensors of the update determine the input, whatever the rest of it is."""
    names, noun = " and ".join(map(repr, certificate.part)), subject.noun
    masks = "whatever loss, label and dropout masks the client had"
    held = "It holds for the model stated below, in the mode stated; how the client trained has no part in it."
    if certificate.verdict == "proved":
        bound = f" Its root mean square error is at most {sig(certificate.bound)} in units of the model's inputs."
        return Verdict(
            "proved",
            f"The update proves that the client trained on this {noun}.",
            f"The gradients of {names} are those that it must have ({_figures(certificate)}), and no other {noun} has "
            f"them, {masks}.{bound if certificate.bound else ''}",
            (
                "No ground truth was needed: anyone with this update can obtain the same result and know that it is "
                "right.",
                held,
            ),
        )
    if certificate.verdict == "matched":
        headline = f"The {noun} was read off the update, up to a factor."
        if certificate.mixture:
            headline = f"The update comes from this {noun} or a mean of several."
        return Verdict("matched", headline, certificate.reason, (held, _LOOK))
    if outcome.status == "exact":
        told = " ".join((certificate.reason, *outcome.told("range")))
        return Verdict("solved", f"The private {noun} was read off the update.", told, (held, _LOOK))
    return Verdict(
        "unmatched",
        f"The {noun} that was solved for does not fit the update down to its rounding.",
        certificate.reason,
        ("It may be close all the same: noise and pruning blur the equations, several examples mix in them.", _LOOK),
    )


def _times(certificate: CertificateRecord) -> str:
    """Return how the captured update differs in scale from what the stated training gives."""
    if certificate.factors:
        return f" up to a factor for each of {len(certificate.factors)} tensors"
    return "" if abs(certificate.factor - 1) <= 1e-3 else f" up to a common factor of {sig(certificate.factor, 3)}"


def _figures(certificate: CertificateRecord) -> str:
    return f"residual {sig(certificate.residual)}, floor {sig(certificate.floor)}"


def _of_features(subject: Subject, certificate: CertificateRecord | None) -> Verdict:
    count = subject.batch_size
    whose = f"all {subject.counted(count)}" if count > 1 else f"the {subject.noun}"
    sure = () if certificate is None else [e for e in certificate.examples if e == "proved"]
    next_ = (
        f"These numbers are not the {subject.nouns}, but they name the classes and serve every further attack: auto "
        "and feature_matching go on from them.",
        "Labels and number of examples follow from them.",
    )
    reason = "" if certificate is None else certificate.reason
    if certificate is not None and certificate.verdict == "proved":
        return Verdict("proved", f"The update proves what the last layer saw of {whose}.", reason, next_)
    if sure:
        headline = f"The update shows what the last layer saw of {len(sure)} of {subject.counted(count)}."
        return Verdict("matched", headline, reason, next_)
    if certificate is not None and certificate.verdict == "matched":
        headline = f"What the last layer saw of {whose} explains its gradient, but other numbers may, too."
        return Verdict("matched", headline, reason, next_)
    headline = f"What the last layer saw of the {subject.nouns} could not be told apart."
    return Verdict("unmatched", headline, reason or "The head's gradient is not explained.", (_LOOK,))


def _is_matched(match: Match) -> bool:
    """Say whether the residual is rounding: a network's arithmetic accumulates some, a coarse format dominates it."""
    return match.residual <= min(_FLOOR * match.floor, max(2 * match.floor, 1e-5))
