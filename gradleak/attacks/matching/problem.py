"""What is searched for: the inputs of one observation, and its labels where they are not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradleak.attacks.labeling import estimate_labels
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.threat import Observation
from gradleak.training import (
    CrossEntropy,
    Loss,
    Simulator,
    TargetKind,
    Tensors,
    class_axis,
    relax,
    soft_labels,
    target_kind,
)
from gradleak.training.simulate import cast, cast_one
from gradleak.types import Note, NoteKind

if TYPE_CHECKING:
    from gradleak.attacks.matching.engine import GradientMatching

__all__ = ["Fixed", "Problem", "Targets"]

_TRIED = 20
"""Classes up to which each is tried in turn for a lone example whose label nothing shows: every class is one more
start, so ten classes take ten times as long. Beyond, the label is optimized beside the input."""
_ARRANGED = 24
"""Ways to pair granted labels with known examples up to which each is tried: all orders of four examples."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """Examples of a batch that are known already, around which the others are searched.

    Of the decoded ``inputs`` (N, *shape) only the rows in ``mask`` (N,) count. ``labels`` (N, ...) are those of all
    rows, in this order, as the loss takes them; None where they are not known, or their order is not.
    """

    inputs: Tensor
    mask: Tensor
    labels: Tensor | None = None

    def check(self, observation: Observation) -> None:
        """Check that rows, mask and labels fit each other and the batch.

        Raises:
            InvalidInput: they do not.
        """
        n = observation.batch_size
        sizes = {len(self.inputs), len(self.mask), n} | ({len(self.labels)} if self.labels is not None else set())
        if len(sizes) > 1 or self.mask.dtype != torch.bool or self.mask.ndim != 1:
            raise InvalidInput(
                f"{len(self.inputs)} inputs, a mask of shape {tuple(self.mask.shape)} and a batch of {n} do not fit; "
                "pass one row, one boolean and (if any) one label for every example of the batch."
            )
        if not bool(torch.isfinite(self.inputs[self.mask].double()).all()):
            raise InvalidInput("A known row has values that are not finite; leave it out of the mask.")


@dataclass(frozen=True, eq=False)
class Targets:
    """What the loss compares the outputs with.

    Attributes:
        kind: how targets look; None where a model of several outputs does not tell.
        shape: of the numbers that are optimized; () where targets are given.
        axis: of the classes.
        given: (K, N, ...) known targets, or K alternatives of which the objective chooses; None where optimized.
    """

    kind: TargetKind | None = None
    shape: tuple[int, ...] = ()
    axis: int = 1
    given: Tensor | None = None

    @property
    def size(self) -> int:
        """How many numbers are optimized."""
        return 0 if self.given is not None else torch.Size(self.shape).numel()

    @property
    def alternatives(self) -> int:
        """How many given targets there are to choose from."""
        return 1 if self.given is None else len(self.given)

    def of(self, z: Tensor) -> Tensor:
        """Return the targets that numbers ``z`` (size,) stand for."""
        assert self.kind is not None
        return relax(self.kind, z.reshape(self.shape), self.axis)


@dataclass(frozen=True, eq=False)
class Problem:
    """One observation, cast to the number type of the search; tensors by name.

    Attributes:
        buffers: buffers and frozen parameters.
        observed: the update, in the order of ``params``.
        known: (K, *shape) model inputs of the known examples, None for none.
        free: indices of the examples that are searched.
        notes: what a reader must know.
    """

    observation: Observation
    params: Tensors
    buffers: Tensors
    observed: Tensors
    targets: Targets
    known: Tensor | None
    free: tuple[int, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, observation: Observation, attack: GradientMatching, seed: int) -> Problem:
        """Cast the observation, and find out how its labels are to be had."""
        fixed, simulator = attack.fixed, observation.simulator
        dtype, notes = attack.dtype or simulator.dtype, list[str]()
        probe = torch.randn(
            (observation.batch_size or 1, *observation.space.shape),
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float64,
        ).to(simulator.device)
        simulator.check(probe)
        try:
            with torch.no_grad():
                outputs = simulator.outputs(probe, dtype)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or dtype == simulator.dtype:
                raise
            names = [str(t).removeprefix("torch.") for t in (dtype, simulator.dtype)]
            text = f"The model does not compute in {names[0]}, so it was searched in {names[1]}."
            notes.append(Note(text, NoteKind.METHOD))
            dtype = simulator.dtype
            with torch.no_grad():
                outputs = simulator.outputs(probe, dtype)
        params = simulator.params(dtype)
        buffers = {k: b.clone() for k, b in simulator.buffers(dtype).items()}  # some models write into theirs
        shared = observation.update.tensors
        # In the order of the parameters, whatever the file's was: prepared gradients take their tensors by position.
        order = [*(k for k in params if k in shared), *(k for k in shared if k not in params)]
        observed = {k: shared[k].to(device=simulator.device, dtype=dtype) for k in order}
        n, known = observation.batch_size or 1, None
        free = tuple(range(n))
        if fixed is not None:
            fixed.check(observation)
            free = tuple((~fixed.mask).nonzero().flatten().tolist())
            solved = fixed.inputs[fixed.mask].to(simulator.device)
            known = cast_one(observation.space.encode(cast_one(solved, dtype)), dtype)
        targets = _targets(observation, attack, simulator, outputs, dtype, seed, notes)
        return cls(observation, params, buffers, observed, targets, known, free, tuple(notes))

    @property
    def model(self) -> nn.Module:
        """The model that was sent out."""
        return self.observation.model

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.observation.batch_size or 1

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem in another number type."""
        given = None if self.targets.given is None else cast_one(self.targets.given, dtype)
        return replace(
            self,
            params=cast(self.params, dtype),
            buffers=cast(self.buffers, dtype),
            observed=cast(self.observed, dtype),
            targets=replace(self.targets, given=given),
            known=None if self.known is None else self.known.to(dtype),
        )

    def signature(self) -> object:
        """Problems with equal signatures can share one vmapped evaluation."""
        o, t = self.observation, self.targets
        shapes = tuple((k, tuple(v.shape), v.dtype, v.device) for k, v in self.params.items())
        given = None if t.given is None else (tuple(t.given.shape), t.given.dtype)
        # The computation of two models is taken to be the same when their printed structures are.
        return (repr(self.model), shapes, o.space.shape, self.size, repr(o.training), t.kind, t.shape, given, self.free)


