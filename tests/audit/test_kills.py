"""Audits that are killed at random moments lose nothing, measure nothing twice, and end with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_audits_go_on(tmp_path: Path) -> None:
    only = [f"--only={name}" for name in ("here", "processes", "kills")]
    script = ROOT / "benchmarks" / "audit.py"
    done = subprocess.run(
        [sys.executable, str(script), "--seeds", "4", "--kills", "12", "--folder", str(tmp_path), *only],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["trials"] for f in found] == [12, 12, 12]
    assert all(f["same bits as here"] for f in found)
    assert (found[2]["lost"], found[2]["measured twice"]) == (0, 0)
