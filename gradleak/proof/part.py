"""What a part of an update proves that determines the input whatever loss, labels and random masks there were.

The equations of a layer hold for every client that computes this model's gradient: the tensors that they relate are
compared with each other instead of re-simulating all of the update, which takes the client's masks. Then *proved* means
that no other input satisfies them, and that more equations than unknowns show that they hold.
"""

from __future__ import annotations

import math

from torch import Tensor

from gradleak.proof.unique import SAFETY
from gradleak.training import Tensors
from gradleak.types import Certificate, Construction, Part, Verdict

__all__ = ["certify_part"]

_SHOWN = 1e-6
"""Distance between a solution and what is shown of it, relative to a typical value, that is rounding."""


def certify_part(
    update: Tensors,
    inputs: Tensor,
    construction: Construction,
    part: Part,
    *,
    split: bool = False,
    unit: float | None = None,
    tolerance: float = 0.1,
) -> Certificate:
    """Return what the tensors of ``part`` prove about inputs that their equations determine.

    Args:
        update: what was seen, as a gradient, by parameter name.
        inputs: reconstructed model inputs, (N, *shape).
        construction: how they were constructed.
        part: of the update.
        split: whether the number of examples was not stated, and inputs may differ that the part does not tell apart.
        unit: size of a typical input value; None takes the root mean square of ``inputs``.
        tolerance: largest error bound, relative to ``unit``, that is still called a proof.

    """
    simulated = part.simulate(part.inputs)
    seen = {k: update[k].double() for k in simulated}
    left = {k: float((seen[k].flatten() - v.flatten()).norm()) for k, v in simulated.items()}
    whole = math.sqrt(sum(float(t.square().sum()) for t in seen.values()))
    residual, floor = (math.hypot(*v.values()) / whole for v in (left, part.floors))
    worst = max(left, key=lambda k: left[k] / max(part.floors[k], 1e-300))
    # What is shown is the solution, rounded and clipped; a mean of near duplicates satisfies the equations, too.
    moved = float((inputs.to(part.inputs) - part.inputs).square().mean().sqrt())
    bound = SAFETY * construction.error + moved + part.hidden
    size = float(inputs.square().mean().sqrt()) if unit is None else unit
    names, given = (" and ".join(map(repr, v)) for v in (simulated, part.given))
    told = f"As {given} gives them, the gradients of {names} agree with the seen ones to {residual:.1e}"
    told += f" (rounding: {floor:.1e})"
    verdict, mixture = Verdict.MATCHED, False
    if not all(left[k] <= part.floors[k] for k in left):
        verdict = Verdict.UNPROVED
        tail = (
            f"that is above rounding in {worst!r}, so the update is noised, pruned, not of one example or not of this "
            "model"
        )
    elif moved > max(SAFETY * construction.error, _SHOWN * size):
        verdict = Verdict.UNPROVED
        tail = "what is shown is not the solution, whose values leave the stated range"
    elif part.spare < 1:
        tail = "there are as many unknowns as equations, so nothing shows that they hold"
    elif not construction.alone or split:
        mixture = True
        why = "the number of examples was not stated, and " if construction.alone else ""
        tail = f"{construction.statement}, but {why}means of several examples may explain them as well"
    elif not construction.scaled:
        tail = f"{construction.statement}, but tensors may carry factors of their own, so the scale is no evidence"
    elif not bound <= tolerance * size:
        tail = f"{construction.statement}, but the noise leaves an error of up to {bound:.1e}, too much for a proof"
    else:
        verdict = Verdict.PROVED
        tail = (
            f"{construction.statement}, so no other single input explains them, whatever loss, label and dropout masks "
            f"the client had; error at most {bound:.1e} (root mean square, model-input units)"
        )
    return Certificate(
        verdict,
        residual,
        floor,
        rank=construction.unknowns if verdict is Verdict.PROVED else None,
        unknowns=construction.unknowns,
        examples=(verdict,) * len(inputs),
        reason=f"{told}; {tail}.",
        bound=bound if math.isfinite(bound) else None,
        mixture=mixture,
        factors=dict(part.factors),
        part=tuple(simulated),
    )
