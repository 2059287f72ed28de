"""Processes killed while they write leave what is whole or recognized; workers end with their parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = 34
"""Kills of each of three kinds."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_kills_at_random_moments(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "_kills.py"
    done = subprocess.run(
        [sys.executable, str(script), str(KILLS), "0", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(sum(kind.values()) for kind in found.values()) == 3 * KILLS
    assert found["new results"] == found["stored cases"] == {"whole": KILLS}
    assert set(found["a result replaced"]) <= {"whole", "whole, page missing", "recognized"}


TOY = '''"""A toy that never ends."""
import os
import time
NAME, SMOKE, DEFAULT, FULL = "toy", 3, 3, 3

def one(lab, *, number):
    (lab.out / f"process {os.getpid()}").touch()
    time.sleep(600)

def run(config, lab):
    lab.measure(one, [{"number": i} for i in range(config)])
'''
START = """
from pathlib import Path
from gradleak.papers.reproduce import reproduce
if __name__ == "__main__":
    here = Path(__file__).parent
    reproduce("1999_toy", out=here / "out", root=here / "papers", jobs=2, scale="smoke")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGINT"])
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="the system does not tell who is alive")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, sent: str) -> None:
    (tmp_path / "papers" / "1999_toy").mkdir(parents=True)
    (tmp_path / "papers" / "1999_toy" / "toy.py").write_text(TOY)
    (tmp_path / "papers" / "1999_toy" / "expected.toml").write_text("")
    (tmp_path / "start.py").write_text(START)
    started = subprocess.Popen([sys.executable, str(tmp_path / "start.py")], stderr=subprocess.DEVNULL)
    try:
        workers: set[int] = set()
        while len(workers) < 2:
            assert started.poll() is None
            time.sleep(0.1)
            workers = {int(p.name.removeprefix("process ")) for p in (tmp_path / "out").glob("process *")}
        started.send_signal(getattr(signal, sent))
        started.wait(20)
        limit = time.monotonic() + 20
        while any(map(alive, workers)):
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        started.kill()


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
