"""The one matching loop: candidates whose simulated update equals the observed one; papers are choices of its parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.attacks.matching import backends
from gradleak.attacks.matching.convolutions import LeanConvolutions
from gradleak.attacks.matching.coordinates import Coordinates
from gradleak.attacks.matching.memory import available, candidate_bytes, fitting
from gradleak.attacks.matching.objectives import Objective, SquaredError
from gradleak.attacks.matching.priors import Prior
from gradleak.errors import InvalidInput, UnknownName
from gradleak.exact.labels import recover_labels
from gradleak.solve import LBFGS, Outcome, Project, Referee, Solver
from gradleak.threat import Knowledge, Observation
from gradleak.training import Tensors, check_reproducible, soft_labels
from gradleak.types import Reconstruction, Trace

__all__ = ["GradientMatching"]

_VMAP_LIMIT = 2_000_000  # Parameters x examples above which vmap on a CPU only costs memory (measured on ResNet-18).
_SLOTS, _SLOTS_GPU = 16, 1024  # Candidates at work at a time: more would leave a CPU's cache (measured on LeNets).
_SAVED = {"compile": 0.5, "trace": 0.15}  # Shares of an eager evaluation that are saved (measured on LeNets).
_TYPICAL = 0.1  # Share of its rounds that a search usually takes.
_RECHECKED = 4  # Rows on which a prepared gradient that is used again is checked.
_RUNG, _BEHIND = 100, 10.0  # Restarts are compared after 100, 200, 400 … evaluations; dropped when 10 times behind.


@dataclass(frozen=True)
class GradientMatching(Attack):
    """Search inputs (and labels) whose simulated update matches the observed one.

    Candidates of all restarts and of all observations of equal shape form one leading axis and advance together.
    The best restart is chosen by the attacker's own objective.

    Attributes:
        objective: distance between updates.
        solver: minimizes it.
        priors: penalties on candidate inputs.
        labels: "joint" optimizes label logits beside the inputs; "recovered" reads class counts off the update first.
            Labels that the threat model grants are used as they are.
        init_std: standard deviation of the normal start of the inputs, in model-input units.
        restarts: independent starts per observation.
        box: project candidates to valid inputs after each step.
        tolerance: objective at which a candidate counts as converged.
        dtype: number type of the search; None keeps the model's own.
        warm_dtype: a cheaper number type to begin in, down to an objective of ``warm_tolerance``; None begins in
            ``dtype``. Below about 1e-9 the rounding of float32 gradients would mislead a line search.
        warm_tolerance: see ``warm_dtype``.
        coordinates: in which the inputs are searched; None searches the inputs as the model sees them.
        race: drop restarts that fall far behind the best of their observation, and all others once one has converged.
        vectorize: vmap over candidates; None decides by model size.
        backend: how gradients are computed: "eager", "trace" (a graph of elementary operations), "compile" (needs a
            C++ compiler), or "auto", which prepares where that should pay within the run. What disagrees with the
            eager gradient at the start (1e-9 relative in float64, 1e-4 in float32) is not used, and a note says so.
        budget: seconds for all observations together, None for no limit; the best so far is returned, with status
            "budget".
        trace: record iterates for the report.

    Raises:
        MissingKnowledge: batch size or training is not granted.
        InvalidModel: active dropout or train-mode BatchNorm.
        InvalidInput: the options contradict each other.
        ResourceLimit: not even one candidate fits in the free memory.

    """

    objective: Objective = field(default_factory=SquaredError)
    solver: Solver = field(default_factory=LBFGS)
    priors: tuple[Prior, ...] = ()
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
    backend: str = "auto"
    budget: float | None = None
    trace: bool = True

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def __post_init__(self) -> None:
        if self.labels not in ("joint", "recovered") or self.restarts < 1:
            raise InvalidInput(
                f"GradientMatching has no labels={self.labels!r} with restarts={self.restarts}; "
                "use 'joint' or 'recovered' and at least one restart."
            )
        if self.backend not in backends.BACKENDS:
            raise UnknownName("backend", self.backend, backends.BACKENDS)
        if self.budget is not None and not self.budget > 0:
            raise InvalidInput(f"GradientMatching cannot use budget={self.budget}; give seconds above 0, or None.")
        if self.box and self.coordinates is not None:
            raise InvalidInput("A box is one of inputs, not of coordinates; drop box or coordinates.")

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        groups: dict[object, list[int]] = {}
        problems = [_Problem.of(o, self, seed) for o in observations]
        for i, problem in enumerate(problems):
            groups.setdefault(problem.signature(), []).append(i)
        results: dict[int, Reconstruction] = {}
        deadline = None if self.budget is None else time.monotonic() + self.budget
        for members in groups.values():
            until = None
            if deadline is not None:  # Groups share what is left by their size.
                now, waiting = time.monotonic(), len(problems) - len(results)
                until = now + (deadline - now) * len(members) / waiting
            found = _solve([problems[i] for i in members], self, seed, callback, until)
            results.update(zip(members, found, strict=True))
        return [results[i] for i in range(len(observations))]


@dataclass(frozen=True, eq=False)
class _Problem:
    """One observation, cast to the search's number type."""

    observation: Observation
    model: nn.Module
    params: Tensors
    buffers: Tensors
    observed: Tensors
    classes: int
    labels: Tensor | None  # (N, C) fixed labels, None when they are optimized
    notes: tuple[str, ...]

    @classmethod
    def of(cls, observation: Observation, attack: GradientMatching, seed: int) -> _Problem:
        check_reproducible(observation.model)
        model = observation.model
        own = next(iter(observation.params.values()))
        dtype = attack.dtype or own.dtype
        params = {k: v.to(dtype) for k, v in observation.params.items()}
        others = {k: v.detach() for k, v in model.named_parameters() if not v.requires_grad}
        buffers = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in (others | dict(model.named_buffers())).items()
        }
        shared = observation.update.tensors
        # In the order of the parameters, whatever the file's was: prepared gradients take their tensors by position.
        order = [*(k for k in params if k in shared), *(k for k in shared if k not in params)]
        observed = {k: shared[k].to(device=own.device, dtype=dtype) for k in order}
        n, notes = observation.batch_size or 1, []
        with torch.no_grad():
            probe = torch.zeros(1, *observation.space.shape, dtype=dtype, device=own.device)
            classes = int(functional_call(model, {**params, **buffers}, (probe,)).shape[-1])
        labels = None
        if observation.labels is not None:
            labels = soft_labels(observation.labels.to(own.device), classes, dtype)
        elif attack.labels == "recovered":
            assert observation.training is not None
            estimate = recover_labels(
                model,
                observation.params,
                observation.gradient.tensors,
                tuple(observation.space.shape),
                n,
                observation.training.loss,
                torch.Generator().manual_seed(seed),
            )
            labels = soft_labels(torch.as_tensor(estimate.labels, device=own.device), classes, dtype)
            if not estimate.exact:
                notes.append(f"Labels were estimated, not proved: {estimate.reason}")
        return cls(observation, model, params, buffers, observed, classes, labels, tuple(notes))

    @property
    def size(self) -> int:
        return self.observation.batch_size or 1

    def to(self, dtype: torch.dtype) -> _Problem:
        """Return the problem in another number type."""

        def cast(items: Tensors) -> dict[str, Tensor]:
            return {k: v.to(dtype) if v.is_floating_point() else v for k, v in items.items()}

        return replace(
            self,
            params=cast(self.params),
            buffers=cast(self.buffers),
            observed=cast(self.observed),
            labels=None if self.labels is None else self.labels.to(dtype),
        )

    def signature(self) -> object:
        """Problems with equal signatures can share one vmapped evaluation."""
        o = self.observation
        shapes = tuple((k, tuple(v.shape), v.dtype, v.device) for k, v in self.params.items())
        # The computation of two models is taken to be the same when their printed structures are.
        return (repr(self.model), shapes, o.space.shape, self.size, repr(o.training), self.labels is None)


