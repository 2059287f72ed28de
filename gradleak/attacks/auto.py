"""The attack that chooses: exact where there is an exact way, matching where there is none, a certificate always."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

from torch import Tensor, nn

from gradleak.attacks.base import Attack, Callback, nothing_found
from gradleak.attacks.certifying import better, certified
from gradleak.attacks.entity_embeddings import EntityEmbeddings
from gradleak.attacks.feature_matching import feature_matching
from gradleak.attacks.findings import find_besides
from gradleak.attacks.gauss_newton import GaussNewton, gauss_newton
from gradleak.attacks.labeling import estimate_labels
from gradleak.attacks.least_squares import is_smooth
from gradleak.attacks.linear_inversion import linear_inversion
from gradleak.attacks.matching import GradientMatching, dlg, idlg, prior_matching, tableak
from gradleak.attacks.matching.papers.tableak import TabLeak
from gradleak.attacks.noise_aware import noise_aware, noise_share
from gradleak.attacks.patch_embedding import patch_embedding
from gradleak.attacks.recursion import recursion
from gradleak.attacks.sentences import read_sentences
from gradleak.attacks.spear import spear
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import InvalidInput, InvalidModel, MissingKnowledge, NotApplicable, ResourceLimit
from gradleak.spaces import Category, TableSpace, TokenSpace
from gradleak.structure.first_layer import find_input_layer
from gradleak.structure.lookups import Tail
from gradleak.threat import Knowledge, Observation
from gradleak.training import FedSGD
from gradleak.types import Attempt, Finding, Note, NoteKind, Reconstruction, Status, Verdict

__all__ = ["WAYS", "Auto", "Case", "Way", "auto"]

_POLISHED = 1024
"""Unknowns up to which a Gauss–Newton polish is a matter of seconds on a CPU."""
_NOISY = 1e-3
"""Share of the update's energy from which on a prior helps more than it smooths (measured on LeNets)."""
_Refusal = (InvalidModel, MissingKnowledge, NotApplicable, ResourceLimit)


@final
@dataclass(frozen=True)
class Way:
    """One way to reconstruct a batch.

    Attributes:
        make: the attack, with the options of :func:`auto`.
        against: (case) → why the way does not fit, None where it may.
        continues: whether it starts from the best result so far instead of competing with it.
        starts: whether matching starts from what it leaves open.
        share: of the time that is left, which it may use up; a search that may miss leaves some to the others.
        searches: whether it optimizes, instead of solving equations.
    """

    name: str
    make: Callable[[Auto], Attack]
    against: Callable[[Case], str | None]
    continues: bool = False
    starts: bool = False
    share: float = 1.0
    searches: bool = False


@final
@dataclass
class Case:
    """One observation on its way through the attacks: the best result so far, and the ways that were tried."""

    observation: Observation
    options: Auto
    best: Reconstruction | None = None
    attempts: list[Attempt] = field(default_factory=list)
    start: Tensor | None = None

    @property
    def open(self) -> bool:
        """Whether the update is not explained yet, and its inputs were not all solved exactly either."""
        if self.best is None or self.best.certificate is None:
            return True
        return self.best.certificate.verdict is Verdict.UNPROVED and self.best.status is not Status.EXACT

    @property
    def sentences(self) -> bool:
        """Whether the inputs are sentences, which are read; matching them is for callers who choose its parts."""
        return isinstance(self.observation.space, TokenSpace)

    @property
    def rows(self) -> int:
        """How many examples linear algebra has solved so far."""
        return _rows(self.best)

    @cached_property
    def smooth(self) -> bool:
        """Whether the model is smooth in its input.

        Raises:
            InvalidModel: it cannot be evaluated reproducibly.
        """
        return is_smooth(self.observation.model, tuple(self.observation.space.shape))

    @cached_property
    def weighs(self) -> bool:
        """Whether the noise of a known defense is large enough to be weighed against a prior."""
        return Knowledge.DEFENSE in self.observation.knows and noise_share(self.observation) > _NOISY

    @cached_property
    def labels_show(self) -> bool:
        """Whether the labels are granted, or proved by the head's gradient."""
        try:
            return self.observation.labels is not None or estimate_labels(self.observation).exact
        except NotApplicable:
            return False

    def offer(self, name: str, found: Reconstruction) -> None:
        """Keep ``found`` if it beats the best so far: by its certificate, then by the rows that were solved."""
        proof = found.certificate
        assert proof is not None  # The template method has certified it.
        self.attempts.append(Attempt(name, True, proof.verdict, proof.reason))
        former = None if self.best is None else self.best.certificate
        wins = better(proof, former)
        if former is not None and proof.verdict is former.verdict is Verdict.UNPROVED and _rows(found) != self.rows:
            wins = _rows(found) > self.rows
        if wins:
            self.best = replace(found, attack=name)


