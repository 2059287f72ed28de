"""Several local steps: the update of federated averaging, unrolled."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput
from gradleak.training.base import LocalTraining, Tensors, gradient, tracks_statistics
from gradleak.training.checkpoint import checkpoint
from gradleak.training.losses import CrossEntropy, Loss, as_loss
from gradleak.training.optimizers import SGD, Optimizer
from gradleak.training.private import PerExample
from gradleak.types import UpdateKind

__all__ = ["FedAvg"]

Carry = dict[str, dict[str, Tensor]]
"""What one step hands to the next: "displacement" of the parameters, and the optimizer's slots."""
_Steps = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class FedAvg(LocalTraining):
    """Local training for several steps (McMahan et al. 2017, Algorithm 1), as one differentiable function.

    The update is the weight delta, after minus before. It is summed up as a displacement, so a small step on large
    weights loses no digits; ``as_weights`` adds the rounding of clients that subtract stored weights.

    Attributes:
        lr: step size of plain SGD; None where ``optimizer`` brings its own.
        epochs: passes over the batch; on one example, the number of steps.
        batch_size: examples per step, None for all; the last batch of an epoch may be smaller.
        optimizer: the client's optimizer with its step size, started afresh; None for plain SGD with ``lr``.
        steps: number of steps in all, instead of ``epochs`` (further epochs begin as needed).
        shuffle: seed of the order of the examples, drawn anew for every epoch; None keeps the order of the batch.
        loss: any differentiable (outputs, targets) → scalar, of one minibatch.
        checkpoint: recompute the steps in the backward pass instead of storing them: memory of about one step and
            2 √steps copies of the parameters, against about twice the time.
        as_weights: take the difference of weights rounded to their own number format, as a real client does; in
            float32 that rounding (6e-8 of a weight) can reach a percent of a small step.
        private: how each local step clips and noises, as DP-SGD does; None for plain gradients.

    Raises:
        InvalidInput: neither or both of ``lr`` and ``optimizer``, or a count below 1.
    """

    lr: float | None = None
    epochs: int = 1
    batch_size: int | None = None
    optimizer: Optimizer | None = None
    steps: int | None = None
    shuffle: int | None = None
    loss: Loss = field(default_factory=CrossEntropy)
    checkpoint: bool = False
    as_weights: bool = False
    private: PerExample | None = None

    kind = UpdateKind.WEIGHT_DELTA

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", as_loss(self.loss))
        if (self.lr is None) == (self.optimizer is None):
            raise InvalidInput("FedAvg takes its step size from lr or from optimizer; give exactly one of the two.")
        self.rule  # noqa: B018 - an unusable lr is refused here rather than in the first step
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size), ("steps", self.steps)):
            if value is not None and value < 1:
                raise InvalidInput(f"FedAvg cannot use {name}={value}; give a number of at least 1.")

    @property
    def rule(self) -> Optimizer:
        """The optimizer in use."""
        return SGD(self.lr) if self.optimizer is None and self.lr is not None else self.optimizer  # type: ignore[return-value]

    def count(self, examples: int) -> int:
        """Return the number of local steps on a batch of ``examples``."""
        return self.steps or self.epochs * math.ceil(examples / (self.batch_size or examples))

    def batches(self, examples: int) -> tuple[tuple[int, ...], ...]:
        """Return the indices of the examples that enter each step, in order."""
        return _schedule(examples, self.batch_size or examples, self.count(examples), self.shuffle)

    def known(self, *, order: bool = False) -> FedAvg:
        """Return the map without the seeds of noise and, unless the order is known, of shuffling."""
        private = None if self.private is None else replace(self.private, seed=None)
        return replace(self, private=private, shuffle=self.shuffle if order else None)

    @property
    def undefended(self) -> FedAvg:
        """The same steps on plain gradients."""
        return self if self.private is None else replace(self, private=None)

    @property
    def simulated(self) -> FedAvg:
        """Itself, without the seed of its noise: examples are clipped before their gradients are summed."""
        if self.private is None or self.private.seed is None:
            return self
        return replace(self, private=replace(self.private, seed=None))

    def reseed(self, seed: int) -> FedAvg:
        """Return the map with another order and fresh noise, where there are such."""
        private = None if self.private is None else replace(self.private, seed=seed)
        return replace(self, private=private, shuffle=None if self.shuffle is None else seed)

    def deviation(self, observed: Tensors) -> dict[str, Tensor]:
        """Return the standard deviation of the noise per coordinate, as plain SGD sums it up (batch of one step)."""
        size = 0.0
        if self.private is not None:
            steps = self.steps or self.epochs
            size = self.private.deviation(self.loss) * getattr(self.rule, "lr", 0.0) * math.sqrt(steps)
        return {k: torch.full_like(o, size) for k, o in observed.items()}

    def run(
        self, model: nn.Module, params: Tensors, inputs: Tensor, labels: Tensor, buffers: Tensors | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return parameters after minus before, by name, and the buffers after the last step."""
        carry: Carry = {"displacement": {k: torch.zeros_like(p) for k, p in params.items()}, **self.rule.start(params)}
        buffers = dict(buffers or {})
        schedule = list(enumerate(self.batches(inputs.shape[0])))
        # Running statistics are handed from step to step, and only clients have them: they store nothing anyway.
        if self.checkpoint and not tracks_statistics(model):
            carry = self._recomputed(model, params, carry, buffers, inputs, labels, schedule)
        else:
            for index, chosen in schedule:
                carry, buffers = self._step(model, index, chosen, params, carry, buffers, inputs, labels)
        moved = carry["displacement"]
        if self.as_weights:
            moved = {k: (params[k] + d) - params[k] for k, d in moved.items()}
        return moved, buffers

    def _step(
        self,
        model: nn.Module,
        index: int,
        chosen: tuple[int, ...],
        params: Tensors,
        carry: Carry,
        buffers: dict[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
    ) -> tuple[Carry, dict[str, Tensor]]:
        moved = carry["displacement"]
        now = {k: p + moved[k] for k, p in params.items()} if index else dict(params)
        x, y = _take(inputs, chosen), _take(labels, chosen)
        if self.private is None:
            gradients, buffers = gradient(model, self.loss, now, x, y, buffers or None)
        else:
            gradients = self.private.gradient(model, self.loss, now, x, y, buffers or None, index)
        state = {slot: values for slot, values in carry.items() if slot != "displacement"}
        change, state = self.rule.step(index, now, gradients, state)
        return {"displacement": {k: moved[k] + c for k, c in change.items()}, **state}, buffers

    def _recomputed(
        self,
        model: nn.Module,
        params: Tensors,
        carry: Carry,
        buffers: dict[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
        schedule: list[tuple[int, tuple[int, ...]]],
    ) -> Carry:
        # Two levels: √k segments keep their first carry, and one segment at a time keeps that of each of its steps.
        slots = [(slot, name) for slot, values in carry.items() for name in values]
        fixed = (*params.values(), *buffers.values(), inputs, labels)

        def pack(values: tuple[Tensor, ...]) -> Carry:
            packed: Carry = {}
            for (slot, name), value in zip(slots, values, strict=True):
                packed.setdefault(slot, {})[name] = value
            return packed

        def unpack(values: Carry) -> tuple[Tensor, ...]:
            return tuple(values[slot][name] for slot, name in slots)

        def step(index: int, chosen: tuple[int, ...]) -> _Steps:
            def run(*values: Tensor) -> tuple[Tensor, ...]:
                given: Iterator[Tensor] = iter(values[len(slots) :])
                p = {k: next(given) for k in params}
                b = {k: next(given) for k in buffers}
                x, y = given
                return unpack(self._step(model, index, chosen, p, pack(values[: len(slots)]), b, x, y)[0])

            return run

        def segment(part: list[tuple[int, tuple[int, ...]]]) -> _Steps:
            def run(*values: Tensor) -> tuple[Tensor, ...]:
                state, rest = values[: len(slots)], values[len(slots) :]
                for index, chosen in part:
                    state = checkpoint(step(index, chosen), *state, *rest)
                return state

            return run

        length = math.ceil(math.sqrt(len(schedule)))
        state = unpack(carry)
        for start in range(0, len(schedule), length):
            state = checkpoint(segment(schedule[start : start + length]), *state, *fixed)
        return pack(state)


def _take(values: Tensor, chosen: tuple[int, ...]) -> Tensor:
    if len(chosen) == values.shape[0]:  # the loss of a whole batch does not depend on its order
        return values
    if chosen == tuple(range(chosen[0], chosen[0] + len(chosen))):
        return values[chosen[0] : chosen[0] + len(chosen)]
    return values[torch.tensor(chosen, device=values.device)]


@lru_cache(maxsize=256)
def _schedule(examples: int, size: int, steps: int, seed: int | None) -> tuple[tuple[int, ...], ...]:
    # Python's generator, not torch's: vmap refuses random torch functions, and no tensor has to be made.
    generator = None if seed is None else random.Random(seed)
    batches: list[tuple[int, ...]] = []
    while len(batches) < steps:
        order = list(range(examples))
        if generator is not None:
            generator.shuffle(order)
        batches += [tuple(order[i : i + size]) for i in range(0, examples, size)]
    return tuple(batches[:steps])
