"""What counting alone tells of a layer: whether its equations can determine its inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradleak.exact.layer_direct import LARGEST
from gradleak.exact.layer_equations import counts
from gradleak.structure.chain import Affine, Chain, Elementwise, Fixed, Maximum, Step

__all__ = ["LayerReport", "count", "kept", "obstacle", "too_long"]

Tensors = Mapping[str, Tensor]

_MARGIN = 1.02
"""Equations for an unknown from which on a batch's layer is tried: a square system would be ill-conditioned."""
_WORK = 1 << 30
"""Multiplications of one pass through a layer, for all examples, up to which it is solved: some thousand passes."""
_SEARCH = 1 << 27
"""The same behind max-pooling, whose choices are searched: some ten thousand passes."""


@final
@dataclass(frozen=True)
class LayerReport:
    """How one layer's inputs were determined, for all examples together.

    Attributes:
        name: the layer's path in the model.
        unknowns: values of the layer's inputs.
        forward: usable forward equations: an output that a ReLU holds at zero gives none.
        gradient: gradient equations.
        rank_bound: the most that forward and gradient equations together can have as rank, known before solving.
        determined: whether every direction shows in the equations, as solved, and the error is small enough to go on.
        error: estimated root mean square error of the inputs, of the worst example; infinite where nothing was solved.
        relative: three times that, relative to the spread between examples (one example: its size); NaN where some
            direction shows in no equation.
        iterations: of conjugate gradients.
        unseen: values that no equation holds, since nothing behind them depends on them.

    """

    name: str
    unknowns: int
    forward: int
    gradient: int
    rank_bound: int
    determined: bool = False
    error: float = math.inf
    relative: float = math.inf
    iterations: int = 0
    unseen: int = 0

    def __str__(self) -> str:
        state, error = "determined" if self.determined else "not determined", ""
        if math.isnan(self.relative):
            error = ", which some direction does not show in"
        elif math.isfinite(self.relative):
            error = f", relative error at most {self.relative:.1e}"
            state = state if self.determined else f"{state} well enough"
        unseen = f"; {self.unseen} values that nothing depends on remain open" if self.unseen else ""
        return (
            f"{self.name}: {state}, {self.unknowns} unknowns, {self.forward} forward and {self.gradient} gradient "
            f"equations of rank at most {self.rank_bound}{error}{unseen}"
        )


def obstacle(chain: Chain, params: Tensors, names: Collection[str], examples: int) -> str | None:
    """Return what keeps the walk from the model's input for so many ``examples``, as counting alone can tell."""
    if chain.stop is not None:
        return chain.stop
    pending: list[Step] = []
    known = chain.anchor.inputs
    for step in reversed(chain.steps):
        if isinstance(step, Affine):
            shared = step.weight_name in names
            pooled = any(isinstance(s, Maximum) for s in pending)
            _, alone, reason = count(step, params[step.weight_name], examples, examples * known, shared, pooled=pooled)
            if reason is not None and not (alone and examples > 1 and not pooled):
                return reason
            pending, known = [], step.inputs
        elif isinstance(step, Fixed) and not step.reorders:
            pending.insert(0, step)
        elif isinstance(step, Maximum) or (isinstance(step, Elementwise) and not (step.affine and pending)):
            rises = isinstance(step, Elementwise) and not step.folds
            if pending and rises and all(isinstance(s, Maximum) for s in pending):
                continue
            if pending and (known < step.outputs or any(isinstance(s, Maximum) for s in pending)):
                return kept(pending, known, f"the output of {step.name!r}")
            pending, known = ([step], step.outputs) if isinstance(step, Maximum) else ([], step.inputs)
    lost = pending and (known < pending[0].inputs or any(isinstance(s, Maximum) for s in pending))
    return kept(pending, known, "the model's input") if lost else None


def count(
    step: Affine, weight: Tensor, examples: int, forward: int, shared: bool, *, pooled: bool = False
) -> tuple[LayerReport, bool, str | None]:
    """Return a layer's report before it is solved, whether its gradient alone may do, and what stops it if not."""
    own, unknowns = counts(step, weight, examples), examples * step.inputs
    rank = own.rank * step.channels * shared
    report = LayerReport(step.name, unknowns, forward, weight.numel() * shared, min(unknowns, forward + rank))
    alone, reason = shared and own.rank >= own.unknowns and own.unknowns <= LARGEST, None
    if rank + forward < (_MARGIN if examples > 1 else 1) * unknowns:
        reason = f"the input of {report}"
    else:
        reason = too_long(step, weight, examples, pooled=pooled)
    return report, alone, reason


def too_long(step: Affine, weight: Tensor, examples: int, *, pooled: bool = False) -> str | None:
    """Return why a layer is not solved where that takes too long; behind max-pooling it takes a search."""
    most = _SEARCH if pooled else _WORK
    if examples * weight.numel() * math.prod(step.out_shape[1:]) <= most:
        return None
    return f"solving for the input of {step.name!r} takes more than {most:.0e} multiplications in every iteration"


def kept(pending: Sequence[Step], known: int, where: str) -> str:
    """Say that maps without parameters hide what comes before them."""
    names = ", ".join(repr(s.name) for s in pending)
    return f"{names} keeps {known} of the {pending[0].inputs} values before it, so {where} is not determined"
