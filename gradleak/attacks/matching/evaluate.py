"""Objectives and gradients of candidates: one by one, all at once by vmap, or by a function prepared beforehand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad_and_value, vmap

from gradleak.attacks.matching import backends
from gradleak.attacks.matching.convolutions import LeanConvolutions
from gradleak.attacks.matching.priors import Context
from gradleak.attacks.matching.problem import Problem
from gradleak.clock import Deadline
from gradleak.errors import GradleakError, NotApplicable, reason
from gradleak.training import Tensors

if TYPE_CHECKING:
    from gradleak.attacks.matching.engine import GradientMatching

__all__ = ["SLOTS", "Evaluator", "Group"]

_VMAP_LIMIT = 2_000_000
"""Parameters x examples above which vmap on a CPU only costs memory (measured on ResNet-18)."""
SLOTS, SLOTS_GPU = 16, 1024
"""Candidates at work at a time: more would leave a CPU's cache (measured on LeNets)."""
_PADDED = 3
"""A prepared function has a fixed width; with fewer than a third of it at work, padding costs more than it saves."""
_RECHECKED = 4
"""Rows on which a prepared function that is used again is checked."""
_COMPILING = 30.0
"""Seconds that must be left for a compilation to begin: that of a LeNet takes 7 to 12, and nothing can interrupt it."""


class Given(NamedTuple):
    """What a candidate is compared with; stacked along a first axis for many, None where there is no such thing."""

    params: Any
    buffers: Any
    observed: Any
    scale: Any
    targets: Any
    known: Any


def _stack(items: Sequence[Tensors]) -> tuple[Tensors, int | None]:
    """Stack equal-keyed tensors along a new axis; one shared copy and axis None where all are equal."""
    first = items[0]
    if all(i is first or all(torch.equal(i[k], first[k]) for k in first) for i in items[1:]):
        return first, None
    return {k: torch.stack([i[k] for i in items]) for k in first}, 0