def _rows(found: Reconstruction | None) -> int:
    return 0 if found is None or found.solved is None else int(found.solved.sum())


# ----------------------------------------------------------------------------------------------- what fits whom


def _sentences(case: Case) -> str | None:
    return None if case.sentences else "The inputs are no sentences."


def _values(case: Case) -> str | None:
    return "Sentences are read, not solved for." if case.sentences else None


def _looked_up(case: Case) -> str | None:
    if case.sentences or not any(isinstance(m, nn.Embedding) for m in case.observation.model.modules()):
        return "The model looks nothing up in embeddings."
    # From the first linear layer on, an attack of this kind sees plain numbers.
    return "It was done already." if isinstance(case.observation.model, Tail) else None


def _batch(case: Case) -> str | None:
    if not case.sentences and case.observation.batch_size == 1:
        return "One example has no others to be taken apart from."
    return _values(case)


def _read_off(case: Case) -> str | None:
    why, observation = _values(case), case.observation
    if why is None and observation.batch_size == 1:
        with suppress(*_Refusal):
            shape = tuple(observation.space.shape)
            layer = find_input_layer(observation.model, observation.params, shape, mapped=True)
            if layer is not None and layer.before and layer.bias_name is not None:
                why = "The model scales or moves values before its first layer; recursion undoes that with one example."
    return why


def _one_example(case: Case) -> str | None:
    if case.sentences or case.observation.batch_size != 1:
        return "All layers together are solved for one example; a batch is matched."
    return None


def _matchable(case: Case) -> str | None:
    if case.sentences:
        return "Sentences are read, not matched."
    if case.weighs:  # Without a prior the search would explain the noise, and look better for it.
        return "The stated defense hides part of the update, which noise_aware weighs against a prior."
    if Knowledge.TRAINING not in case.observation.knows:
        return "Matching simulates the client, which takes TRAINING; grant it in the threat model."
    return None


def _noised(case: Case) -> str | None:
    if case.sentences:
        return "Sentences are read, not matched."
    if not case.weighs:
        return "No stated defense hides the update in noise."
    return None


def _smooth(case: Case) -> str | None:
    why = _matchable(case)
    if why is None and not case.smooth:
        why = "The model has kinks (ReLU, max-pooling), where squared error stalls."
    return why


def _separable(case: Case) -> str | None:
    why = _smooth(case)
    observation = case.observation
    if why is None and observation.batch_size in (None, 1):
        why = "One example has no others to be separated from."
    if why is None and (observation.labels is not None or not isinstance(observation.training, FedSGD) or case.rows):
        why = "It takes one gradient of a batch whose labels are not granted, none of whose rows is known."
    return why


def _labeled(case: Case) -> str | None:
    why = _smooth(case)
    if why is None and not case.labels_show:
        why = "The labels are not known; they are optimized with the inputs."
    return why


def _unlabeled(case: Case) -> str | None:
    why = _smooth(case)
    return "The labels are known." if why is None and case.labels_show else why


def _kinked(case: Case) -> str | None:
    why = _matchable(case)
    return "The model is smooth." if why is None and case.smooth else why


def _pooled(case: Case) -> str | None:
    space = case.observation.space
    if not isinstance(space, TableSpace) or any(isinstance(c, Category) and not c.one_hot for c in space.columns):
        return "The inputs are no rows with one-hot groups."
    return _kinked(case)


