"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real-data samples: GRADLEAK_DATA, or ../shared/data beside the checkout."""
    named = os.environ.get("GRADLEAK_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"GRADLEAK_DATA names {folder}, which is not a folder")
        pytest.skip(f"no real data: set GRADLEAK_DATA, or put the samples into {folder}")
    return folder