class Group:
    """Problems of equal shape, and the objective and gradient of their candidates.

    Candidate r belongs to problem r // restarts. Its variables are one row: the coordinates of the examples that are
    searched, then the numbers that stand for its targets where these are optimized.
    """

    def __init__(self, problems: Sequence[Problem], attack: GradientMatching) -> None:
        """Stack the problems."""
        self.problems, self.attack, self.first = problems, attack, problems[0]
        p = self.first
        self.space, self.targets = p.observation.space, p.targets
        # Alternative targets are restarts of their own.
        self.restarts = attack.restarts * self.targets.alternatives
        coordinates = attack.coordinates
        self.shape = tuple(self.space.shape if coordinates is None else coordinates.shape(self.space))
        self.like = next(iter(p.params.values()))
        training = p.observation.training
        assert training is not None
        self.training, self.undefended = training, training.simulated
        self.params, params_axis = _stack([q.params for q in problems])
        self.buffers, buffers_axis = _stack([q.buffers for q in problems])
        self.observed, observed_axis = _stack([q.observed for q in problems])
        self.scales = torch.stack([attack.objective.scale(q.observed) for q in problems])
        given = [q.targets.given for q in problems]
        self.given = None if given[0] is None else torch.stack([g for g in given if g is not None])
        known = [q.known for q in problems]
        self.known = None if known[0] is None else torch.stack([k for k in known if k is not None])
        rest = [i for i in range(p.size) if i not in p.free]
        self.order = torch.tensor([*p.free, *rest], device=self.like.device).argsort()
        weight = sum(v.numel() for v in p.params.values()) * p.size
        self.small = weight <= _VMAP_LIMIT  # Bound by starting operations, not by arithmetic.
        targets_axis, known_axis = None if self.given is None else 0, None if self.known is None else 0
        self.axes = Given(params_axis, buffers_axis, observed_axis, 0, targets_axis, known_axis)
        self.batched: Callable[..., tuple[Tensor, Tensor]] = vmap(self.gradient, in_dims=(0, self.axes))
        self.workspace: list[Tensor] = []

    @property
    def unknowns(self) -> int:
        """How many numbers of a row stand for inputs."""
        return len(self.first.free) * torch.Size(self.shape).numel()

    @cached_property
    def vectorize(self) -> bool:
        """Whether candidates are evaluated together; tried once, since not every model can be vmapped.

        Recurrent layers, buffers that are written in place and branches on values cannot.
        """
        wanted = self.like.is_cuda or self.small if self.attack.vectorize is None else self.attack.vectorize
        if not wanted:
            return False
        rows = torch.zeros(2, dtype=torch.long, device=self.like.device)
        functorch: Any = torch._C._functorch
        allowed = functorch._is_vmap_fallback_enabled()
        functorch._set_vmap_fallback_enabled(False)  # It loops as well, more slowly, and warns.
        try:
            self.batched(self.start(0)[rows], self.arguments(rows))
        except (GradleakError, torch.OutOfMemoryError):
            raise
        except Exception:  # noqa: BLE001 - whatever vmap stumbles over, one by one remains
            return False
        finally:
            functorch._set_vmap_fallback_enabled(allowed)
        return True

    def start(self, seed: int) -> Tensor:
        """Draw the starts of all candidates, (P, D), from one generator per observation."""
        attack, rows = self.attack, []
        for i in range(len(self.problems)):
            generator = torch.Generator().manual_seed(seed + 7919 * i)
            for number in range(self.restarts):
                count = len(self.first.free)
                if attack.begin is not None and number == 0:
                    x = self.space.encode(attack.begin.double()).cpu()
                elif attack.coordinates is not None:
                    x = attack.coordinates.start(count, self.space, generator, attack.init_std)
                else:
                    x = self.space.start(count, generator, attack.init_std)
                y = torch.randn(self.targets.size, generator=generator, dtype=torch.float64)
                rows.append(torch.cat([x.flatten().double(), y]))
        return torch.stack(rows).to(self.like)

    def unpack(self, z: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return model inputs (N, *shape) and targets of one candidate row."""
        x = z[: self.unknowns].reshape(len(self.first.free), *self.shape)
        if self.attack.coordinates is not None:
            x = self.attack.coordinates.inputs(x, self.space)
        if given.known is not None:
            x = torch.cat([x, given.known])[self.order]
        return x, self.targets.of(z[self.unknowns :]) if given.targets is None else given.targets

    def compare(self, simulated: Tensors, given: Given, workspace: list[Tensor] | None = None) -> Tensor:
        """Return the objective; under a known defense, of what that defense leaves to be explained."""
        objective, observed = self.attack.objective, given.observed
        if self.training is self.undefended:
            more = () if workspace is None or not objective.reuses else (workspace,)
            return objective(simulated, observed, given.scale, *more)
        residual = self.training.residual(simulated, observed)
        target = {k: (simulated[k] - residual[k]).detach() for k in observed}
        return objective({k: target[k] + residual[k] for k in observed}, target, given.scale)

    def measure(
        self, z: Tensor, given: Given, workspace: list[Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the objective with all priors, the simulated update and the model inputs of one candidate."""
        p = self.first
        x, targets = self.unpack(z, given)
        simulated = self.undefended.tensors(p.model, given.params, x, targets, buffers=given.buffers)
        value = self.compare(simulated, given, workspace)
        if self.attack.priors:
            context = Context(p.model, given.params, given.buffers, x, targets)
            penalty = torch.stack([prior(x, context) for prior in self.attack.priors]).sum()
            value = value * penalty.exp() if self.attack.relative else value + penalty
        return value, simulated, x

    def gradient(self, z: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Return the objective and its gradient (D,) at one candidate row, by functional transforms."""
        gradient, value = grad_and_value(lambda row: self.measure(row, given)[0])(z)
        return value, gradient

    def arguments(self, rows: Tensor | int) -> Given:
        """Return what the candidates ``rows`` are compared with."""
        index = rows // self.restarts

        def pick(items: Tensors, axis: int | None) -> Tensors:
            return items if axis is None else {k: v[index] for k, v in items.items()}

        return Given(
            pick(self.params, self.axes.params),
            pick(self.buffers, self.axes.buffers),
            pick(self.observed, self.axes.observed),
            self.scales[index],
            None if self.given is None else self.given[index, rows % self.targets.alternatives],
            None if self.known is None else self.known[index],
        )

    def looped(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return objectives (A,) and gradients (A, D) of candidates ``rows``, one after another.

        Raises:
            NotApplicable: the update cannot be differentiated with respect to the inputs.
        """
        values, gradients = z.new_empty(len(z)), torch.empty_like(z)
        for j, row in enumerate(rows.tolist()):
            # Plain autograd, here and so in the forward map: functional transforms cost more on one candidate.
            leaf = z[j].detach().requires_grad_()
            with _explained(), nullcontext() if self.small else LeanConvolutions():
                value = self.measure(leaf, self.arguments(row), self.workspace)[0]
                (gradients[j],) = torch.autograd.grad(value, leaf)
            values[j] = value.detach()
        return values, gradients

    def tied(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the penalties (A,) that tie restarts to each other, and their gradients (A, D)."""
        leaf = z.detach().requires_grad_()
        owner = rows // self.restarts
        penalties = z.new_zeros(len(z))
        for i in owner.unique():
            places = (owner == i).nonzero().flatten()
            batches = torch.stack([self.unpack(leaf[j], self.arguments(int(rows[j])))[0] for j in places.tolist()])
            for prior in self.attack.group_priors:
                penalties = penalties.index_add(0, places, prior(batches))
        (gradients,) = torch.autograd.grad(penalties.sum(), leaf)
        return penalties.detach(), gradients

    def key(self, width: int, kind: str) -> Hashable | None:
        """Return what identifies a prepared gradient of ``width`` candidates, None where nothing safely does."""
        p, a = self.first, self.attack
        parts = (a.objective, a.priors, a.relative, a.coordinates)
        found = (kind, width, p.signature(), type(p.model), self.training, *parts)
        named = tuple(p.observed), tuple(p.buffers)
        key = (*found, p.observation.space, self.axes, named, self.like.dtype, self.like.device)
        try:
            hash(key)
        except TypeError:
            return None
        return key


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what PyTorch says of a model that cannot be differentiated twice into one sentence."""
    try:
        yield
    except (GradleakError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise NotApplicable(
            "Matching differentiates the client's update with respect to the inputs, and this model or loss does not "
            f"allow that ({reason(error)}); use an attack that solves instead (gradleak list attacks), or write "
            "the operation so that it can be differentiated twice."
        ) from error


class Evaluator:
    """Objectives and gradients of the candidates at work, by the backend that the attack asks for."""

    def __init__(self, group: Group, width: int, deadline: Deadline) -> None:
        """Prepare for at most ``width`` candidates at a time, or one after another where the group cannot vectorize."""
        self.group, self.width, self.deadline = group, width, deadline
        self.function: backends.Function | None = None
        self.notes: list[str] = []
        self._gathered: tuple[Tensor | None, Any] = (None, None)
        self._flat: tuple[Tensor | None, list[Tensor]] = (None, [])
        self._ready = group.attack.backend == "eager"

    def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return objectives (A,) and gradients (A, D) of candidates ``rows`` at ``z`` (A, D)."""
        values, gradients = self._alone(z, rows)
        if self.group.attack.group_priors:
            more = self.group.tied(z, rows)
            values, gradients = values + more[0], gradients + more[1]
        return values, gradients

    def _alone(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self._ready:
            self._ready = True
            return self._prepare(z, rows)
        if self.function is not None and _PADDED * len(rows) >= self.width:
            return self._call(self.function, z, rows)
        return self._plain(z, rows)

    def _call(self, function: backends.Function, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.width > 1:
            values, gradients = function(*self._arguments(z, rows))
            return values[: len(rows)], gradients[: len(rows)]
        found = [function(*self._arguments(z[j : j + 1], rows[j : j + 1])) for j in range(len(rows))]
        return torch.cat([v for v, _ in found]), torch.cat([g for _, g in found])

    def _plain(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        group = self.group
        if len(rows) == 1 or not group.vectorize:
            return group.looped(z, rows)
        if self._gathered[0] is not rows:  # Rows change when problems come and go; copies are reused meanwhile.
            self._gathered = rows, group.arguments(rows)
        values, gradients = group.batched(z, self._gathered[1])
        return values.detach(), gradients.detach()

    def _arguments(self, z: Tensor, rows: Tensor) -> list[Tensor]:
        """Return the flat list of tensors that the prepared function takes, padded to its width."""
        missing = self.width - len(rows)
        if self._flat[0] is not rows:
            full = torch.cat([rows, rows[-1:].expand(missing)]) if missing else rows
            leaves = pytree.tree_leaves(self.group.arguments(full))
            self._flat = rows, [t for t in leaves if isinstance(t, Tensor)]
        z = torch.cat([z, z[-1:].expand(missing, -1)]) if missing else z
        return [z, *self._flat[1]]

    def _prepare(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Trace or compile, and check the result against the eager gradient.

        What is new is checked on all rows; what has passed before, for another observation, on a few.
        """
        kind = self.group.attack.backend
        key = self.group.key(self.width, kind)
        function = backends.prepared(key)
        fresh = function is None
        few = slice(None) if fresh else slice(_RECHECKED)
        plain = self._plain(z[few], rows[few])
        if function is None:
            function = self._made(kind, self._arguments(z[: self.width], rows[: self.width]))
        if function is None:
            return plain
        found = self._call(function, z, rows)
        if backends.agree((found[0][few], found[1][few]), plain):
            self.function = function
            if fresh:
                backends.remember(key, function)
            return found
        self.notes.append("The prepared gradient disagreed with the eager one and was not used.")
        return plain if fresh else self._plain(z, rows)

    def _made(self, kind: str, arguments: list[Tensor]) -> backends.Function | None:
        if self.deadline.left() < _COMPILING:
            self.notes.append("The gradient was not prepared, since the time budget leaves no time for it.")
            return None
        try:
            graph = backends.traced(self._function(), arguments)
            return backends.compiled(graph, arguments) if kind == "compile" else graph
        except Exception as error:  # noqa: BLE001 - whatever a compiler stumbles over, the eager gradient remains
            why = f"{type(error).__name__}: {reason(error)}"
            self.notes.append(f"The gradient could not be prepared ({why}); it ran eagerly.")
            return None

    def _function(self) -> backends.Function:
        group = self.group
        leaves, spec = pytree.tree_flatten(group.arguments(torch.zeros(self.width, dtype=torch.long)))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def function(z: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
            filled: list[Any] = [None] * len(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            return group.batched(z, pytree.tree_unflatten(filled, spec))

        return function
