"""How far a simulated update is from the observed one: a scalar to be minimized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradleak.training import Tensors

__all__ = ["BalancedError", "Cosine", "Objective", "SquaredError"]

_TINY = 1e-30


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([torch.dot(a[k].reshape(-1), b[k].reshape(-1)) for k in b]).sum()


def _distances(simulated: Tensors, observed: Tensors) -> Tensor:
    """Return the squared distance of every tensor, one number each."""
    return torch.stack([(simulated[k] - v).square().sum() for k, v in observed.items()])


class Objective(ABC):
    """A distance between updates.

    Attributes:
        reuses: whether calling takes a fourth argument, a list that is empty at first: numbers as large as the update
            that the next call may overwrite. Asking the system for fresh memory costs more than writing to it.
    """

    reuses: ClassVar[bool] = False

    @abstractmethod
    def scale(self, observed: Tensors) -> Tensor:
        """Return the scalar that depends on the observation alone, computed once per run."""

    @abstractmethod
    def __call__(self, simulated: Tensors, observed: Tensors, scale: Tensor) -> Tensor:
        """Return the distance; zero where the updates agree."""


@dataclass(frozen=True)
class SquaredError(Objective):
    """‖∇W′ − ∇W‖² / ‖∇W‖² (Zhu et al. 2019, Equation 4).

    Deviation: divided by the squared norm of the observation, which moves no minimum and makes values comparable.
    """

    def scale(self, observed: Tensors) -> Tensor:
        """Return 1 / ‖∇W‖²."""
        return 1 / _dot(observed, observed).clamp_min(_TINY)

    def __call__(self, simulated: Tensors, observed: Tensors, scale: Tensor) -> Tensor:
        """Return the relative squared distance."""
        # Not _dot: under vmap, its float32 sum over a whole layer loses four digits, and a line search sees that.
        return _distances(simulated, observed).sum() * scale


@dataclass(frozen=True)
class BalancedError(Objective):
    """Squared error in which no tensor drowns the others: Σ ‖∇Wₖ′ − ∇Wₖ‖² / ‖∇Wₖ‖ᵖ, divided by Σ ‖∇Wₖ‖²⁻ᵖ.

    In a language model the gradient of the head is up to a million times that of the first layers, which know most
    about the input. Tensors far below the others are rounding (a key's bias has no gradient at all): their norm is
    taken to be at least ``floor`` times that of the whole update. ``power`` is p: 0 is :class:`SquaredError`, 2 gives
    every tensor the same weight.
    """

    power: float = 1.5
    floor: float = 1e-7

    def _shares(self, observed: Tensors) -> Tensor:
        """Return ‖∇Wₖ‖ / ‖∇W‖, at least ``floor``."""
        squares = torch.stack([v.square().sum() for v in observed.values()])
        # The lower bound keeps powers of it above what float32 can write.
        return (squares / squares.sum().clamp_min(_TINY)).sqrt().clamp_min(max(self.floor, 1e-15))

    def scale(self, observed: Tensors) -> Tensor:
        """Return 1 / (‖∇W‖ᵖ Σ ‖∇Wₖ‖²⁻ᵖ)."""
        shares = (self._shares(observed) ** (2 - self.power)).sum()
        return 1 / (shares * _dot(observed, observed).clamp_min(_TINY))

    def __call__(self, simulated: Tensors, observed: Tensors, scale: Tensor) -> Tensor:
        """Return the balanced relative squared distance."""
        return (_distances(simulated, observed) / self._shares(observed) ** self.power).sum() * scale


@dataclass(frozen=True)
class Cosine(Objective):
    """1 − ⟨∇W′, ∇W⟩ / (‖∇W′‖ ‖∇W‖) over all parameters together (Geiping et al. 2020, Equation 4)."""

    reuses: ClassVar[bool] = True

    def scale(self, observed: Tensors) -> Tensor:
        """Return 1 / ‖∇W‖."""
        return _dot(observed, observed).clamp_min(_TINY).rsqrt()

    def __call__(
        self, simulated: Tensors, observed: Tensors, scale: Tensor, workspace: list[Tensor] | None = None
    ) -> Tensor:
        """Return one minus the cosine similarity, in [0, 2]."""
        names = list(observed)
        ours, theirs = [simulated[k] for k in names], [observed[k] for k in names]
        compare: Any = _Similarity.apply
        cosine: Tensor = compare(scale, len(names), workspace, *ours, *theirs)[0]
        return 1 - cosine


class _Similarity(torch.autograd.Function):
    """⟨a, b⟩ / ‖a‖ · scale, with the derivative in a in two passes over the numbers instead of five; b is constant.

    The dot product and ‖a‖² are outputs as well, so that second derivatives are right too. On ResNet-18 with one
    example, automatic differentiation of the two dot products was a fifth of an iteration.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        scale: Tensor, count: int, workspace: list[Tensor] | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ours, theirs = ({str(i): t for i, t in enumerate(part)} for part in (tensors[:count], tensors[count:]))
        product, square = _dot(ours, theirs), _dot(ours, ours).clamp_min(_TINY)
        return product * square.rsqrt() * scale, product, square

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.count, ctx.workspace = inputs[1:3]
        ctx.save_for_backward(inputs[0], *output[1:], *inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, product, square, *tensors = ctx.saved_tensors
        slope = grads[0] * scale * square.rsqrt()
        along, against = slope + grads[1], 2 * grads[2] - slope * product / square
        ours, theirs = tensors[: ctx.count], tensors[ctx.count :]
        if ctx.workspace is None or torch.is_grad_enabled():  # the latter for a third derivative
            found = [torch.addcmul(b * along, a, against.expand_as(a)) for a, b in zip(ours, theirs, strict=True)]
        else:
            found = ctx.workspace
            found.extend(torch.empty_like(a) for a in ours[len(found) :])
            for out, a, b in zip(found, ours, theirs, strict=True):
                torch.mul(b, along, out=out).addcmul_(a, against.expand_as(a))
        return (None, None, None, *found, *(None for _ in found))
