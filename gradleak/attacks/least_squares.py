"""The update as a nonlinear least-squares problem of the inputs, and Levenberg–Marquardt on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradleak.attacks.base import Callback, Progress
from gradleak.attacks.labeling import estimate_labels
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import NotApplicable
from gradleak.formats import number_format, storage_deviation
from gradleak.solve.conjugate_gradients import conjugate_gradients
from gradleak.solve.jacobian import jacobian
from gradleak.solve.least_squares import State, minimize
from gradleak.structure.probe import meets_kinks, probe_inputs
from gradleak.threat import Observation
from gradleak.training import check_reproducible, output_tensors
from gradleak.types import Reconstruction, Status

__all__ = ["LARGEST", "Problem", "Sampled", "State", "is_smooth", "search"]

_DENSE = 2e7
"""Numbers of a Jacobian that is kept whole; larger ones are sampled and only precondition."""
LARGEST = 4096
"""Unknowns up to which the normal matrix is factorized."""
_SHARE = 1024
"""Rows after which a sum over rows asks whether to go on."""
_OVERSAMPLED = 4
"""Sampled rows per unknown."""
_POINTS = 9
"""Points of a line, for Simpson's rule."""
_KINK = 1e-3
"""Relative error of Simpson's rule above which a line meets a kink: on smooth activations it is far smaller."""