def _stack(items: Sequence[Tensors]) -> tuple[Tensors, int | None]:
    """Stack equal-keyed tensors along a new axis; one shared copy and axis None where all are equal."""
    first = items[0]
    if all(i is first or all(torch.equal(i[k], first[k]) for k in first) for i in items[1:]):
        return first, None
    return {k: torch.stack([i[k] for i in items]) for k in first}, 0


class _Group:
    """Problems of equal shape, and the objective and gradient of their candidates."""

    def __init__(self, problems: Sequence[_Problem], attack: GradientMatching) -> None:
        self.problems, self.attack, self.first = problems, attack, problems[0]
        p = self.first
        self.restarts, self.n, self.shape = attack.restarts, p.size, tuple(p.observation.space.shape)
        self.joint = p.labels is None
        self.like = next(iter(p.params.values()))
        training = p.observation.training
        assert training is not None
        self.training, self.undefended = training, training.undefended
        self.params, self.params_axis = _stack([q.params for q in problems])
        self.buffers, self.buffers_axis = _stack([q.buffers for q in problems])
        self.observed, self.observed_axis = _stack([q.observed for q in problems])
        scales = [attack.objective.scale(q.observed) for q in problems]
        self.scales = torch.stack(scales)
        self.labels = None if self.joint else torch.stack([q.labels for q in problems if q.labels is not None])
        weight = sum(v.numel() for v in p.params.values()) * self.n
        self.small = weight <= _VMAP_LIMIT  # Bound by starting operations, not by arithmetic.
        wanted = self.like.is_cuda or self.small
        self.vectorize = wanted if attack.vectorize is None else attack.vectorize
        axes = (0, self.params_axis, self.buffers_axis, self.observed_axis, 0, None if self.joint else 0)
        self._batched: Callable[..., tuple[Tensor, Tensor]] = vmap(self._gradient, in_dims=axes)
        self.axes = axes
        self.workspace: list[Tensor] = []

    @property
    def pixels(self) -> int:
        return self.n * int(torch.Size(self.shape).numel())

    def start(self, seed: int) -> Tensor:
        """Draw the starts of all candidates, (P, D), from one generator per observation."""
        rows = []
        for i in range(len(self.problems)):
            generator = torch.Generator().manual_seed(seed + 7919 * i)
            for _ in range(self.restarts):
                x = torch.randn(self.pixels, generator=generator, dtype=torch.float64) * self.attack.init_std
                y = torch.randn(self.n * self.first.classes * self.joint, generator=generator, dtype=torch.float64)
                rows.append(torch.cat([x, y]))
        return torch.stack(rows).to(self.like)

    def unpack(self, z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return inputs (N, *shape) and soft labels (N, C) of one candidate row."""
        x = z[: self.pixels].reshape(self.n, *self.shape)
        if self.attack.coordinates is not None:
            x = self.attack.coordinates.inputs(x, self.first.observation.space)
        if labels is not None:
            return x, labels
        return x, z[self.pixels :].reshape(self.n, self.first.classes).softmax(-1)

    def simulate(self, z: Tensor, params: Tensors, buffers: Tensors, labels: Tensor | None) -> dict[str, Tensor]:
        x, y = self.unpack(z, labels)
        return self.undefended.tensors(self.first.model, params, x, y, buffers=buffers)

    def compare(
        self, simulated: Tensors, observed: Tensors, scale: Tensor, workspace: list[Tensor] | None = None
    ) -> Tensor:
        """Return the objective; under a known defense, of what that defense leaves to be explained."""
        if self.training is self.undefended:
            more = () if workspace is None or not self.attack.objective.reuses else (workspace,)
            return self.attack.objective(simulated, observed, scale, *more)
        residual = self.training.residual(simulated, observed)
        target = {k: (simulated[k] - residual[k]).detach() for k in observed}
        return self.attack.objective({k: target[k] + residual[k] for k in observed}, target, scale)

    def distance(
        self,
        z: Tensor,
        params: Tensors,
        buffers: Tensors,
        observed: Tensors,
        scale: Tensor,
        labels: Tensor | None,
        workspace: list[Tensor] | None = None,
    ) -> Tensor:
        x, _ = self.unpack(z, labels)
        value = self.compare(self.simulate(z, params, buffers, labels), observed, scale, workspace)
        for prior in self.attack.priors:
            value = value + prior(x)
        return value

    def _gradient(
        self, z: Tensor, params: Tensors, buffers: Tensors, observed: Tensors, scale: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        gradient, value = grad_and_value(self.distance)(z, params, buffers, observed, scale, labels)
        return value, gradient

    def arguments(self, index: Tensor | int) -> tuple[Tensors, Tensors, Tensors, Tensor, Tensor | None]:
        """Return parameters, buffers, observation, scale and labels of the given observation(s)."""

        def pick(items: Tensors, axis: int | None) -> Tensors:
            return items if axis is None else {k: v[index] for k, v in items.items()}

        return (
            pick(self.params, self.params_axis),
            pick(self.buffers, self.buffers_axis),
            pick(self.observed, self.observed_axis),
            self.scales[index],
            None if self.labels is None else self.labels[index],
        )

    def looped(self, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return objectives (A,) and gradients (A, D) of candidates of problems ``index``, one after another."""
        values, gradients = z.new_empty(len(z)), torch.empty_like(z)
        for j, i in enumerate(index.tolist()):
            # Plain autograd, here and so in the forward map: functional transforms cost more on one candidate.
            leaf = z[j].detach().requires_grad_()
            with nullcontext() if self.small else LeanConvolutions():
                value = self.distance(leaf, *self.arguments(i), self.workspace)
            (gradients[j],) = torch.autograd.grad(value, leaf)
            values[j] = value.detach()
        return values, gradients

    def key(self, width: int, kind: str) -> Hashable | None:
        """Return what identifies a prepared gradient of ``width`` candidates, None where nothing safely does."""
        p, a = self.first, self.attack
        found = (kind, width, p.signature(), type(p.model), self.training, a.objective, a.priors, a.coordinates)
        named = tuple(p.observed), tuple(p.buffers)
        key = (*found, p.observation.space, self.axes, named, self.like.dtype, self.like.device)
        try:
            hash(key)
        except TypeError:
            return None
        return key


class _Evaluator:
    """Objectives and gradients of the candidates at work, by the backend that the attack asks for."""

    def __init__(self, group: _Group, width: int, rounds: float, until: float | None) -> None:
        self.group, self.width, self.rounds, self.until = group, width, rounds, until
        self.function: backends.Function | None = None
        self.notes: list[str] = []
        self._gathered: tuple[Tensor | None, Any] = (None, None)
        self._flat: tuple[Tensor | None, list[Tensor]] = (None, [])
        self._ready = group.attack.backend == "eager"

    def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self._ready:
            self._ready = True
            return self._prepare(z, rows)
        if self.function is not None and 3 * len(rows) >= self.width:  # Below that, padding costs more than it saves.
            return self._call(self.function, z, rows)
        return self._plain(z, rows)

    def _call(self, function: backends.Function, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.group.vectorize:
            values, gradients = function(*self._arguments(z, rows))
            return values[: len(rows)], gradients[: len(rows)]
        found = [function(*self._arguments(z[j : j + 1], rows[j : j + 1])) for j in range(len(rows))]
        return torch.cat([v for v, _ in found]), torch.cat([g for _, g in found])

    def _plain(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        group = self.group
        if not group.vectorize or len(rows) == 1:
            return group.looped(z, rows // group.restarts)
        if self._gathered[0] is not rows:  # Rows change when problems come and go; copies are reused meanwhile.
            self._gathered = rows, group.arguments(rows // group.restarts)
        values, gradients = group._batched(z, *self._gathered[1])
        return values.detach(), gradients.detach()

    def _arguments(self, z: Tensor, rows: Tensor) -> list[Tensor]:
        """Return the flat list of tensors that the prepared function takes, padded to its width."""
        missing = self.width - len(rows)
        if self._flat[0] is not rows:
            full = torch.cat([rows, rows[-1:].expand(missing)]) if missing else rows
            self._flat = rows, pytree.tree_leaves(self.group.arguments(full // self.group.restarts))
        z = torch.cat([z, z[-1:].expand(missing, -1)]) if missing else z
        return [z, *(t for t in self._flat[1] if isinstance(t, Tensor))]

    def _prepare(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Trace or compile, if asked for or if it should pay, and check the result against the eager gradient.

        What is new is checked on all rows; what has passed before, for another observation, on a few.
        """
        group, asked = self.group, self.group.attack.backend
        kinds = ["compile", "trace"] if asked == "auto" else [asked]
        known = next((f for kind in kinds if (f := backends.prepared(group.key(self.width, kind))) is not None), None)
        fresh = known is None
        few = slice(None) if fresh else slice(_RECHECKED)
        timed = fresh and asked == "auto"
        plain, seconds = self._timed(z, rows) if timed else (self._plain(z[few], rows[few]), math.inf)
        if known is None:
            known = self._made(asked, self._arguments(z[: self.width], rows[: self.width]), seconds)
        if known is None:
            return plain
        found = self._call(known, z, rows)
        if backends.agree((found[0][few], found[1][few]), plain):
            self.function = known
            if fresh:
                backends.remember(group.key(self.width, self._kind(asked)), known)
            return found
        self.notes.append("The prepared gradient disagreed with the eager one and was not used.")
        return plain if fresh else self._plain(z, rows)

    def _kind(self, asked: str) -> str:
        able = backends.can_compile(self.group.like.device)
        return asked if asked != "auto" else "compile" if able else "trace"

    def _made(self, asked: str, arguments: list[Tensor], seconds: float) -> backends.Function | None:
        kind = self._kind(asked)
        total = seconds * self.rounds
        if self.until is not None:
            total = min(total, self.until - time.monotonic())
        gain = total * _SAVED[kind]
        if asked == "auto" and (not self.group.vectorize or gain < 5.0):  # Not worth even the tracing.
            return None
        try:
            graph = backends.traced(self._function(), arguments)
            if kind == "trace":
                function: backends.Function = graph
            elif asked == "auto" and gain < 1.2 * backends.compile_seconds(graph):
                return None
            else:
                function = backends.compiled(graph, arguments)
        except Exception as error:  # noqa: BLE001 - whatever a compiler stumbles over, the eager gradient remains
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self.notes.append(f"The gradient could not be prepared ({type(error).__name__}: {reason}); it ran eagerly.")
            return None
        return function

    def _function(self) -> backends.Function:
        group = self.group
        spec = pytree.tree_structure(group.arguments(torch.zeros(self.width, dtype=torch.long)))

        def function(z: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
            given = list(tensors) if not group.joint else [*tensors, None]
            return group._batched(z, *pytree.tree_unflatten(given, spec))

        return function

    def _timed(self, z: Tensor, rows: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
        """Return an eager evaluation and its time; the first one also sets things up, so a short one is repeated."""
        seconds = math.inf
        for _ in range(2):
            began, worked = time.perf_counter(), time.process_time()
            found = self._plain(z, rows)
            if z.is_cuda:
                torch.cuda.synchronize()
            # On a busy machine the time of the processor tells more; a GPU leaves it idle.
            spent = time.perf_counter() - began
            seconds = min(seconds, spent if z.is_cuda else min(spent, time.process_time() - worked))
            if seconds > 0.5:
                break
        return found, seconds


class _Recorder:
    """Keeps iterates of every candidate on a geometric schedule, and reports progress."""

    def __init__(self, group: _Group, callback: Callback | None, total: int, until: float | None) -> None:
        self.group, self.callback, self.total, self.until = group, callback, total, until
        self.best, self.last, self.late = float("inf"), 0.0, False
        self.offset = [0] * (len(group.problems) * group.restarts)
        self.frames: dict[int, list[tuple[int, Tensor]]] = {}
        self._rows: Tensor | None = None
        self._working: list[int] = []
        self._born: dict[int, int] = {}
        steps = {0}
        while max(steps) < total:
            steps.add(max(max(steps) + 1, int(max(steps) * 1.15)))
        self._schedule = steps

    def stage(self, spent: list[int]) -> None:
        """Begin another run of the solver, on problems that have had ``spent`` evaluations."""
        self.offset, self._born, self._rows = spent, {}, None

    def __call__(self, step: int, rows: Tensor, x: Tensor, objective: Tensor) -> bool:
        if self.group.attack.trace:
            if rows is not self._rows:
                self._rows, self._working = rows, rows.tolist()
                for r in self._working:
                    self._born.setdefault(r, step)
            for place, r in enumerate(self._working):
                age = step - self._born[r] + self.offset[r]
                if age in self._schedule:
                    self.frames.setdefault(r, []).append((age, x[place].detach().clone()))
        now = time.monotonic()
        if self.callback is not None and (now - self.last > 0.1 or step + 1 >= self.total):
            self.last = now
            self.best = min(self.best, float(objective.min()))
            self.callback(Progress(min(step + 1, self.total), self.total, self.best, f"{len(rows)} candidates"))
        if self.until is not None and now > self.until:
            self.late = True
            raise KeyboardInterrupt
        return False


class _Race:
    """Ends restarts that are far behind or no longer needed, and shares a time budget among those who wait."""

    def __init__(self, group: _Group, tolerance: float, share: float | None) -> None:
        self.restarts, self.on = group.restarts, group.attack.race and group.restarts > 1
        self.tolerance, self.share = tolerance, share
        self.decided: set[int] = set()
        self.dropped: set[int] = set()
        self._rungs: dict[tuple[int, int], list[float]] = {}
        self._at: dict[int, int] = {}
        self._since: dict[int, float] = {}

    def __call__(
        self, rows: Sequence[int], ages: Sequence[int], objectives: Sequence[float], waiting: bool
    ) -> Collection[int]:
        ended: set[int] = set()
        if self.on:
            self.decided |= {r // self.restarts for r, f in zip(rows, objectives, strict=True) if f <= self.tolerance}
            ended |= {r for r in rows if r // self.restarts in self.decided}
            for r, age, f in zip(rows, ages, objectives, strict=True):
                rung = int(math.log2(age / _RUNG)) if age >= _RUNG else -1
                if rung > self._at.get(r, -1):
                    self._at[r] = rung
                    seen = self._rungs.setdefault((r // self.restarts, rung), [])
                    if seen and f > _BEHIND * min(seen) and f > sorted(seen)[len(seen) // 2]:
                        ended.add(r)
                    seen.append(f)
        if self.share is not None and waiting:
            now = time.monotonic()
            ended |= {r for r in rows if now - self._since.setdefault(r, now) > self.share}
        self.dropped |= ended
        return ended


def _solve(
    problems: Sequence[_Problem],
    attack: GradientMatching,
    seed: int,
    callback: Callback | None,
    until: float | None,
) -> list[Reconstruction]:
    began = time.perf_counter()
    group = _Group(problems, attack)
    recorder = _Recorder(group, callback, attack.solver.iterations, until)
    project = None
    if attack.box:
        space = group.first.observation.space

        def project(z: Tensor) -> Tensor:
            x = z[:, : group.pixels].reshape(-1, *group.shape)
            return torch.cat([space.project(x).reshape(len(z), -1), z[:, group.pixels :]], 1)

    outcome, notes = _search(group, attack, seed, project, recorder, until)
    if recorder.late:
        notes.append(f"The search was ended by its time budget of {attack.budget:g} s.")
    seconds = (time.perf_counter() - began) / len(problems)
    return [_result(group, i, outcome, recorder, seconds, tuple(notes)) for i in range(len(problems))]


def _slots(group: _Group, candidates: int, size: int) -> int:
    """Return how many candidates work at a time: what the cache likes and the memory holds."""
    attack, like = group.attack, group.like
    host = _SLOTS if group.params_axis == 0 else 2 * _SLOTS  # Weights of their own fill the cache sooner.
    wanted = min(candidates, _SLOTS_GPU if like.is_cuda else host)
    if not group.vectorize:
        wanted = candidates
    keeps = attack.solver.memory(size, like.dtype.itemsize)
    free = available(like.device)
    weights = sum(v.numel() for v in group.first.params.values()) * like.dtype.itemsize
    # A candidate's gradient takes a few dozen copies of the weights; only where that may matter is it worked out.
    if wanted * (keeps + 60 * (weights + size * like.dtype.itemsize)) < 0.05 * free:
        return wanted
    one = candidate_bytes(lambda z, *rest: group._gradient(z, *rest), _example(group, size))
    return fitting(wanted, one if group.vectorize else 0, keeps, once=0 if group.vectorize else one, free=free)


def _example(group: _Group, size: int) -> tuple[Any, ...]:
    return (torch.zeros(size, dtype=group.like.dtype, device=group.like.device), *group.arguments(0))


def _search(
    group: _Group,
    attack: GradientMatching,
    seed: int,
    project: Project | None,
    recorder: _Recorder,
    until: float | None,
) -> tuple[Outcome, list[str]]:
    """Run the solver, first in the cheaper number type if there is one, and return one outcome for both stages."""
    start, solver = group.start(seed), attack.solver
    notes: list[str] = []
    count = len(start)

    def run(stage: _Group, x: Tensor, tolerance: float, spent: list[int] | None, rounds: int) -> tuple[Outcome, _Race]:
        turn = count if spent is None else sum(n < solver.iterations for n in spent)
        slots = _slots(stage, max(turn, 1), x.shape[1])
        share = None if until is None else max(until - time.monotonic(), 0.0) * slots / max(turn, 1)
        race = _Race(stage, tolerance, share if turn > slots else None)
        width = slots if stage.vectorize else 1
        evaluate = _Evaluator(stage, width, _TYPICAL * rounds * math.ceil(turn / slots), until)
        referee: Referee | None = race if race.on or race.share is not None else None
        found = solver.minimize(
            evaluate,
            x,
            tolerance=tolerance,
            project=project,
            monitor=recorder,
            referee=referee,
            slots=slots,
            spent=spent,
        )
        notes.extend(n for n in evaluate.notes if n not in notes)
        return found, race

    if attack.warm_dtype is None or attack.warm_dtype == start.dtype:
        return run(group, start, attack.tolerance, None, solver.iterations)[0], notes
    warm = _Group([p.to(attack.warm_dtype) for p in group.problems], attack)
    goal = max(attack.warm_tolerance, attack.tolerance)
    rough, race = run(warm, start.to(attack.warm_dtype), goal, None, solver.iterations)
    rough = replace(rough, x=rough.x.to(start.dtype), objective=rough.objective.to(start.dtype))
    if rough.interrupted:
        return rough, notes
    spent = rough.evaluations.tolist()
    over = (rough.objective <= attack.tolerance).tolist()
    used = [solver.iterations if over[r] or r in race.dropped else n for r, n in enumerate(spent)]
    if all(n >= solver.iterations for n in used):
        return rough, notes
    recorder.stage(spent)
    fine, _ = run(group, rough.x, attack.tolerance, used, solver.iterations)
    idle = fine.evaluations == 0  # Done in the first stage, or never reached in this one.
    return replace(
        fine,
        x=torch.where(idle[:, None], rough.x, fine.x),
        objective=torch.where(idle, rough.objective, fine.objective),
        converged=torch.where(idle, rough.objective <= attack.tolerance, fine.converged),
        stalled=torch.where(idle, rough.stalled, fine.stalled),
        iterations=fine.iterations + rough.iterations,
        evaluations=fine.evaluations + rough.evaluations,
    ), notes


def _result(
    group: _Group, i: int, outcome: Outcome, recorder: _Recorder, seconds: float, notes: tuple[str, ...]
) -> Reconstruction:
    problem, r = group.problems[i], group.restarts
    rows = slice(i * r, (i + 1) * r)
    scores = torch.where(torch.isfinite(outcome.objective[rows]), outcome.objective[rows], torch.inf)
    row = i * r + int(scores.argmin())
    _, _, _, _, labels = group.arguments(i)
    inputs, soft = group.unpack(outcome.x[row].detach(), labels)
    if bool(outcome.converged[row]):
        status = "converged"
    elif outcome.interrupted and not recorder.late:
        status = "interrupted"
    else:
        status = "stalled" if bool(outcome.stalled[row]) else "budget"
    objective = float(outcome.objective[row])
    if not math.isfinite(objective):  # It never had its turn.
        objective = float(group.looped(outcome.x[row : row + 1], torch.tensor([i]))[0])
    space = problem.observation.space
    result = Reconstruction(
        inputs=space.decode(inputs),
        labels=soft.argmax(-1),
        objective=objective,
        label_probabilities=soft,
        status=status,
        iterations=int(outcome.iterations[row]),
        evaluations=int(outcome.evaluations[rows].sum()),
        seconds=seconds,
        notes=(*problem.notes, *notes),
    )
    return replace(result, trace=_trace(group, i, row, recorder, outcome)) if group.attack.trace else result


def _trace(group: _Group, i: int, row: int, recorder: _Recorder, outcome: Outcome) -> Trace:
    """Evaluate the recorded iterates of one candidate: objective, distance per layer, decoded picture."""
    params, buffers, observed, scale, labels = group.arguments(i)
    space = group.problems[i].observation.space
    steps: list[int] = []
    objectives: list[float] = []
    pictures: list[Tensor] = []
    layers: dict[str, list[float]] = {k: [] for k in observed}
    frames = recorder.frames.get(row, [])
    # The iterate that is returned closes the curve.
    last = max(int(outcome.evaluations[row]), frames[-1][0] + 1 if frames else 0)
    frames = [(step, z.to(group.like)) for step, z in frames] + [(last, outcome.x[row])]

    def measure(z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        simulated = group.simulate(z, params, buffers, labels)
        value = group.compare(simulated, observed, scale)
        inputs, _ = group.unpack(z, labels)
        for prior in group.attack.priors:
            value = value + prior(inputs)
        return value, {k: (simulated[k] - observed[k]).square().sum() for k in observed}

    with torch.no_grad():
        size = _SLOTS if group.vectorize else 1
        for some in (frames[k : k + size] for k in range(0, len(frames), size)):
            if len(some) == 1:
                value, squares = measure(some[0][1])
                values, squares = value[None], {k: v[None] for k, v in squares.items()}
            else:
                values, squares = vmap(measure)(torch.stack([z for _, z in some]))
            steps += [step for step, _ in some]
            objectives += values.tolist()
            for k in observed:
                layers[k] += squares[k].tolist()
            pictures += [space.decode(group.unpack(z, labels)[0]).to(torch.float32).cpu() for _, z in some]
    curves = {k: tuple(v) for k, v in layers.items()}
    return Trace(tuple(steps), tuple(objectives), curves, torch.stack(pictures) if pictures else None)
