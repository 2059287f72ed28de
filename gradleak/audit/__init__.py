"""Audits: plans, trials, scores against a truth that no attack sees, and the records that reports are made of.

Nothing is imported here: the report reads ``gradleak.audit.records`` and must not load PyTorch with it. The package can
be called: ``gradleak.audit("plan.toml", "out")`` is :func:`gradleak.run_audit`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import gradleak


class _Package(types.ModuleType):
    @property
    def __call__(self) -> Callable[..., Any]:
        """What a call of the package calls."""
        found: Callable[..., Any] = gradleak.run_audit
        return found


sys.modules[__name__].__class__ = _Package
