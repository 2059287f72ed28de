"""Draws the pictures of docs/exact.md and measures every figure of it, all on the photograph that is shipped.

Run it from the root of a checkout: ``python docs/pictures/exact.py`` (under a minute on one core). It prints the
figures, writes them into the table at the end of the page, and writes the pictures beside itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.data import demo_image
from gradleak.errors import NotApplicable
from gradleak.exact.one_example import invert_layers
from gradleak.structure.head import features_and_logits, find_head
from gradleak.structure.ranks import rank_bound
from gradleak.training import parameters

matplotlib.use("Agg")

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "exact.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
SHAPE = (3, 32, 32)
LABELS = (44, 7, 81, 19, 63, 2, 95, 30)
WIDTHS = (4, 8, 12, 16, 20, 24, 28, 32, 36, 40)
COUNTS = (1, 2, 4, 8, 16)


def client(images: Tensor, labels: Tensor, *, classes: int = 100, dtype: torch.dtype = torch.float32) -> gl.Client:
    """Return a client with the paper's LeNet."""
    return gl.Client(gl.models.lenet(classes=classes, seed=0).to(dtype), gl.Batch(images.to(dtype), labels))


def error(found: Tensor, truth: Tensor) -> float:
    """Return the distance relative to the length of the truth."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@dataclass(frozen=True, eq=False)
class Layers:
    """One example on its way back: what enters each layer, truth and recovered, from the last layer to the first."""

    photo: Tensor
    gradient: Tensor
    names: tuple[str, ...]
    truth: tuple[Tensor, ...]
    found: tuple[Tensor, ...]
    label: int | None
    reports: tuple[str, ...]
    ratio: float
    steps: int


def layers(dtype: torch.dtype) -> Layers:
    """Invert one gradient of the photograph, stopping at the input of every layer.

    Stopping early is inverting the model's tail: its gradient is part of the whole gradient.
    """
    photo = demo_image(32)
    sender = client(photo, torch.tensor([44]), dtype=dtype)
    seen = sender.send().tensors
    model = sender.model
    convs, head = model.get_submodule("body"), model.get_submodule("fc")
    assert isinstance(convs, nn.Sequential)
    assert isinstance(head, nn.Sequential)
    by_tensor = {id(p): seen[k] for k, p in model.named_parameters()}
    names, truth, found, label, reports = [], [], [], None, ()
    for first, name in ((len(convs), "last linear layer"), (4, "third convolution"), (2, "second"), (0, "first")):
        with torch.no_grad():
            value = convs[:first](photo.to(dtype))
        tail = nn.Sequential(*convs[first:], nn.Flatten(), *head)
        params = dict(tail.named_parameters())
        grads = {k: by_tensor[id(p)] for k, p in params.items()}
        result = invert_layers(tail, params, grads, tuple(value.shape[1:]))
        assert result.input is not None, result.stopped_at
        names.append(name)
        truth.append(value[0])
        found.append(result.input)
        label, reports = result.label, tuple(str(r) for r in result.layers)
    weight, bias = seen["fc.0.weight"].double(), seen["fc.0.bias"].double()
    row = int(bias.abs().argmax())
    ratio = error(weight[row] / bias[row], truth[0].flatten())
    return Layers(photo, weight, tuple(names), tuple(truth), tuple(found), label, reports, ratio, result.steps)


@dataclass(frozen=True, eq=False)
class Separated:
    """A batch at the last layer."""

    images: Tensor
    singular: Tensor
    truth: Tensor
    mixed: Tensor
    found: Tensor
    labels_right: bool
    verdicts: tuple[str, ...]
    errors: Tensor
    iterations: int


def tiles() -> Tensor:
    """Return eight different 32 × 32 tiles of the photograph."""
    large = demo_image(128)[0]
    grid = [large[:, r : r + 32, c : c + 32] for r in (32, 64) for c in (0, 32, 64, 96)]
    return torch.stack(grid)


def separate(
    labels: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32, *, alike: float | None = None
) -> Separated:
    """Separate the features of the eight tiles from one gradient of all of them.

    With ``alike``, the second tile is the first, brighter by so much.
    """
    y = torch.tensor(sorted(labels))
    images = tiles()[: len(y)]
    if alike is not None:
        images[1] = images[0] + alike
    sender = client(images, y, classes=classes, dtype=dtype)
    space = gl.ImageSpace(SHAPE)
    seen = gl.ThreatModel().observe(
        sender.model, sender.send(), space=space, training=sender.training, batch_size=len(y)
    )
    found = gl.attacks.disaggregate().reconstruct(seen)
    params = parameters(sender.model)
    head = find_head(sender.model, params, SHAPE)
    assert head is not None
    assert found.features is not None
    assert found.labels is not None
    assert found.certificate is not None
    with torch.no_grad():
        truth = features_and_logits(sender.model, params, images.to(dtype), head)[0].double()
    weight, bias = seen.update.tensors["fc.0.weight"].double(), seen.update.tensors["fc.0.bias"].double()
    # Within a class the order is free; try the cheapest assignment of recovered to true features.
    features = found.features.double()
    order = gl.metrics.assign(features, truth)
    features = features[order]
    spread = (truth - truth.mean(0)).square().sum(1).mean().sqrt()
    return Separated(
        images,
        torch.linalg.svdvals(weight),
        truth,
        # An absent class says of every example p_ic h_i: a blend of all.
        (weight / bias[:, None])[[c for c in range(classes) if c not in labels][:8]],
        features,
        found.labels.tolist() == y.tolist(),
        tuple(found.certificate.examples[int(i)] for i in order),
        (features - truth).norm(dim=1) / spread,
        found.iterations,
    )


@dataclass(frozen=True, eq=False)
class Whole:
    """A batch whose every layer was solved: the first layer's gradient rows, images found, images sent."""

    rows: Tensor
    found: Tensor
    truth: Tensor
    verdict: str
    reports: tuple[str, ...]

    @property
    def error(self) -> float:
        """Mean squared error of the worst image."""
        return float((self.found.double() - self.truth.double()).square().mean((1, 2, 3)).max())


