"""Experiments lie in folders with any name, and are importable all the same, in worker processes as well."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["address", "at", "load_package"]

Address = tuple[str, str, str, str]
"""Where a worker finds a function: package, its folder, module, name."""


def load_package(name: str, folder: Path) -> None:
    """Make the Python files of ``folder`` importable as submodules of ``name``, whatever the folder is called."""
    for stale in [k for k in sys.modules if k == name or k.startswith(f"{name}.")]:
        del sys.modules[stale]
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def address(function: Callable[..., Any]) -> Address:
    """Return where ``function`` is, of an experiment that :func:`load_package` made importable."""
    module = sys.modules[function.__module__]
    package = sys.modules[module.__name__.rpartition(".")[0]]
    return package.__name__, str(next(iter(package.__path__))), module.__name__, function.__name__


def at(where: Address) -> Callable[..., Any]:
    """Return the function that is there, in whatever process."""
    package, folder, module, function = where
    if getattr(sys.modules.get(package), "__path__", None) != [folder]:
        load_package(package, Path(folder))
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
