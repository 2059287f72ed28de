"""Tests of adapters whose framework is not installed are not collected; each has an environment of its own."""

from __future__ import annotations

from importlib.util import find_spec

FRAMEWORKS = {"test_flower.py": "flwr", "test_nvflare.py": "nvflare"}
collect_ignore = [test for test, package in FRAMEWORKS.items() if find_spec(package) is None]