def _polishable(case: Case) -> str | None:
    if not case.options.polish or case.best is None or case.sentences:
        return "There is nothing to polish."
    unknowns = case.best.inputs.numel()
    if unknowns > _POLISHED and case.options.budget is None:
        return (
            f"A step with {unknowns} unknowns takes minutes on a CPU; call gauss_newton().polish(...) yourself, or "
            "give auto a budget."
        )
    return None


def _weighing(options: Auto) -> Attack:
    chosen = {} if options.iterations is None else {"iterations": options.iterations}
    return noise_aware(restarts=options.restarts, **chosen)


def _voting(options: Auto) -> Attack:
    return tableak() if options.iterations is None else tableak(iterations=options.iterations)


def _matching(factory: Callable[..., GradientMatching]) -> Callable[[Auto], Attack]:
    def make(options: Auto) -> Attack:
        chosen = {} if options.iterations is None else {"iterations": options.iterations}
        return factory(restarts=options.restarts, **chosen)

    return make


WAYS = (
    Way("read_sentences", lambda _: read_sentences(), _sentences),
    Way("entity_embeddings", lambda options: EntityEmbeddings(options), _looked_up),
    Way("patch_embedding", lambda _: patch_embedding(), _values, starts=True),
    Way("linear_inversion", lambda _: linear_inversion(), _read_off),
    Way("spear", lambda _: spear(), _batch),
    Way("recursion", lambda _: recursion(), _values, share=0.5),
    Way("gauss_newton", lambda _: GaussNewton(layers_only=True), _one_example),
    Way("noise_aware", _weighing, _noised, searches=True),
    Way("feature_matching", _matching(feature_matching), _separable, searches=True),  # type: ignore[arg-type]
    Way("idlg", _matching(idlg), _labeled, searches=True),
    Way("dlg", _matching(dlg), _unlabeled, searches=True),
    Way("tableak", _voting, _pooled, searches=True),
    Way("prior_matching", _matching(prior_matching), _kinked, searches=True),
    Way("gauss_newton", lambda _: gauss_newton(), _polishable, continues=True),
)
"""In the order in which they are tried: solving before searching, polishing last."""


