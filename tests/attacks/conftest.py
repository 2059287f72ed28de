"""What the tests of attacks share."""

from __future__ import annotations

import pytest

from gradleak.attacks.matching import engine


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled unless a test asks for it: no small search gains from it, and time decides too much else."""
    monkeypatch.setattr(engine, "_SAVED", dict.fromkeys(engine._SAVED, 0.0))
