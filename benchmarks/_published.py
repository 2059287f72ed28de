"""The published algorithm as it was published, written from Algorithm 1 and its stated options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def published_dlg(
    model: nn.Module, observed: list[Tensor], shape: tuple[int, ...], classes: int, seed: int, outer: int = 300
) -> tuple[Tensor, Tensor, int]:
    """Return image, label probabilities and evaluations of L-BFGS, lr 1, ``outer`` x 20, no line search, float32.

    Stops early only when the objective is no longer finite, where nothing can change anymore.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, *shape, generator=generator).requires_grad_()
    y = torch.randn(1, classes, generator=generator).requires_grad_()
    parameters = list(model.parameters())
    solver = torch.optim.LBFGS([x, y], lr=1)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        solver.zero_grad()
        loss = -(F.softmax(y, -1) * F.log_softmax(model(x), -1)).sum(-1).mean()
        dummy = torch.autograd.grad(loss, parameters, create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(dummy, observed, strict=True)]).sum()
        x.grad, y.grad = torch.autograd.grad(distance, [x, y])
        return distance.detach()

    for _ in range(outer):
        if not bool(torch.isfinite(solver.step(closure))):
            break
    return x.detach(), F.softmax(y.detach(), -1), evaluations
