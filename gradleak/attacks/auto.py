"""The attack that chooses: exact where there is an exact way, matching where there is none, a certificate always."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback, Progress, as_gradient
from gradleak.attacks.feature_matching import feature_matching
from gradleak.attacks.gauss_newton import by_layers, gauss_newton
from gradleak.attacks.labeling import read_labels
from gradleak.attacks.least_squares import is_smooth
from gradleak.attacks.linear_inversion import invert_first_layer
from gradleak.attacks.matching import dlg, idlg, inverting_gradients
from gradleak.attacks.recursion import check, from_layers, hides, invert_batch, mixtures_fit, plain_gradient
from gradleak.attacks.sentences import read_sentences
from gradleak.errors import InvalidInput, InvalidModel, NotApplicable, ResourceLimit
from gradleak.exact.labels import recover_labels
from gradleak.exact.one_example import RecursionResult, check_together, invert_layers
from gradleak.proof.certify import certify
from gradleak.spaces import ImageSpace, TokenSpace
from gradleak.structure.chain import Chain
from gradleak.structure.ranks import rank_bound
from gradleak.structure.reader import trace_chain
from gradleak.threat import Knowledge, Observation
from gradleak.training import FedSGD
from gradleak.types import Certificate, Construction, Reconstruction

__all__ = ["Auto", "auto", "certificate"]

_RANK = {"unproved": 0, "matched": 1, "proved": 2}
_UNKNOWN = 0.1
"""Residual with which a result counts whose update cannot be simulated."""
_POLISHED = 1024
"""Unknowns up to which a Gauss–Newton polish is a matter of seconds."""
_BACKWARD = "solved backward, every layer's linear system has full rank"
_BATCHED = "solved backward from separated features, every layer's equations determine its inputs for all examples"
_TOGETHER = "solved for all layers together, whose linear system there has full rank"


def certificate(
    observation: Observation,
    found: Reconstruction,
    *,
    construction: Construction | None = None,
    uniqueness: bool | None = None,
    seed: int = 0,
) -> Certificate:
    """Return what the observed update proves about ``found``; no truth is involved.

    Args:
        observation: what was seen.
        found: any attack's result on it.
        construction: a proof of uniqueness that came with the solution.
        uniqueness: whether to compute the Jacobian; None does so where it is cheap.
        seed: of the jitter by which rounding is measured.

    """
    return _certified(observation, found, construction=construction, uniqueness=uniqueness, seed=seed)[0]


def _certified(
    observation: Observation,
    found: Reconstruction,
    *,
    construction: Construction | None,
    uniqueness: bool | None,
    seed: int,
) -> tuple[Certificate, Tensor | None, Tensor | None]:
    """Return the certificate, with the labels (N,) and probabilities (N, C) that were simulated with."""
    space, device = observation.space, next(iter(observation.params.values())).device
    decoded = found.inputs.detach().to(device)
    inputs = space.encode(decoded.double() if decoded.is_floating_point() else decoded).double()
    scale = 1 / max(space.std or (1.0,)) if isinstance(space, ImageSpace) else None

    def examined(labels: Tensor) -> Certificate:
        return certify(
            observation.model,
            observation.update.tensors,
            inputs,
            labels.to(device),
            training=observation.training,
            construction=construction,
            uniqueness=uniqueness,
            scale=scale,
            seed=seed,
        )

    hard, soft = found.labels, found.label_probabilities
    try:
        if observation.labels is not None:  # Granted labels are taken as they are.
            granted = observation.labels
            hard, soft = (None, granted) if granted.is_floating_point() else (granted, None)
        elif hard is None:
            hard, soft = read_labels(observation, inputs)
        if hard is None and soft is None:
            why = "The labels are not known, so the update cannot be re-simulated."
            return _unproved(len(found), why), None, None
        best, used = None, hard
        for labels in (hard, soft):
            if labels is not None and (best is None or best.verdict == "unproved"):
                other = examined(labels)
                if best is None or _order(other) > _order(best):
                    best, used = other, labels
        assert best is not None
        return best, hard, soft if used is soft else None
    except InvalidModel as reason:
        return _unproved(len(found), str(reason)), hard, soft


def _unproved(count: int, reason: str) -> Certificate:
    return Certificate("unproved", float("nan"), 0.0, examples=("unproved",) * count, reason=reason)


def _order(item: Certificate | None) -> tuple[int, float]:
    """Order by verdict, then by residual; both are the attacker's own."""
    if item is None:
        return (-1, float("-inf"))
    # Nothing could be simulated: that loses against what explains the most, not against what explains little.
    return _RANK[item.verdict], -_UNKNOWN if math.isnan(item.residual) else -item.residual


