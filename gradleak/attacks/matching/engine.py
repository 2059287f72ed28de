"""The one matching loop: candidates whose simulated update equals the observed one; papers are choices of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradleak.analytic.labels import recover_labels
from gradleak.attacks.base import Attack, Callback, Progress, as_gradient
from gradleak.attacks.matching.objectives import Objective, SquaredError
from gradleak.attacks.matching.priors import Prior
from gradleak.attacks.matching.solvers import LBFGS, Outcome, Project, Solver
from gradleak.errors import InvalidInput
from gradleak.threat import Knowledge, Observation
from gradleak.training import Tensors, check_reproducible, soft_labels
from gradleak.types import Reconstruction, Trace

__all__ = ["GradientMatching"]

_VMAP_LIMIT = 2_000_000  # Parameters x examples above which vmap on a CPU only costs memory (measured on ResNet-18).


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
            ``dtype``. Below about 1e-7 the rounding of float32 gradients would mislead a line search.
        warm_tolerance: see ``warm_dtype``.
        vectorize: vmap over candidates; None decides by model size.
        trace: record iterates for the report.

    Raises:
        MissingKnowledge: batch size or training is not granted.
        InvalidModel: active dropout or train-mode BatchNorm.
        InvalidInput: the options contradict each other.

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
    warm_tolerance: float = 1e-7
    vectorize: bool | None = None
    trace: bool = True

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def __post_init__(self) -> None:
        if self.labels not in ("joint", "recovered") or self.restarts < 1:
            raise InvalidInput(
                f"GradientMatching has no labels={self.labels!r} with restarts={self.restarts}; "
                "use 'joint' or 'recovered' and at least one restart."
            )

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        groups: dict[object, list[int]] = {}
        problems = [_Problem.of(o, self, seed) for o in observations]
        for i, problem in enumerate(problems):
            groups.setdefault(problem.signature(), []).append(i)
        results: dict[int, Reconstruction] = {}
        for members in groups.values():
            found = _solve([problems[i] for i in members], self, seed, callback)
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
        observed = {k: v.to(device=own.device, dtype=dtype) for k, v in observation.update.tensors.items()}
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
                as_gradient(observation),
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
        wanted = self.like.is_cuda or weight <= _VMAP_LIMIT
        self.vectorize = wanted if attack.vectorize is None else attack.vectorize
        axes = (0, self.params_axis, self.buffers_axis, self.observed_axis, 0, None if self.joint else 0)
        self._batched: Callable[..., tuple[Tensor, Tensor]] = vmap(self._gradient, in_dims=axes)

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
        if labels is not None:
            return x, labels
        return x, z[self.pixels :].reshape(self.n, self.first.classes).softmax(-1)

    def simulate(self, z: Tensor, params: Tensors, buffers: Tensors, labels: Tensor | None) -> dict[str, Tensor]:
        x, y = self.unpack(z, labels)
        return self.undefended.tensors(self.first.model, params, x, y, buffers=buffers)

    def compare(self, simulated: Tensors, observed: Tensors, scale: Tensor) -> Tensor:
        """Return the objective; under a known defense, of what that defense leaves to be explained."""
        if self.training is self.undefended:
            return self.attack.objective(simulated, observed, scale)
        residual = self.training.residual(simulated, observed)
        target = {k: (simulated[k] - residual[k]).detach() for k in observed}
        return self.attack.objective({k: target[k] + residual[k] for k in observed}, target, scale)

    def distance(
        self, z: Tensor, params: Tensors, buffers: Tensors, observed: Tensors, scale: Tensor, labels: Tensor | None
    ) -> Tensor:
        x, _ = self.unpack(z, labels)
        value = self.compare(self.simulate(z, params, buffers, labels), observed, scale)
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

    def evaluate(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return objectives (A,) and gradients (A, D) of candidates ``rows`` at ``z``."""
        index = rows // self.restarts
        if self.vectorize and len(rows) > 1:
            values, gradients = self._batched(z, *self._cached(index))
            return values.detach(), gradients.detach()
        values, gradients = z.new_empty(len(z)), torch.empty_like(z)
        for j, i in enumerate(index.tolist()):
            # Plain autograd outside the forward map: the functional transform costs more on one candidate.
            leaf = z[j].detach().requires_grad_()
            value = self.distance(leaf, *self.arguments(i))
            (gradients[j],) = torch.autograd.grad(value, leaf)
            values[j] = value.detach()
        return values, gradients

    _cache: tuple[Tensor, tuple[Tensors, Tensors, Tensors, Tensor, Tensor | None]] | None = None

    def _cached(self, index: Tensor) -> tuple[Tensors, Tensors, Tensors, Tensor, Tensor | None]:
        # Rows change only when problems finish; the gathered copies are reused in between.
        if self._cache is None or self._cache[0].shape != index.shape:
            self._cache = (index, self.arguments(index))
        return self._cache[1]


