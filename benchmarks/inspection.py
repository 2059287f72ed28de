"""Whether ``gl.inspect()`` predicts what ``auto()`` then does, over the models that people federate.

Cells: model × batch size × one or three local steps × filter. A prediction is right where the outcome is of its kind:
*exact*, if equations solved all examples or the update explains them; *partial*, if some were solved, or ids read;
*matching only*, if no equations did; *nothing*, if neither equations nor a search came to anything that the update
matches. Exact ways that are quick are run by an inspection itself; what is put to the test is the rest. Inputs are
random, and the time of an attack is limited, so that a search may end early; that changes no kind.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from _common import arguments, write_result
from adapters import averaging, logistic
from torch import nn

import gradleak as gl
from gradleak.attacks.auto import WAYS
from gradleak.defenses import clip, compose, gaussian_noise
from gradleak.errors import GradleakError
from gradleak.inspection import Prediction
from gradleak.types import FindingKind, Reconstruction, Verdict

TARGET = 0.95
SEARCHES = {w.name for w in WAYS if w.searches}
READ = {FindingKind.ROWS, FindingKind.COLUMNS, FindingKind.TOKENS}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def tutorial() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def adult() -> nn.Module:
    return nn.Sequential(nn.Linear(104, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))


def transformer() -> nn.Module:
    return gl.models.vision_transformer(classes=10, image_size=32, patch=8, width=192, depth=3).eval()


MODELS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "logistic regression": (logistic, (1, 28, 28), 10),
    "Adult perceptron": (adult, (104,), 2),
    "LeNet": (lambda: gl.models.lenet(classes=10), (3, 32, 32), 10),
    "FedAvg CNN": (averaging, (1, 28, 28), 10),
    "tutorial CNN": (tutorial, (3, 32, 32), 10),
    "ResNet-18": (lambda: gl.models.resnet18(classes=10).eval(), (3, 32, 32), 10),
    "vision transformer": (transformer, (3, 32, 32), 10),
    "LSTM": (Recurrent, (16, 8), 4),
}
FILTERS = {
    "none": None,
    "clip and noise": compose(clip(1.0), gaussian_noise(1e-3)),
    "clip and much noise": compose(clip(1.0), gaussian_noise(1.0)),
}


def observe(name: str, count: int, steps: int, filter_: str, seed: int) -> gl.Observation:
    make, shape, classes = MODELS[name]
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        model = make()
        batch = gl.Batch(torch.rand(count, *shape), torch.randint(classes, (count,)))
    training: gl.LocalTraining = gl.FedSGD() if steps == 1 else gl.FedAvg(lr=0.05, steps=steps)
    defense = FILTERS[filter_]
    training = training if defense is None else defense.wrap(training, seed=seed)
    space = gl.ImageSpace(shape) if len(shape) == 3 else gl.TensorSpace(shape)
    knows = gl.Knowledge.BATCH_SIZE | gl.Knowledge.TRAINING | gl.Knowledge.DEFENSE
    return gl.ThreatModel(knows).observe(
        model, training(model, batch), space=space, training=training, batch_size=count
    )


def outcome(found: Reconstruction | None, count: int) -> set[Prediction]:
    """Return the predictions that what ``auto`` did makes true."""
    if found is None:
        return {Prediction.NOTHING}
    proof = found.certificate
    explained = proof is not None and proof.verdict is not Verdict.UNPROVED
    solved = 0 if found.solved is None else int(found.solved.sum())
    searched = found.attack.split(" and ")[0] in SEARCHES
    if not searched and (explained or solved == count):
        return {Prediction.EXACT}
    if solved or READ & {f.kind for f in found.findings}:
        return {Prediction.PARTIAL}
    return {Prediction.MATCHING} if explained else {Prediction.MATCHING, Prediction.NOTHING}


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", batches=3, seconds=15, model=-1)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    names = list(MODELS) if options.model < 0 else [list(MODELS)[options.model]]
    for name in names:
        for count in (1, 4, 16)[: options.batches]:
            for steps in (1, 3):
                for filter_ in FILTERS:
                    observation = observe(name, count, steps, filter_, seed=count)
                    start = time.process_time()
                    said = gl.inspect(observation)
                    taken = time.process_time() - start
                    found: Reconstruction | None = None
                    with suppress(GradleakError):
                        found = gl.attacks.auto(budget=options.seconds).reconstruct(observation)
                    right = said.prediction in outcome(found, count)
                    cell = {"model": name, "examples": count, "steps": steps, "filter": filter_}
                    rows.append(cell | {"predicted": said.prediction.value, "right": right, "seconds": taken})
                    print(*rows[-1].values(), "" if right else f"{said.reason} {found and found.attack}", flush=True)
    share = sum(r["right"] for r in rows) / len(rows)
    slowest = max(r["seconds"] for r in rows)
    right = f"{sum(r['right'] for r in rows)} of {len(rows)}"
    summary = [
        {
            "what": "`gl.inspect()` predicts what `auto()` then does, models × batches × steps × filters",
            "target": f"≥ {TARGET:.0%}".replace("%", " %"),
            "measured": f"{right} ({', '.join(names)}), at most {slowest:.1f} s each",
            "met": share >= TARGET,
        }
    ]
    write_result(
        "inspection", rows, seconds=options.seconds, kinds=Counter(r["predicted"] for r in rows), summary=summary
    )


if __name__ == "__main__":
    main()