@final
@dataclass(frozen=True)
class Auto(Attack):
    """Tries exact attacks first, then matching, and proves what it returns; made by :func:`auto`.

    Attributes:
        budget: seconds for all observations together, None for no limit; the best so far is returned.
        iterations: of matching, None for each attack's own default.
        restarts: of matching.
        polish: whether to finish smooth models with Gauss–Newton steps where they fit.
        uniqueness: whether certificates compute the Jacobian; None does so where it is cheap.

    """

    budget: float | None = None
    iterations: int | None = None
    restarts: int = 1
    polish: bool = True
    uniqueness: bool | None = None

    requires = Knowledge.BATCH_SIZE

    def __post_init__(self) -> None:
        if (self.budget is not None and not self.budget > 0) or self.restarts < 1:
            raise InvalidInput(
                f"auto cannot use budget={self.budget} with restarts={self.restarts}; give seconds above 0 (or None) "
                "and at least one restart."
            )

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        clock = _Clock(self.budget, callback)
        cases = [_Case(o, seed) for o in observations]
        try:
            for number, case in enumerate(cases):
                case.exactly(self, clock)
                clock(Progress(number + 1, len(cases), case.objective, "exact attacks"), stop=False)
        except KeyboardInterrupt:
            if any(c.best is None for c in cases):
                raise  # there is nothing yet to return
            return [replace(case.result(), status="interrupted") for case in cases]
        open_ = [c for c in cases if c.open and not c.text]
        for case in open_:
            # One by one: whether the features of a batch separate is known only after trying.
            if case.separable() and not (clock.over or clock.cancelled):
                _match("feature_matching", self._made("feature_matching"), [case], seed, clock)
        for name, attack, members in self._matching([c for c in open_ if c.by != "feature_matching"]):
            _match(name, attack, members, seed, clock)
        for case in open_:
            if self.polish and case.open and not (clock.over or clock.cancelled):
                case.polished(self, clock)
        return [case.result() for case in cases]

    def _matching(self, cases: Sequence[_Case]) -> list[tuple[str, Attack, list[_Case]]]:
        """Choose a matching attack for every case; cases with the same choice advance together."""
        groups: dict[str, list[_Case]] = {}
        for case in cases:
            name = case.matching()
            if name is not None:
                groups.setdefault(name, []).append(case)
        return [(name, self._made(name), members) for name, members in groups.items()]

    def _made(self, name: str) -> Attack:
        factories: dict[str, Callable[..., Attack]] = {
            "feature_matching": feature_matching,
            "idlg": idlg,
            "dlg": dlg,
            "inverting_gradients": inverting_gradients,
        }
        chosen = {} if self.iterations is None else {"iterations": self.iterations}
        return factories[name](restarts=self.restarts, **chosen)


class _Clock:
    """Passes progress on, and stops an attack when the time is over."""

    def __init__(self, budget: float | None, callback: Callback | None) -> None:
        self.deadline = None if budget is None else time.monotonic() + budget
        self.callback, self.stopped, self.cancelled = callback, False, False

    @property
    def over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def __call__(self, progress: Progress, *, stop: bool = True) -> None:
        if self.callback is not None:
            try:
                self.callback(progress)
            except KeyboardInterrupt:
                self.cancelled = True
                raise
        if stop and self.over:
            self.stopped = True
            raise KeyboardInterrupt


