"""Broken files, broken results, and processes killed at random moments: how many end as promised.

What ``tests/hostile`` tries in seconds, at any scale: ``--broken`` files of each format through their readers,
``--results`` damaged result folders through the report, ``--kills`` of processes that write, ``--commands`` of the
whole command line (``gradleak attack``, and ``gradleak reproduce --jobs 2``), killed with SIGKILL or asked to stop with
SIGTERM, SIGHUP, SIGINT, each followed by a look at what was left and by a run that must succeed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _hostile
import safetensors.torch
import torch
from _common import arguments, write_result
from _kills import KINDS

import gradleak as gl
from gradleak.audit.folder import read_folder
from gradleak.data import write_tensors
from gradleak.errors import InvalidFile

Row = Mapping[str, Any]


def row(what: str, found: Counter[str], wrong: list[str]) -> Row:
    """Return one line of the table; what went wrong is printed."""
    for text in wrong[:5]:
        print(text, file=sys.stderr)
    tried = sum(found.values()) + len(wrong)
    return {"what": what, "tried": tried, **found, "not as promised": len(wrong)}


def broken(count: int, folder: Path) -> list[Row]:
    """Break every file in ``count`` ways and read it."""
    rows = []
    for name, data in (_hostile.tensor_files() | _hostile.image_files() | _hostile.batch_files()).items():
        found, wrong = Counter[str](), []
        for seed in range(count):
            (folder / name).write_bytes(_hostile.broken_bytes(data, seed))
            try:
                said = _hostile.refusal(_hostile.read, folder, name)
                found["read" if said is None else "refused"] += 1
            except Exception:  # noqa: BLE001  (what must not happen is counted)
                wrong.append(f"{name}, seed {seed}: {traceback.format_exc()}")
        rows.append(row(f"broken {name}", found, wrong))
    return rows


def bombs(folder: Path) -> Row:
    """Read what would take all memory."""
    found, wrong = Counter[str](), []
    for name in _hostile.write_bombs(folder):
        _hostile.forget_peak()
        before = _hostile.resident()
        said = _hostile.refusal(_hostile.read, folder, name)
        more = _hostile.resident() - before
        if said is None or more > 64 << 20:
            wrong.append(f"{name}: {more} bytes more, {said}")
        else:
            found["refused"] += 1
    return row("bombs, devices, pipes", found, wrong)


def results(count: int, folder: Path) -> Row:
    """Damage a result in ``count`` ways and render it."""
    found, wrong, out = Counter[str](), [], folder / "result"
    _hostile.write_folder(out, _hostile.result(), "<html>")
    text = (out / "result.json").read_text()
    for seed in range(count):
        (out / "result.json").write_text(_hostile.broken_json(text, seed))
        try:
            said = _hostile.refusal(_hostile.show, out)
            found["read" if said is None else "refused"] += 1
        except Exception:  # noqa: BLE001  (what must not happen is counted)
            wrong.append(f"result, seed {seed}: {traceback.format_exc()}")
    return row("damaged result.json", found, wrong)


def kills(count: int, folder: Path) -> list[Row]:
    """Kill processes that write."""
    rows = []
    for name, kind in KINDS.items():
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            rows.append(row(f"SIGKILL: {name}", kind(count, 1, place), []))
        except AssertionError:
            rows.append(row(f"SIGKILL: {name}", Counter(), [traceback.format_exc()]))
    return rows


MODULE = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 5))
"""
TOY = '''"""A toy."""
import time
from gradleak.papers.experiment import Result, Row, median
NAME, SMOKE, DEFAULT, FULL = "toy", 12, 12, 12

def one(lab, *, number):
    with open(lab.out / "calls.txt", "a") as file:
        file.write(f"{number}\\\\n")
    time.sleep(0.2)
    return {"square": number**2}

def run(config, lab):
    found = lab.measure(one, [{"number": i} for i in range(config)])
    return Result([Row("median square", median([r["square"] for r in found]))])
'''
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}


def command(arguments_: list[str], folder: Path, sent: str | None, seconds: float) -> int:
    """Run the command line, send it a signal after ``seconds``, and return its exit code."""
    code = "import sys; sys.argv[0] = 'gradleak'; from gradleak.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments_], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if sent is not None:
        time.sleep(seconds)
        process.send_signal(getattr(signal, sent))
    _, error = process.communicate(timeout=300)
    if b"Traceback" in error:
        raise AssertionError(error.decode(errors="replace"))
    return process.returncode


