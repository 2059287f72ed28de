"""Cost of one iteration of inverting_gradients() on ResNet-18 at 32x32 against a hand-written minimal loop.

Both run in turn in one process; the ratio is taken pair by pair. Target: at most 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from _common import arguments, observe, spread, write_result
from torch import nn

import gradleak as gl


def minimal_loop(model: nn.Module, labels: torch.Tensor, observed: list[torch.Tensor], steps: int) -> None:
    """Cosine + total variation, signed Adam, written as briefly as a researcher would who cares about speed."""
    parameters, loss = list(model.parameters()), nn.CrossEntropyLoss()
    x = torch.randn(len(labels), 3, 32, 32, requires_grad=True)
    solver = torch.optim.Adam([x], lr=0.1)
    for _ in range(steps):
        gradient = torch.autograd.grad(loss(model(x), labels), parameters, create_graph=True)
        product = torch.stack([(a * b).sum() for a, b in zip(gradient, observed, strict=True)]).sum()
        norms = [torch.stack([a.square().sum() for a in g]).sum().sqrt() for g in (gradient, observed)]
        variation = (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
        (slope,) = torch.autograd.grad(1 - product / norms[0] / norms[1] + 1e-4 * variation, x)
        x.grad = slope.sign()
        solver.step()
        x.data.clamp_(0, 1)


def seconds_per_step(run: Callable[[int], object], steps: int) -> float:
    """Return the time of one step: the difference of two lengths leaves set-up and result out."""
    times = []
    for length in (1, 1 + steps):
        began = time.perf_counter()
        run(length)
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / steps


def reconstruct(seen: gl.Observation, steps: int) -> None:
    """Run inverting_gradients() for ``steps`` iterations."""
    gl.attacks.inverting_gradients(iterations=steps, trace=False).reconstruct(seen)


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", pairs=7, steps=6)
    rows = []
    for n in (1, 8):
        labels = torch.arange(n)
        images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        client, seen = observe(gl.Client(gl.models.resnet18(seed=0).eval(), gl.Batch(images, labels)))
        observed = list(seen.update.tensors.values())
        hand = partial(minimal_loop, client.model, labels, observed)
        tool = partial(reconstruct, seen)
        pairs = [
            (seconds_per_step(tool, options.steps), seconds_per_step(hand, options.steps))
            for _ in range(options.pairs + 1)
        ]
        ours, theirs = zip(*pairs[1:], strict=True)  # The first pair warms up.
        ratios = [a / b for a, b in pairs[1:]]
        rows.append(
            {
                "batch": n,
                "gradleak s/iteration": spread(ours)["median"],
                "minimal loop s/iteration": spread(theirs)["median"],
                "ratio (median of pairs)": spread(ratios)["median"],
                "ratio range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
    write_result("inverting_gradients", rows, target="ratio <= 1.0")


if __name__ == "__main__":
    main()
