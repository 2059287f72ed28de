"""Tables as people keep them: a schema in JSON, rows in CSV, a DataFrame, scikit-learn's fitted ColumnTransformer.

Neither pandas nor scikit-learn is imported: what is handed over is asked for its public attributes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import InvalidFile, InvalidInput, UnknownName, reason
from gradleak.files import read_file, write_bytes
from gradleak.spaces.tables import Category, Column, Number, TableSpace

__all__ = ["read_rows", "read_schema", "schema_bytes", "table_of_frame", "table_of_transformer", "write_schema"]

_LARGEST = 1 << 26
"""Bytes of a schema or a file of rows, at most."""
_KEYS = {"name", "unit", "range", "mean", "std", "decimals", "tolerance"}


def read_schema(path: str | Path) -> TableSpace:
    """Return the table that a JSON file describes.

    It has ``columns``, a list in the order in which the model sees them, and perhaps ``target``. A column of numbers
    has a ``name`` and, as far as known, ``unit``, ``range`` [low, high], ``mean`` and ``std`` of its standardization,
    ``decimals`` and ``tolerance``; a category has ``name``, ``values`` and perhaps ``coding``, "one-hot" or "integer",
    and ``dropped``, the value that a one-hot group leaves out.

    Raises:
        InvalidFile: it is absent, no JSON, or describes no table.
    """
    text = _text(path)
    try:
        data = json.loads(text)
        columns = tuple(_column(entry) for entry in data["columns"])
        return TableSpace(columns, _category(data["target"]) if "target" in data else None)
    except InvalidInput as error:
        raise InvalidFile(f"The table's schema {str(path)!r} cannot be used: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidFile(
            f"{str(path)!r} is no schema of a table ({reason(error)}); write JSON such as "
            '{"columns": [{"name": "age", "mean": 38.6, "std": 13.6}, {"name": "sex", "values": ["Female", "Male"]}]}.'
        ) from error


def write_schema(path: str | Path, space: TableSpace) -> None:
    """Write a table's description, as :func:`read_schema` reads it.

    Raises:
        InvalidFile: it cannot be written there.
    """
    write_bytes(path, schema_bytes(space))


def schema_bytes(space: TableSpace) -> bytes:
    """Return the content of a file with a table's description."""
    columns = [_plain(c) for c in space.columns]
    data = {"columns": columns} | ({} if space.target is None else {"target": _plain(space.target)})
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def read_rows(path: str | Path, space: TableSpace, *, count: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the rows (N, C) of a CSV file in people's words, decoded, float64, and their labels, if it has them.

    The first line names the columns, in any order, with or without their units; others are left out. Labels (N,) are
    those of ``space.target``, or whole numbers in a column ``label``.

    Args:
        path: of the file.
        space: the table.
        count: number of rows that there must be; any if None.

    Raises:
        InvalidFile: it is absent, empty or no CSV.
        InvalidInput: a column is missing, or a cell is no value of its column, with the number of its line.
    """
    text = _text(path)
    try:
        lines = csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True)
        header = [name.strip() for name in next(lines, [])]
        rows = [(lines.line_num, line) for line in lines if line]
    except csv.Error as error:
        raise InvalidFile(f"{str(path)!r} is no CSV file ({reason(error)}); save the rows with commas.") from error
    places = []
    for column in space.columns:
        place = next((header.index(n) for n in (column.name, column.heading) if n in header), None)
        if place is None:
            shown = ", ".join(map(repr, header[:12]))
            raise InvalidInput(
                f"{str(path)!r} has no column {column.name!r} in its first line ({shown}); name it as in the schema."
            )
        places.append(place)
    target: Column = Number("label") if space.target is None else space.target
    if not rows or (count is not None and len(rows) != count):
        raise InvalidInput(
            f"{str(path)!r} has {len(rows)} rows, but {count or 'some'} are needed; give those of the attacked batch."
        )
    for number, line in rows:
        if len(line) != len(header):
            raise InvalidInput(
                f"Line {number} of {str(path)!r} has {len(line)} cells for {len(header)} columns; correct it."
            )
    cells = [
        [_cell(column, line[place], path, number) for column, place in zip(space.columns, places, strict=True)]
        for number, line in rows
    ]
    labels = None
    if target.name in header:
        place = header.index(target.name)
        labels = torch.tensor([_cell(target, line[place], path, number) for number, line in rows], dtype=torch.float64)
        labels = labels.long() if bool((labels == labels.round()).all()) else labels
    return torch.tensor(cells, dtype=torch.float64), labels


def table_of_frame(frame: Any, *, target: str | None = None, one_hot: bool = True) -> TableSpace:
    """Return the table of a pandas ``DataFrame``: each column standardized by its own mean and standard deviation.

    Columns of numbers are numbers (whole ones where their type is), all others are categories with their values in
    order. Where the client standardizes by other rows, describe them with :func:`table_of_transformer` or a schema.

    Args:
        frame: the rows by which the model's inputs were standardized.
        target: column of the label, which is no input.
        one_hot: whether categories are one-hot groups, else integer codes.

    Raises:
        InvalidInput: it has no such columns, or a column has missing or constant values.
    """
    columns: list[Column] = []
    label = None
    for name in frame.columns:
        series = frame[name]
        if bool(series.isna().any()):
            raise InvalidInput(f"Column {str(name)!r} has missing values; fill them as the client does.")
        if name == target:
            label = Category(str(name), _values(series))
        elif series.dtype.kind in "iuf" and not hasattr(series, "cat"):
            low, high, mean, std = (float(v) for v in (series.min(), series.max(), series.mean(), series.std(ddof=0)))
            columns.append(Number(str(name), "", low, high, mean, std or 1.0, 0 if series.dtype.kind in "iu" else None))
        else:
            columns.append(Category(str(name), _values(series), one_hot))
    if target is not None and label is None:
        raise UnknownName("column", target, [str(c) for c in frame.columns])
    return TableSpace(tuple(columns), label)


def table_of_transformer(transformer: Any, *, target: Category | None = None) -> TableSpace:
    """Return the table that a fitted scikit-learn ``ColumnTransformer`` makes of its columns.

    It may use ``StandardScaler``, ``MinMaxScaler``, ``OneHotEncoder``, ``OrdinalEncoder`` and "passthrough", alone or
    behind a ``SimpleImputer`` in a ``Pipeline``.

    Args:
        transformer: what the client fits to its rows or received from the server.
        target: the values of the label, where they have names.

    Raises:
        InvalidInput: it is not fitted, or uses something else.
    """
    if not hasattr(transformer, "transformers_"):
        raise InvalidInput("A table is read off a fitted ColumnTransformer; call its fit(...) first.")
    labeled = hasattr(transformer, "feature_names_in_")
    named = [str(n) for n in (transformer.feature_names_in_ if labeled else range(transformer.n_features_in_))]
    columns: list[Column] = []
    for _name, step, selected in transformer.transformers_:
        chosen = named[selected] if isinstance(selected, slice) else selected
        names = [c if isinstance(c, str) else named[c] for c in ([chosen] if isinstance(chosen, str) else chosen)]
        if step != "drop" and names:
            columns += _transformed(step, names)
    return TableSpace(tuple(columns), target)


def _transformed(step: Any, names: Sequence[str]) -> list[Column]:
    """Return what one fitted transformer makes of the columns ``names``."""
    for inner in [s for _, s in getattr(step, "steps", ())]:
        if hasattr(inner, "statistics_") and not getattr(inner, "add_indicator", False):
            continue  # An imputer hands on what is there.
        step = inner
        break
    kind = "passthrough" if isinstance(step, str) else type(step).__name__
    if kind == "passthrough" or (kind == "FunctionTransformer" and step.func is None):
        return [Number(n) for n in names]
    if kind == "StandardScaler":
        means = [0.0] * len(names) if step.mean_ is None else step.mean_
        stds = [1.0] * len(names) if step.scale_ is None else step.scale_
        return [Number(n, mean=float(m), std=float(s)) for n, m, s in zip(names, means, stds, strict=True)]
    if kind == "MinMaxScaler":
        ends = zip(names, step.data_min_, step.data_max_, step.min_, step.scale_, strict=True)
        return [Number(n, "", float(a), float(b), float(-m / s), float(1 / s)) for n, a, b, m, s in ends]
    if kind in ("OneHotEncoder", "OrdinalEncoder"):
        if any(joined is not None for joined in getattr(step, "infrequent_categories_", None) or ()):
            raise InvalidInput(
                "The OneHotEncoder joins rare categories, which cannot be told apart; fit it without min_frequency and "
                "max_categories, or describe the columns in a schema."
            )
        drops = getattr(step, "drop_idx_", None)
        drops = [None] * len(names) if drops is None else drops
        return [
            Category(n, tuple(map(str, values)), kind == "OneHotEncoder", None if d is None else str(values[int(d)]))
            for n, values, d in zip(names, step.categories_, drops, strict=True)
        ]
    raise InvalidInput(
        f"The ColumnTransformer uses {kind}, which no table is read off; use StandardScaler, MinMaxScaler, "
        "OneHotEncoder, OrdinalEncoder or passthrough, or describe the columns in a schema."
    )


def _values(series: Any) -> tuple[str, ...]:
    found = series.cat.categories if hasattr(series, "cat") else sorted(series.unique())
    return tuple(str(v) for v in found)


def _column(entry: dict[str, Any]) -> Column:
    if "values" in entry:
        return _category(entry)
    unknown = set(entry) - _KEYS
    if unknown:
        raise UnknownName("key of a column", sorted(unknown)[0], [*_KEYS, "values", "coding"])
    low, high = (float(v) for v in entry.get("range", (-math.inf, math.inf)))
    decimals, tolerance = entry.get("decimals"), entry.get("tolerance")
    if decimals is not None and not isinstance(decimals, int):
        raise TypeError("decimals is a whole number")
    return Number(
        _name(entry), str(entry.get("unit", "")), low, high, float(entry.get("mean", 0)), float(entry.get("std", 1)),
        decimals, None if tolerance is None else float(tolerance),
    )  # fmt: skip


def _category(entry: dict[str, Any]) -> Category:
    known = ["name", "values", "coding", "dropped"]
    unknown = set(entry) - set(known)
    if unknown:
        raise UnknownName("key of a category", sorted(unknown)[0], known)
    coding = entry.get("coding", "one-hot")
    if coding not in ("one-hot", "integer"):
        raise UnknownName("coding", str(coding), ["one-hot", "integer"])
    if not isinstance(entry["values"], list):
        raise TypeError("values is a list")
    dropped = None if entry.get("dropped") is None else str(entry["dropped"])
    return Category(_name(entry), tuple(str(v) for v in entry["values"]), coding == "one-hot", dropped)


def _name(entry: dict[str, Any]) -> str:
    if not isinstance(entry["name"], str):
        raise TypeError("a name is a text")
    return entry["name"]


def _plain(column: Column) -> dict[str, Any]:
    if isinstance(column, Category):
        plain: dict[str, Any] = {"name": column.name, "values": list(column.values)}
        plain |= {} if column.one_hot else {"coding": "integer"}
        return plain | ({} if column.dropped is None else {"dropped": column.dropped})
    values = dataclasses.asdict(column)
    low, high = values.pop("low"), values.pop("high")
    if math.isfinite(low) and math.isfinite(high):
        values["range"] = [low, high]
    return {k: v for k, v in values.items() if v is not None and v != ""}


def _cell(column: Column, text: str, path: str | Path, line: int) -> float:
    text = text.strip()
    if isinstance(column, Category):
        if text in column.values:
            return float(column.values.index(text))
        choices = ", ".join(map(repr, column.values[:8])) + (" …" if len(column.values) > 8 else "")
        raise InvalidInput(
            f"Line {line} of {str(path)!r} has {text[:60]!r} in column {column.name!r}, whose values are {choices}; "
            "correct it."
        )
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidInput(
            f"Line {line} of {str(path)!r} has {text[:60]!r} in the numbers of {column.name!r}; correct it."
        )
    return number


def _text(path: str | Path) -> str:
    try:
        return read_file(path, limit=_LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFile(f"{str(path)!r} is no text in UTF-8; save it as such.") from error
