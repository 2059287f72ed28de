"""Matching as what it is on smooth models, a nonlinear least-squares problem: Gauss–Newton, and a polish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch

from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.attacks.least_squares import LARGEST, Problem, State, search
from gradleak.attacks.recursion import check, from_layers
from gradleak.clock import Deadline
from gradleak.errors import InvalidInput, NotApplicable, ResourceLimit
from gradleak.exact.one_example import RecursionResult, check_together, fit_layers
from gradleak.formats import number_format
from gradleak.structure.ranks import rank_bound
from gradleak.structure.reader import trace_chain
from gradleak.threat import Knowledge, Observation
from gradleak.types import Note, NoteKind, Reconstruction, Status

__all__ = ["GaussNewton", "by_layers", "gauss_newton"]


def by_layers(
    observation: Observation,
    start: torch.Tensor | None = None,
    *,
    seed: int = 0,
    going: Callable[[float, int], bool] | None = None,
) -> RecursionResult:
    """Solve all layers of a smooth chain together for one example; see :func:`fit_layers`.

    ``start`` is a decoded input (*shape), None for the space's neutral one; ``going`` (relative residual, steps so far)
    says whether to go on.

    Raises:
        NotApplicable: the update is no plain gradient of one example in float32 or float64, or the model no such chain.
        ResourceLimit: the matrices of a layer do not fit in memory.
    """
    check(observation)
    fmt, training = number_format(observation.update.tensors), observation.training
    if fmt not in (torch.float32, torch.float64) or (training is not None and training.undefended is not training):
        raise NotApplicable("Solving all layers together takes a plain float32 or float64 gradient; use matching.")
    space = observation.space
    device = observation.simulator.device
    return fit_layers(
        observation.model,
        dict(observation.model.named_parameters()),
        observation.gradient.tensors,
        space.neutral().to(device) if start is None else space.encode(start[None].to(device, torch.float64))[0],
        seed=seed,
        going=going,
    )


_TOGETHER = "solved for all layers together, whose linear system there has full rank"


@final
@dataclass(frozen=True)
class GaussNewton(Attack):
    """Gauss–Newton by layers where they form a chain, else Levenberg–Marquardt; made by :func:`gauss_newton`.

    ``layers_only`` refuses where the layers form no chain that can be solved, instead of searching.
    """

    iterations: int = 60
    restarts: int = 1
    init_std: float = 0.1
    budget: float | None = None
    layers_only: bool = False

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def __post_init__(self) -> None:
        if min(self.iterations, self.restarts) < 1 or (self.budget is not None and not self.budget > 0):
            raise InvalidInput(
                f"gauss_newton cannot use iterations={self.iterations}, restarts={self.restarts}, "
                f"budget={self.budget}; give positive numbers."
            )

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        begin, deadline = time.perf_counter(), Deadline(self.budget)
        try:
            if self.layers_only:
                check(observation)
                check_together(trace_chain(observation.model, tuple(observation.space.shape)))  # Cheaper than counting.
                bound = rank_bound(observation.model, observation.params, tuple(observation.space.shape), 1)
                if not bound.determined:
                    raise NotApplicable(bound.reason)
            return self._layers(observation, None, seed, callback, deadline)
        except (NotApplicable, ResourceLimit):
            if self.layers_only:
                raise  # otherwise what is no chain of layers is taken as a whole
        problem = _problem(observation, None, seed)
        draw = torch.Generator().manual_seed(seed)
        best: State | None = None
        evaluations = 0
        for _ in range(self.restarts):
            start = self.init_std * torch.randn(problem.unknowns, generator=draw, dtype=torch.float64)
            state = self._search(problem, start.to(problem.like), callback, deadline)
            evaluations += state.evaluations
            best = state if best is None or state.cost < best.cost else best
            if best.status in (Status.CONVERGED, Status.INTERRUPTED):
                break
        assert best is not None
        return problem.result(best, evaluations, time.perf_counter() - begin)

    def polish(
        self, observation: Observation, found: Reconstruction, *, seed: int = 0, callback: Callback | None = None
    ) -> Reconstruction:
        """Return ``found`` after steps from it; labels are taken from it.

        Raises:
            NotApplicable: the model has kinks, or the training is not known.
            ResourceLimit: too many unknowns.
        """
        begin, deadline = time.perf_counter(), Deadline(self.budget)
        if observation.training is None:
            raise NotApplicable("A polish simulates the client, which takes TRAINING; grant it in the threat model.")
        if len(found) == 1:
            try:
                return self._layers(observation, found, seed, callback, deadline)
            except (NotApplicable, ResourceLimit):
                pass
        problem = _problem(observation, found.labels, seed)
        start = observation.space.encode(found.inputs.to(problem.like)).flatten()
        state = self._search(problem, start, callback, deadline)
        polished = problem.result(state, state.evaluations, time.perf_counter() - begin)
        return replace(polished, notes=(*found.notes, *polished.notes), features=found.features)

    def _layers(
        self,
        observation: Observation,
        found: Reconstruction | None,
        seed: int,
        callback: Callback | None,
        deadline: Deadline,
    ) -> Reconstruction:
        status = Status.CONVERGED

        def going(residual: float, steps: int) -> bool:
            nonlocal status
            if deadline.over or steps >= self.iterations:
                status = Status.BUDGET
            elif callback is not None:
                try:
                    callback(Progress(steps, self.iterations, residual**2, "all layers together"))
                except KeyboardInterrupt:
                    status = Status.INTERRUPTED
            return status is Status.CONVERGED

        result = by_layers(observation, None if found is None else found.inputs[0], seed=seed, going=going)
        done = from_layers(observation, result, None, _TOGETHER, local=True)
        notes: tuple[str, ...] = (Note(f"{result.steps} Gauss–Newton steps on all layers together."), *done.notes)
        if result.input is not None and status is Status.BUDGET:
            status = Status.CONVERGED
        if result.stopped_at is not None and status is Status.CONVERGED:
            status = Status.STALLED
            notes = (*notes, Note(f"It ended without a unique solution: {result.stopped_at}.", NoteKind.LIMIT))
        if found is None:
            return replace(done, status=done.status if done.status is Status.EXACT else status, notes=notes)
        return replace(
            done,
            labels=done.labels if found.labels is None else found.labels,
            label_probabilities=found.label_probabilities,
            status=status,
            notes=(*found.notes, *notes),
            features=found.features,
        )

    def _search(self, problem: Problem, z: torch.Tensor, callback: Callback | None, deadline: Deadline) -> State:
        return search(problem, z, iterations=self.iterations, deadline=deadline, callback=callback)


def _problem(observation: Observation, labels: torch.Tensor | None, seed: int) -> Problem:
    problem = Problem.of(observation, labels, seed)
    if problem.unknowns > LARGEST:
        raise ResourceLimit(
            f"Gauss–Newton factorizes a matrix of {problem.unknowns} rows, more than {LARGEST}; use idlg() or dlg()."
        )
    return problem


def gauss_newton(
    *, iterations: int = 60, restarts: int = 1, init_std: float = 0.1, budget: float | None = None
) -> GaussNewton:
    """Solve ∇W′ = ∇W by Gauss–Newton: quadratic convergence on smooth models, down to the noise of the update.

    One example through a chain of smooth layers is solved for all layers together, from mid-gray: the normal matrix is
    put together layer by layer, exactly, so thousands of unknowns take seconds, without restarts or labels.

    For everything else, every equation is divided by its own noise: accumulated rounding, the number format, and what a
    known defense leaves uncertain, so float16, bfloat16 and noised updates are inverted as well as linear estimation
    can. Labels are granted or recovered first. The Jacobian is exact where it fits; beyond, products by automatic
    differentiation are preconditioned by a factor of sampled rows (Avron, Maymounkov, Toledo 2010, *Blendenpik*).

    Source: Levenberg 1944, Marquardt 1963; damping of Nielsen 1999.

    Args:
        iterations: steps per start.
        restarts: starts, chosen by the objective.
        init_std: standard deviation of the normal start, model-input units.
        budget: seconds per observation, the best so far is returned.
    """
    return GaussNewton(iterations=iterations, restarts=restarts, init_std=init_std, budget=budget)
