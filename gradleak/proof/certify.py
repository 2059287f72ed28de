"""What an update alone proves about a reconstruction, in one place for every attack.

*Proved* means three things at once: the update re-simulated from the result equals the seen one down to the noise that
it must carry (:mod:`gradleak.proof.explained`); nothing nearby explains it as well, by construction or by the Jacobian
(:mod:`gradleak.proof.unique`); and no mean or mixture of other examples does (:mod:`gradleak.proof.alternatives`).
*Matched* is the first without the others; *unproved* is everything else. No truth is involved. The questions are asked
in the order of their cost, and no further than a proof is possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from gradleak.clock import Deadline, TimeSpent
from gradleak.proof.alternatives import has_free_directions, reversed_sign, shortage, unseen_spread
from gradleak.proof.explained import Explanation, Fit
from gradleak.proof.unique import SAFETY
from gradleak.proof.unique import uniqueness as by_jacobian
from gradleak.training import Simulator, Tensors
from gradleak.types import Certificate, Construction, Verdict

__all__ = ["certify", "unproved"]

_CHECKED = 256
"""Unknowns up to which the error bound of a construction is checked against the Jacobian's."""
_LARGEST = 1024
"""Unknowns up to which the Jacobian is computed without being asked for."""
_UNSEEN = 4.0
"""Factor between the distance of examples that random directions leave unseen and the one of their best direction."""
_PARTLY = 8.0
"""The same where the first layer leaves directions unseen, in which most of the distance may lie."""
_MIXTURE = "means of several examples explain it as well, so that what is shown may be such means"


@dataclass(frozen=True)
class _Case:
    """One candidate on its way to a certificate."""

    explanation: Explanation
    fit: Fit
    told: str
    unit: float
    tolerance: float
    stated: bool

    @property
    def count(self) -> int:
        return len(self.explanation.inputs)

    @property
    def whole(self) -> str:
        """How the single explanation is called."""
        return "single input" if self.count == 1 else "batch of this size"

    def certificate(self, verdict: Verdict, tail: str) -> Certificate:
        """Return a certificate of one verdict for all examples."""
        unknowns = self.explanation.inputs.numel()
        return Certificate(
            verdict,
            self.fit.residual,
            self.fit.noise.floor,
            unknowns=unknowns,
            examples=(verdict,) * self.count,
            reason=f"{self.told}; {tail}.",
            factor=self.fit.factor,
            factors=self.fit.factors,
        )

    @cached_property
    def spread(self) -> float:
        """How far several examples may lie from their mean unnoticed, relative to the inputs' size."""
        return unseen_spread(self.explanation, self.fit)

    @property
    def least(self) -> float:
        """The least error that a proof may state: without the number of examples, near ones may hide in their mean."""
        return 0.0 if self.stated else _UNSEEN * self.spread * self.explanation.size

    def doubt(self, *, alone: bool) -> tuple[str | None, bool]:
        """Return what speaks against a proof, and whether that is a mean or mixture of several examples."""
        explanation, fit = self.explanation, self.fit
        sign = reversed_sign(explanation, fit)
        if sign is not None:
            return sign, False
        if fit.factors:
            return "every tensor needs a factor of its own, so the scale of the update is no evidence", False
        # A batch that is taken for one example is the likeliest slip.
        if math.isinf(self.spread) or (self.count == 1 and _PARTLY * self.spread >= 1 and self._splits()):
            return _MIXTURE, True
        if not alone and (fit.free or explanation.free_labels):
            return "up to a factor a mixture of several examples would be explained as well", True
        if not self.stated and self._splits():
            return "the number of examples was not stated, and " + _MIXTURE, True
        return None, False

    def _splits(self) -> bool:
        simulator = self.explanation.simulator
        shape = tuple(self.explanation.inputs.shape[1:])
        return has_free_directions(simulator.model, dict(simulator.params()), shape)


