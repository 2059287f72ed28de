"""The plan of an audit: a TOML file that says what is tried, read before anything runs; ``docs/audit.md`` shows one."""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradleak.errors import InvalidFile, InvalidInput, UnknownName, clean, reason
from gradleak.files import read_file

__all__ = ["Case", "Fault", "Plan", "Remedy", "Training", "Utility", "read_plan"]

_LARGEST = 1 << 20
"""Bytes of a plan, at most."""
_HEADER = re.compile(r"\s*(?P<open>\[\[?)\s*(?P<name>[\w.\- ]+?)\s*\]")
_KEY = re.compile(r"\s*(?P<name>[\w\-]+)\s*=")
_SPAN = 100
"""Lines over which one value may run."""
_GRANTED = ("batch_size", "training", "defense")


@dataclass(frozen=True)
class Training:
    """What a client does with its batch; without ``lr`` and ``optimizer`` it sends one gradient."""

    loss: str | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    lr: float | None = None
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    local_epochs: int | None = None
    local_steps: int | None = None
    local_batch_size: int | None = None


@dataclass(frozen=True)
class Utility:
    """The federation that is trained to see what the filters cost, and to reach later stages.

    Attributes:
        rounds: of training.
        clients: updates that the server averages in each.
        batch_size: examples of each of them.
        lr: the server's step along the mean gradient; of weight deltas, by what their mean is multiplied (1).
        seeds: number of trainings, with other batches and noise.
    """

    rounds: int = 100
    clients: int = 4
    batch_size: int = 16
    lr: float | None = None
    seeds: int = 3


@dataclass(frozen=True)
class Case:
    """One federation as it ships, and what is asked about it.

    Fields of the names that ``gradleak attack`` has as options mean the same. Paths are whole, options are pairs.

    Attributes:
        data: a file, folder or named set of ``docs/data.md``, or "synthetic".
        folder: where named sets and files of data are; that of the plan if it names no other.
        examples: how many of them there are on either side at most: for training and guesses, and to be attacked.
        filters: what the client does to its update, in order.
        stages: rounds of training before the attacked one.
        rounds: rounds that the attacker sees the client in, for the upper bound.
        sampling_rate: with which an example is in a round, for the upper bound.
        prior: probability of success without the update, for the upper bound; None to measure it.
    """

    name: str
    model: str
    data: str
    folder: Path = Path()
    model_arg: tuple[tuple[str, bool | int | float | str], ...] = ()
    weights: Path | None = None
    mode: str = "as-is"
    input_shape: tuple[int, ...] = ()
    table: Path | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: int | None = None
    examples: int = 1000
    training: Training = Training()
    filters: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    stages: tuple[int, ...] = (0,)
    utility: Utility | None = None
    rounds: int = 1
    sampling_rate: float = 1.0
    prior: float | None = None


@dataclass(frozen=True)
class Remedy:
    """What is tried where more came back than the target allows: other filters, another batch size, or both."""

    filters: tuple[str, ...] | None = None
    batch_size: int | None = None

    @property
    def words(self) -> str:
        """The remedy in a reader's words."""
        said = [] if self.batch_size is None else [f"batches of {self.batch_size}"]
        if self.filters is not None:
            said.append(", then ".join(self.filters) or "no filters")
        return " with ".join(said)


@dataclass(frozen=True)
class Plan:
    """What an audit tries.

    Attributes:
        path: of the file.
        text: its content.
        seeds: number of batches that are drawn for each cell of case, stage and batch size.
        knows: what the attacker knows, names of ``Knowledge`` in small letters.
        budget: seconds of one attack, None for no limit.
        fail_above: the target, a share in [0, 1); None for none.
        tolerance: largest error of an example that counts as recovered.
        remedies: tried in this order where more came back than the target allows.
        places: table and key → line of the file.
    """

    path: Path
    text: str
    cases: tuple[Case, ...]
    title: str = ""
    seeds: int = 10
    attacks: tuple[str, ...] = ("auto",)
    knows: tuple[str, ...] = _GRANTED
    budget: float | None = 60.0
    fail_above: float | None = None
    tolerance: float = 1e-3
    remedies: tuple[Remedy, ...] = ()
    places: Places | None = field(default=None, repr=False)

    def refused(self, fault: Fault, case: int | None = None) -> InvalidInput:
        """Return the error that names the line of what cannot run, of the ``case`` by number, if it is one's."""
        table, number = ("audit", 0) if case is None else ("case", case + 1)
        line = 1 if self.places is None else self.places.line(table, number, fault.key, fault.value)
        return InvalidInput(f"Line {line} of {self.path.name!r}: {fault}")


