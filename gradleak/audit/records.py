"""The record of one reconstruction: what ``result.json`` holds and all that a report may read.

Plain frozen dataclasses without tensors, so that a record can be read, compared and rendered where torch is not
installed. ``docs/result-schema.md`` documents every field; :data:`SCHEMA` grows by one when a field changes meaning.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gradleak.errors import InvalidFile

__all__ = [
    "BETTER",
    "SCHEMA",
    "Aggregate",
    "AttackRun",
    "CertificateRecord",
    "Curves",
    "Example",
    "Lift",
    "Match",
    "Outcome",
    "Pictures",
    "Record",
    "Subject",
    "Success",
    "Threat",
    "Values",
    "Verdict",
    "from_json",
    "to_json",
]

SCHEMA = 1
"""Version of the record schema."""

BETTER = 0.5
"""Largest null guess ratio of an example that counts as back: every other guess beats another one by a little."""

Option = bool | int | float | str | None


@dataclass(frozen=True)
class Subject:
    """What was attacked.

    Attributes:
        model: the model as the user named it, with its options.
        model_class: the class of the model.
        parameters: number of trainable numbers.
        tensors: number of trainable tensors.
        input_kind: "image" or "tensor".
        input_shape: shape of one input, without the batch axis.
        classes: number of classes, None where the model is not a classifier.
        batch_size: number of examples behind the update.
        update_kind: "gradient" or "weight_delta".
        dtype: number format of the captured update.
        training: the client's forward map in words.
        normalization: how pixels become model inputs, in words; empty where they are used as they are.

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
class Outcome:
    """How the attack ended.

    Attributes:
        status: "converged", "budget", "stalled", "interrupted" or "exact".
        objective: the attacker's own final objective; comparable within one attack only.
        iterations: iterations of the returned candidate.
        evaluations: evaluations of the objective's gradient, over all restarts.
        seconds: wall-clock time.
        labels: the recovered class of each reconstructed example, in the attack's order; None without classes.
        notes: sentences that a reader of the result must know.
        shows: "inputs", or "features" where the attack recovers the last layer's inputs instead.

    """

    status: str
    objective: float
    iterations: int
    evaluations: int
    seconds: float
    labels: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    shows: str = "inputs"


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

    """

    index: int
    guess: int | None
    label: int | None
    recovered: int | None
    values: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def mse(self) -> float | None:
        """Mean squared error, in squared units of the input (images: [0, 1])."""
        return self.values.get("mse")

    @property
    def relative_error(self) -> float | None:
        """Error in units of what each position usually holds; of inputs that are no images."""
        return self.values.get("relative_error")

    @property
    def null_guess_ratio(self) -> float | None:
        """Relative error over that of the best guess without the update; from 1 on nothing was learned."""
        return self.values.get("null_guess_ratio")

    @property
    def better(self) -> bool:
        """Whether it is clearly better than every null guess, where that was measured."""
        return self.null_guess_ratio is None or self.null_guess_ratio <= BETTER

    @property
    def psnr(self) -> float | None:
        """Peak signal-to-noise ratio in dB."""
        return self.values.get("psnr")

    @property
    def ssim(self) -> float | None:
        """Structural similarity, at most 1."""
        return self.values.get("ssim")


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

    """

    metric: str
    unit: str
    n: int
    mean: float
    sd: float | None
    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True)
class Success:
    """How many examples came back, by a threshold on their error.

    Attributes:
        threshold: largest MSE that counts as success; of inputs that are no images, largest squared relative error.
        successes: number of successful examples.
        n: number of examples.
        low: lower end of the Wilson 95 % interval of the rate.
        high: its upper end.
        labels: share of the batch's labels that were recovered, in whatever order; None where the attack says nothing.

    """

    threshold: float
    successes: int
    n: int
    low: float
    high: float
    labels: float | None = None


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
class Verdict:
    """The answer in plain words.

    Attributes:
        grade: "leaked", "partly", "not_recovered" with ground truth; "proved", "matched", "solved", "close" or
            "unmatched" without.
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
    command: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class Values:
    """One input that is no image: names, private values (None without ground truth) and reconstructed values."""

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
        values: tables for inputs that are no images.
        omitted: number of examples that are not shown.

    """

    titles: tuple[str, ...] = ()
    truth: tuple[str, ...] | None = None
    guess: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    snapshots: tuple[tuple[str, ...], ...] = ()
    values: tuple[Values, ...] = ()
    omitted: int = 0


def to_json(record: Record) -> str:
    """Return ``record`` as indented JSON; NaN and infinities become the strings "NaN", "Infinity", "-Infinity"."""
    return json.dumps(_plain(dataclasses.asdict(record)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Record:
    """Return the record that :func:`to_json` wrote.

    Raises:
        InvalidFile: not JSON, of another schema version, or a field is missing or has the wrong type.

    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"result.json is not valid JSON ({error}); run the attack again to write it anew.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise InvalidFile(
            f"result.json has schema {found!r}, but this version of gradleak reads schema {SCHEMA}; "
            "run the attack again, or use the version of gradleak that wrote it."
        )
    try:
        return _build(Record, data, "result")
    except _Mismatch as error:
        raise InvalidFile(f"result.json is damaged: {error}; run the attack again to write it anew.") from error


class _Mismatch(Exception):
    """A JSON value does not have the declared type."""


T = TypeVar("T")
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: type[T], data: Any, where: str) -> T:
    if not isinstance(data, dict):
        raise _Mismatch(f"{where} is not an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise _Mismatch(f"{where} has an unknown field {name!r}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise _Mismatch(f"{where} lacks the field {name!r}")
    hints = _hints(typing.cast("Any", kind))
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        return _union(typing.get_args(hint), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _Mismatch(f"{where} is not a list")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _Mismatch(f"{where} is not an object")
        item = typing.get_args(hint)[1]
        return {k: _value(item, v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where)
    return _scalar(hint, value, where)


def _union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    # JSON keeps apart what Python blurs: True is no int, and the exact type wins over a convertible one.
    if type(value) in choices:
        return value
    for choice in choices:
        if choice is not type(None):
            try:
                return _value(choice, value, where)
            except _Mismatch:
                if len([c for c in choices if c is not type(None)]) == 1:
                    raise
    raise _Mismatch(f"{where} has a value of the wrong type")


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str) and value in _SPECIAL:
        return _SPECIAL[value]
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _Mismatch(f"{where} is not {'a number' if hint in (int, float) else 'of type ' + hint.__name__}")
