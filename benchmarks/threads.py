"""What the number of threads costs where other work keeps one core busy, and what the commands choose.

Threads of small operations wait for each other all the time. Where another program holds one core, every wait may last
a time slice of the scheduler. Three processes run the same search side by side in turns: with one thread, with as many
as torch takes by itself, and with as many as ``gradleak`` chooses by timing (the choice included). A loop that does
nothing keeps one core busy, or none. The target: the chosen number takes at most 1.5 times as long as one thread on the
busy machine.

Run: ``python benchmarks/threads.py [--rounds 3] [--evaluations 300]``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from _common import observe, spread, write_result

TARGET = 1.5
CHOICES = ("one", "all", "chosen")


def search(choice: str, evaluations: int) -> dict[str, float]:
    """Return the seconds of one search of ``dlg()`` on the paper's LeNet, and the threads that it ran with."""
    import gradleak as gl
    from gradleak.cli.threads import choose_threads

    generator = torch.Generator().manual_seed(0)
    batch = gl.Batch(torch.rand(1, 3, 32, 32, generator=generator), torch.tensor([3]))
    client, seen = observe(gl.Client(gl.models.lenet(seed=0), batch))
    began = time.perf_counter()
    if choice == "one":
        torch.set_num_threads(1)
    elif choice == "chosen":
        choose_threads(client.send)
    attack = gl.attacks.dlg(iterations=evaluations, tolerance=0.0, backend="eager", trace=False)
    found = attack.reconstruct(seen)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "evaluations": found.evaluations, "threads": torch.get_num_threads()}


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Keep so many cores busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.5 if loops else 0.0)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def in_process(choice: str, evaluations: int) -> dict[str, float]:
    """Run :func:`search` in a process of its own, in which nobody has set a number of threads."""
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--only", choice, "--evaluations", str(evaluations)]
    done = subprocess.run(command, env=free, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and store the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--only", choices=CHOICES, help="run one search and print its time")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(search(options.only, options.evaluations)))
        return
    rows, medians = [], {}
    for cores in (0, 1):
        runs: dict[str, list[dict[str, float]]] = {choice: [] for choice in CHOICES}
        with busy(cores):
            for _ in range(options.rounds):
                for choice in CHOICES:
                    runs[choice].append(in_process(choice, options.evaluations))
        for choice in CHOICES:
            each = [1e3 * r["seconds"] / max(1.0, r["evaluations"]) for r in runs[choice]]
            medians[cores, choice] = spread(each)["median"]
            threads = sorted({int(r["threads"]) for r in runs[choice]})
            row = {"busy cores": cores, "threads": choice, "were": ", ".join(map(str, threads))}
            rows.append(row | {f"ms per evaluation, {k}": v for k, v in spread(each).items()})
    ratio = medians[1, "chosen"] / medians[1, "one"]
    summary = [
        {
            "what": "search with the threads that the commands choose, one core busy, against one thread",
            "target": f"≤ {TARGET} ×",
            "measured": f"{ratio:.2f} × (all threads: {medians[1, 'all'] / medians[1, 'one']:.1f} ×)",
            "met": ratio <= TARGET,
        }
    ]
    write_result("threads", rows, rounds=options.rounds, evaluations=options.evaluations, summary=summary)


if __name__ == "__main__":
    main()