class Fault(InvalidInput):
    """Something in a plan that cannot run.

    Attributes:
        key: the key whose value is at fault, with a point before the keys of a table inside.
        value: the part of its value.
    """

    def __init__(self, message: str, key: str = "", value: str = "") -> None:
        """Say what is wrong and how to mend it."""
        super().__init__(message)
        self.key, self.value = key, value


class Places:
    """Where in a TOML text the keys are: the standard library's parser does not tell."""

    def __init__(self, text: str) -> None:
        """Look through ``text``."""
        self._lines = text.splitlines()
        self._at: dict[tuple[str, int, str], int] = {}
        counts: Counter[str] = Counter()
        table, number = "", 0
        for at, line in enumerate(self._lines, 1):
            if header := _HEADER.match(line):
                table = header["name"]
                counts[table] += header["open"] == "[["
                number = counts[table.partition(".")[0]]
                self._at.setdefault((table, number, ""), at)
            elif key := _KEY.match(line):
                self._at.setdefault((table, number, key["name"]), at)

    def line(self, table: str, number: int, key: str, value: str = "") -> int:
        """Return the line of ``key`` in the ``number``-th ``table``, of the part ``value`` of it if there is one."""
        outer, _, inner = key.rpartition(".")
        asked = [(f"{table}.{outer}", number, inner), (f"{table}.{outer}", number, "")] if outer else []
        asked += [(table, number, outer or key), (table, number, "")]
        at = next((self._at[place] for place in asked if place in self._at), 1)
        near = range(at - 1, min(at - 1 + _SPAN, len(self._lines))) if value else ()
        return next((i + 1 for i in near if value in self._lines[i]), at)


# ------------------------------------------------------------------------------------------------ values of a plan

_Check = Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return value


def _word(*choices: str) -> _Check:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(map(repr, choices))}")
        return str(value)

    return check


def _whole(least: int, most: int = 10**7) -> _Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"a whole number from {least} to {most:,}")
        return value

    return check