def perceptron() -> Whole:
    """Recover the eight tiles from one gradient of a perceptron with two hidden ReLU layers."""
    return solve(gl.models.perceptron(seed=0), tiles(), "body.1.weight", 8, SHAPE)


def convolutions() -> Whole:
    """Recover four tiles from one gradient of a LeNet with 64 channels: three convolutions, sigmoids."""
    return solve(gl.models.lenet(width=64, seed=0), tiles()[:4], "body.0.weight", 32, (3, 5, 5))


def solve(model: nn.Module, images: Tensor, name: str, count: int, shape: tuple[int, int, int]) -> Whole:
    """Recover a batch with :func:`auto`; ``count`` outputs of the gradient ``name``, each of ``shape``, go along."""
    sender = gl.Client(model, gl.Batch(images, torch.tensor(LABELS[: len(images)])))
    seen = gl.ThreatModel().observe(
        model, sender.send(), space=gl.ImageSpace(SHAPE), training=sender.training, batch_size=len(images)
    )
    found = gl.attacks.auto().reconstruct(seen)
    assert found.certificate is not None
    first = seen.update.tensors[name].double().flatten(1)
    rows = first[first.norm(dim=1).argsort(descending=True)[:count]].view(count, *shape)
    order = gl.metrics.assign(found.inputs, images)
    layers = dict(model.named_modules())
    reports = tuple(n for n in found.notes if n.partition(": ")[0] in layers)
    return Whole(rows, found.inputs[order], images, found.certificate.verdict, reports)


def bounds() -> dict[tuple[int, int], tuple[int, int]]:
    """Return rank bound and unknowns by (width, examples)."""
    found = {}
    for width in WIDTHS:
        model = gl.models.lenet(width=width, seed=0)
        for count in COUNTS:
            bound = rank_bound(model, parameters(model), SHAPE, count)
            found[width, count] = (bound.rank, bound.unknowns)
    return found