def _targets(
    observation: Observation,
    attack: GradientMatching,
    simulator: Simulator,
    outputs: Any,
    dtype: torch.dtype,
    seed: int,
    notes: list[str],
) -> Targets:
    """Return the targets: granted, recovered, tried in turn, or optimized, in this order."""
    fixed, loss, device = attack.fixed, simulator.undefended.loss, simulator.device
    granted = observation.labels if fixed is None or fixed.labels is None else fixed.labels
    if granted is not None:
        # As the client's loss took them: some losses differ for indices and for the probabilities that equal them.
        given: Tensor | None = granted.to(device)[None]
        if fixed is not None and fixed.labels is None:  # Examples are solved in an order of their own.
            given = _arrangements(granted.to(device), fixed.mask.nonzero().flatten().tolist())
        if given is not None:
            kind = target_kind(loss, outputs) if isinstance(outputs, Tensor) else None
            return Targets(kind, axis=class_axis(loss), given=cast_one(given, dtype))
        text = "Which granted label belongs to which known example is not known, so the labels were optimized."
        notes.append(Note(text, NoteKind.LABELS))
    if not isinstance(outputs, Tensor):
        raise NotApplicable(
            f"The model returns a {type(outputs).__name__}, and how the labels of its parts look is not known, so they "
            "cannot be searched; grant LABELS in the threat model (command line: --labels)."
        )
    why = ""
    if attack.labels == "recovered" and fixed is None:  # Rows that are known have labels of their own, in their order.
        try:
            labels = _recovered(observation, simulator, seed, notes)
            return Targets(TargetKind.CLASSES, given=labels.to(device)[None])
        except NotApplicable as reason:
            why = str(reason)
    kind = target_kind(loss, outputs)
    axis = class_axis(loss) if kind is TargetKind.CLASSES else 1
    n, classes = len(outputs), outputs.shape[axis] if outputs.ndim > 1 else 1
    optimizable = outputs.ndim > 0 and n == observation.batch_size and _optimizable(loss, kind, outputs, axis)
    lone = kind is TargetKind.CLASSES and outputs.ndim == 2 and n == 1 and classes <= _TRIED
    if lone and fixed is None and (why or not optimizable):
        text = f"No label could be read off the update, so each of the {classes} classes was tried and the objective "
        text += "chose."
        notes.append(Note(text, NoteKind.LABELS))
        return Targets(kind, given=torch.arange(classes, device=device)[:, None])
    if not optimizable and kind is not TargetKind.CLASSES:
        raise NotApplicable(
            f"The loss does not take targets of the outputs' shape {tuple(outputs.shape)}, so unknown labels cannot be "
            "searched; grant LABELS in the threat model (command line: --labels)."
        )
    if not optimizable:
        raise NotApplicable(
            "The loss gives other values for class indices than for the same classes as probabilities, or takes no "
            "probabilities, so unknown labels cannot be optimized; grant LABELS, or state a loss that takes both, such "
            "as gl.CrossEntropy(weight=...)."
        )
    if why:
        text = "Labels could not be read off the update, so they were optimized beside the inputs."
        notes.append(Note(text, NoteKind.LABELS))
    return Targets(kind, tuple(outputs.shape), axis)