def certify(
    simulator: Simulator,
    update: Tensors,
    inputs: Tensor,
    labels: Tensor,
    *,
    construction: Construction | None = None,
    uniqueness: bool | None = None,
    stated: bool = True,
    granted: bool = False,
    unit: float | None = None,
    tolerance: float = 0.1,
    largest: int = _LARGEST,
    deadline: Deadline | None = None,
    seed: int = 0,
) -> Certificate:
    """Return what ``update`` proves about a reconstruction.

    Args:
        simulator: of the client, as the attacker knows it, defended or not.
        update: what was seen, by parameter name, in the number format in which it was shared.
        inputs: reconstructed model inputs, (N, *shape).
        labels: as the client's loss takes them; real numbers count as unknowns of their own unless ``granted``.
        construction: how the inputs were constructed, where that makes them unique.
        uniqueness: whether to compute the Jacobian where a proof is possible; None does so up to ``largest`` unknowns.
            The error bound of a construction is checked against it in any case, where that is cheap.
        stated: whether the number of examples was stated, not assumed.
        granted: whether the labels are known, not read off the update.
        unit: size of a typical input value; None takes the root mean square of ``inputs``.
        tolerance: largest error bound, relative to ``unit``, that is still called a proof.
        largest: see ``uniqueness``.
        deadline: when to stop asking for uniqueness.
        seed: of the random moves by which noise and curvature are measured.

    Raises:
        InvalidModel: the update cannot be re-simulated (active dropout, changing batch statistics).
    """
    simulator.check(inputs)
    explanation = Explanation(simulator, update, inputs, labels, granted=granted, seed=seed)
    unknowns, built = inputs.numel(), construction is not None
    asked = unknowns <= (_CHECKED if built else largest) if built or uniqueness is None else uniqueness
    fit = explanation.fit(thorough=asked)
    if fit is None:
        return unproved(len(inputs), "The update is zero or not finite, so it proves nothing.")
    cause = f"rounding, {str(explanation.format).removeprefix('torch.')}"
    if simulator.defended:
        cause += ", and the known defense"
    if not fit.matched:
        return _unmatched(fit, len(inputs), cause)
    told = f"The re-simulated update agrees with the seen one to {fit.residual:.1e} ({cause}: {fit.noise.floor:.1e})"
    if fit.factors:
        told += ", with a factor for every tensor"
    elif fit.free:
        told += f", up to a common factor of {fit.factor:.4g}"
    size = explanation.size if unit is None else unit
    case = _Case(explanation, fit, told, size, tolerance, stated)
    late = case.certificate(Verdict.MATCHED, "the time ended before it was asked whether anything else does")
    if deadline is not None and deadline.over:
        return late
    if construction is not None:
        return _constructed(case, construction)
    if not asked or not inputs.is_floating_point():
        why = "was not asked" if uniqueness is False else f"takes a Jacobian of {unknowns} columns"
        mixture = math.isinf(case.spread)
        tail = f"whether it is the only explanation nearby is unknown, since that {why} (uniqueness=True)"
        return replace(case.certificate(Verdict.MATCHED, _MIXTURE if mixture else tail), mixture=mixture)
    try:
        return _by_jacobian(case, deadline)
    except TimeSpent:
        return late


def unproved(count: int, reason: str, residual: float = math.nan, floor: float = 0.0) -> Certificate:
    """Return the certificate of ``count`` examples of which nothing is proved."""
    return Certificate(Verdict.UNPROVED, residual, floor, examples=(Verdict.UNPROVED,) * count, reason=reason)


def _unmatched(fit: Fit, count: int, cause: str) -> Certificate:
    floor = fit.noise.floor
    if fit.noise.limited:
        reason = (
            f"The known defense limited or zeroed all of the update but {fit.noise.shown:.1e}, too little to "
            "tell this guess from another."
        )
    elif fit.hidden:
        reason = (
            f"The stated noise hides the update ({cause}: {floor:.1e} of it), so no attack can tell this guess from "
            "another."
        )
    else:
        reason = (
            f"The re-simulated update differs from the seen one by {fit.residual:.1e} ({cause}: {floor:.1e}), most in "
            f"{fit.worst!r}, by {fit.times:.1e} times the noise there; the reconstruction is wrong or inexact, or the "
            "client did something else (noise, pruning, another loss, more steps)."
        )
    return replace(unproved(count, reason, fit.residual, floor), factor=fit.factor)


