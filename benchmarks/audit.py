"""Trials of an audit: two processes against one, a local Ray cluster against both, and kills at random moments.

Run as ``python benchmarks/audit.py`` (Ray is measured where it is installed). ``--kills N`` kills that many audits
into one folder, each after a random time, and then lets one end.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradleak.audit.running import run
from gradleak.audit.store import read_case

PLAN = """
[audit]
seeds = {seeds}
budget = 600

[[case]]
name = "perceptron"
model = "perceptron"
model_arg = {{ width = 64, depth = 1 }}
data = "synthetic"
input_shape = [1, 8, 8]
classes = 4
examples = 200
batch_sizes = [1, 3]

[[case]]
name = "classifier"
model = "lenet"
data = "synthetic"
input_shape = [1, 16, 16]
classes = 10
examples = 200
batch_sizes = [1]
"""
LATEST = 2.5
"""Seconds after which an audit is killed at the latest."""


def bits(folder: Path) -> dict[str, str]:
    """Return the hash of what each stored trial found, times and machine left out."""
    found = {}
    for path in sorted((folder / "trials").glob("*.json")):
        record = json.loads(path.read_text())
        kept = read_case(path, record["case"])
        assert kept is not None, f"{path} is damaged"
        digest = hashlib.sha256()
        for name, value in sorted(kept.values.items()):
            digest.update(name.encode() + (value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()))
        found[path.stem] = digest.hexdigest()
    return found


def measure(plan: Path, out: Path, executor: str, jobs: int = 2) -> tuple[float, float]:
    """Return the wall-clock and the processor seconds of one audit, its processes included."""
    before, begin = os.times(), time.perf_counter()
    run(plan, out, executor=executor, jobs=jobs)
    after = os.times()
    return time.perf_counter() - begin, sum(after[:4]) - sum(before[:4])


def kill(plan: Path, out: Path, kills: int, seed: int) -> Mapping[str, Any]:
    """Kill so many audits into one folder at random moments, and return what was lost or measured twice."""
    chance, kept, lost, twice = random.Random(seed), {}, 0, 0
    for _ in range(kills):
        process = os.fork()  # from here, where everything is imported
        if process == 0:
            try:
                run(plan, out)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.05, LATEST))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        now = {path: path.stat().st_mtime_ns for path in (out / "trials").glob("*.json")}
        lost += sum(path not in now for path in kept)
        twice += sum(now.get(path, written) != written for path, written in kept.items())
        kept = now
    return {"kills": kills, "stored by then": len(kept), "lost": lost, "measured twice": twice}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=67)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", choices=("here", "processes", "ray", "kills"), action="append")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.toml"
    plan.write_text(PLAN.format(seeds=asked.seeds))
    executors = asked.only or ["here", "processes", "ray", "kills"]
    for executor in executors:
        if executor == "ray" and importlib.util.find_spec("ray") is None:
            print("ray is not installed", file=sys.stderr)
            continue
        if executor == "kills":
            found = dict(kill(plan, folder / "kills", asked.kills, 0))
            run(plan, folder / "kills")
        else:
            wall, spent = measure(plan, folder / executor, executor)
            found = {"wall": wall, "processor": spent}
        told = bits(folder / executor)
        same = bits(folder / "here") == told if (folder / "here").is_dir() else None
        print(json.dumps({"executor": executor, "trials": len(told), "same bits as here": same, **found}))


if __name__ == "__main__":
    main()