def _number(low: float, high: float, words: str, *, open_low: bool = True) -> _Check:
    def check(value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not low <= value <= high or (open_low and value == low):
            raise ValueError(words)
        return float(value)

    return check


def _list(of: _Check, *, empty: bool = False) -> _Check:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (value or empty):
            raise ValueError("a list" if empty else "a list of one or more values")
        try:
            found = tuple(of(v) for v in value)
        except ValueError as error:
            raise ValueError(f"a list, each value {error}") from None
        if len(set(found)) < len(found) and not empty:
            raise ValueError("a list of values that differ")
        return found

    return check


def _options(value: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value, dict) or not all(isinstance(v, (bool, int, float, str)) for v in value.values()):
        raise ValueError("a table of texts and numbers, such as { width = 24 }")
    return tuple(sorted(value.items()))


_POSITIVE = _number(0, math.inf, "a number above 0")
_ANY = _number(-math.inf, math.inf, "a number")
_SHARE = _number(0, 1, "a share from 0 to 1", open_low=False)

_TRAINING: Mapping[str, _Check] = {
    "loss": _text,
    "reduction": _word("mean", "sum"),
    "label_smoothing": _number(0, 1, "a number in [0, 1)", open_low=False),
    "class_weights": _list(_POSITIVE, empty=True),
    "lr": _POSITIVE,
    "optimizer": _word("sgd", "adam", "adamw"),
    "momentum": _number(0, 1, "a number in [0, 1)", open_low=False),
    "weight_decay": _number(0, math.inf, "a number of at least 0", open_low=False),
    "local_epochs": _whole(1, 10_000),
    "local_steps": _whole(1, 10_000),
    "local_batch_size": _whole(1),
}
_UTILITY: Mapping[str, _Check] = {
    "rounds": _whole(1, 10**6),
    "clients": _whole(1, 10**5),
    "batch_size": _whole(1),
    "lr": _POSITIVE,
    "seeds": _whole(1, 1000),
}


def _inner(kind: type[Any], checks: Mapping[str, _Check], name: str) -> _Check:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("a table")
        return kind(**_read(value, checks, name))

    return check


_CASE: Mapping[str, _Check] = {
    "name": _text,
    "model": _text,
    "model_arg": _options,
    "weights": _text,
    "mode": _word("as-is", "eval", "train", "batch"),
    "data": _text,
    "input_shape": _list(_whole(1), empty=True),
    "table": _text,
    "mean": _list(_ANY, empty=True),
    "std": _list(_POSITIVE, empty=True),
    "classes": _whole(1),
    "examples": _whole(2, 10**6),
    "training": _inner(Training, _TRAINING, "training"),
    "filters": _list(_text, empty=True),
    "batch_sizes": _list(_whole(1, 10**5)),
    "stages": _list(_whole(0, 10**6)),
    "utility": _inner(Utility, _UTILITY, "utility"),
    "rounds": _whole(1),
    "sampling_rate": _number(0, 1, "a number in (0, 1]"),
    "prior": _number(0, 1, "a number in (0, 1)"),
}
_AUDIT: Mapping[str, _Check] = {
    "title": _text,
    "data": _text,
    "seeds": _whole(1, 10**5),
    "attacks": _list(_text),
    "knows": _list(_word(*_GRANTED, "labels", "buffers", "public_data", "order")),
    "budget": _POSITIVE,
    "fail_above": _number(0, 1, "a share in [0, 1)", open_low=False),
    "tolerance": _POSITIVE,
}
_REMEDY: Mapping[str, _Check] = {"filters": _list(_text, empty=True), "batch_size": _whole(1, 10**5)}
_TABLES = ("audit", "case", "remedy")


def _read(table: Mapping[str, Any], checks: Mapping[str, _Check], inside: str = "") -> dict[str, Any]:
    """Return the values of a table, each checked.

    Raises:
        Fault: a key is not known, or its value is none.
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        whole = f"{inside}.{key}" if inside else key
        if key not in checks:
            raise Fault(str(UnknownName("key", key, checks)), whole)
        try:
            found[key] = checks[key](value)
        except ValueError as error:
            if isinstance(error, Fault):
                raise
            raise Fault(f"{key!r} must be {error}; correct it.", whole) from None
    return found


def read_plan(path: str | Path, *, data: str | Path | None = None) -> Plan:
    """Return the plan in a TOML file; paths in it are relative to the file.

    ``data`` is the folder of named sets, in place of the plan's own.

    Raises:
        InvalidFile: it cannot be read, or is no TOML.
        InvalidInput: a value is none, with the number of its line.
    """
    path = Path(path)
    try:
        text = read_file(path, limit=_LARGEST).decode("utf-8")
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidFile(f"{str(path)!r} is no plan in TOML ({reason(error)}); correct it there.") from error
    plan = Plan(path, text, (), places=Places(text))
    for table in tables:
        if table not in _TABLES:
            fault = Fault(str(UnknownName("table of a plan", table, _TABLES)))
            line = next((i for i, s in enumerate(text.splitlines(), 1) if table in s), 1)
            raise InvalidInput(f"Line {line} of {path.name!r}: {fault}")
    try:
        said = tables.get("audit", {})
        if not isinstance(said, dict):
            raise Fault("'audit' is one table; write [audit].")
        audit = _read(said, _AUDIT)
    except Fault as fault:
        raise plan.refused(fault) from None
    where = audit.pop("data", None)
    folder = Path(data) if data is not None else path.parent / (where or "")
    plan = replace(plan, **audit, remedies=_remedies(plan, tables.get("remedy", [])))
    cases = _cases(plan, tables.get("case", []), folder.absolute())
    return replace(plan, cases=cases)


def _remedies(plan: Plan, tables: Any) -> tuple[Remedy, ...]:
    found = []
    for number, table in enumerate(_tables(plan, tables, "remedy"), 1):
        try:
            remedy = Remedy(**_read(table, _REMEDY))
            if remedy == Remedy():
                raise Fault("A remedy changes filters or batch_size; give one of them.")
        except Fault as fault:
            assert plan.places is not None
            line = plan.places.line("remedy", number, fault.key)
            raise InvalidInput(f"Line {line} of {plan.path.name!r}: {fault}") from None
        found.append(remedy)
    return tuple(found)


def _cases(plan: Plan, tables: Any, folder: Path) -> tuple[Case, ...]:
    found: list[Case] = []
    for number, table in enumerate(_tables(plan, tables, "case")):
        try:
            values = _read(table, _CASE)
            for key in ("model", "data"):
                if key not in values:
                    raise Fault(f"A case needs {key!r}; give it.")
            values.setdefault("name", f"case {number + 1}")
            if values["name"] in [c.name for c in found]:
                raise Fault(f"There are two cases named {clean(values['name'], 60)!r}; rename one.", "name")
            for key in ("weights", "table"):
                if key in values:
                    values[key] = (plan.path.parent / values[key]).absolute()
            found.append(Case(**values, folder=folder))
        except Fault as fault:
            raise plan.refused(fault, number) from None
    if not found:
        raise InvalidInput(f"The plan {plan.path.name!r} has no case; add [[case]] with model and data.")
    return tuple(found)


def _tables(plan: Plan, tables: Any, name: str) -> Iterable[Mapping[str, Any]]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        line = 1 if plan.places is None else plan.places.line(name, 0, "")
        raise InvalidInput(f"Line {line} of {plan.path.name!r}: {name!r} is a list of tables; write [[{name}]].")
    return tables