def _arrangements(labels: Tensor, known: Sequence[int]) -> Tensor | None:
    """Return the distinct ways (K, N, ...) to give each known row one of ``labels`` (N, ...); None where too many."""
    names = [tuple(row.flatten().tolist()) for row in labels]
    found: list[tuple[int, ...]] = []

    def extend(chosen: tuple[int, ...]) -> None:
        if len(found) > _ARRANGED:
            return
        if len(chosen) == len(known):
            found.append(chosen)
            return
        left = {names[i]: i for i in reversed(range(len(names))) if i not in chosen}
        for i in sorted(left.values()):
            extend((*chosen, i))

    extend(())
    if len(found) > _ARRANGED:
        return None
    orders = []
    for chosen in found:
        places, rest = dict(zip(known, chosen, strict=True)), (i for i in range(len(names)) if i not in chosen)
        orders.append([places[row] if row in places else next(rest) for row in range(len(names))])
    return labels[torch.tensor(orders, device=labels.device)]


def _recovered(observation: Observation, simulator: Simulator, seed: int, notes: list[str]) -> Tensor:
    estimate = estimate_labels(observation, torch.Generator().manual_seed(seed))
    if not estimate.exact and getattr(simulator.undefended.loss, "weight", None) is not None:
        raise NotApplicable("Class counts are estimated for equal class weights only; grant the labels.")
    if not estimate.exact:
        notes.append(Note(f"Labels were estimated, not proved: {estimate.reason}", NoteKind.LABELS))
    return torch.as_tensor(estimate.labels)


def _optimizable(loss: Loss, kind: TargetKind, outputs: Tensor, axis: int) -> bool:
    """Tell whether the loss takes relaxed targets, and gives probabilities of one class what its index gives."""
    if isinstance(loss, CrossEntropy):
        return True

    def value(targets: Tensor) -> float | None:
        try:
            return float(loss(outputs, targets))
        except Exception:  # noqa: BLE001 - it is the user's function, which may raise anything
            return None

    with torch.no_grad():
        if value(relax(kind, torch.zeros_like(outputs), axis)) is None:
            return False
        if kind is not TargetKind.CLASSES:
            return True
        shape = outputs.movedim(axis, -1).shape[:-1]
        labels = torch.arange(shape.numel(), device=outputs.device).view(shape) % outputs.shape[axis]
        hard = value(labels)
        soft = value(soft_labels(labels, outputs.shape[axis], outputs.dtype, axis))
    return hard is None or (soft is not None and abs(hard - soft) <= 1e-4 * abs(hard) + 1e-12)
