"""The command ``gradleak list``: names with the first line of their documentation."""

from __future__ import annotations

import inspect
import re

import gradleak.attacks
import gradleak.defenses
import gradleak.metrics
import gradleak.models
from gradleak.cli.console import say
from gradleak.errors import UnknownName
from gradleak.metrics import Metric

__all__ = ["NAMED", "list_names"]

NAMED = {
    "attacks": gradleak.attacks,
    "models": gradleak.models,
    "metrics": gradleak.metrics,
    "defenses": gradleak.defenses,
}


def list_names(kind: str | None) -> None:
    """Print the names of one kind, or of all.

    Raises:
        UnknownName: there is no such kind.
    """
    if kind is not None and kind not in NAMED:
        raise UnknownName("list", kind, NAMED)
    for group, package in NAMED.items():
        # Factories and instances; base classes are for those who write new ones.
        names = [n for n in getattr(package, "__all__", ()) if not inspect.isclass(getattr(package, n))]
        if kind not in (None, group):
            continue
        if kind is None:
            say(group, style="bold")
        if not names:
            say("  (none yet)")
        for name in names:
            say(f"  {name:<22} {_summary(getattr(package, name))}")


def _summary(thing: object) -> str:
    # A metric is an object, documented by the file that it is alone in; everything else documents itself.
    documented = inspect.getmodule(thing.fn) if isinstance(thing, Metric) else thing
    line = " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", line).replace("``", "")