def attacks(count: int, folder: Path) -> Row:
    """Stop ``gradleak attack`` at random moments; into the same folder again and again."""
    (folder / "victim.py").write_text(MODULE)
    namespace: dict[str, Any] = {}
    exec(MODULE, namespace)
    model = namespace["small"]()
    batch = gl.Batch(torch.rand(1, 1, 8, 8), torch.tensor([3]))
    safetensors.torch.save_file(dict(model.state_dict()), folder / "W.safetensors")
    write_tensors(folder / "U.safetensors", gl.Client(model, batch).send().tensors)
    asked = ["attack", "--model", "victim:small", "--weights", "W.safetensors", "--update", "U.safetensors"]
    asked += ["--input-shape", "1,8,8", "--batch-size", "1", "--attack", "dlg", "--out", "out"]
    began = time.perf_counter()
    assert command([*asked, "--attack-option", "iterations=5"], folder, None, 0) == 0
    usual = time.perf_counter() - began
    rng, found, wrong = random.Random(2), Counter[str](), []
    for turn in range(count):
        sent = list(SIGNALS)[turn % len(SIGNALS)]
        try:
            code = command([*asked, "--attack-option", "iterations=3000"], folder, sent, rng.uniform(0, 1.5 * usual))
            assert code in (0, SIGNALS[sent], -getattr(signal, sent)), code
            try:
                read_folder(folder / "out")
                found["whole"] += 1
            except InvalidFile as error:
                if "stopped in between" not in str(error):
                    raise
                found["recognized"] += 1
        except (AssertionError, InvalidFile):
            wrong.append(f"{sent}: {traceback.format_exc()}")
    if command([*asked, "--attack-option", "iterations=5"], folder, None, 0) != 0:
        wrong.append("the last run failed")
    read_folder(folder / "out")
    left = [p.name for p in folder.rglob("*.partial")]
    return row("`gradleak attack` stopped at a random moment", found, wrong + left)


def reproductions(count: int, folder: Path) -> Row:
    """Stop ``gradleak reproduce --jobs 2`` at random moments; the next run must finish, and measure nothing twice."""
    toy = folder / "experiments" / "1999_toy"
    toy.mkdir(parents=True)
    (toy / "toy.py").write_text(TOY.replace("\\\\n", "\\n"))
    (toy / "expected.toml").write_text("")
    source = Path(gl.__file__).parent
    shutil.copytree(source, folder / "gradleak", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text("")
    asked = ["reproduce", "1999_toy", "--smoke", "--jobs", "2", "--out", "out"]
    os.environ["PYTHONPATH"] = str(folder)
    rng, found, wrong, out = random.Random(3), Counter[str](), [], folder / "out"
    began = time.perf_counter()
    assert command(asked, folder, None, 0) == 0
    usual = time.perf_counter() - began
    for turn in range(count):
        sent = list(SIGNALS)[turn % len(SIGNALS)]
        shutil.rmtree(out)
        try:
            code = command(asked, folder, sent, rng.uniform(0.3 * usual, usual))
            assert code in (0, SIGNALS[sent], -getattr(signal, sent)), code
            stored = {json.loads(p.read_text())["case"]["number"] for p in out.glob("toy/[!.]*.json")}
            before = calls(out)
            assert command(asked, folder, None, 0) == 0, "it cannot be run again"
            again = stored & set(calls(out)[len(before) :])
            assert not again, f"measured twice: {again}"
            left = [p.name for p in out.rglob("*.partial")]
            assert not left, left
            found["stopped" if code else "finished before"] += 1
        except AssertionError:
            wrong.append(f"{sent}: {traceback.format_exc()}")
    return row("`gradleak reproduce --jobs 2` stopped at a random moment, and run again", found, wrong)


def calls(out: Path) -> list[int]:
    """Return the numbers of the cases that were begun."""
    path = out / "calls.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def main() -> None:
    """Try all of it and store the table."""
    options = arguments(__doc__ or "", broken=200, results=1000, kills=200, commands=16)
    with tempfile.TemporaryDirectory() as name:
        places = {kind: Path(name, kind) for kind in ("broken", "bombs", "results", "kills", "attack", "reproduce")}
        for place in places.values():
            place.mkdir()
        rows = [
            *broken(options.broken, places["broken"]),
            bombs(places["bombs"]),
            results(options.results, places["results"]),
            *kills(options.kills, places["kills"]),
        ]
        if options.commands:
            rows.append(attacks(options.commands, places["attack"]))
            rows.append(reproductions(options.commands, places["reproduce"]))
    wrong, tried = sum(r["not as promised"] for r in rows), sum(r["tried"] for r in rows)
    summary = [
        {
            "what": "broken files, results and bombs, kills and signals: not as promised",
            "target": "0",
            "measured": f"{wrong} of {tried:,}",
            "met": wrong == 0,
        }
    ]
    write_result("hostile", rows, summary=summary)


if __name__ == "__main__":
    main()
