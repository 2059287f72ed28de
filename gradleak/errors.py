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
    └── ResourceLimit         the run would not fit in memory

``MissingKnowledge`` and ``NotApplicable`` are answers, not failures of the program: an audit records them as
``not_applicable`` with the reason, never as a score of zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GradleakError(Exception):
    """Base of all errors raised on purpose."""


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
        known = sorted(known)
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


class ResourceLimit(GradleakError):
    """The run would not fit in the memory at hand."""
