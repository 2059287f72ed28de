"""Rows of a table: numbers with units and categories, as one-hot groups or integer codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics import Metric
from gradleak.metrics.assignment import cheapest
from gradleak.spaces.base import InputSpace, NullGuess

__all__ = ["Category", "Column", "Number", "TableSpace"]

_WORDS = {
    0: "The row did not come back.",
    1: "Most of its cells are right.",
    2: "Nearly every cell is right.",
    4: "Every cell is right.",
}
_VALID = 1e-2
"""How far a row that was solved may be from one-hot groups and its range, in model-input units."""
_FINE = 1e-3
"""Part of a column's range, or of its std, up to which numbers are the same where no decimals are stated."""


_EDGE = 1e-3
"""Least distance of a mean from the ends of a range, as a part of it, for a sigmoid to start from."""


@dataclass(frozen=True)
class Number:
    """A column of numbers, which the model sees as (number − mean) / std.

    Attributes:
        low: smallest possible value, −∞ if nobody knows.
        decimals: digits after the point with which people write it, 0 for whole numbers; None for six digits in all.
        tolerance: difference up to which a number counts as found, in its unit; None for half of the last decimal, or
            a thousandth of the range.

    Raises:
        InvalidInput: the std is not above 0, the range is empty, or a value is not finite.
    """

    name: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    mean: float = 0.0
    std: float = 1.0
    decimals: int | None = None
    tolerance: float | None = None

    width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        finite = math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0
        if not finite or not self.low <= self.high or not 0 <= (self.decimals or 0) <= 12 or (self.tolerance or 0) < 0:
            raise InvalidInput(
                f"Column {self.name!r} needs a finite mean, a std above 0, a range from low to high, 0 to 12 "
                "decimals and a tolerance of at least 0; correct its description."
            )

    @property
    def heading(self) -> str:
        """The name with its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def close(self) -> float:
        """The difference up to which two numbers count as the same."""
        if self.tolerance is not None:
            return self.tolerance
        if self.decimals is not None:
            return 0.5 * 10.0**-self.decimals
        return _FINE * (self.high - self.low if math.isfinite(self.high - self.low) else self.std)

    def text(self, value: float) -> str:
        """Return the number as people write it."""
        if not math.isfinite(value):
            return "–"
        text = f"{value:.6g}" if self.decimals is None else f"{value:.{self.decimals}f}"
        return text.removeprefix("-") if float(text) == 0 else text


@dataclass(frozen=True)
class Category:
    """A column with one of several ``values``, which the model sees as a one-hot group or as an integer code.

    ``dropped`` is the value, if any, that a one-hot group leaves out and shows by zeros alone.

    Raises:
        InvalidInput: there are no values, two are the same, or the dropped one is not among several of a group.
    """

    name: str
    values: tuple[str, ...]
    one_hot: bool = True
    dropped: str | None = None

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) < len(self.values):
            raise InvalidInput(f"Column {self.name!r} needs one or more values, all different; list each of them once.")
        if self.dropped is not None and (self.dropped not in self.values or len(self.values) < 2 or not self.one_hot):
            raise InvalidInput(f"Column {self.name!r} drops no value of a one-hot group; name one of its values.")

    @property
    def heading(self) -> str:
        """The name."""
        return self.name

    @property
    def width(self) -> int:
        """How many model inputs it takes."""
        return len(self.values) - (self.dropped is not None) if self.one_hot else 1

    def whole(self, group: Tensor, rest: Tensor | None = None) -> Tensor:
        """Return a one-hot group (..., K) with ``rest`` (..., 1) where a value was dropped: one minus the others."""
        if self.dropped is None:
            return group
        at = self.values.index(self.dropped)
        rest = 1 - group.sum(-1, keepdim=True) if rest is None else rest
        return torch.cat([group[..., :at], rest, group[..., at:]], -1)

    def reduced(self, whole: Tensor) -> Tensor:
        """Return the group (..., width) that the model sees of a whole one (..., K)."""
        return whole[..., [i for i, value in enumerate(self.values) if value != self.dropped]]

    def text(self, value: float) -> str:
        """Return the value of a code."""
        return self.values[int(value)] if math.isfinite(value) and 0 <= value < len(self.values) else "–"


Column = Number | Category


@dataclass(frozen=True)
class TableSpace(InputSpace):
    """Rows of a table with these ``columns``, in the order in which the model sees them.

    Candidates are model inputs (D,): one each for numbers and codes, a group for each one-hot category. Decoded rows
    are (C,) in float64: numbers in their units, categories as the position among their values. ``target`` names the
    values of the label, for files of rows.

    Raises:
        InvalidInput: there is no column, or two have one name.
    """

    columns: tuple[Column, ...]
    target: Category | None = None

    kind: ClassVar[str] = "table"
    noun: ClassVar[str] = "row"
    nouns: ClassVar[str] = "rows"
    display: ClassVar[Literal["pictures", "numbers", "text", "table"]] = "table"
    reads: ClassVar[frozenset[str]] = frozenset({"rows"})
    quoted: ClassVar[tuple[str, ...]] = ("cells_found",)
    error_name: ClassVar[str] = "share of wrong cells"

    def __post_init__(self) -> None:
        names = [c.name for c in self.columns] + ([] if self.target is None else [self.target.name])
        if not self.columns or len(set(names)) < len(names):
            raise InvalidInput("A table needs columns with names that differ; describe each of them once.")

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,), the number of model inputs."""
        return (sum(c.width for c in self.columns),)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns with their units."""
        return tuple(c.heading for c in self.columns)

    @property
    def normalization(self) -> str:
        """What the model's inputs are, in words."""
        groups = sum(isinstance(c, Category) and c.one_hot for c in self.columns)
        numbers = sum(isinstance(c, Number) for c in self.columns)
        codes = len(self.columns) - groups - numbers
        parts = ((numbers, "numbers, standardized"), (groups, "one-hot groups"), (codes, "integer codes"))
        return "columns: " + ", ".join(f"{n} {what}" for n, what in parts if n)

    @cached_property
    def _places(self) -> tuple[slice, ...]:
        ends = torch.tensor([c.width for c in self.columns]).cumsum(0).tolist()
        return tuple(slice(end - c.width, end) for end, c in zip(ends, self.columns, strict=True))

    def place(self, name: str) -> slice:
        """Return where the model inputs of a column are."""
        return self._places[[c.name for c in self.columns].index(name)]

    def parts(self, candidates: Tensor) -> list[tuple[Column, Tensor]]:
        """Return each column with its part (..., width) of ``candidates``."""
        return [(c, candidates[..., p]) for c, p in zip(self.columns, self._places, strict=True)]

    # ------------------------------------------------------------------------------------- for model and attacker

    def neutral(self) -> Tensor:
        """Return the row of every number's mean, as far as its range has it, and every category's first value."""
        middle = [min(max(c.mean, c.low), c.high) if isinstance(c, Number) else 0.0 for c in self.columns]
        return self.encode(torch.tensor(middle, dtype=torch.float64))

    def decode(self, candidates: Tensor) -> Tensor:
        """Return rows (..., C), float64: numbers in their units, the largest of each group, the nearest code."""
        cells = []
        for column, part in self.parts(candidates.double()):
            if isinstance(column, Number):
                cells.append(part[..., 0] * column.std + column.mean)
            elif column.one_hot:
                code = column.whole(torch.nan_to_num(part, nan=-torch.inf)).argmax(-1).double()
                cells.append(code.masked_fill(part.isnan().all(-1), torch.nan))
            else:
                cells.append(part[..., 0].round().clamp(0, len(column.values) - 1))
        return torch.stack(cells, -1)

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the model inputs (..., D) of rows (..., C), in their number type (float64 of integers)."""
        wide, parts = inputs.double(), []
        for cell, column in zip(wide.unbind(-1), self.columns, strict=True):
            if isinstance(column, Number):
                parts.append(((cell - column.mean) / column.std)[..., None])
            elif column.one_hot:
                codes = torch.arange(len(column.values), device=wide.device)
                group = (cell[..., None] == codes).double().masked_fill(cell[..., None].isnan(), torch.nan)
                parts.append(column.reduced(group))
            else:
                parts.append(cell[..., None])
        return torch.cat(parts, -1).to(inputs.dtype if inputs.is_floating_point() else torch.float64)

    def relax(self, z: Tensor) -> Tensor:
        """Return model inputs (..., D) that a search may take at any ``z`` (..., D): softmax of each one-hot group.

        Numbers whose range is known stay in it by a sigmoid that has their mean at 0, and there one std for each unit;
        other numbers and codes are taken as they are.
        """
        parts = []
        for column, part in self.parts(z):
            low, high = _bounds(column)
            if isinstance(column, Category):
                logits = column.whole(part, torch.zeros_like(part[..., :1]))
                parts.append(column.reduced(logits.softmax(-1)) if column.one_hot else part)
            elif math.isfinite(high - low) and high > low:
                at = min(max(-low / (high - low), _EDGE), 1 - _EDGE)
                slope = 1 / ((high - low) * at * (1 - at))
                parts.append(low + (high - low) * (slope * part + math.log(at / (1 - at))).sigmoid())
            else:
                parts.append(part)
        return torch.cat(parts, -1)

    def project(self, candidates: Tensor) -> Tensor:
        """Return the nearest candidates whose numbers and codes lie in their ranges, and groups in [0, 1]."""
        return torch.cat([part.clamp(*_bounds(column)) for column, part in self.parts(candidates)], -1)

    def plausible(self, candidates: Tensor, tolerance: float = _VALID) -> Tensor:
        """Return which of ``candidates`` (N, D) are rows, (N,), up to ``tolerance`` in model-input units.

        Every group must be one-hot, every code whole, every number in its range and as whole as its decimals say.
        """
        result = candidates.isfinite().all(-1)
        for column, part in self.parts(candidates.double()):
            low, high = _bounds(column)
            part = column.whole(part) if isinstance(column, Category) and column.one_hot else part
            result &= ((part >= low - tolerance) & (part <= high + tolerance)).all(-1)
            if isinstance(column, Category):
                result &= ((part - part.round()).abs() <= tolerance).all(-1)
                result &= (part.round().sum(-1) == 1) if column.one_hot else True
            elif column.decimals is not None:
                steps = (part[..., 0] * column.std + column.mean) * 10.0**column.decimals
                result &= (steps - steps.round()).abs() <= tolerance * column.std * 10.0**column.decimals
        return result

    def show(self, candidates: Tensor) -> tuple[Tensor, str | None]:
        """Return rows, and a sentence where solved inputs are none: groups not one-hot, numbers out of range."""
        rows = self.decode(candidates)
        strange = [c.name for c, p in zip(self.columns, self._places, strict=True) if not _fits(c, candidates[..., p])]
        if not strange:
            return rows, None
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        return rows, (
            f"The solved inputs are no rows of the stated table ({', '.join(strange[:3])}{more}: no one-hot group, no "
            "code, or out of range): they are mixtures, or the table's description differs from the client's, so check "
            "its columns, their order and their standardization. The nearest rows are shown."
        )

    def check(self, inputs: Tensor) -> None:
        """Check that model inputs (N, D) are rows: one-hot groups, whole codes, numbers in range."""
        super().check(inputs)
        for column, part in self.parts(inputs):
            if not _fits(column, part):
                what = (
                    f"numbers outside {column.low:g} to {column.high:g}"
                    if isinstance(column, Number)
                    else "groups that are not one-hot"
                    if column.one_hot
                    else f"codes outside 0 to {len(column.values) - 1}"
                )
                raise InvalidInput(
                    f"Column {column.name!r} has {what}; describe the columns in the order and the coding in which the "
                    "model sees them."
                )

    # ------------------------------------------------------------------------------------------------- for scores

    def cells(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return which cells (N, C) of decoded rows are right: categories exactly, numbers up to their tolerance."""
        close = torch.tensor([c.close if isinstance(c, Number) else 0.0 for c in self.columns], dtype=torch.float64)
        return (guess.double() - truth.double()).abs() <= close + 1e-9 * truth.double().abs()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The share of cells that are right, by the tolerances of this table."""
        meaning = "share of the row's cells that are right: categories exactly, numbers up to their tolerance"
        return (Metric("cells_found", "", True, lambda g, t: 1 - self.errors(g, t), "rows", meaning),)

    def assign(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return the assignment with the fewest wrong cells, numbers by how wrong they are where that is equal."""
        right = torch.stack([self.cells(guess, row).double() for row in truth])
        apart = (self.encode(guess)[None] - self.encode(truth)[:, None]).square().mean(-1)
        return cheapest(1 - right.mean(-1) + 1e-3 * apart / (1 + apart))

    def errors(self, guess: Tensor, truth: Tensor) -> Tensor:
        """Return the share of wrong cells of each row, (N,)."""
        wrong = 1 - self.cells(guess, truth).double().mean(1)
        return wrong.masked_fill(guess.isnan().any(1), torch.nan)

    def null_guesses(self, truth: Tensor, public: Tensor | None = None) -> tuple[NullGuess, ...]:
        """Return the row of medians and commonest values, of ``public`` rows or else of the private ones (oracle)."""
        super().null_guesses(truth, public)  # checks the shapes
        rows = (truth if public is None else public).detach().to("cpu", torch.float64)
        middle, commonest = rows.median(0).values, rows.mode(0).values
        numbers = torch.tensor([isinstance(c, Number) for c in self.columns])
        whose = "the private batch's" if public is None else f"{len(rows)} public rows'"
        said = f"{whose} medians and commonest values{' (oracle)' if public is None else ''}"
        return (NullGuess(said, torch.where(numbers, middle, commonest).expand_as(truth), oracle=public is None),)

    def closeness(self, values: Mapping[str, float | None]) -> tuple[int, str]:
        """Return 1 where three quarters of the cells are right, 2 from nine tenths on, 4 for all."""
        share = values.get("cells_found") or 0.0
        level = 4 if share >= 1 - 1e-9 else int(share >= 0.75) + int(share >= 0.9)
        return level, _WORDS[level]

    def texts(self, inputs: Tensor) -> tuple[tuple[str, ...], ...]:
        """Return rows as people write them."""
        return tuple(
            tuple(c.text(v) for c, v in zip(self.columns, row, strict=True)) for row in self.prepare(inputs).tolist()
        )


def _bounds(column: Column) -> tuple[float, float]:
    """Return the least and the largest model input of a column."""
    if isinstance(column, Number):
        return (column.low - column.mean) / column.std, (column.high - column.mean) / column.std
    return 0.0, 1.0 if column.one_hot else len(column.values) - 1.0


def _fits(column: Column, part: Tensor) -> bool:
    return bool(TableSpace((column,)).plausible(part).all())