def maps(value: Tensor) -> np.ndarray:
    """Return feature maps (C, H, W) side by side, four a row; an image as it is."""
    if value.shape[0] == 3:
        return value.permute(1, 2, 0).clamp(0, 1).double().numpy()
    count, height, width = value.shape
    grid = torch.full((-(-count // 4) * (height + 1) - 1, 4 * (width + 1) - 1), torch.nan, dtype=torch.float64)
    for i, one in enumerate(value.double()):
        top, left = i // 4 * (height + 1), i % 4 * (width + 1)
        grid[top : top + height, left : left + width] = (one - one.min()) / (one.max() - one.min()).clamp_min(1e-12)
    return grid.numpy()


def ranks(values: Tensor) -> np.ndarray:
    """Return numbers as gray levels by rank, so that few large ones do not hide the rest."""
    flat = values.flatten()
    return (flat.argsort().argsort().double() / len(flat)).reshape(values.shape).numpy()


def finish(figure: matplotlib.figure.Figure, name: str) -> None:
    """Write a picture."""
    from matplotlib import pyplot as plt

    figure.savefig(HERE / name, metadata={"Software": None})
    plt.close(figure)


def bare(axis: matplotlib.axes.Axes, above: str, below: str = "") -> None:
    """Title a panel without ticks."""
    axis.set_title(above, fontsize=9, fontweight="bold")
    axis.set_xlabel(below, fontsize=8)
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_edgecolor("0.7")


def draw_layers(one: Layers) -> None:
    """Draw the way back through the layers."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 6, figsize=(10.4, 2.3), dpi=100, facecolor="white")
    axes[0].imshow(ranks(one.gradient[:, :100]), cmap="gray", interpolation="nearest")
    bare(axes[0], "What is shared", "last layer: column × row")
    for axis, name, truth, found in zip(axes[1:], one.names, one.truth, one.found, strict=False):
        value = found.reshape(truth.shape)
        axis.imshow(maps(value), cmap="gray", interpolation="nearest")
        title = "Image" if value.shape[0] == 3 else f"Input of the\n{name}"
        bare(axis, title, f"relative error {error(found, truth):.0e}")
    axes[5].imshow(maps(one.photo[0]), interpolation="nearest")
    bare(axes[5], "Photograph", "never left the client")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.84, bottom=0.1, wspace=0.06)
    finish(figure, "layers.png")


def draw_batch(batch: Separated) -> None:
    """Draw features of a batch: true, as single rows of the gradient show them, separated."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, 5, figsize=(10.4, 2.3), dpi=100, facecolor="white", gridspec_kw={"width_ratios": [1, 1.35, 1, 1, 1]}
    )
    axes[0].imshow(sheet(batch.images), interpolation="nearest")
    bare(axes[0], "Eight images", "private")
    axes[1].semilogy(range(1, 25), (batch.singular / batch.singular[0])[:24].numpy(), "o", markersize=3, color="black")
    axes[1].axvline(8.5, color="0.7", linewidth=0.8)
    axes[1].set_title("One gradient: rank 8", fontsize=9, fontweight="bold")
    axes[1].set_xlabel("singular values", fontsize=8)
    axes[1].tick_params(labelsize=7)
    mean = batch.truth.mean(0)
    high = float((batch.truth - mean)[:, :48].abs().max())
    panels = ((batch.mixed, "Single rows show blends"), (batch.found, "Separated"), (batch.truth, "True features"))
    for axis, (value, title) in zip(axes[2:], panels, strict=True):
        shown = (value - mean)[:, :48].numpy()
        axis.imshow(shown, cmap="gray", vmin=-high, vmax=high, aspect="auto", interpolation="nearest")
        bare(axis, title, "8 × 48 features, less mean")
    figure.subplots_adjust(left=0.005, right=0.995, top=0.87, bottom=0.17, wspace=0.1)
    right = axes[1].get_position()
    axes[1].set_position([right.x0 + 0.035, right.y0, right.width - 0.035, right.height])
    finish(figure, "batch.png")


def sheet(images: Tensor) -> np.ndarray:
    """Return images (N, 3, H, W) as two rows, or four of many."""
    shown = np.pad(images.permute(0, 2, 3, 1).double().numpy(), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
    return np.vstack([np.hstack(list(row)) for row in np.split(shown, 2 if len(shown) <= 8 else 4)])


def draw_whole(one: Whole, below: str, name: str, width: float) -> None:
    """Draw what the first layer's gradient shows, what the layers together show, and what was sent."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(width, 2.2), dpi=100, facecolor="white")
    low, high = one.rows.amin((1, 2, 3), keepdim=True), one.rows.amax((1, 2, 3), keepdim=True)
    panels = (
        ((one.rows - low) / (high - low), "What is shared", below),
        (one.found.clamp(0, 1), "Solved backward", f"worst mean squared error {one.error:.0e}"),
        (one.truth, "The batch", "never left the client"),
    )
    for axis, (value, title, text) in zip(axes, panels, strict=True):
        axis.imshow(sheet(value), interpolation="nearest")
        bare(axis, title, text)
    figure.subplots_adjust(left=0.005, right=0.995, top=0.88, bottom=0.1, wspace=0.04)
    finish(figure, name)


def draw_ranks(found: dict[tuple[int, int], tuple[int, int]]) -> None:
    """Draw the share of the pixels that the rank bound leaves determined."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 2.9), dpi=100, facecolor="white")
    for shade, count in zip(np.linspace(0, 0.75, len(COUNTS)), COUNTS, strict=True):
        shares = [found[w, count][0] / found[w, count][1] for w in WIDTHS]
        axis.plot(WIDTHS, shares, color=str(shade), marker=".", label=f"N = {count}")
    axis.axvline(12, color="0.8", linewidth=0.8, zorder=0)
    axis.text(12.3, 0.05, "the paper's\nLeNet", fontsize=8, color="0.4")
    axis.set_xlabel("channels of the LeNet", fontsize=8)
    axis.set_ylabel("rank bound / unknown pixels", fontsize=8)
    axis.set_ylim(0, 1.05)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    finish(figure, "rank.png")


def verdicts(batch: Separated) -> str:
    """Return verdicts and errors, counted."""
    parts = []
    for verdict in dict.fromkeys(batch.verdicts):
        chosen = torch.tensor([v == verdict for v in batch.verdicts])
        parts.append(f"{int(chosen.sum())} {verdict} (true error at most {float(batch.errors[chosen].max()):.0e})")
    return ", ".join(parts)


def refusal(labels: tuple[int, ...], classes: int) -> str:
    """Return why a batch cannot be separated."""
    try:
        separate(labels, classes)
    except NotApplicable as reason:
        return str(reason)
    return "not refused"


def write_table(figures: dict[str, str]) -> None:
    """Put the figures between the markers of the page."""
    if not PAGE.exists():
        return
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    table = "\n".join(["| what | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in figures.items())])
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def solved_whole(figures: dict[str, str], one: Whole, what: str, part: str) -> None:
    """Write how a batch was solved, layer by layer."""
    figures[f"{what}, float32 update: worst mean squared error, certificate"] = f"{one.error:.1e}, {one.verdict}"
    for report in one.reports:
        name, _, rest = report.partition(": ")
        figures[f"its {part} `{name}`"] = rest


def main() -> None:
    """Measure, draw, print."""
    figures: dict[str, str] = {}
    single, double = layers(torch.float32), layers(torch.float64)
    for name, one in (("float32", single), ("float64", double)):
        figures[f"features from one row of the last gradient, {name} update: relative error"] = f"{one.ratio:.1e}"
        mse = float((one.found[-1].double() - one.truth[-1].double()).square().mean())
        figures[f"image, {name} update: mean squared error"] = f"{mse:.1e}"
    figures["label read off the gradient (true: 44)"] = str(single.label)
    for report in single.reports:
        name, _, rest = report.partition(": ")
        figures[f"system for the input of `{name}`"] = rest
    figures["Gauss–Newton steps on the whole network, float32 update"] = str(single.steps)
    draw_layers(single)

    batch = separate(LABELS, 100)
    figures["B = 8, eight classes of 100: 8th and 9th singular value, relative to the 1st"] = (
        f"{float(batch.singular[7] / batch.singular[0]):.1e}, {float(batch.singular[8] / batch.singular[0]):.1e}"
    )
    figures["the same: labels right, verdicts"] = f"{'yes' if batch.labels_right else 'no'}; {verdicts(batch)}"
    figures["the same: Levenberg–Marquardt steps"] = str(batch.iterations)
    draw_batch(batch)
    twice = separate((44, 44, 81, 19, 63, 2, 95, 30), 100)
    figures["B = 8, two of one class, C = 100"] = verdicts(twice)
    close = separate((2, 2, 81, 19, 63, 44, 95, 30), 100, alike=1e-3)
    figures["the same, where these two differ by 0.001 in brightness"] = verdicts(close)
    few = separate((4, 4, 4, 1, 9, 3, 2, 0), 10)
    figures["B = 8, three of one class, C = 10"] = verdicts(few)
    finer = separate((4, 4, 4, 1, 9, 3, 2, 0), 10, torch.float64)
    figures["the same, float64 update"] = verdicts(finer)
    figures["B = 8, C = 8"] = refusal((0, 1, 2, 3, 4, 5, 6, 7), 8)
    whole, deep = perceptron(), convolutions()
    solved_whole(figures, whole, "B = 8, perceptron 3,072-256-256-100 with ReLU", "layer")
    draw_whole(whole, "eight rows of the first layer's gradient", "perceptron.png", 10.4)
    solved_whole(figures, deep, "B = 4, LeNet of width 64", "convolution")
    draw_whole(deep, "32 of the first layer's 64 kernels", "convolutions.png", 7.4)

    found = bounds()
    for width, count in ((12, 1), (12, 2), (12, 4), (24, 4), (32, 8)):
        rank, unknowns = found[width, count]
        figures[f"LeNet of width {width}, N = {count}: rank bound of pixels"] = f"{rank:,} of {unknowns:,}"
    draw_ranks(found)

    for what, value in figures.items():
        print(f"{what}: {value}")  # noqa: T201
    write_table(figures)


if __name__ == "__main__":
    main()
