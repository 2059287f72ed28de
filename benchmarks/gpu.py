"""Matching on a GPU: dlg() on CIFAR-100 images together, against the published algorithm on the same GPU.

Target: at most 1/20 of the published algorithm's time per success (MSE 1e-4), one image after another there; wall
times, compilation included. How near to the device's limits that comes is said in two shares: of the arithmetic that a
large matrix product reaches in the format of the search's last stage (float64), and of the bandwidth that a large copy
reaches. Operations are counted by PyTorch's rules, traffic as if nothing were fused: every operation reads its inputs
and writes its output once.

Run: ``python benchmarks/gpu.py [--images 64] [--published 16]``. Without a GPU it says so and writes nothing;
``--cpu 1`` tries the script itself on the CPU, which says nothing about the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _common import arguments, cifar100, observe, write_result
from _published import published_dlg
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import gradleak as gl

FACTOR = 20
FAST = 5e-8
"""Relative squared distance at which other images than these had an MSE below 1e-4, as in dlg.py."""
LARGE = {"cuda": 8192, "cpu": 1024}
"""Rows of the matrix product that shows the arithmetic limit; the copy has as many numbers as its factors."""


def main() -> None:
    """Measure and store the table."""
    options = arguments(__doc__ or "", images=64, published=16, cpu=0)
    if not options.cpu and not torch.cuda.is_available():
        print("There is no GPU here, so nothing is measured; --cpu 1 tries the script on the CPU.")
        return
    device = torch.device("cpu" if options.cpu else "cuda")
    images, labels = cifar100(options.data)
    pairs = [victim(images[i : i + 1], labels[i : i + 1], i, device) for i in range(options.images)]
    attack = gl.attacks.dlg(tolerance=FAST, trace=False)
    found, seconds = timed(lambda: attack.reconstruct_all([seen for _, seen in pairs]), device)
    errors = [float((r.inputs.cpu() - images[i]).square().mean()) for i, r in enumerate(found)]
    evaluations = sum(r.evaluations for r in found)
    operations, traffic = one_evaluation(*pairs[0])
    multiply, move = limits(device)
    rows = [row("dlg(), all images together", errors, seconds, evaluations)]
    rows[0] |= {
        "evaluations per second": evaluations / seconds,
        "share of arithmetic": evaluations * operations / seconds / multiply,
        "share of bandwidth": evaluations * traffic / seconds / move,
    }
    errors, spent, count = [], 0.0, 0
    for i in range(options.published):
        client, seen = pairs[i]
        tensors = list(seen.update.tensors.values())

        def search(client: gl.Client = client, tensors: list[Tensor] = tensors, i: int = i) -> tuple[Any, ...]:
            return published_dlg(client.model, tensors, (3, 32, 32), 100, seed=i)

        (x, _, taken), seconds = timed(search, device)
        errors.append(float((x.cpu().double().clamp(0, 1) - images[i]).square().mean().nan_to_num(nan=1.0)))
        spent, count = spent + seconds, count + taken
    if errors:
        rows.append(row("published algorithm, one after another", errors, spent, count))
    write_result("gpu", rows, device=str(device), summary=summary(rows))


def victim(images: Tensor, labels: Tensor, seed: int, device: torch.device) -> tuple[gl.Client, gl.Observation]:
    """Return a client with the paper's LeNet on ``device``, and what the server sees."""
    model = gl.models.lenet(seed=seed).to(device)
    return observe(gl.Client(model, gl.Batch(images.float().to(device), labels.to(device))))


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return a result and its wall time."""
    wait(device)
    began = time.perf_counter()
    found = work()
    wait(device)
    return found, time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Count(TorchDispatchMode):
    """Adds up floating point operations, and the bytes that operations read and write."""

    operations = bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        if func.overloadpacket in flop_registry:
            self.operations += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


def one_evaluation(client: gl.Client, seen: gl.Observation) -> tuple[float, float]:
    """Return floating point operations and bytes of one evaluation in float64."""
    model, x = client.model, torch.rand_like(client.batch.inputs).double().requires_grad_()
    double = gl.models.lenet(seed=0).to(x)
    double.load_state_dict(model.state_dict())
    y = torch.zeros(1, 100).to(x).requires_grad_()
    observed = [t.double() for t in seen.update.tensors.values()]

    with Count() as count:
        loss = -(F.softmax(y, -1) * F.log_softmax(double(x), -1)).sum(-1).mean()
        dummy = torch.autograd.grad(loss, list(double.parameters()), create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(dummy, observed, strict=True)]).sum()
        torch.autograd.grad(distance, [x, y])
    return float(count.operations), float(count.bytes)


def limits(device: torch.device) -> tuple[float, float]:
    """Return operations per second of a large float64 product, and bytes per second of a large copy."""
    size = LARGE[device.type]
    a, b = (torch.rand(size, size, dtype=torch.float64, device=device) for _ in range(2))
    product = min(timed(lambda: a @ b, device)[1] for _ in range(4))
    copy = min(timed(lambda: a.copy_(b), device)[1] for _ in range(4))
    return 2 * size**3 / product, 2 * a.numel() * a.element_size() / copy


def row(name: str, errors: list[float], seconds: float, evaluations: int) -> dict[str, Any]:
    """Return one line of the table."""
    hits = sum(e <= 1e-4 for e in errors)
    return {
        "attacker": name,
        "images": len(errors),
        "MSE <= 1e-4": hits,
        "seconds": seconds,
        "evaluations": evaluations,
        "seconds per success": seconds / hits if hits else float("inf"),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the line of the target, decided where both sides have successes on a GPU."""
    ours = rows[0]
    shares = f"{ours['share of arithmetic']:.1%} of the arithmetic, {ours['share of bandwidth']:.1%} of the bandwidth"
    measured = f"{ours['MSE <= 1e-4']} of {ours['images']} images, {ours['seconds per success']:.2g} s each; {shares}"
    met = None
    if len(rows) > 1 and ours["MSE <= 1e-4"] and rows[1]["MSE <= 1e-4"]:
        ratio = rows[1]["seconds per success"] / ours["seconds per success"]
        measured = f"{ratio:.0f} ×, {measured}"
        met = bool(ratio >= FACTOR) if torch.cuda.is_available() else None
    what = "`dlg()` on a GPU against the published algorithm on the same GPU"
    return [{"what": what, "target": f"≥ {FACTOR} ×", "measured": measured, "met": met}]


if __name__ == "__main__":
    main()
