"""Processes that write without end, killed at random moments: what they leave is whole, or recognized as broken.

Run as ``python _kills.py COUNT SEED FOLDER``, it prints what was found as JSON. The processes are forked from one that
has imported everything, and each rename waits for a moment, so that many kills fall between two of them.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradleak.audit import store
from gradleak.audit.folder import Folder, read_folder, write_folder
from gradleak.audit.records import AttackRun, Outcome, Record, Subject, Threat, Verdict
from gradleak.errors import InvalidFile
from gradleak.files import sweep
from gradleak.papers.experiment import Lab

PAUSE = 0.001
"""Seconds that a rename waits."""
LATEST = 0.06
"""Seconds after which a process is killed at the latest."""

Found = collections.Counter[str]


def kill_later(work: Callable[[], None], seconds: float) -> None:
    """Run ``work`` again and again in a process of its own, and kill that after ``seconds``."""
    process = os.fork()
    if process == 0:
        try:
            rename = Path.replace

            def slow(self: Path, target: Path) -> Path:
                time.sleep(PAUSE)
                return rename(self, target)

            Path.replace = slow  # type: ignore[method-assign]
            while True:
                work()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def result(number: int) -> tuple[Folder, str]:
    """Return a result and its page, all of which name ``number``."""
    record = Record(
        subject=Subject("lenet", "LeNet", 10, 2, "image", (1, 8, 8), 5, 2, "gradient", "float32", "FedSGD"),
        threat=Threat(()),
        attack=AttackRun("dlg", seed=number),
        outcome=Outcome("converged", 1e-3, 5, 7, 1.5),
        verdict=Verdict("leaked", f"Result {number}.", "Because."),
    )
    inputs = np.full((2, 1, 8, 8), number / 1000)
    return Folder(record, inputs, truth=inputs), f"<p>Result {number}.</p>"


def check_folder(folder: Path) -> str:
    """Return "whole" or "recognized"; every other state is an error."""
    try:
        found = read_folder(folder)
    except InvalidFile as error:
        if "stopped in between" not in str(error):
            raise
        return "recognized"
    number = found.record.attack.seed
    assert np.all(found.inputs == number / 1000)
    assert found.truth is not None
    assert np.all(found.truth == number / 1000)
    page = folder / "report.html"
    assert not page.exists() or page.read_text() == f"<p>Result {number}.</p>"
    return "whole" if page.exists() else "whole, page missing"


def replaced_folders(count: int, seed: int, place: Path) -> Found:
    """Kill processes that replace one result by the next."""
    rng, found, out = random.Random(seed), Found(), place / "out"
    write_folder(out, *result(0))
    for _ in range(count):
        numbers = itertools.count(rng.randrange(500))
        kill_later(lambda numbers=numbers: write_folder(out, *result(next(numbers) % 500)), rng.uniform(0, LATEST))
        found[check_folder(out)] += 1
    write_folder(out, *result(1))
    assert check_folder(out) == "whole"
    assert sorted(p.name for p in place.iterdir()) == ["out"], list(place.iterdir())
    assert len(list(out.iterdir())) == 4, list(out.iterdir())
    return found


def new_folders(count: int, seed: int, place: Path) -> Found:
    """Kill processes that write one new folder after the other."""
    rng, found = random.Random(seed), Found()
    for turn in range(count):
        names = (place / f"{turn}-{i}" for i in itertools.count())
        kill_later(lambda names=names: write_folder(next(names), *result(7)), rng.uniform(0, LATEST))
        for folder in place.glob(f"{turn}-*"):
            assert check_folder(folder) == "whole"
        found["whole"] += 1
    sweep(place)
    assert not list(place.glob(".*")), list(place.glob(".*"))
    return found


def measure(lab: Lab, *, number: int) -> Mapping[str, Any]:
    """Return numbers and an array that can be checked."""
    return {"square": number**2, "array": np.full(2000, number)}


def stores(count: int, seed: int, place: Path) -> Found:
    """Kill processes that measure and store one case after the other."""
    rng, found, lab, before = random.Random(seed), Found(), Lab("cases", place), 0
    for _ in range(count):
        numbers = itertools.count()
        kill_later(lambda n=numbers: _one(lab, n), rng.uniform(0, LATEST))
        after = store.count_measured(place)
        assert after >= before
        before = after
        for path in (place / "cases").glob("[!.]*.json"):
            _check_case(path)
        found["whole"] += 1
    lab.measure(measure, [{"number": n} for n in range(before + 3)])
    assert not list((place / "cases").glob(".*"))
    assert store.count_measured(place) == before + 3, "a case was measured twice"
    return found


def _one(lab: Lab, numbers: Iterator[int]) -> None:
    number = next(numbers)
    assert lab.measure(measure, [{"number": number}])[0]["square"] == number**2


def _check_case(path: Path) -> None:
    case = json.loads(path.read_text())["case"]
    stored = store.read_case(path, case)
    assert stored is not None
    assert stored["square"] == case["number"] ** 2
    assert np.all(stored["array"] == case["number"])


KINDS = {"a result replaced": replaced_folders, "new results": new_folders, "stored cases": stores}


def kill_all(count: int, seed: int, place: Path) -> dict[str, dict[str, int]]:
    """Return what was found after ``count`` kills of each kind."""
    found = {}
    for name, kind in KINDS.items():
        folder = Path(tempfile.mkdtemp(dir=place))
        found[name] = dict(kind(count, seed, folder))
    return found


if __name__ == "__main__":
    print(json.dumps(kill_all(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))

__all__ = ["KINDS", "kill_all"]
