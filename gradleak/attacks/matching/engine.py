"""The one matching loop: candidates whose simulated update equals the observed one; papers are choices of its parts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback
from gradleak.attacks.matching import backends
from gradleak.attacks.matching.coordinates import Coordinates
from gradleak.attacks.matching.evaluate import SLOTS, SLOTS_GPU, Evaluator, Group
from gradleak.attacks.matching.memory import available, candidate_bytes, fitting
from gradleak.attacks.matching.objectives import Objective, SquaredError
from gradleak.attacks.matching.priors import GroupPrior, Prior
from gradleak.attacks.matching.problem import Fixed, Problem
from gradleak.attacks.matching.race import Race
from gradleak.attacks.matching.trace import Recorder, write_trace
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import InvalidInput, UnknownName
from gradleak.solve import LBFGS, Outcome, Project, Referee, Solver
from gradleak.threat import Knowledge, Observation
from gradleak.training import TargetKind, harden
from gradleak.types import Note, NoteKind, Reconstruction, Status

__all__ = ["GradientMatching"]

_MOMENT = 1e-3
"""Seconds of a budget that is over already: every observation is measured once."""


@dataclass(frozen=True)
class GradientMatching(Attack):
    """Search inputs (and labels) whose simulated update matches the observed one.

    Candidates of all restarts and of all observations of equal shape form one leading axis and advance together.
    The best restart is chosen by the attacker's own objective.

    Attributes:
        relative: multiply the distance by the exponential of the priors instead of adding them to it. That minimizes
            the logarithm of the distance plus the priors: a prior counts in proportion to what is left unexplained.
        labels: "joint" optimizes unknown labels beside the inputs, in the form that the client's loss has them (class
            probabilities, probabilities of each output, real numbers); "recovered" reads class counts off the update
            first, and where that says nothing, tries every class for a lone example or optimizes them after all.
            Labels that the threat model grants are passed to the loss as they are.
        init_std: standard deviation of the normal start of the inputs, in model-input units.
        restarts: independent starts per observation.
        box: project candidates to valid inputs after each step.
        tolerance: objective at which a candidate counts as converged.
        dtype: number type of the search; None keeps the model's own, as does a model that computes in no other.
        warm_dtype: a cheaper number type to begin in, down to an objective of ``warm_tolerance``; None begins in
            ``dtype``. Below about 1e-9 the rounding of float32 gradients would mislead a line search.
        warm_tolerance: see ``warm_dtype``.
        coordinates: in which the inputs are searched; None searches the inputs as the model sees them.
        race: drop restarts that fall far behind the best of their observation, and all others once one has converged.
        vectorize: vmap over candidates; None decides by model size. Models that cannot be vmapped are looped over.
        backend: how gradients are computed: "eager", "trace" (a graph of elementary operations), or "compile" (needs a
            C++ compiler and some ten seconds, and halves the time of many restarts). What disagrees with the eager
            gradient at the start (1e-9 relative in float64, 1e-4 in float32) is not used, and a note says so.
        budget: seconds for all observations together, None for no limit; the best so far is returned, with status
            "budget".
        trace: record iterates for the report.
        group_priors: penalties that tie the restarts of one observation to each other.
        fixed: examples that are known already; set by :meth:`around`.
        begin: decoded inputs (N, *shape) from which the first restart starts, None for a random start.

    Raises:
        MissingKnowledge: batch size or training is not granted.
        InvalidModel: active dropout or train-mode BatchNorm, or the model does not run on such a batch.
        InvalidInput: the options contradict each other.
        NotApplicable: the model cannot be differentiated twice, or its labels are not known and cannot be searched.
        ResourceLimit: not even one candidate fits in the free memory.
    """

    objective: Objective = field(default_factory=SquaredError)
    solver: Solver = field(default_factory=LBFGS)
    priors: tuple[Prior, ...] = ()
    relative: bool = False
    labels: str = "joint"
    init_std: float = 0.1
    restarts: int = 1
    box: bool = False
    tolerance: float = 0.0
    dtype: torch.dtype | None = torch.float64
    warm_dtype: torch.dtype | None = None
    warm_tolerance: float = 1e-8
    coordinates: Coordinates | None = None
    race: bool = True
    vectorize: bool | None = None
    backend: str = "eager"
    budget: float | None = None
    trace: bool = True
    group_priors: tuple[GroupPrior, ...] = ()
    fixed: Fixed | None = field(default=None, repr=False, compare=False)
    begin: Tensor | None = field(default=None, repr=False, compare=False)

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def __post_init__(self) -> None:
        if self.labels not in ("joint", "recovered") or self.restarts < 1:
            raise InvalidInput(
                f"GradientMatching has no labels={self.labels!r} with restarts={self.restarts}; "
                "use 'joint' or 'recovered' and at least one restart."
            )
        if self.begin is not None and self.coordinates is not None:
            raise InvalidInput("A search that begins at given inputs steps in them; drop begin or coordinates.")
        if self.backend not in backends.BACKENDS:
            raise UnknownName("backend", self.backend, backends.BACKENDS)
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise InvalidInput(f"GradientMatching cannot use budget={self.budget}; give seconds above 0, or None.")
        if self.box and self.coordinates is not None:
            raise InvalidInput("A box is one of inputs, not of coordinates; drop box or coordinates.")
        if self.group_priors and isinstance(self.solver, LBFGS):
            raise InvalidInput(
                "A penalty across restarts changes while others move, which a line search does not allow; use Adam or "
                "GradientDescent as the solver."
            )

    def around(
        self,
        observation: Observation,
        solved_inputs: Tensor,
        solved_mask: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        callback: Callback | None = None,
        deadline: Deadline | None = None,
    ) -> Reconstruction:
        """Reconstruct a batch of which some examples are known: they stay as they are, the others are searched.

        Args:
            observation: what was seen.
            solved_inputs: (N, *shape) decoded inputs; rows outside the mask are ignored.
            solved_mask: (N,) which rows are known.
            labels: (N, ...) labels of all rows, known or not, in this order. None tries how granted labels and known
                rows belong together, where there are few ways, and otherwise optimizes the labels.
            seed: of the start of the other rows.
            callback: receives progress.
            deadline: when to end with the best so far.

        Raises:
            InvalidInput: inputs, mask, labels and batch size do not fit each other.
        """
        fixed = Fixed(solved_inputs.detach(), solved_mask, labels)
        return replace(self, fixed=fixed).reconstruct(observation, seed=seed, callback=callback, deadline=deadline)

    def reconstruct_all(
        self,
        observations: Sequence[Observation],
        *,
        seed: int = 0,
        callback: Callback | None = None,
        deadline: Deadline | None = None,
    ) -> list[Reconstruction]:
        """Reconstruct several batches; a deadline is a budget, which shortens schedules instead of cutting them off."""
        limited = self
        if deadline is not None and deadline.left() < (math.inf if self.budget is None else self.budget):
            limited = replace(self, budget=max(deadline.left(), _MOMENT))
        return super(GradientMatching, limited).reconstruct_all(
            observations, seed=seed, callback=callback, deadline=deadline
        )

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        if self.fixed is not None and any(o is not observations[0] for o in observations):
            raise InvalidInput("Known examples belong to one observation; call around() for each.")
        groups: dict[object, list[int]] = {}
        deadline = Deadline(self.budget)
        problems = [Problem.of(o, self, seed) for o in observations]
        for i, problem in enumerate(problems):
            groups.setdefault(problem.signature(), []).append(i)
        results: dict[int, Reconstruction] = {}
        for members in groups.values():
            # Groups share what is left by their size.
            share = len(members) / (len(problems) - len(results))
            until = Deadline(None if self.budget is None else deadline.left() * share)
            found = _solve([problems[i] for i in members], self, seed, callback, until)
            results.update(zip(members, found, strict=True))
        return [results[i] for i in range(len(observations))]


def _solve(
    problems: Sequence[Problem], attack: GradientMatching, seed: int, callback: Callback | None, deadline: Deadline
) -> list[Reconstruction]:
    began = time.perf_counter()
    group = Group(problems, attack)
    recorder = Recorder(group, callback, attack.solver.iterations)
    outcome, notes = _search(group, attack, seed, recorder, deadline)
    if outcome.late:
        notes.append(Note("The search was ended by its time budget.", NoteKind.METHOD))
    seconds = (time.perf_counter() - began) / len(problems)
    return [_result(group, i, outcome, recorder, seconds, notes, deadline) for i in range(len(problems))]


def _projection(group: Group) -> Project | None:
    if not group.attack.box:
        return None

    def project(z: Tensor) -> Tensor:
        x = z[:, : group.unknowns].reshape(-1, *group.shape)
        return torch.cat([group.space.project(x).reshape(len(z), -1), z[:, group.unknowns :]], 1)

    return project


def _slots(group: Group, candidates: int, size: int) -> int:
    """Return how many candidates work at a time: what the cache likes and the memory holds."""
    attack, like = group.attack, group.like
    host = SLOTS if group.axes.params == 0 else 2 * SLOTS  # Weights of their own fill the cache sooner.
    wanted = min(candidates, SLOTS_GPU if like.is_cuda else host)
    together = candidates > 1 and group.vectorize
    if not together:
        wanted = candidates
    keeps = attack.solver.memory(size, like.dtype.itemsize)
    free = available(like.device)
    weights = sum(v.numel() for v in group.first.params.values()) * like.dtype.itemsize
    # A candidate's gradient takes a few dozen copies of the weights; only where that may matter is it worked out, which
    # takes as long as several evaluations: for one at a time, where it may not fit at all.
    if wanted * (keeps + 60 * (weights + size * like.dtype.itemsize)) >= (0.05 if together else 0.5) * free:
        row = torch.zeros(size, dtype=like.dtype, device=like.device)
        one = candidate_bytes(group.gradient, (row, group.arguments(0)))
        wanted = fitting(wanted, one if together else 0, keeps, once=0 if together else one, free=free)
    if attack.group_priors:  # Restarts that are tied to each other work at the same time.
        wanted = min(candidates, -(-wanted // group.restarts) * group.restarts)
    return wanted


def _search(
    group: Group, attack: GradientMatching, seed: int, recorder: Recorder, deadline: Deadline
) -> tuple[Outcome, list[str]]:
    """Run the solver, first in the cheaper number type if there is one, and return one outcome for both stages."""
    start, solver = group.start(seed), attack.solver
    notes: list[str] = []
    count = len(start)
    if start.shape[1] == 0:  # Every example and every label is known.
        with torch.no_grad():
            values = torch.stack([group.measure(start[r], group.arguments(r))[0] for r in range(count)])
        none = torch.zeros(count, dtype=torch.long, device=start.device)
        return Outcome(start, values, none, none + 1, none == 0, none == 1), notes

    def run(stage: Group, x: Tensor, tolerance: float, spent: list[int] | None) -> tuple[Outcome, Race]:
        turn = count if spent is None else sum(n < solver.iterations for n in spent)
        slots = _slots(stage, max(turn, 1), x.shape[1])
        share = deadline.left() * slots / max(turn, 1)
        race = Race(
            stage.restarts,
            tolerance,
            on=attack.race and not attack.group_priors,
            share=share if turn > slots and share < math.inf else None,
        )
        evaluate = Evaluator(stage, slots if turn > 1 and stage.vectorize else 1, deadline)
        referee: Referee | None = race if race.on or race.share is not None else None
        found = solver.minimize(
            evaluate,
            x,
            tolerance=tolerance,
            project=_projection(stage),
            monitor=recorder,
            referee=referee,
            slots=slots,
            spent=spent,
            deadline=deadline if deadline.left() < math.inf else None,
        )
        notes.extend(n for n in evaluate.notes if n not in notes)
        return found, race

    if attack.warm_dtype is None or attack.warm_dtype == start.dtype:
        return run(group, start, attack.tolerance, None)[0], notes
    warm = Group([p.to(attack.warm_dtype) for p in group.problems], attack)
    goal = max(attack.warm_tolerance, attack.tolerance)
    rough, race = run(warm, start.to(attack.warm_dtype), goal, None)
    rough = replace(rough, x=rough.x.to(start.dtype), objective=rough.objective.to(start.dtype))
    rough = replace(rough, converged=rough.objective <= attack.tolerance)  # The first stage had a goal of its own.
    if rough.interrupted or rough.late:
        return rough, notes
    spent = rough.evaluations.tolist()
    over = rough.converged.tolist()
    used = [solver.iterations if over[r] or r in race.dropped else n for r, n in enumerate(spent)]
    if all(n >= solver.iterations for n in used):
        return rough, notes
    recorder.stage(spent)
    fine, _ = run(group, rough.x, attack.tolerance, used)
    idle = fine.evaluations == 0  # Done in the first stage, or never reached in this one.
    return replace(
        fine,
        x=torch.where(idle[:, None], rough.x, fine.x),
        objective=torch.where(idle, rough.objective, fine.objective),
        converged=torch.where(idle, rough.converged, fine.converged),
        stalled=torch.where(idle, rough.stalled, fine.stalled),
        iterations=fine.iterations + rough.iterations,
        evaluations=fine.evaluations + rough.evaluations,
    ), notes


def _result(
    group: Group, i: int, outcome: Outcome, recorder: Recorder, seconds: float, notes: Sequence[str], deadline: Deadline
) -> Reconstruction:
    problem, r = group.problems[i], group.restarts
    rows = slice(i * r, (i + 1) * r)
    scores = torch.where(torch.isfinite(outcome.objective[rows]), outcome.objective[rows], torch.inf)
    row = i * r + int(scores.argmin())
    inputs, targets = group.unpack(outcome.x[row].detach(), group.arguments(row))
    if bool(outcome.converged[row]):
        status = Status.CONVERGED
    elif outcome.interrupted:
        status = Status.INTERRUPTED
    else:
        status = Status.STALLED if bool(outcome.stalled[row]) else Status.BUDGET
    objective = float(outcome.objective[row])
    if not math.isfinite(objective):  # It never had its turn.
        with torch.no_grad():
            objective = float(group.measure(outcome.x[row], group.arguments(row))[0])
    decoded, fixed = group.space.decode(inputs), group.attack.fixed
    if fixed is not None:  # Bit for bit: encoding and decoding rounds.
        decoded = decoded.to(torch.promote_types(decoded.dtype, fixed.inputs.dtype))
        decoded[fixed.mask] = fixed.inputs[fixed.mask].to(decoded)
    labels, probabilities = _labels(problem, targets)
    result = Reconstruction(
        inputs=decoded,
        labels=labels,
        objective=objective,
        label_probabilities=probabilities,
        status=status,
        iterations=int(outcome.iterations[row]),
        evaluations=int(outcome.evaluations[rows].sum()),
        seconds=seconds,
        notes=(*problem.notes, *notes),
        solved=None if fixed is None else fixed.mask,
    )
    if not group.attack.trace:
        return result
    with suppress(TimeSpent):  # A result without its curves is better than none.
        result = replace(result, trace=write_trace(group, row, recorder, outcome, deadline))
    return result


def _labels(problem: Problem, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return targets as class indices, where they are such, and as numbers, where they are not indices already."""
    if not targets.is_floating_point():
        return targets, None
    kind, axis = problem.targets.kind, problem.targets.axis
    if kind is TargetKind.CLASSES:
        return harden(kind, targets, axis), targets
    if kind is TargetKind.BINARY and targets.numel() == len(targets):
        return harden(kind, targets).flatten().long(), targets
    return None, targets
