"""The record of one reconstruction: what ``result.json`` holds and all that a report may read.

Without tensors, so that a record can be read, compared and rendered where torch is not installed.
``docs/result-schema.md`` documents every field; :data:`SCHEMA` grows by one when a field changes its meaning.
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
    "REFUSED", "SCHEMA", "Aggregate", "AttackRun", "AttemptRecord", "CertificateRecord", "ColumnScore", "Curves",
    "Example", "FindingRecord", "Lift", "Match", "Outcome", "Pictures", "Record", "Shown", "Subject", "Success",
    "Threat", "Values", "Verdict", "from_json", "to_json",
]  # fmt: skip

SCHEMA = 2
"""Version of the record schema."""

REFUSED = ("not_applicable", "missing_knowledge")
"""The statuses of an attack that did not run; nothing was reconstructed."""

Option = bool | int | float | str | None


@dataclass(frozen=True)
class Subject:
    """What was attacked."""

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
    """Something that the update gives away besides whole inputs."""

    kind: str
    text: str
    proved: bool
    count: int
    of: int


@dataclass(frozen=True)
class AttemptRecord:
    """One way that was tried; ``taken`` says whether it gave a result."""

    attack: str
    taken: bool
    verdict: str | None
    reason: str


@dataclass(frozen=True)
class Outcome:
    """How the attack ended."""

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
    part: tuple[str, ...] = ()


@dataclass(frozen=True)
class Match:
    """How well the re-simulated update equals the captured one; no ground truth is involved."""

    residual: float
    floor: float


@dataclass(frozen=True)
class Example:
    """The scores of one private example."""

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

    ``guessed`` is the mean of the best guess without the update (``Success.guess``), None where there is no such guess.
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
    guessed: float | None = None


@dataclass(frozen=True)
class Success:
    """How many examples came back, by a threshold on their error."""

    threshold: float
    successes: int
    n: int
    low: float
    high: float
    labels: float | None = None
    error: str = "MSE"
    guess: str = ""


@dataclass(frozen=True)
class ColumnScore:
    """How many cells of one column are right, and how many ``guess``, which never saw the update, gets right."""

    name: str
    found: int
    guessed: int
    n: int
    guess: str


@dataclass(frozen=True)
class Lift:
    """How much better the reconstruction is than a guess that never saw the update."""

    guess: str
    psnr: float
    lift: float | None
    oracle: bool = False


@dataclass(frozen=True)
class Curves:
    """How an iterative attack went, at K recorded moments."""

    iterations: tuple[int, ...] = ()
    objectives: tuple[float, ...] = ()
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    mse: tuple[float, ...] = ()


@dataclass(frozen=True)
class Shown:
    """Inputs as a person reads them: sentences, or rows of a table."""

    names: tuple[str, ...]
    guess: tuple[tuple[str, ...], ...]
    truth: tuple[tuple[str, ...], ...] | None = None
    found: tuple[tuple[bool, ...], ...] | None = None
    confidence: tuple[tuple[float, ...], ...] | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The answer in plain words."""

    grade: str
    headline: str
    reason: str
    meaning: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """Everything about one reconstruction except the pictures."""

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
    columns: tuple[ColumnScore, ...] = ()
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
        names: what the pieces are, empty for a sentence.
        truth: the private ones, None without ground truth.
        found: which pieces are right, empty where that was not decided piece by piece.
        confidence: how sure the attack is of each piece, empty where it does not say.

    """

    title: str
    names: tuple[str, ...]
    truth: tuple[str, ...] | None
    guess: tuple[str, ...]
    found: tuple[bool, ...] = ()
    confidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """What a report shows besides the record, in display order (worst first); images are PNG data URIs.

    Attributes:
        frames: positions in ``Record.curves`` of the shown snapshots.
        snapshots: one tuple of images per shown snapshot.

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
        raise InvalidFile(
            f"result.json is not valid JSON ({_readable(str(error))[:200]}); run the attack again to write it anew."
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        older = isinstance(found, int) and not isinstance(found, bool) and 0 < found < SCHEMA
        which = f"an earlier version wrote it (schema {found})" if older else f"it has schema {repr(found)[:40]}"
        raise InvalidFile(
            f"This version of gradleak reads result.json of schema {SCHEMA}, but {which}; run its command again to "
            "write it anew, or read it with the version that wrote it."
        )
    try:
        return _together(_build(Record, data, "result"))
    except _Mismatch as error:
        what = str(error) if len(str(error)) <= 200 else str(error)[:200] + "…"
        raise InvalidFile(
            f"result.json is damaged: {_readable(what)}; run the attack again to write it anew."
        ) from error


class _Mismatch(Exception):
    """A JSON value does not have the declared type."""


def _together(record: Record) -> Record:
    """Return the record if what a report relies on holds: lists that belong together are equally long."""
    curves, outcome, shown = record.curves, record.outcome, record.shown
    lengths: list[tuple[str, int, int]] = []
    if curves is not None:
        points = len(curves.iterations)
        lengths = [("curves.objectives", len(curves.objectives), points)]
        lengths += [(f"curves.layers.{name}", len(values), points) for name, values in curves.layers.items()]
        lengths += [("curves.mse", len(curves.mse), points)] if curves.mse else []
    if outcome.note_kinds:
        lengths.append(("outcome.note_kinds", len(outcome.note_kinds), len(outcome.notes)))
    if shown is not None and record.examples is not None and shown.truth is not None:
        lengths.append(("shown.truth", len(shown.truth), len(record.examples)))
    if shown is not None and shown.found is not None:
        lengths.append(("shown.found", len(shown.found), len(shown.truth or ())))
    for where, found, expected in lengths:
        if found != expected:
            raise _Mismatch(f"{where} has {found} entries, not {expected}")
    return record


T = TypeVar("T")
_LARGEST = 2**63
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return _readable(value)
    if isinstance(value, Mapping):
        return {_readable(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _readable(text: str) -> str:
    """Return ``text`` without halves of characters, as in file names that are not UTF-8; no file can hold those."""
    return text.encode("utf-8", "replace").decode("utf-8")


_hints = functools.cache(typing.get_type_hints)


def _build(kind: type[T], data: Any, where: str) -> T:
    if not isinstance(data, dict):
        raise _Mismatch(f"{where} is not an object")
    hints = _hints(typing.cast("Any", kind))
    for name in data:
        if name not in hints:
            raise _Mismatch(f"{where} has an unknown field {name!r}")
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise _Mismatch(f"{where} lacks the field {f.name!r}")
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
        return {_readable(k): _value(item, v, f"{where}.{k}") for k, v in value.items()}
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
    if isinstance(value, int) and not isinstance(value, bool) and not -_LARGEST < value < _LARGEST:
        raise _Mismatch(f"{where} is larger than any number that belongs there")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return _readable(value) if isinstance(value, str) else value
    raise _Mismatch(f"{where} is not {'a number' if hint in (int, float) else 'of type ' + hint.__name__}")
