from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def hostile() -> ModuleType:
    """What these tests share with ``benchmarks/hostile.py``."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "_hostile.py"
    spec = importlib.util.spec_from_file_location("benchmarks_hostile", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
