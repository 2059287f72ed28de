"""How one option's text becomes a value; a text that does not fit ends in one sentence with an example.

Free of torch and NumPy, like :mod:`gradleak.cli.commands`, which hangs these on its options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import typer

from gradleak.errors import UnknownName, clean

__all__ = ["Numbers", "Shape", "finite", "folder", "numbers", "positive", "seconds", "shape", "share", "word"]

_LONGEST = 1e8
"""Longest time limit, three years: what is longer is a slip, and overflows in timers."""
_LARGEST = 2**31 - 1
"""Most values of one input: larger shapes are slips of the keyboard, and overflow in libraries below."""


class Numbers(tuple[float, ...]):
    """Finite numbers, separated by commas."""


class Shape(tuple[int, ...]):
    """Sizes of at least 1, separated by commas or an x."""


def numbers(text: str | Numbers) -> Numbers:
    """Return ``0.5,0.5,0.5`` as numbers."""
    if isinstance(text, Numbers):
        return text
    try:
        found = Numbers(float(part) for part in text.split(","))
    except ValueError:
        found = Numbers((math.nan,))
    if not all(map(math.isfinite, found)):
        raise _refused(text, "is not a list of finite numbers; write for example 0.5,0.5,0.5.")
    return found


def shape(text: str | Shape) -> Shape:
    """Return ``3,32,32`` as a shape."""
    if isinstance(text, Shape):
        return text
    try:
        found = Shape(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise _refused(text, "is not a list of whole numbers; write for example 3,32,32.") from None
    if min(found) < 1:
        raise _refused(text, "has a size below 1; write for example 3,32,32.")
    if math.prod(found) > _LARGEST:
        raise _refused(text, f"has more than {_LARGEST:,} values; write the shape of one input, such as 3,32,32.")
    return found


def seconds(text: str | float) -> float:
    """Return ``90s``, ``2m`` or ``1h`` in seconds."""
    if isinstance(text, float):
        return text
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:].lower())
    try:
        found = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        found = math.nan
    if not 0 < found <= _LONGEST:
        raise _refused(text, "is not a time; write for example 90s, 2m or 1h.")
    return found


def finite(text: str | float) -> float:
    """Return a finite number."""
    return _number(text, lambda value: math.isfinite(value), "is not a finite number; write for example 0.1.")


def positive(text: str | float) -> float:
    """Return a finite number above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "is not a number above 0; write for example 0.1.")


def share(text: str | float) -> float:
    """Return a share in [0, 1)."""
    return _number(text, lambda value: 0 <= value < 1, "is not a share in [0, 1); write for example 0.05 for 5 %.")


def folder(text: str | Path) -> Path:
    """Return the folder of that name; an empty name, of an unset variable say, is not the current folder."""
    if not str(text).strip():
        raise typer.BadParameter("the name is empty; give a folder, or . for the current one.")
    return Path(text)


def word(*choices: str) -> Callable[[str], str]:
    """Return a parser that takes one of ``choices`` only, and suggests the nearest."""

    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(str(UnknownName("such value", text, choices)))
        return text

    return parse


def _number(text: str | float, fits: Callable[[float], bool], sentence: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not fits(found):
        raise _refused(text, sentence)
    return found


def _refused(text: object, sentence: str) -> typer.BadParameter:
    return typer.BadParameter(f"{clean(str(text), 100)!r} {sentence}")
