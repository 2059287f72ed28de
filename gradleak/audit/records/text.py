"""Reading and writing ``result.json``."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from gradleak.audit.records.fields import SCHEMA, Record
from gradleak.errors import InvalidFile

__all__ = ["from_json", "to_json"]


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
        older = isinstance(found, int) and not isinstance(found, bool) and 0 < found < SCHEMA
        which = f"an earlier version wrote it (schema {found})" if older else f"it has schema {found!r}"
        raise InvalidFile(
            f"This version of gradleak reads result.json of schema {SCHEMA}, but {which}; run its command again to "
            "write it anew, or read it with the version that wrote it."
        )
    try:
        return _build(Record, data, "result")
    except _Mismatch as error:
        raise InvalidFile(f"result.json is damaged: {error}; run the attack again to write it anew.") from error


class _Mismatch(Exception):
    """A JSON value does not have the declared type."""


T = TypeVar("T")
_LARGEST = 2**63
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
    if isinstance(value, int) and not isinstance(value, bool) and not -_LARGEST < value < _LARGEST:
        raise _Mismatch(f"{where} is larger than any number that belongs there")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _Mismatch(f"{where} is not {'a number' if hint in (int, float) else 'of type ' + hint.__name__}")