class _Case:
    """One observation on its way through the attacks."""

    def __init__(self, observation: Observation, seed: int) -> None:
        self.observation, self.seed = observation, seed
        self.notes: list[str] = []
        self.best: Reconstruction | None = None
        self.reasons: list[str] = []
        self.seconds = 0.0
        self.by = ""
        self.solved = False

    @property
    def open(self) -> bool:
        """Whether the update is not explained yet, and its inputs were not solved exactly either."""
        unproved = self.best is None or self.best.certificate is None or self.best.certificate.verdict == "unproved"
        return unproved and not self.solved

    @property
    def objective(self) -> float:
        return float("inf") if self.best is None else self.best.objective

    @property
    def text(self) -> bool:
        """Whether the inputs are sentences, which are read; matching them is for callers who choose its parts."""
        return isinstance(self.observation.space, TokenSpace)

    def offer(
        self, name: str, found: Reconstruction, uniqueness: bool | None, construction: Construction | None = None
    ) -> None:
        """Keep ``found`` if its certificate is better than that of the best so far."""
        proof, hard, soft = found.certificate if self.text else None, found.labels, found.label_probabilities
        if proof is None:
            proof, hard, soft = _certified(
                self.observation, found, construction=construction, uniqueness=uniqueness, seed=self.seed
            )
        if found.labels is None and hard is not None:
            found = replace(found, labels=hard, label_probabilities=soft)
        self.notes.append(f"{name}: {proof.verdict}. {proof.reason}")
        if self.best is None or _order(proof) > _order(self.best.certificate):
            self.best, self.by = replace(found, certificate=proof), name
            # Linear algebra that fits down to rounding shows the inputs even where the client is not as stated.
            self.solved = found.status == "exact" and not self.text

    def exactly(self, options: Auto, clock: _Clock) -> None:
        """Try what needs no search."""
        begin = time.perf_counter()
        images = (
            ("linear_inversion", self._linear),
            ("recursion", lambda: self._recursion(clock)),
            ("gauss_newton", lambda: self._together(clock)),
        )
        for name, attempt in (("read_sentences", self._sentences),) if self.text else images:
            if not self.open:
                break
            try:
                found, construction = attempt()
                self.offer(name, found, options.uniqueness, construction)
            except (InvalidModel, NotApplicable, ResourceLimit) as reason:
                self._skip(name, reason)
            finally:
                self.seconds += time.perf_counter() - begin
                begin = time.perf_counter()

    def _skip(self, name: str, reason: Exception) -> None:
        self.notes.append(f"{name}: not taken. {reason}")
        self.reasons.append(f"{name}: {reason}")

    def _sentences(self) -> tuple[Reconstruction, Construction | None]:
        if self.observation.training is None:
            raise NotApplicable("Labels are read by simulating the client, which takes TRAINING; grant it.")
        return read_sentences().reconstruct(self.observation, seed=self.seed), None

    def _linear(self) -> tuple[Reconstruction, Construction | None]:
        found, alone = invert_first_layer(self.observation)
        if found.status != "exact" or len(found) != 1:
            return found, None
        size = float(found.inputs.double().square().mean().sqrt())
        error = max(found.objective**0.5, _rounding(self.observation)) * size
        proof = Construction(
            found.inputs.numel(),
            error,
            "the first layer's gradient is the input times a known vector",
            alone=alone,
        )
        return found, proof

    def _recursion(self, clock: _Clock) -> tuple[Reconstruction, Construction | None]:
        observation = self.observation
        if observation.batch_size != 1:
            found, peeled = invert_batch(observation, seed=self.seed, going=lambda: not clock.over)
            size = float(peeled.known.values.square().mean().sqrt())
            error = max(peeled.error, _rounding(observation) * size)
            return found, Construction(peeled.known.values.numel(), error, _BATCHED, local=True)
        check(observation)
        shape = tuple(observation.space.shape)
        params = {k: p.detach() for k, p in observation.model.named_parameters()}
        begin = time.perf_counter()
        result = invert_layers(
            observation.model, params, plain_gradient(observation), shape, chain=self.chain, seed=self.seed
        )
        for value, note in ((result.input, ""), (result.start, f"it stops: {result.stopped_at}")):
            if value is not None:
                if note:
                    self.notes.append(f"recursion: {note}; what lies behind is its best guess.")
                proof = _determined(result, _rounding(observation), _BACKWARD)
                found = from_layers(observation, result, value, self.chain, begin)
                if hides(self.chain, value[None]):
                    proof = None
                elif proof is not None and mixtures_fit(observation, self.chain):
                    proof = replace(proof, alone=False)
                return found, proof
        raise NotApplicable(f"The recursion stops: {result.stopped_at}.")

    def _together(self, clock: _Clock) -> tuple[Reconstruction, Construction | None]:
        """Solve all layers together."""
        observation = self.observation
        if observation.batch_size != 1:
            raise NotApplicable("All layers together are solved for one example; a batch is matched.")
        check_together(self.chain)
        bound = rank_bound(observation.model, observation.params, tuple(observation.space.shape), 1)
        if not bound.determined:
            raise NotApplicable(bound.reason)
        begin, limit = time.perf_counter(), gauss_newton().iterations

        def going(residual: float, steps: int) -> bool:
            clock(Progress(min(steps, limit), limit, residual**2, "all layers together"), stop=False)
            return not clock.over

        result = by_layers(observation, chain=self.chain, seed=self.seed, going=going)
        value = result.start if result.input is None else result.input
        assert value is not None
        return from_layers(observation, result, value, self.chain, begin), _determined(
            result, _rounding(observation), _TOGETHER, local=True
        )

    @cached_property
    def chain(self) -> Chain:
        """The model's layers; raises NotApplicable where they have no beginning to solve from."""
        return trace_chain(self.observation.model, tuple(self.observation.space.shape))

    @cached_property
    def smooth(self) -> bool:
        """Whether the model is smooth in its input; raises InvalidModel where that cannot be asked."""
        return is_smooth(self.observation.model, tuple(self.observation.space.shape))

    def separable(self) -> bool:
        """Whether feature matching may serve: one gradient of a batch through a smooth model, labels not granted."""
        observation = self.observation
        training = observation.training
        if observation.batch_size in (None, 1) or observation.labels is not None or not isinstance(training, FedSGD):
            return False
        try:
            return self.smooth
        except InvalidModel:
            return False

    def matching(self) -> str | None:
        """Return the matching attack that fits, and note why."""
        observation = self.observation
        if Knowledge.TRAINING not in observation.knows or observation.training is None:
            reason = NotApplicable("Matching simulates the client, which takes TRAINING; grant it in the threat model.")
            self._skip("matching", reason)
            return None
        try:
            smooth = self.smooth
        except InvalidModel as reason:
            self._skip("matching", reason)
            return None
        if not smooth:
            self.notes.append(
                "inverting_gradients: taken, since the model has kinks (ReLU, max-pooling), where squared error stalls."
            )
            return "inverting_gradients"
        name, why = "dlg", "the labels are optimized with the inputs"
        if observation.labels is not None:
            name, why = "idlg", "the labels are granted"
        else:
            try:
                estimate = recover_labels(
                    observation.model,
                    observation.params,
                    as_gradient(observation),
                    tuple(observation.space.shape),
                    observation.batch_size or 1,
                    observation.training.loss,
                    torch.Generator().manual_seed(self.seed),
                )
                if estimate.exact:
                    name, why = "idlg", "the head's gradient proves the labels"
            except NotApplicable as reason:
                why = f"{why}: {reason}"
        self.notes.append(f"{name}: taken, since the model is smooth and {why}.")
        return name

    def polished(self, options: Auto, clock: _Clock) -> None:
        """Finish with Gauss–Newton steps from the best so far, on smooth models where they fit."""
        if self.best is None:
            return
        unknowns = self.best.inputs.numel()
        # One example was solved by all layers together where that is possible; what is left takes the whole Jacobian.
        if unknowns > _POLISHED and clock.deadline is None:
            reason = ResourceLimit(
                f"A step with {unknowns} unknowns takes minutes on a CPU; call gauss_newton().polish(...) yourself, "
                "or give auto a budget."
            )
            self._skip("gauss_newton", reason)
            return
        begin = time.perf_counter()
        left = None if clock.deadline is None else max(clock.deadline - time.monotonic(), 1e-3)
        try:
            found = gauss_newton(budget=left).polish(self.observation, self.best, seed=self.seed, callback=clock)
        except (InvalidModel, NotApplicable, ResourceLimit) as reason:
            self._skip("gauss_newton", reason)
            return
        found = replace(found, evaluations=found.evaluations + self.best.evaluations, trace=self.best.trace)
        self.offer(f"{self.by} and gauss_newton", found, options.uniqueness)
        self.seconds += time.perf_counter() - begin

    def result(self) -> Reconstruction:
        """Return the best, with the way that led to it."""
        if self.best is None:
            raise NotApplicable("No attack applies. " + " ".join(self.reasons))
        proof = self.best.certificate
        explained = proof is not None and proof.verdict != "unproved"
        why = "Its equations are solved exactly" if self.solved and not explained else "Chosen by its certificate"
        notes = (f"{why}: {self.by}.", *self.notes, *self.best.notes)
        return replace(self.best, notes=notes, seconds=self.seconds)


