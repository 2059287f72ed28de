"""``expected.toml``: what the paper says and what was measured, row by row."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradleak.errors import InvalidFile
from gradleak.files import read_file

__all__ = ["drift", "enter", "reached", "read_expected", "to_toml"]

Tables = dict[str, dict[str, dict[str, Any]]]
"""Experiment → row → what is said about it."""

_WRITTEN = (
    "ours", "ours_interval", "published", "published_interval", "n", "unit", "cost", "note", "reached", "scale",
    "hardware", "date",
)  # fmt: skip
_HEADER = """# What the paper says and what gradleak measured.
# By hand: paper, source, target (such as "<= 1e-4"), tolerance (absolute) or factor (multiplicative) within which a
# repetition must stay, why (disagreement with the paper, explained: without a measured number, and nothing that
# another run may contradict, since every run prints it). All other keys are written by `gradleak reproduce`; never
# type them in.
"""
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("source", "target", "why", "unit", "cost", "note", "scale", "hardware", "date"), (str,)),
    **dict.fromkeys(("tolerance", "factor"), (int, float)),
}


def read_expected(folder: Path) -> Tables:
    """Return the tables of ``folder/expected.toml``.

    Raises:
        InvalidFile: it is absent, no TOML, or no table of rows.
    """
    path = folder / "expected.toml"
    try:
        tables = tomllib.loads(read_file(path).decode("utf-8"))
    except InvalidFile:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{path} is not valid TOML ({error}); correct it.") from error
    for name, rows in tables.items():
        for row, entry in rows.items() if isinstance(rows, dict) else [("", rows)]:
            if not isinstance(entry, dict):
                raise InvalidFile(f"{path} has {name!r} where a table [{name}.ROW] is needed; correct it.")
            for key, value in entry.items():
                if not isinstance(value, _TYPES.get(key, (object,))) or (isinstance(value, bool) and key in _TYPES):
                    raise InvalidFile(f"{path} has a wrong type of {key!r} under [{name}.{row}]; correct it.")
    return tables


def reached(row: Mapping[str, Any], target: str) -> bool | None:
    """Return whether ours meets a target such as "<= 1e-4"; None without target or number."""
    match = re.fullmatch(r"\s*(<=|>=)\s*([-+0-9.eE]+)\s*", target)
    if not match or not isinstance(row["ours"], Mapping):
        return None
    try:
        bound = float(match[2])
    except ValueError:
        return None
    value = row["ours"]["value"]
    return bool(value <= bound if match[1] == "<=" else value >= bound)


def drift(name: str, stored: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Yield a sentence for each row that left the tolerance around the recorded value."""
    for row in stored["rows"]:
        record = expected.get(row["name"], {})
        before = record.get("ours")
        if record.get("scale") != stored["scale"] or not isinstance(before, (int, float)):
            continue
        now = row["ours"]["value"] if isinstance(row["ours"], Mapping) else float("nan")
        within = abs(now - before) <= record.get("tolerance", float("inf"))
        if "factor" in record:
            within = before / record["factor"] <= now <= before * record["factor"]
        if not within:
            yield f"{name}, {row['name']}: measured {now:.3g}, recorded {before:.3g}."


def enter(tables: Tables, name: str, stored: Mapping[str, Any]) -> None:
    """Write the rows of the result ``stored`` of the experiment ``name`` into ``tables``."""
    table = tables.setdefault(name, {})
    for row in stored["rows"]:
        entry = {k: v for k, v in table.get(row["name"], {}).items() if k not in _WRITTEN}
        table[row["name"]] = entry | _written(row, stored, entry.get("target", ""))


def _written(row: Mapping[str, Any], stored: Mapping[str, Any], target: str) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for key in ("ours", "published"):
        value = row[key]
        if isinstance(value, Mapping):
            entry[key] = _rounded(value["value"])
            entry[f"{key}_interval"] = [_rounded(value["low"]), _rounded(value["high"])]
        elif value is not None:
            entry[key] = value
    n = [row[k]["n"] for k in ("ours", "published") if isinstance(row[k], Mapping)]
    if n:
        entry["n"] = n[0]
    entry |= {k: row[k] for k in ("unit", "cost", "note") if row[k]}
    met = reached(row, target)
    if met is not None:
        entry["reached"] = met
    return entry | {k: stored[k] for k in ("scale", "hardware", "date")}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def to_toml(tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the tables as TOML, under the words that say what is written by hand."""
    lines = [_HEADER.rstrip()]
    for name, rows in tables.items():
        for row, entry in rows.items():
            lines.append(f"\n[{_key(name)}.{_key(row)}]")
            lines += [f"{_key(k)} = {_value(v)}" for k, v in entry.items()]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
