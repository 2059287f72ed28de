"""The published algorithm as it was published: the baseline that all experiments on images run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OUTER", "Published", "published"]

OUTER = 300
"""Outer iterations, of up to 20 inner ones each, as published."""

Watch = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, eq=False)
class Published:
    """What the published algorithm returned.

    Attributes:
        inputs: (N, *shape), as they came out: neither clamped nor chosen among iterates.
        labels: (N,) the largest of the dummy label's logits.
        outer: outer iterations done.
        evaluations: evaluations of the distance and its gradient.
        distance: ‖∇W′ − ∇W‖² at the last step; not finite where the run diverged.
        status: "budget", "settled" (nothing can change any more) or "diverged".

    """

    inputs: Tensor
    labels: Tensor
    outer: int
    evaluations: int
    distance: float
    status: str


def published(
    model: nn.Module,
    gradient: Mapping[str, Tensor],
    shape: tuple[int, ...],
    classes: int,
    *,
    batch_size: int = 1,
    seed: int = 0,
    outer: int = OUTER,
    budget: int | None = None,
    watch: Watch | None = None,
) -> Published:
    """Match ``gradient`` as Zhu et al. 2019 do (Algorithm 1 and the options of the authors' code).

    Dummy inputs and label logits from N(0, 1); the label passes a softmax; squared distance summed over all shared
    parameters; ``torch.optim.LBFGS`` with lr 1, 20 inner iterations a step, history 100, no line search; float32 (the
    model's own type); the last iterate is returned. A run ends early only where nothing can change any more: the
    distance is not finite, or a whole step moved nothing because the optimizer's own tolerances held it.

    Args:
        model: the model that was sent out; parameters with ``requires_grad=False`` are withheld.
        gradient: the shared gradient by parameter name.
        shape: of one input.
        classes: number of classes.
        batch_size: number of examples.
        seed: of the start.
        outer: outer iterations; 300 as published.
        budget: evaluations after which no further outer iteration begins; None as published, where 6,000 is the most.
        watch: called after each outer iteration with its number, the evaluations so far, and the iterate.

    """
    generator = torch.Generator().manual_seed(seed)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    target = [gradient[k].detach() for k in params]
    like = target[0]
    x = torch.randn(batch_size, *shape, generator=generator).to(like).requires_grad_()
    y = torch.randn(batch_size, classes, generator=generator).to(like).requires_grad_()
    solver = torch.optim.LBFGS([x, y], lr=1.0, max_iter=20, history_size=100)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        loss = -(F.softmax(y, -1) * F.log_softmax(model(x), -1)).sum(-1).mean()
        dummy = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        distance = torch.stack([(a - b).square().sum() for a, b in zip(dummy, target, strict=True)]).sum()
        x.grad, y.grad = torch.autograd.grad(distance, [x, y])
        return distance.detach()

    status, distance, done = "budget", float("nan"), 0
    for done in range(1, outer + 1):
        before = x.detach().clone(), y.detach().clone()
        distance = float(solver.step(closure))
        if watch is not None:
            watch(done, evaluations, x.detach().clone())
        if not bool(torch.isfinite(x).all()) or distance != distance or distance == float("inf"):
            status = "diverged"
            break
        if torch.equal(before[0], x.detach()) and torch.equal(before[1], y.detach()):
            status = "settled"
            break
        if budget is not None and evaluations >= budget:
            break
    return Published(x.detach(), y.detach().argmax(-1), done, evaluations, distance, status)
