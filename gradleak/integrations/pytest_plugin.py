"""A pytest plugin: a test that fails where a plan's federation leaks more than it may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["assert_leakage_below"]


@pytest.fixture
def assert_leakage_below(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Return a function (plan, share, out=None) that audits and fails the test where a larger share came back.

    The evidence goes to ``out``, a temporary folder if it is None; in one that stays, nothing is measured twice. The
    test also fails where trials failed or nothing was measured: a test that tried nothing proves nothing.
    """

    def check(plan: str | Path, share: float, out: str | Path | None = None) -> None:
        from gradleak.audit.running import exit_code  # Not at the top: every run of pytest would load torch.
        from gradleak.auditing import PAGE, run_audit

        folder = Path(out) if out is not None else tmp_path_factory.mktemp("audit")
        evidence = run_audit(plan, folder, fail_above=share).evidence
        if exit_code(evidence):
            told = evidence["verdict"]
            pytest.fail("\n".join([told["headline"], *told["reason"], f"Evidence: {folder / PAGE}"]), pytrace=False)

    return check