def _constructed(case: _Case, proof: Construction) -> Certificate:
    """Return the certificate of a candidate whose construction makes it unique."""
    explanation, fit = case.explanation, case.fit
    bound = SAFETY * proof.error * max(1.0, fit.excess)
    doubt, mixture = case.doubt(alone=proof.alone)
    if explanation.inputs.numel() <= _CHECKED:
        # The noise of this very update, where measuring it is cheap. Folds say nothing here, free directions do.
        own = by_jacobian(explanation, fit, unit=case.unit, tolerance=case.tolerance, folds=False)
        errors = () if own is None else own.errors
        bound = max([bound, *(math.inf if math.isnan(e) else e for e in errors)])
        if doubt is None and bound <= case.tolerance * case.unit:
            doubt = shortage(explanation, fit)
            mixture = doubt is not None
    bound = max(bound, case.least)
    small = bound <= case.tolerance * case.unit
    if doubt is not None:
        tail = f"{proof.statement}, but {doubt}"
    elif small:
        only = "input nearby" if proof.local else case.whole
        tail = f"{proof.statement}, so no other {only} explains it" + (f"; {_error(bound)}" if bound > 0 else "")
    else:
        tail = f"{proof.statement}, but the noise leaves an error of up to {bound:.1e}, too much for a proof"
    verdict = Verdict.PROVED if small and doubt is None else Verdict.MATCHED
    return replace(
        case.certificate(verdict, tail),
        rank=proof.unknowns if verdict is Verdict.PROVED else None,
        bound=bound if math.isfinite(bound) else None,
        local=proof.local,
        mixture=mixture,
    )


def _by_jacobian(case: _Case, deadline: Deadline | None) -> Certificate:
    """Return the certificate of a candidate that was searched: unique nearby, or not."""
    explanation, fit = case.explanation, case.fit
    doubt, mixture = case.doubt(alone=True)
    if doubt is not None:  # Then nothing can be proved, and the Jacobian is not worth its time.
        return replace(case.certificate(Verdict.MATCHED, doubt), mixture=mixture)
    going = None if deadline is None else lambda: not deadline.over
    own = by_jacobian(explanation, fit, unit=case.unit, tolerance=case.tolerance, going=going)
    if own is None:
        return case.certificate(
            Verdict.MATCHED, "whether anything else does is unknown, since its Jacobian is not finite"
        )
    if own.few:
        doubt = own.why
    elif any(own.determined):
        doubt = shortage(explanation, fit)
        mixture = doubt is not None
    if doubt is None and case.least > case.tolerance * case.unit:
        doubt = f"the number of examples was not stated, and several within {case.least:.1e} would not be told apart"
    verdicts = tuple(Verdict.PROVED if good and doubt is None else Verdict.MATCHED for good in own.determined)
    sure = [e for e, v in zip(own.errors, verdicts, strict=True) if v is Verdict.PROVED]
    bound = max(*(sure or own.errors), case.least)
    if all(v is Verdict.PROVED for v in verdicts):
        tail = (
            f"its Jacobian has full rank {own.rank} (weakest direction {own.weakest:.1e}), so nothing nearby explains "
            f"it as well; {_error(bound)}"
        )
    else:
        tail = doubt or own.why
        if case.count > 1:
            tail += f"; {len(sure)} of {case.count} examples are determined"
    return replace(
        case.certificate(min(verdicts, key=lambda v: v.strength), tail),
        rank=own.rank,
        examples=verdicts,
        bound=bound if math.isfinite(bound) else None,
        local=True,
        mixture=mixture,
    )


def _error(bound: float) -> str:
    return f"error at most {bound:.1e} (root mean square, model-input units)"