def _match(name: str, attack: Attack, cases: list[_Case], seed: int, clock: _Clock) -> None:
    """Run one matching attack on all ``cases`` together."""
    begin = time.perf_counter()
    clock.stopped = False
    try:
        results = attack.reconstruct_all([c.observation for c in cases], seed=seed, callback=clock)
    except (InvalidModel, NotApplicable, ResourceLimit) as reason:
        for case in cases:
            case._skip(name, reason)
        return
    share = (time.perf_counter() - begin) / len(cases)
    for case, found in zip(cases, results, strict=True):
        if clock.stopped and not clock.cancelled and found.status == "interrupted":
            found = replace(found, status="budget")
            case.notes.append(f"{name}: the time budget ended it.")
        # Its own uniqueness is asked once, at the end of the polish.
        case.offer(name, found, None)
        case.seconds += share


def _determined(result: RecursionResult, rounding: float, why: str, *, local: bool = False) -> Construction | None:
    if result.input is None or math.isnan(result.spread):
        return None
    # A residual of zero is luck: nothing is known better than to the rounding of the numbers it came from.
    size = float(result.input.square().mean().sqrt())
    error = max(result.spread**0.5, rounding * size)
    return Construction(result.input.numel(), error, why, local)


def _rounding(observation: Observation) -> float:
    return float(torch.finfo(next(iter(observation.update.tensors.values())).dtype).eps)