@final
@dataclass(frozen=True)
class Auto(Attack):
    """Tries exact attacks first, then matching, and keeps what each solves; made by :func:`auto`."""

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
        deadline, stopped, late = Deadline(self.budget), False, False
        results: list[Reconstruction] = []
        for observation in observations:
            begin, case = time.perf_counter(), Case(observation, self)
            try:
                self._try_all(case, seed, callback, deadline, stopped)
            except TimeSpent:
                late = True
            except KeyboardInterrupt:
                if case.best is None and not results:
                    raise  # there is nothing yet to return
                stopped = True
            status = Status.INTERRUPTED if stopped else Status.BUDGET if (late or deadline.over) and case.open else None
            results.append(self._result(case, status, time.perf_counter() - begin))
        return results

    def _try_all(self, case: Case, seed: int, callback: Callback | None, deadline: Deadline, stopped: bool) -> None:
        for way in WAYS:
            if stopped or deadline.over or not case.open:
                return
            try:
                why = way.against(case)
                if why is not None:
                    # What never applies to such inputs is no news.
                    if not case.sentences and way.name != "read_sentences":
                        case.attempts.append(Attempt(way.name, False, None, why))
                    continue
                found = self.go(way, case, seed, callback, deadline)
            except _Refusal as reason:
                case.attempts.append(Attempt(way.name, False, None, str(reason)))
                continue
            except TimeSpent:
                if deadline.over:
                    raise
                why = f"It was not done in {way.share:.0%} of the time."
                case.attempts.append(Attempt(way.name, False, None, why))
                continue
            if way.starts and found.status is Status.STALLED:
                case.start = found.inputs
            name = f"{case.best.attack} and {way.name}" if way.continues and case.best is not None else way.name
            case.offer(name, found)

    def go(self, way: Way, case: Case, seed: int, callback: Callback | None, deadline: Deadline) -> Reconstruction:
        """Return what one way finds: around the rows that are solved already, or from the best so far."""
        observation, attack, best = case.observation, way.make(self), case.best
        deadline = deadline.part(way.share) if way.share < 1 else deadline
        if way.continues:
            assert isinstance(attack, GaussNewton) and best is not None
            left = max(deadline.left(), 1e-3)
            attack = replace(attack, budget=None if left == float("inf") else left)
            found = attack.polish(observation, best, seed=seed, callback=callback)
            found = replace(found, evaluations=found.evaluations + best.evaluations, trace=best.trace)
        elif (
            isinstance(attack, (GradientMatching, TabLeak))
            and case.rows
            and best is not None
            and best.solved is not None
        ):
            return attack.around(observation, best.inputs, best.solved, seed=seed, callback=callback, deadline=deadline)
        else:
            if isinstance(attack, GradientMatching) and case.start is not None:
                attack = replace(attack, begin=case.start, coordinates=None)
            found = attack.reconstruct(observation, seed=seed, callback=callback, deadline=deadline)
            if self.uniqueness is None:
                return found
        return certified(observation, found, uniqueness=self.uniqueness, deadline=deadline, seed=seed)

    def _result(self, case: Case, status: Status | None, seconds: float) -> Reconstruction:
        """Return the best, with the ways that were tried and what was found besides."""
        notes = [Note(f"{a.attack}: {a.verdict or 'not taken'}. {a.reason}", NoteKind.ATTEMPT) for a in case.attempts]
        besides: tuple[Finding, ...] = ()
        with suppress(TimeSpent):
            besides = tuple(find_besides(case.observation)) if case.open else ()
        best = case.best
        if best is None:
            told = " ".join(f.text for f in besides)
            if status is None:
                reasons = " ".join(f"{a.attack}: {a.reason}" for a in case.attempts)
                refusal = NotApplicable(f"No attack applies. {told}{' ' if told else ''}{reasons}")
                refusal.findings, refusal.attempts = besides, tuple(case.attempts)
                raise refusal
            best = nothing_found(case.observation)
        explained = best.certificate is not None and best.certificate.verdict is not Verdict.UNPROVED
        solved = best.status is Status.EXACT and not explained
        why = "Its equations are solved exactly" if solved else "Chosen by its certificate"
        kinds = {f.kind for f in best.findings}
        return replace(
            best,
            status=best.status if status is None or best.status is Status.EXACT else status,
            notes=(Note(f"{why}: {best.attack}."), *notes, *best.notes),
            findings=(*best.findings, *(f for f in besides if f.kind not in kinds)),
            attempts=tuple(case.attempts),
            seconds=seconds,
        )


def auto(
    *,
    budget: float | None = None,
    iterations: int | None = None,
    restarts: int = 1,
    polish: bool = True,
    uniqueness: bool | None = None,
) -> Auto:
    """Take the exact way where there is one, matching where there is none, and prove what came out.

    The ways and their order are :data:`WAYS`: sentences are read; other inputs are read off a first linear layer, a
    batch taken apart by the zeros of a ReLU, solved backward layer by layer or for all layers together; what is left
    is searched, ``feature_matching`` for a batch whose features separate, ``idlg`` or ``dlg`` on smooth models
    otherwise, ``prior_matching`` where there are kinks; then Gauss–Newton steps follow where they fit. Rows that
    one way solves stay, and the next ones search the rest around them. The first result that the update proves or
    matches ends the search; among others the certificate decides, then the rows that are solved, then the residual.
    ``attempts`` and notes say why each way was taken or not.

    Args:
        budget: seconds for all observations together; the best so far is returned.
        iterations: of matching; None keeps each attack's default.
        restarts: of matching, chosen by its objective.
        polish: finish smooth models with Gauss–Newton steps.
        uniqueness: whether certificates compute the Jacobian of the update; None does so where it is cheap.
    """
    return Auto(budget=budget, iterations=iterations, restarts=restarts, polish=polish, uniqueness=uniqueness)