def is_smooth(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Tell whether ``model`` is smooth in its input, by behavior: no class names, no graph.

    Functions of torch with a kink that values surround tell at once. Else, along short lines, the integral of the
    second derivative must give the change of the first. At a kink (ReLU, max-pooling) the first derivative jumps, which
    the second does not see.

    Raises:
        InvalidModel: the model cannot be evaluated reproducibly.
    """
    check_reproducible(model)
    own = {k: p.detach() for k, p in model.named_parameters()}
    with suppress(NotApplicable):
        if meets_kinks(model, own, probe_inputs(shape, 2, next(iter(own.values())))):
            return False  # Of a large network, the lines below take many seconds.
    tensors = {k: p.detach().double() for k, p in model.named_parameters()}
    tensors |= {k: b.double() if b.is_floating_point() else b for k, b in model.named_buffers()}
    like = next(iter(tensors.values()))
    draw = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, _POINTS, dtype=like.dtype, device=like.device)
    simpson = torch.ones_like(t)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    simpson = simpson / (3 * (_POINTS - 1))

    def derivatives(start: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
        """Return first and second derivatives (lines, points) along lines (lines, *shape)."""
        s = t.repeat(len(start)).requires_grad_()
        grid = s.view(len(start), _POINTS, *(1,) * len(shape))
        found = functional_call(model, tensors, ((start[:, None] + grid * way[:, None]).flatten(0, 1),))
        out = torch.cat([part.flatten(1) for part in output_tensors(found)], 1)
        mixed = out @ torch.randn(out.shape[1], generator=draw, dtype=torch.float64).to(out)
        (first,) = torch.autograd.grad(mixed.sum(), s, create_graph=True)
        second = None
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), s, allow_unused=True)
        second = torch.zeros_like(s) if second is None else second
        return first.detach().view(len(start), _POINTS), second.view(len(start), _POINTS)

    # A large model has enough units for any line to meet a kink; a tiny one has few.
    size = sum(p.numel() for p in model.parameters())
    rounds, lines = (1, 2) if size >= 100_000 else (4, 8) if size >= 2_000 else (16, 16)
    try:
        for _ in range(rounds):
            start, way = (torch.randn(lines, *shape, generator=draw, dtype=torch.float64).to(like) for _ in range(2))
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                first, second = derivatives(start, 0.2 * way)
                if not bool(second.any()):  # affine, or linear in pieces, of which a long line meets several
                    first, second = derivatives(start, 10 * way)
            change = first[:, -1] - first[:, 0]
            error = (second @ simpson - change).abs()
            # Against the whole variation, not the net change, in which rises and falls may cancel.
            if bool((error > _KINK * (second.abs() @ simpson) + 1e-9 * first.norm(dim=1)).any()):
                return False
    except (NotImplementedError, RuntimeError, IndexError, ValueError, TypeError, AttributeError):
        return False  # an operation without second derivatives cannot be judged, nor taken by this attack
    return True


def search(
    problem: Problem,
    z: Tensor,
    *,
    iterations: int,
    deadline: Deadline | None = None,
    callback: Callback | None = None,
) -> State:
    """Return where Levenberg–Marquardt from ``z`` (n,) ends, after at most ``iterations`` steps.

    See :func:`gradleak.solve.least_squares.minimize`. The end of ``deadline``, or a ``KeyboardInterrupt`` from
    ``callback``, returns the best so far.
    """
    told = Progress(0, iterations, math.inf)

    def alive() -> bool:
        if callback is not None:
            callback(told)
        return (deadline is None or not deadline.over) and (problem.going is None or problem.going())

    def going(state: State, damping: float) -> bool:
        nonlocal told
        told = Progress(state.steps, iterations, problem.relative(state.cost), f"damping {damping:.0e}")
        return alive()

    return minimize(replace(problem, going=alive), z, iterations=iterations, going=going)


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """The weighted residual of one observation as a function of the inputs; ``going`` says whether to go on."""

    observation: Observation
    labels: Tensor
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    observed: Mapping[str, Tensor]
    deviation: Mapping[str, Tensor]
    weight: Tensor
    notes: tuple[str, ...]
    seed: int
    going: Callable[[], bool] | None = None

    @classmethod
    def of(cls, observation: Observation, labels: Tensor | None, seed: int, *, kinks: bool = False) -> Problem:
        """Return the problem of an observation; labels are granted, given, or recovered, in this order.

        ``kinks`` admits a model with kinks, for a start so near that the activation pattern is known.

        Raises:
            NotApplicable: the model has kinks, where the update jumps.
        """
        model, space = observation.model, observation.space
        assert observation.training is not None and observation.batch_size is not None
        if not kinks and not is_smooth(model, tuple(space.shape)):
            raise NotApplicable(
                "Gauss–Newton linearizes the update, which jumps with the activation pattern of a model with kinks "
                "(ReLU, max-pooling); use recursion() for one example or prior_matching() for a batch."
            )
        params = {k: p.double() for k, p in observation.params.items()}
        others = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}
        others |= dict(model.named_buffers())
        buffers = {k: b.double() if b.is_floating_point() else b for k, b in others.items()}
        tensors = observation.update.tensors
        like = next(iter(params.values()))
        observed = {k: t.to(like) for k, t in tensors.items()}
        notes: list[str] = []
        if observation.labels is not None:
            labels = observation.labels
        elif labels is None:
            estimate = estimate_labels(observation, torch.Generator().manual_seed(seed))
            labels = estimate.labels
            if not estimate.exact:
                notes.append(f"Labels were estimated, not proved: {estimate.reason}")
        labels = labels.to(like.device)
        deviation = {k: d.to(like) for k, d in observation.training.deviation(observed).items()}
        weight = _weight(tensors, observed, deviation)
        return cls(
            observation,
            labels.to(like) if labels.is_floating_point() else labels,
            params,
            buffers,
            observed,
            deviation,
            weight,
            tuple(notes),
            seed,
        )

    @property
    def like(self) -> Tensor:
        """A parameter, for its device and precision."""
        return next(iter(self.params.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the batch of inputs."""
        assert self.observation.batch_size is not None
        return (self.observation.batch_size, *self.observation.space.shape)

    @property
    def unknowns(self) -> int:
        """Number of values that are sought."""
        return math.prod(self.shape)

    def residual(self, z: Tensor) -> Tensor:
        """Return the weighted residual (m,); traceable by torch.func."""
        training = self.observation.training
        assert training is not None
        undefended = training.simulated
        found = undefended.tensors(
            self.observation.model, self.params, z.reshape(self.shape), self.labels, buffers=self.buffers
        )
        if undefended is training:
            left = {k: found[k] - o for k, o in self.observed.items()}
        else:
            left = training.centered(found, self.observed)
        return torch.cat([left[k].flatten() for k in self.observed]) * self.weight

    @torch.no_grad()
    def cost(self, z: Tensor) -> float:
        """Return the sum of squares."""
        return float(self.residual(z).square().sum())

    def relative(self, cost: float) -> float:
        """Return the cost relative to that of explaining nothing."""
        seen = torch.cat([o.flatten() for o in self.observed.values()]) * self.weight
        return cost / max(float(seen.square().sum()), 1e-300)

    def linearize(self, z: Tensor, former: System | None) -> System:
        """Return the system at ``z``; a large one keeps the preconditioner of ``former`` where it still serves."""
        rows = len(self.weight)
        if self.unknowns > LARGEST:
            return Iterated(self, z)
        if rows * self.unknowns <= _DENSE:
            return _Dense(self, z)
        return Sampled(self, z, former if isinstance(former, Sampled) else None)

    def columns(self, z: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the Jacobian's ``rows``, transposed: (n, len(rows))."""
        chosen = self.residual if rows is None else lambda v: self.residual(v)[rows]
        return jacobian(chosen, z, dtype, going=self.going)

    def raise_if_over(self) -> None:
        """Raise :class:`TimeSpent` where the search is not to go on."""
        if self.going is not None and not self.going():
            raise TimeSpent

    def result(self, state: State, evaluations: int, seconds: float) -> Reconstruction:
        """Return where a search ended as a reconstruction."""
        labels = self.labels
        hard = labels.argmax(-1) if labels.is_floating_point() else labels
        return Reconstruction(
            self.observation.space.decode(state.z.reshape(self.shape)),
            hard,
            self.relative(state.cost),
            label_probabilities=labels if labels.is_floating_point() else None,
            status=Status(state.status),
            iterations=state.steps,
            evaluations=evaluations,
            seconds=seconds,
            notes=(*self.notes, f"{state.steps} Gauss–Newton steps."),
        )


def _weight(tensors: Mapping[str, Tensor], observed: Mapping[str, Tensor], deviation: Mapping[str, Tensor]) -> Tensor:
    """Return one over the standard deviation of every number: rounding, number format, known defense."""
    fmt = number_format(tensors)
    parts = []
    for k, o in observed.items():
        # Accumulated rounding is about equal for the numbers of one tensor.
        eps = max(torch.finfo(tensors[k].dtype).eps, 2.0**-40)
        noise = torch.full_like(o, float(o.square().mean().sqrt()) * eps)
        coarse = storage_deviation(o, fmt) if fmt in (torch.float16, torch.bfloat16) else torch.zeros_like(o)
        known = deviation[k]
        # Both describe the same rounding where the defense is the number format.
        parts.append(torch.hypot(noise, torch.where(known > 0, known, coarse)).flatten())
    tau = torch.cat(parts)
    least = float(tau[tau > 0].min()) if bool((tau > 0).any()) else 1.0
    return torch.where(torch.isfinite(tau), 1 / tau.clamp(min=least), 0.0)


class _Dense:
    """The whole Jacobian, factorized once: every damping costs two products."""

    def __init__(self, problem: Problem, z: Tensor) -> None:
        self.J = problem.columns(z, None, z.dtype).T
        with torch.no_grad():
            self.r = problem.residual(z)
        self.evaluations = len(z)
        left, J = self.r, self.J
        if len(J) > J.shape[1]:
            Q, J = torch.linalg.qr(J)
            left = Q.T @ left
        if not bool(torch.isfinite(J).all()):
            raise NotApplicable(
                "The update's derivatives at the point reached are not finite, so no step can be taken; use dlg()."
            )
        try:
            U, self.s, self.Vh = torch.linalg.svd(J, full_matrices=False)
            self.right = U.T @ left
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # LAPACK's iteration may fail on clustered singular values.
            values, vectors = torch.linalg.eigh(J.T @ J)
            self.s, self.Vh = values.clamp(min=0).sqrt(), vectors.T
            seen = self.s > float(self.s.max()) * torch.finfo(J.dtype).eps ** 0.5
            self.right = torch.where(seen, (self.Vh @ (J.T @ left)) / self.s.clamp(min=1e-300), 0.0)

    def step(self, damping: float) -> Tensor:
        """Return −(JᵀJ + damping · mean(s²))⁻¹ Jᵀ r."""
        shift = damping * float(self.s.square().mean())
        return -self.Vh.T @ (self.s / (self.s.square() + shift).clamp(min=1e-300) * self.right)

    def decrease(self, change: Tensor) -> float:
        """Return ‖r‖² − ‖r + J change‖²."""
        moved = self.s * (self.Vh @ change)
        return float(-(2 * self.right * moved + moved.square()).sum())


class _Products:
    """Products with the Jacobian by automatic differentiation."""

    evaluations = 0

    def __init__(self, problem: Problem, z: Tensor) -> None:
        self.going = problem.going
        with torch.enable_grad():
            self.leaf = z.detach().clone().requires_grad_()
            self.left = problem.residual(self.leaf)
            self.dummy = torch.zeros_like(self.left, requires_grad=True)
            (self.pulled,) = torch.autograd.grad(self.left, self.leaf, self.dummy, create_graph=True)
        self.r = self.left.detach()
        self.gradient = self._pull(self.r)

    def _pull(self, u: Tensor) -> Tensor:
        return torch.autograd.grad(self.left, self.leaf, u, retain_graph=True)[0]

    def _push(self, v: Tensor) -> Tensor:
        return torch.autograd.grad(self.pulled, self.dummy, v, retain_graph=True)[0]

    def decrease(self, change: Tensor) -> float:
        """Return ‖r‖² − ‖r + J change‖²."""
        moved = self._push(change)
        return float(-(2 * self.r * moved + moved.square()).sum())


class Iterated(_Products):
    """Conjugate gradients without preconditioner, for more unknowns than a matrix can have: from a good start only.

    Far from the solution they stall. Near it, what stands out in the residual goes first, and they end where the rest
    falls no longer, which regularizes as well as damping does.
    """

    def __init__(self, problem: Problem, z: Tensor) -> None:
        super().__init__(problem, z)
        signs = torch.randint(0, 2, z.shape, generator=torch.Generator().manual_seed(problem.seed))
        self.mean = float(self._push((2 * signs - 1).to(z)).square().sum()) / len(z)  # of the normal matrix' diagonal

    def step(self, damping: float) -> Tensor:
        """Return the step that conjugate gradients reach, damped little."""
        shift, left = damping**3 * self.mean, float(self.r.square().sum())
        gained: list[float] = []

        def on(fallen: float) -> bool:
            gained.append(fallen)
            stale = len(gained) > _STALE + 1 and fallen - gained[-1 - _STALE] < _GAIN * (left - fallen)
            return not stale and (self.going is None or self.going())

        x, _, _ = conjugate_gradients(
            lambda v: self._pull(self._push(v[0]))[None] + shift * v,
            -self.gradient[None],
            lambda r: r,
            tolerance=0.0,
            limit=_PATIENT,
            going=on,
        )
        return x[0]


class Sampled(_Products):
    """A factor of sampled rows preconditions conjugate gradients (Avron et al. 2010)."""

    def __init__(self, problem: Problem, z: Tensor, former: Sampled | None) -> None:
        super().__init__(problem, z)
        if former is None or former.slow:
            self.gram = self._sample(problem, z)
            self.evaluations = len(z)
        else:
            self.gram = former.gram
        self.mean = float(self.gram.diagonal().mean())
        self.slow: bool = False
        self.factors: dict[float, Tensor] = {}

    def _sample(self, problem: Problem, z: Tensor) -> Tensor:
        """Return an estimate of JᵀJ (n, n) in float32 from rows of every tensor."""
        draw = torch.Generator().manual_seed(problem.seed)
        budget = _OVERSAMPLED * len(z)
        sizes = [t.numel() for t in problem.observed.values()]
        share = max(1, budget // len(sizes))
        rows, scales, offset = [], [], 0
        spare = budget - sum(min(n, share) for n in sizes)
        wanting = sum(n for n in sizes if n > share)
        for n in sizes:
            count = n if n <= share else min(n, share + spare * n // max(wanting, 1))
            chosen = torch.randperm(n, generator=draw)[:count]
            rows.append(chosen + offset)
            scales.append(torch.full((count,), math.sqrt(n / count)))
            offset += n
        index, scale = torch.cat(rows).to(z.device), torch.cat(scales).to(z.device)
        columns = problem.columns(z, index, torch.float32).mul_(scale)
        gram = columns.new_zeros(len(z), len(z))
        for part in columns.split(_SHARE, 1):
            problem.raise_if_over()
            gram.addmm_(part, part.T)
        return gram

    def step(self, damping: float) -> Tensor:
        """Return the damped step by preconditioned conjugate gradients."""
        shift = damping * self.mean
        lower = self.factors.get(damping)
        if lower is None:
            matrix = self.gram.clone()
            jitter = max(shift, 1e-6 * self.mean)
            matrix.diagonal().add_(jitter)
            lower, info = torch.linalg.cholesky_ex(matrix)
            while int(info) != 0:
                matrix.diagonal().add_(9 * jitter)
                jitter *= 10
                lower, info = torch.linalg.cholesky_ex(matrix)
            self.factors = {damping: lower}

        x, steps, _ = conjugate_gradients(
            lambda v: self._pull(self._push(v[0]))[None] + shift * v,
            -self.gradient[None],
            lambda r: torch.cholesky_solve(r.to(lower).mT, lower).mT.to(r),
            tolerance=1e-4,
            limit=_INNER,
            going=lambda _: self.going is None or self.going(),
        )
        self.slow = steps > _INNER // 2 + 1
        return x[0]


_INNER = 60
_PATIENT = 400
"""Conjugate gradient steps without a preconditioner."""
_STALE, _GAIN = 25, 0.02
"""They end when so many steps lower what is left by no more than this share."""

System = _Dense | Iterated | Sampled
"""The problem linearized at one point."""
