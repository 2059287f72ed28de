"""Every error that gradleak raises on purpose; each message is one sentence that ends with the remedy.

::

    GradleakError
    ├── InvalidInput          what the caller handed over cannot be used as it is
    │   ├── InvalidUpdate     all zero, NaN or infinite values, missing, extra or misshapen parameters
    │   ├── InvalidModel      active dropout, train-mode BatchNorm where it must be reproduced, no such factory
    │   ├── InvalidFile       truncated, hostile, pickled or absent file
    │   └── UnknownName       no attack, model, metric or dataset of that name ("did you mean …?")
    ├── Refusal               an attack does not run here; what was found all the same is recorded
    │   ├── MissingKnowledge  the threat model does not grant what the attack needs
    │   └── NotApplicable     the attack's structural conditions do not hold for this model or update
    ├── UpdateBlocked         a policy keeps an update from leaving the client
    └── ResourceLimit         the run would not fit in memory

``MissingKnowledge`` and ``NotApplicable`` are answers, not failures of the program: an audit records them as
``not_applicable`` with the reason, never as a score of zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST = 1000
"""Characters of a message; names and reasons come out of untrusted files, where they may be a megabyte long."""
_SHOWN = 100
"""Characters of a name that was not found."""


def clean(text: str, longest: int = _LONGEST) -> str:
    r"""Return ``text`` as one printable line: control characters spelled out, its middle left out if it is long.

    >>> print(clean("a\x1b[2J\nb"))
    a\x1b[2J b
    """
    if len(text) > longest:
        end = longest // 4
        text = f"{text[: longest - end - 3]} … {text[-end:]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """Return the first line of what ``error`` says, or its type where it says nothing, for use inside a sentence."""
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return clean(line or type(error).__name__, 400)


def is_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: torch's allocator on the CPU says so in a RuntimeError without a type of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        w in str(error) for w in ("DefaultCPUAllocator", "not enough memory")
    )


class GradleakError(Exception):
    """Base of all errors raised on purpose; the message is made printable by :func:`clean`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(clean(message))

    def __reduce__(self) -> tuple[Any, ...]:
        # By its message: it is raised in worker processes as well, and subclasses take other arguments.
        return _again, (type(self), str(self)), self.__dict__ or None


def _again(kind: type[GradleakError], message: str) -> GradleakError:
    return kind.__new__(kind, message)


class InvalidInput(GradleakError, ValueError):
    """What the caller handed over cannot be used as it is."""


class InvalidUpdate(InvalidInput):
    """An update does not fit its model or is not finite."""


class InvalidModel(InvalidInput):
    """A model cannot be evaluated reproducibly, or cannot be built."""


class InvalidFile(InvalidInput):
    """A file cannot be read safely."""


class UnknownName(InvalidInput):
    """A name is not among the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Say which ``kind`` of thing was not found and suggest the closest ``known`` names."""
        known, name = sorted(known), clean(name, _SHOWN)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"choose one of {', '.join(known)}."
        super().__init__(f"There is no {kind} named {name!r}: {hint}")


class Refusal(GradleakError):
    """An attack does not run here.

    Attributes:
        findings: what was found all the same, ``gradleak.types.Finding``.
        attempts: the ways that were tried, ``gradleak.types.Attempt``.
    """

    findings: tuple[Any, ...] = ()
    attempts: tuple[Any, ...] = ()


class MissingKnowledge(Refusal):
    """The threat model does not grant what the attack needs."""


class NotApplicable(Refusal):
    """The attack's structural conditions do not hold here."""


class UpdateBlocked(GradleakError):
    """A policy keeps an update from leaving the client, because it gives inputs away or cannot be inspected."""


class ResourceLimit(GradleakError):
    """The run would not fit in the memory at hand."""


@contextmanager
def blaming_the_model(what: str, remedy: str) -> Iterator[None]:
    """Run the user's model and loss, which may fail in any way: say ``what`` failed, with what reason, and the remedy.

    Raises:
        InvalidModel: something failed that is neither an error of gradleak, nor Ctrl-C, nor a lack of memory.
    """
    try:
        yield
    except (GradleakError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if is_memory(error):
            raise
        raise InvalidModel(f"{what} ({reason(error)}); {remedy}") from error
