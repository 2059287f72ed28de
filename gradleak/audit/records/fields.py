"""The fields of a record: plain frozen dataclasses without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "NOTHING",
    "SCHEMA",
    "Aggregate",
    "AttackRun",
    "AttemptRecord",
    "CertificateRecord",
    "Curves",
    "Example",
    "FindingRecord",
    "Lift",
    "Match",
    "Outcome",
    "Pictures",
    "Record",
    "Shown",
    "Subject",
    "Success",
    "Threat",
    "Values",
    "Verdict",
]

SCHEMA = 2
"""Version of the record schema."""

NOTHING = "nothing"
"""What ``Outcome.shows`` says where nothing was reconstructed: the attack did not run, or ended before any result."""

Option = bool | int | float | str | None


@dataclass(frozen=True)
class Subject:
    """What was attacked.

    Attributes:
        model: the model as the user named it, with its options.
        model_class: the class of the model.
        parameters: number of trainable numbers.
        tensors: number of trainable tensors.
        input_kind: "image", "tensor", "tokens", or the kind of another input space.
        input_shape: shape of one model input, without the batch axis.
        classes: number of classes, None where the model is not a classifier.
        batch_size: number of examples behind the update.
        batch_size_source: "stated", "read" (off the update, which shows it) or "assumed".
        update_kind: "gradient" or "weight_delta".
        dtype: number format of the captured update.
        training: the client's forward map in words.
        normalization: how inputs become model inputs, in words; empty where they are used as they are.
        noun: what one example is called.
        nouns: what several are called.
        display: how examples are shown: "pictures", "numbers", "text" or "table".
        quoted: the metrics that a headline quotes.

    """

    model: str
    model_class: str
    parameters: int
    tensors: int
    input_kind: str
    input_shape: tuple[int, ...]
    classes: int | None
    batch_size: int
    update_kind: str
    dtype: str
    training: str
    normalization: str = ""
    batch_size_source: str = "stated"
    noun: str = "example"
    nouns: str = "examples"
    display: str = "numbers"
    quoted: tuple[str, ...] = ()

    def counted(self, count: int) -> str:
        """Return "1 image", "4 images"."""
        return f"{count:,} {self.noun if count == 1 else self.nouns}"


@dataclass(frozen=True)
class Threat:
    """What the attacker was granted besides the model and the update: names of ``Knowledge`` flags."""

    granted: tuple[str, ...]
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttackRun:
    """Which attack ran: its name, its full options, its seed."""

    name: str
    options: Mapping[str, Option] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class FindingRecord:
    """Something that the update gives away besides whole inputs.

    Attributes:
        kind: "labels", "counts", "batch_size", "features", "rows", "columns" or "tokens".
        text: one sentence.
        proved: whether the update proves it; otherwise it is an estimate.
        count: how many were found.
        of: how many there are.

    """

    kind: str
    text: str
    proved: bool
    count: int
    of: int


@dataclass(frozen=True)
class AttemptRecord:
    """One way that was tried.

    Attributes:
        attack: its name.
        taken: whether it gave a result.
        verdict: of its certificate, None where there was no result.
        reason: the certificate's reason, or why it did not apply.

    """

    attack: str
    taken: bool
    verdict: str | None
    reason: str


@dataclass(frozen=True)
class Outcome:
    """How the attack ended.

    Attributes:
        status: "converged", "budget", "stalled", "interrupted", "exact", "not_applicable" or "missing_knowledge".
        objective: the attacker's own final objective; comparable within one attack only.
        iterations: iterations of the returned candidate.
        evaluations: evaluations of the objective's gradient, over all restarts.
        seconds: wall-clock time.
        labels: the recovered class of each reconstructed example, in the attack's order; None without classes.
        notes: sentences that a reader of the result must know.
        note_kinds: what each note is about: "attempt", "assumption", "range", "labels", "limit" or "method".
        shows: "inputs", "features" where the attack recovers the last layer's inputs instead, or "nothing".
        attack: name of the attack that led to the result, where the one that ran tries several.
        findings: what the update gives away besides whole inputs.
        attempts: the ways that were tried, in order.
        solved: positions of the reconstructions that linear algebra solved, where not all of them were.

    """

    status: str
    objective: float
    iterations: int
    evaluations: int
    seconds: float
    labels: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    note_kinds: tuple[str, ...] = ()
    shows: str = "inputs"
    attack: str = ""
    findings: tuple[FindingRecord, ...] = ()
    attempts: tuple[AttemptRecord, ...] = ()
    solved: tuple[int, ...] = ()

    def told(self, kind: str) -> tuple[str, ...]:
        """Return the notes of one kind."""
        return tuple(note for note, k in zip(self.notes, self.note_kinds, strict=False) if k == kind)


@dataclass(frozen=True)
class CertificateRecord:
    """What the update alone proves about the result; the fields are those of ``gradleak.types.Certificate``."""

    verdict: str
    residual: float
    floor: float
    rank: int | None = None
    unknowns: int | None = None
    examples: tuple[str, ...] = ()
    reason: str = ""
    factor: float = 1.0
    bound: float | None = None
    local: bool = False
    mixture: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """How well the re-simulated update equals the captured one; no ground truth is involved.

    Attributes:
        residual: ‖update of the reconstruction − captured update‖ / ‖captured update‖.
        floor: the same ratio that rounding to the update's number format alone may cause.

    """

    residual: float
    floor: float


@dataclass(frozen=True)
class Example:
    """The scores of one private example.

    Attributes:
        index: position in the private batch.
        guess: position of the reconstruction that was assigned to it, None where there are fewer reconstructions.
        label: its true class, None where it is not known.
        recovered: the recovered class, None where the attack says nothing.
        values: metric name → value, None where it cannot be computed.
        success: whether its error is at most the threshold, and clearly below that of every guess without the update.
        level: 4 identical to a person, 3 hardly different, 2 came back with visible errors, 1 a coarse impression, 0.
        words: what a person makes of it, one sentence.

    """

    index: int
    guess: int | None
    label: int | None
    recovered: int | None
    values: Mapping[str, float | None] = field(default_factory=dict)
    success: bool = False
    level: int = 0
    words: str = ""

    @property
    def mse(self) -> float | None:
        """Mean squared error, in squared units of the input (images: [0, 1])."""
        return self.values.get("mse")


@dataclass(frozen=True)
class Aggregate:
    """One metric over the examples that have a value: n, center and spread.

    Attributes:
        metric: name of the metric.
        unit: "dB" or empty.
        n: number of examples with a value.
        mean: arithmetic mean.
        sd: sample standard deviation, None for n = 1.
        minimum: smallest value.
        median: middle value.
        maximum: largest value.
        meaning: what the metric measures, one clause.

    """

    metric: str
    unit: str
    n: int
    mean: float
    sd: float | None
    minimum: float
    median: float
    maximum: float
    meaning: str = ""


@dataclass(frozen=True)
class Success:
    """How many examples came back, by a threshold on their error.

    Attributes:
        threshold: largest error that counts as success.
        successes: number of successful examples, clearly better than every guess without the update besides.
        n: number of examples.
        low: lower end of the Wilson 95 % interval of the rate.
        high: its upper end.
        labels: share of the batch's labels that were recovered, in whatever order; None where the attack says nothing.
        error: what the error is: "MSE", "squared relative error", "share of wrong tokens".

    """

    threshold: float
    successes: int
    n: int
    low: float
    high: float
    labels: float | None = None
    error: str = "MSE"


@dataclass(frozen=True)
class Lift:
    """How much better the reconstruction is than a guess that never saw the update.

    Attributes:
        guess: what was guessed, in words.
        psnr: mean PSNR of the guess in dB.
        lift: mean PSNR of the reconstruction minus that of the guess, in dB; None where an example has no score.
        oracle: whether the guess was chosen by the truth, which no attacker can do.

    """

    guess: str
    psnr: float
    lift: float | None
    oracle: bool = False


@dataclass(frozen=True)
class Curves:
    """How an iterative attack went, at K recorded moments.

    Attributes:
        iterations: K numbers, ascending: evaluations of the objective's gradient so far, for the returned candidate.
        objectives: the attacker's objective at each.
        layers: parameter name → K squared gradient distances (Figure 5 of Zhu et al. 2019).
        mse: mean squared error to the private examples at each, empty without ground truth.

    """

    iterations: tuple[int, ...] = ()
    objectives: tuple[float, ...] = ()
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    mse: tuple[float, ...] = ()


@dataclass(frozen=True)
class Shown:
    """Inputs as a person reads them: sentences, or rows of a table.

    Attributes:
        names: what the pieces of one example are, empty for a sentence.
        guess: the pieces of each reconstruction, in the attack's order.
        truth: those of each private example, None without ground truth.

    """

    names: tuple[str, ...]
    guess: tuple[tuple[str, ...], ...]
    truth: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer in plain words.

    Attributes:
        grade: "leaked", "partly", "not_recovered" with ground truth; "proved", "matched", "solved", "close",
            "partly" or "unmatched" without; "not_applicable" or "missing_knowledge" where the attack did not run.
        headline: one short sentence.
        reason: the figures behind it, in words.
        meaning: what this does and does not prove, one sentence each.
        remedies: what would stop it, one sentence each.

    """

    grade: str
    headline: str
    reason: str
    meaning: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """Everything about one reconstruction except the pictures.

    Attributes:
        subject: what was attacked.
        threat: what the attacker knew.
        attack: which attack ran.
        outcome: how it ended.
        verdict: the answer in plain words.
        match: the re-simulated update against the captured one; None where it could not be computed.
        certificate: what the update alone proves, where the attack says.
        examples: per-example scores, worst reconstruction first; None without ground truth.
        aggregates: metrics over the examples, with n and spread.
        success: how many examples came back; None without ground truth.
        lifts: the reconstruction against guesses that never saw the update.
        curves: how the attack went; None for closed forms.
        shown: inputs as a person reads them, where they are neither pictures nor plain numbers.
        command: how to repeat it, as typed in a shell; empty where it was run from Python.
        environment: versions and machine, by name.
        created: date and time, ISO 8601, UTC.
        files: SHA-256 of the tensor files beside ``result.json``, by name, filled in when they are written.
        schema: version of this schema.

    """

    subject: Subject
    threat: Threat
    attack: AttackRun
    outcome: Outcome
    verdict: Verdict
    match: Match | None = None
    certificate: CertificateRecord | None = None
    examples: tuple[Example, ...] | None = None
    aggregates: tuple[Aggregate, ...] = ()
    success: Success | None = None
    lifts: tuple[Lift, ...] = ()
    curves: Curves | None = None
    shown: Shown | None = None
    command: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class Values:
    """One input that is no picture, piece by piece.

    Attributes:
        title: which example.
        names: what the pieces are, empty for a sentence.
        truth: the private ones, None without ground truth.
        guess: the reconstructed ones.

    """

    title: str
    names: tuple[str, ...]
    truth: tuple[str, ...] | None
    guess: tuple[str, ...]


@dataclass(frozen=True)
class Pictures:
    """What a report shows besides the record, in display order (worst first); images are PNG data URIs.

    Attributes:
        titles: one title per shown example.
        truth: the private images, None without ground truth.
        guess: the reconstructed images.
        frames: positions in ``Record.curves`` of the shown snapshots.
        snapshots: one tuple of images per shown snapshot.
        values: inputs that are no pictures, piece by piece.
        omitted: number of examples that are not shown.

    """

    titles: tuple[str, ...] = ()
    truth: tuple[str, ...] | None = None
    guess: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    snapshots: tuple[tuple[str, ...], ...] = ()
    values: tuple[Values, ...] = ()
    omitted: int = 0