def auto(
    *,
    budget: float | None = None,
    iterations: int | None = None,
    restarts: int = 1,
    polish: bool = True,
    uniqueness: bool | None = None,
) -> Auto:
    """Take the exact way where there is one, matching where there is none, and prove what came out.

    Sentences are read (``read_sentences``). For other inputs the order is: ``linear_inversion`` (a first linear layer),
    ``recursion`` (one example, or a batch, determined layer by layer), ``gauss_newton`` (one example, determined by all
    layers of a smooth chain together); then matching: ``feature_matching`` for a batch whose features separate,
    ``idlg`` or ``dlg`` on smooth models otherwise, ``inverting_gradients`` where there are kinks; then Gauss–Newton
    steps on smooth models where they fit. An attack ends the search when the update proves or matches its result; among
    results the certificate decides, then the residual of the re-simulated update. The notes say why each step was taken
    or not.

    Args:
        budget: seconds for all observations together; the best so far is returned. Exact attacks are not cut short.
        iterations: of matching; None keeps each attack's default.
        restarts: of matching, chosen by its objective.
        polish: finish smooth models with Gauss–Newton steps.
        uniqueness: whether certificates compute the Jacobian of the update; None does so where it is cheap.

    """
    return Auto(budget=budget, iterations=iterations, restarts=restarts, polish=polish, uniqueness=uniqueness)
