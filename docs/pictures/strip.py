"""Draws leak.png: what a client keeps, what it sends, and what comes back; the demo's photograph, model and seed.

Run it from the root of a checkout: ``python docs/pictures/strip.py`` (under a minute on one core).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

import gradleak as gl
from gradleak.data import demo_image

matplotlib.use("Agg")

SHOWN = (10, 30, 100)
HERE = Path(__file__).resolve().parent


def leak() -> gl.Exchange:
    """Return the exchange of ``gradleak demo``: one gradient of the LeNet on a photograph, inverted by DLG."""
    label = torch.randint(100, (1,), generator=torch.Generator().manual_seed(0))
    client = gl.Client(gl.models.lenet(seed=0), gl.Batch(demo_image(32), label))
    return gl.simulate(client, gl.attacks.dlg(), seed=0)


def gradient_picture(update: gl.Update) -> np.ndarray:
    """Return every number of the gradient as one gray level, by rank, row by row in a square."""
    numbers = torch.cat([t.flatten() for t in update.tensors.values()]).double().numpy()
    side = int(np.ceil(np.sqrt(len(numbers))))
    padded = np.full(side * side, np.nan)
    padded[: len(numbers)] = numbers.argsort().argsort() / len(numbers)
    return padded.reshape(side, side)


def draw(exchange: gl.Exchange, path: Path) -> None:
    """Write the strip as a PNG."""
    from matplotlib import pyplot as plt

    def pixels(image: torch.Tensor) -> np.ndarray:
        return image.permute(1, 2, 0).double().numpy()

    trace = exchange.reconstruction.trace
    assert trace is not None
    assert trace.snapshots is not None
    numbers = sum(t.numel() for t in exchange.observation.update.tensors.values())
    nearest = [int(np.abs(np.array(trace.iterations) - wanted).argmin()) for wanted in SHOWN]
    last = trace.iterations[-1]
    panels = [
        ("The photograph", "stays on the client", pixels(exchange.truth.inputs[0])),
        ("Its gradient", f"{numbers:,} numbers, shared", gradient_picture(exchange.observation.update)),
        *(
            ("The server guesses", f"{trace.iterations[k]:,} evaluations", pixels(trace.snapshots[k, 0]))
            for k in nearest
        ),
        ("What came back", f"{last:,} evaluations", pixels(exchange.reconstruction.inputs[0])),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(1.62 * len(panels), 2.14), dpi=110, facecolor="white")
    for axis, (above, below, image) in zip(axes, panels, strict=True):
        axis.imshow(image, cmap="gray", interpolation="nearest")
        axis.set_title(above, fontsize=9, fontweight="bold")
        axis.set_xlabel(below, fontsize=8)
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_edgecolor("0.7")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.9, bottom=0.1, wspace=0.06)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(leak(), HERE / "leak.png")
