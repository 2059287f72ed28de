"""What observing costs a client: processor time of ``watch(…, policy="observe")`` beside the round that it watches.

Target: at most 2 %. A round is one pass over the client's 600 examples in batches of 10, the federated averaging of
McMahan et al. 2017, on random data. The cost is that of entering and leaving the block: a copy of the weights, the
difference, and writing both to disk; the hooks in between count. Medians over rounds. Rounds of milliseconds, as of a
logistic regression, cost more than 2 %, since the files must reach the disk all the same; the seconds are listed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import arguments, spread, write_result
from torch import nn

import gradleak as gl
from gradleak.adapters import Recorder
from gradleak.adapters.pytorch import watch

SHARE = 0.02
EXAMPLES, BATCH = 600, 10


def averaging() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "logistic regression": (logistic, (1, 28, 28), EXAMPLES),
    "FedAvg CNN, 1.7 M": (averaging, (1, 28, 28), EXAMPLES),
    "LeNet": (lambda: gl.models.lenet(classes=10), (3, 32, 32), EXAMPLES),
    "ResNet-18, 11 M, 200 examples": (lambda: gl.models.resnet18(classes=10).eval(), (3, 32, 32), 200),
}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return the processor seconds of rounds and of watching them."""
    make, shape, examples = MODELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trained, watched = [], []
    for number in range(rounds + 1):
        inputs, labels = torch.rand(examples, *shape), torch.randint(10, (examples,))
        with tempfile.TemporaryDirectory() as folder:
            block = watch(model, Recorder(folder=folder, model="net:make"), optimizer=optimizer, examples=examples)
            start = time.process_time()
            with block:
                entered = time.process_time()
                for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                done = time.process_time()
            end = time.process_time()
        if number:  # the first warms up
            trained.append(done - entered)
            watched.append(entered - start + end - done)
    training, watching = spread(trained), spread(watched)
    share = watching["median"] / training["median"]
    return {"model": name, "share": share, "training": training, "watching": watching}


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", rounds=5)
    torch.set_num_threads(1)
    found = [measure(name, options.rounds) for name in MODELS]
    rows = [
        {"model": f["model"], "share": f["share"], **{f"{k}, s": f[k]["median"] for k in ("training", "watching")}}
        for f in found
    ]
    shares = ", ".join(f"{f['model'].split(',')[0]} {100 * f['share']:.1f} %" for f in found)
    summary = [
        {
            "what": "adapters that observe, one local epoch of three networks: processor time",
            "target": f"≤ {100 * SHARE:.0f} % of a round",
            "measured": shares,
            "met": max(f["share"] for f in found[1:]) <= SHARE,
        }
    ]
    write_result("adapters", rows, rounds=options.rounds, summary=summary)


if __name__ == "__main__":
    main()