class _Recorder:
    """Keeps iterates on a geometric schedule and reports progress."""

    def __init__(self, group: _Group, callback: Callback | None, total: int) -> None:
        self.group, self.callback, self.total = group, callback, total
        self.next, self.best, self.last = 0, float("inf"), 0.0
        self.offset = 0
        self.frames: list[tuple[int, Tensor, Tensor]] = []

    def __call__(self, step: int, rows: Tensor, x: Tensor, objective: Tensor) -> bool:
        step += self.offset
        if self.group.attack.trace and step >= self.next:
            self.frames.append((step, rows.clone(), x.detach().clone()))
            self.next = max(step + 1, int(step * 1.15))
        now = time.monotonic()
        if self.callback is not None and (now - self.last > 0.1 or step + 1 >= self.total):
            self.last = now
            self.best = min(self.best, float(objective.min()))
            self.callback(Progress(step + 1, self.total, self.best, f"{len(rows)} candidates"))
        return False


def _solve(
    problems: Sequence[_Problem], attack: GradientMatching, seed: int, callback: Callback | None
) -> list[Reconstruction]:
    began = time.perf_counter()
    group = _Group(problems, attack)
    recorder = _Recorder(group, callback, attack.solver.iterations)
    project = None
    if attack.box:
        space = group.first.observation.space

        def project(z: Tensor) -> Tensor:
            x = z[:, : group.pixels].reshape(-1, *group.shape)
            return torch.cat([space.project(x).reshape(len(z), -1), z[:, group.pixels :]], 1)

    outcome = _search(group, attack, seed, project, recorder)
    seconds = (time.perf_counter() - began) / len(problems)
    return [_result(group, i, outcome, recorder, seconds) for i in range(len(problems))]


def _search(
    group: _Group, attack: GradientMatching, seed: int, project: Project | None, recorder: _Recorder
) -> Outcome:
    """Run the solver, first in the cheaper number type if there is one, and return one outcome for both stages."""
    start, solver = group.start(seed), attack.solver
    if attack.warm_dtype is None or attack.warm_dtype == start.dtype:
        return solver.minimize(group.evaluate, start, tolerance=attack.tolerance, project=project, monitor=recorder)
    warm = _Group([p.to(attack.warm_dtype) for p in group.problems], attack)
    rough = solver.minimize(
        warm.evaluate,
        start.to(attack.warm_dtype),
        tolerance=max(attack.warm_tolerance, attack.tolerance),
        project=project,
        monitor=recorder,
    )
    recorder.offset = int(rough.evaluations.max())
    left = solver.iterations - recorder.offset
    if rough.interrupted or left < 1:
        return replace(rough, x=rough.x.to(start.dtype), objective=rough.objective.to(start.dtype))
    fine = replace(solver, iterations=left).minimize(
        group.evaluate, rough.x.to(start.dtype), tolerance=attack.tolerance, project=project, monitor=recorder
    )
    return replace(
        fine, iterations=fine.iterations + rough.iterations, evaluations=fine.evaluations + rough.evaluations
    )


def _result(group: _Group, i: int, outcome: Outcome, recorder: _Recorder, seconds: float) -> Reconstruction:
    problem, r = group.problems[i], group.restarts
    rows = slice(i * r, (i + 1) * r)
    scores = torch.where(torch.isfinite(outcome.objective[rows]), outcome.objective[rows], torch.inf)
    row = i * r + int(scores.argmin())
    _, _, _, _, labels = group.arguments(i)
    inputs, soft = group.unpack(outcome.x[row].detach(), labels)
    if outcome.interrupted:
        status = "interrupted"
    elif bool(outcome.converged[row]):
        status = "converged"
    else:
        status = "stalled" if bool(outcome.stalled[row]) else "budget"
    space = problem.observation.space
    result = Reconstruction(
        inputs=space.decode(inputs),
        labels=soft.argmax(-1),
        objective=float(outcome.objective[row]),
        label_probabilities=soft,
        status=status,
        iterations=int(outcome.iterations[row]),
        evaluations=int(outcome.evaluations[rows].sum()),
        seconds=seconds,
        notes=problem.notes,
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
    frames = []
    for step, rows, x in recorder.frames:
        place = (rows == row).nonzero()
        if len(place):
            frames.append((step, x[int(place[0])].to(group.like)))
    # The iterate that is returned closes the curve.
    frames.append((max(int(outcome.evaluations[row]), frames[-1][0] + 1 if frames else 0), outcome.x[row]))
    with torch.no_grad():
        for step, z in frames:
            simulated = group.simulate(z, params, buffers, labels)
            value = group.compare(simulated, observed, scale)
            inputs, _ = group.unpack(z, labels)
            for prior in group.attack.priors:
                value = value + prior(inputs)
            steps.append(step)
            objectives.append(float(value))
            pictures.append(space.decode(inputs).to(torch.float32).cpu())
            for k in observed:
                layers[k].append(float((simulated[k] - observed[k]).square().sum()))
    curves = {k: tuple(v) for k, v in layers.items()}
    return Trace(tuple(steps), tuple(objectives), curves, torch.stack(pictures) if pictures else None)
