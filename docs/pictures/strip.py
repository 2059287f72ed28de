"""Draws leak.png and transformer.png: what a client keeps, what it sends, and what comes back, as in the demo.

Run it from the root of a checkout: ``python docs/pictures/strip.py`` (under a minute on one core).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

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


def transformer() -> tuple[torch.Tensor, gl.Update, gl.Reconstruction]:
    """Return the photograph at 224 × 224, its gradient of ViT-Base/16 with dropout on, and what it gives away."""
    photo, space = demo_image(224), gl.ImageSpace((3, 224, 224), (0.5,) * 3, (0.5,) * 3)
    model = gl.models.vision_transformer(dropout=0.1, seed=0).train()
    client = gl.Client(model, gl.Batch(space.encode(photo), torch.tensor([44])))
    update = client.send()  # under masks of the moment
    seen = gl.ThreatModel().observe(model, update, space=space, training=client.training, batch_size=1)
    return photo, update, gl.attacks.patch_embedding().reconstruct(seen)


def filters(update: gl.Update) -> np.ndarray:
    """Return the patch embedding's gradient, 14 × 14 of its 768 filters as a picture."""
    kernels = update.tensors["patch.weight"][:196].double()
    kernels = 0.5 + kernels / (6 * kernels.std((1, 2, 3), keepdim=True))
    return kernels.reshape(14, 14, 3, 16, 16).permute(0, 3, 1, 4, 2).reshape(224, 224, 3).clamp(0, 1).numpy()


def draw_transformer(path: Path) -> None:
    """Write the strip of the vision transformer as a PNG."""
    photo, update, found = transformer()
    psnr = float(gl.metrics.psnr(found.inputs, photo)[0])
    numbers = sum(t.numel() for t in update.tensors.values())
    word = found.certificate.verdict.value if found.certificate is not None else ""
    panels = [
        ("The photograph", "224 × 224, stays on the client", pixels(photo[0])),
        ("Its gradient", f"patch embedding, of {numbers / 1e6:.0f} million numbers", filters(update)),
        ("What came back", f"{psnr:.0f} dB, {word}", pixels(found.inputs[0])),
    ]
    strip(panels, path, 2.4)


def pixels(image: torch.Tensor) -> np.ndarray:
    """Return an image (C, H, W) as matplotlib shows it."""
    return image.permute(1, 2, 0).double().numpy()


def draw(exchange: gl.Exchange, path: Path) -> None:
    """Write the strip of the LeNet as a PNG."""
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
    strip(panels, path, 1.62)


def strip(panels: list[tuple[str, str, np.ndarray]], path: Path, width: float) -> None:
    """Write panels, each a title, a caption and a picture, side by side as a PNG, ``width`` inches each."""
    from matplotlib import pyplot as plt

    size = (width * len(panels), width + 0.52)
    figure, axes = plt.subplots(1, len(panels), figsize=size, dpi=110, facecolor="white")
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
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(256)
    small.save(path, optimize=True)


if __name__ == "__main__":
    draw(leak(), HERE / "leak.png")
    draw_transformer(HERE / "transformer.png")
