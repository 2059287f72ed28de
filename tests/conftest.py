"""What every test may ask for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
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


@pytest.fixture
def run_extended(tmp_path: Path) -> Callable[[str, str, str, str], str]:
    """Return (module, text, name, code) → output of ``code`` in a copy of the package with one file and one line more.

    The file is ``module`` with ``text``; the line imports ``name`` from it in the folder below ``gradleak``.
    """

    def run(module: str, text: str, name: str, code: str) -> str:
        # With its bytecode: compiling all of it takes longer than what is tested.
        shutil.copytree(ROOT / "gradleak", tmp_path / "gradleak")
        (tmp_path / (module.replace(".", "/") + ".py")).write_text(text, encoding="utf-8")
        init = tmp_path.joinpath(*module.split(".")[:2], "__init__.py")
        line = f'from {module} import {name}\n\n__all__ = [\n    "{name}",'
        init.write_text(init.read_text(encoding="utf-8").replace("__all__ = [", line, 1), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail on skips that the environment did not announce: GRADLEAK_SKIPS is a pattern of the expected reasons."""
    expected = os.environ.get("GRADLEAK_SKIPS")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if expected is None or reporter is None:
        return
    reasons = {str(r.longrepr[2]) for r in reporter.stats.get("skipped", ()) if isinstance(r.longrepr, tuple)}
    surprises = sorted(r for r in reasons if not re.search(expected, r))
    if surprises:
        reporter.ensure_newline()
        reporter.write_line(f"Skips that were not expected: {'; '.join(surprises)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
