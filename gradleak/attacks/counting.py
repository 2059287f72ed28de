"""How many examples are behind an update, as far as it shows.

The weight gradient of a linear layer that sees one vector per example is a sum of one outer product per example, so its
rank is the number of examples, or less where their vectors depend on each other, and never more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.spaces import InputSpace
from gradleak.structure.probe import linear_inputs
from gradleak.training import LocalTraining, Simulator, TargetKind
from gradleak.types import Update

__all__ = ["CountedExamples", "count_examples", "gradient_rank"]

_NOISE = 64.0
"""Spacings of the number format, times the largest singular value, below which another one is rounding."""


_COLUMNS = 512
"""Size of a gradient from which on its rank is that of so many combinations of its columns."""


@dataclass(frozen=True)
class CountedExamples:
    """The number of examples that an update shows.

    Attributes:
        count: the smallest number that explains the ranks, None where they are as large as they can be.
        reason: one sentence on what it rests.
    """

    count: int | None
    reason: str


def count_examples(
    model: nn.Module, update: Update, training: LocalTraining | None, space: InputSpace
) -> CountedExamples:
    """Return the number of examples behind ``update``, as the ranks of its linear layers show it."""
    simulator = Simulator(model, training)
    names = {id(p): k for k, p in model.named_parameters()}
    like = space.neutral().to(simulator.device, simulator.dtype)
    draw = torch.Generator().manual_seed(0)
    probe = like + 0.1 * torch.randn(2, *like.shape, generator=draw).to(like)
    try:
        layers = linear_inputs(model, simulator.params(), probe)
    except NotApplicable as reason:
        return CountedExamples(None, str(reason))
    best, room, where = 0, 0, ""
    last = list(layers)[-1] if layers else ""
    for name, seen in layers.items():
        weight = names.get(id(model.get_submodule(name).weight))
        gradient = update.tensors.get(weight or "")
        if gradient is None or len(seen) > 1 or seen[0].ndim != 2:
            continue
        rank, limit = gradient_rank(gradient)
        if name == last and getattr(simulator.undefended.loss, "targets", None) is TargetKind.CLASSES:
            limit = min(gradient.shape[0] - 1, limit)  # p − y sums to zero
        if rank > best or (rank == best and limit > room):
            best, room, where = rank, limit, name
    count: int | None = None
    if not where:
        why = "No linear layer sees one vector per example, so the update does not show their number."
    elif best >= room and best > 1:
        why = (
            f"The gradient of {where!r} has the largest rank it can have, {best}, so there may be as many examples or "
            "more."
        )
    else:
        count, several = max(best, 1), "example is" if best == 1 else "examples are"
        why = f"The gradient of {where!r} has rank {best}, so at least {best} {several} behind the update."
    return CountedExamples(count, why)


def gradient_rank(gradient: Tensor) -> tuple[int, int]:
    """Return the rank of a weight's gradient (m, n) above rounding, and the largest that could have shown.

    Of a large gradient, as many random combinations of columns are looked at as there may be examples.
    """
    values = gradient.detach().double()
    if min(gradient.shape) > _COLUMNS:
        draw = torch.Generator().manual_seed(0)
        mix = torch.randn(gradient.shape[1], _COLUMNS, generator=draw, dtype=torch.float64).to(values)
        values = values @ mix
    largest = min(values.shape)
    values = torch.linalg.svdvals(values)
    noise = _NOISE * torch.finfo(gradient.dtype).eps * max(1.0, float(max(gradient.shape)) ** 0.5)
    return (int((values > noise * values[0]).sum()) if float(values[0]) > 0 else 0), largest
