"""What an update proves about inputs of which there are finitely many, such as sentences.

There is no nearby input and no mean of several. What is left to ask is whether the re-simulated update equals the seen
one down to rounding, with the client's own scale or up to one common factor; whether the inputs were read in a way that
leaves no others; and how far the number of examples is evidence: a batch in which everything occurs twice has the
update of half of it.

The comparison keeps no copy of the model in another number type, so that it costs two simulations and little memory.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from gradleak.formats import number_format, storage_deviation
from gradleak.proof.certify import unproved
from gradleak.training import Simulator, Tensors
from gradleak.types import Certificate, Construction, UpdateKind, Verdict

__all__ = ["certify_discrete"]

_ROUNDING = 8.0
"""Residual, in measured rounding, up to which an update counts as explained."""
_LEAST = 4.0
"""Rounding that is assumed at least, in the spacing of the number format."""
_DROWNED = 0.1
"""Noise, relative to the update, from which on agreeing with it says nothing."""
_FAINT = 1e-5
"""Norm of a tensor, relative to the update, below which it may be rounding all through, as the biases of keys are."""


@torch.no_grad()
def certify_discrete(
    simulator: Simulator,
    update: Tensors,
    inputs: Tensor,
    labels: Tensor,
    *,
    construction: Construction | None,
    stated: bool = True,
) -> Certificate:
    """Return what ``update`` proves about discrete inputs (N, T), padded with −1, and their labels.

    Without a ``construction`` a result is matched at most. ``stated`` says whether the number of examples was stated.

    Raises:
        InvalidModel: the update cannot be re-simulated (active dropout, changing batch statistics).
    """
    simulator.check(inputs)
    count = len(inputs)
    shared = number_format(update)
    ours = simulator.update(inputs, labels, None)
    # The same sum in another order, with another number of columns: its difference is a sample of the rounding.
    order = torch.arange(count - 1, -1, -1, device=inputs.device)
    wide = torch.nn.functional.pad(inputs[order], (0, 1), value=-1)
    behind = labels[order]
    if behind.ndim == 2 and behind.shape[1] == inputs.shape[1]:
        behind = torch.nn.functional.pad(behind, (0, 1), value=-100)
    again = simulator.update(wide, behind, None)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in update.values()))
    if not 0 < norm < math.inf:
        return unproved(count, "The update is zero or not finite, so it proves nothing.")
    factor, told = 1.0, f"rounding, {str(shared).removeprefix('torch.')}"
    fit = _fit(simulator, update, ours, again, norm)
    if not fit.fits and not simulator.defended:
        # Another mean: over more tokens (the Trainer of transformers counts those without a loss), or a sum.
        along = sum(float((ours[k].double() * t.double()).sum()) for k, t in update.items())
        length = sum(float(ours[k].double().square().sum()) for k in update)
        free = along / length if length > 0 else 0.0
        if free > 0:
            scaled, repeated = ({k: free * t for k, t in made.items()} for made in (ours, again))
            other = _fit(simulator, update, scaled, repeated, norm)
            if other.fits:
                fit, factor = other, free
    if not fit.fits:
        why = (
            f"The re-simulated update differs from the seen one by {fit.residual:.1e} ({told}: {fit.floor:.1e}), most "
            f"in {fit.worst!r}, by {fit.times:.1e} times the noise there; something of the batch is missing or wrong, "
            "or the client did something else (noise, pruning, another loss, more steps)."
        )
        return unproved(count, why, fit.residual, fit.floor)
    text = f"The re-simulated update agrees with the seen one to {fit.residual:.1e} ({told}: {fit.floor:.1e})"
    if factor != 1.0:
        text += f", up to a common factor of {factor:.4g}"
    return replace(_judged(inputs, labels, text, fit.residual, fit.floor, construction, stated), factor=factor)


@dataclass(frozen=True)
class _Fit:
    """How well an update is explained: relative to it, and in its worst tensor."""

    residual: float
    floor: float
    worst: str
    times: float

    @property
    def fits(self) -> bool:
        return self.times <= _ROUNDING and self.residual <= self.floor <= _DROWNED


def _fit(simulator: Simulator, update: Tensors, ours: Tensors, again: Tensors, norm: float) -> _Fit:
    """Compare ``update`` with two simulations of it, whose difference is rounding."""
    shared, eps = number_format(update), torch.finfo(simulator.dtype).eps
    coarse = storage_deviation if torch.finfo(shared).eps > eps else None
    left, floor, worst, times = 0.0, 0.0, "", 0.0
    params, delta = simulator.params(), simulator.training.kind is UpdateKind.WEIGHT_DELTA
    rests = simulator.residual(ours, {k: t.to(ours[k]) for k, t in update.items()})
    known = simulator.training.deviation(update) if simulator.defended else None
    for name, seen in update.items():
        mine = ours[name]
        rest = float(rests[name].double().norm())
        noise = float((mine - again[name]).double().norm())
        size = float(mine.double().norm())
        noise = math.hypot(noise, _LEAST * eps * size, _FAINT * eps * norm)
        if coarse is not None:
            noise = math.hypot(noise, float(coarse(seen, shared).double().norm()))
        if delta:  # A captured delta is a difference of weights, each rounded to the model's format.
            noise = math.hypot(noise, math.sqrt(2) * float(storage_deviation(params[name], shared).double().norm()))
        if known is not None:
            noise = math.hypot(noise, float(known[name].double().norm()))
        left, floor = math.hypot(left, rest), math.hypot(floor, noise)
        if noise > 0 and rest / noise > times:
            worst, times = name, rest / noise
    return _Fit(left / norm, _ROUNDING * floor / norm, worst, times)


def _judged(
    inputs: Tensor,
    labels: Tensor,
    text: str,
    residual: float,
    floor: float,
    construction: Construction | None,
    stated: bool,
) -> Certificate:
    rows = [(*row, *label) for row, label in zip(inputs.tolist(), labels.view(len(inputs), -1).tolist(), strict=True)]
    occurs = Counter(rows)
    common = reduce(math.gcd, occurs.values())
    first = [rows.index(row) == i for i, row in enumerate(rows)]
    if construction is None:
        tail, examples = "whether another batch explains it as well was not excluded", [Verdict.MATCHED] * len(rows)
    elif stated and common == 1:
        tail = f"{construction.statement}, so no other batch of this size explains it"
        examples = [Verdict.PROVED] * len(rows)
    else:
        tail = (
            f"{construction.statement}, so every one of them was in the batch; how often rests on the number of "
            "examples that was stated or assumed"
        )
        examples = [Verdict.PROVED if new else Verdict.MATCHED for new in first]
        if stated is False and common == 1:
            examples = [Verdict.PROVED if new else Verdict.MATCHED for new in first]
    verdict = min(examples, key=lambda v: v.strength)
    if not stated:
        verdict = Verdict.MATCHED
    return Certificate(
        verdict,
        residual,
        floor,
        rank=None if construction is None else construction.unknowns,
        unknowns=int((inputs >= 0).sum()),
        examples=tuple(examples),
        reason=f"{text}; {tail}.",
        bound=0.0 if verdict is Verdict.PROVED else None,
        mixture=False,
    )
