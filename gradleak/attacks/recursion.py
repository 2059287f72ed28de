"""The exact attack: solve the network backward, layer by layer, for one example or for a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback, Progress, is_signs, present
from gradleak.attacks.disaggregation import disaggregate
from gradleak.attacks.labeling import order_as_granted, read_labels
from gradleak.attacks.least_squares import Problem, search
from gradleak.attacks.peeling import Separated, separate_batch
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.exact.one_example import RecursionResult, invert_layers
from gradleak.proof.alternatives import tells_examples_apart
from gradleak.spaces import ImageSpace
from gradleak.structure.chain import Affine, Chain, Elementwise, Maximum
from gradleak.structure.reader import trace_chain
from gradleak.threat import Knowledge, Observation
from gradleak.training import CrossEntropy
from gradleak.types import Construction, Note, NoteKind, Reconstruction, Status

__all__ = ["Recursion", "check", "from_layers", "hides", "invert_batch", "recursion", "solved"]


@final
@dataclass(frozen=True)
class Recursion(Attack):
    """Inverts an update layer by layer; made by :func:`recursion`, which says its options."""

    polish: bool = True
    quick: bool = True

    requires = Knowledge.BATCH_SIZE

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        begin = time.monotonic()

        def going() -> bool:
            if time.monotonic() - begin > _PROMPT:
                callback(Progress(0, 1, math.inf, "solving a layer"))  # It raises to end the attack.
            return True

        if observation.batch_size != 1:
            return invert_batch(observation, seed=seed, going=going)
        check(observation)
        shape = tuple(observation.space.shape)
        chain = trace_chain(observation.model, shape)
        result = invert_layers(
            observation.model,
            dict(observation.model.named_parameters()),
            observation.gradient.tensors,
            shape,
            chain=chain,
            polish=self.polish,
            quick=self.quick,
            smooth=isinstance(observation.space, ImageSpace),
            seed=seed,
            going=going,
        )
        if result.input is not None:
            return from_layers(observation, result, chain, _BACKWARD)
        if result.start is None:
            raise NotApplicable(f"The recursion stops: {result.stopped_at}; use matching.")
        note = Note(f"The recursion stops: {result.stopped_at}; what lies behind is its best guess.", NoteKind.LIMIT)
        found = from_layers(observation, result, chain, _BACKWARD)
        return replace(found, notes=(note, *found.notes))


def from_layers(
    observation: Observation, result: RecursionResult, chain: Chain | None, statement: str, *, local: bool = False
) -> Reconstruction:
    """Return the input that solving layers led to, or the start that it left, as a reconstruction.

    It is called exact where the layers' equations hold down to rounding, nothing before them hides the input, and the
    update is evidence of a single example.
    """
    value = result.start if result.input is None else result.input
    assert value is not None
    inputs = value[None]
    rounding = _rounding(observation)
    hidden = None if chain is None else hides(chain, inputs)
    solved = result.input is not None and hidden is None
    plain = solved and result.noise <= 16 * rounding and result.residual <= _FLOOR * rounding
    labels, soft = None if result.label is None else torch.tensor([result.label]), None
    loss = observation.simulator.undefended.loss
    smoothed = isinstance(loss, CrossEntropy) and loss.label_smoothing > 0
    if plain and (labels is None or smoothed):  # Then the signs do not tell it.
        with suppress(InvalidModel):
            labels, soft = read_labels(observation, inputs)
    alone = not solved or chain is None
    if chain is not None and solved:
        # Whether the layer where the recursion starts is evidence of a single example.
        tensors, along = observation.update.tensors, None
        name = chain.anchor.bias_name or ""
        seen = tensors.get(name)
        if seen is None:
            name, along = chain.anchor.weight_name, result.features
            seen = tensors[name].double() @ along
        alone = tells_examples_apart(observation.simulator, name, seen, inputs, along)
    exact = plain and (alone or _agrees(observation, inputs, labels if soft is None else soft))
    construction = None
    if solved and not math.isnan(result.spread):
        # A residual of zero is luck: nothing is known better than to the rounding of the numbers it came from.
        error = max(result.spread**0.5, rounding * float(value.square().mean().sqrt()))
        if chain is not None and any(isinstance(s, Maximum) for s in chain.steps):
            statement, local = f"{statement}{_SEARCHED}", True
        construction = Construction(value.numel(), error, statement, local, alone)
    decoded, why = present(observation, inputs, exact=exact)
    notes = [*(n for n in (why, hidden) if n is not None), *map(str, result.layers)]
    if solved and not plain:
        notes.append(
            f"The layers' equations hold to {result.residual:.1e} and the update deviates from an outer product by "
            f"{result.noise:.1e}; that is above rounding, so it is not the plain gradient of one example."
        )
    return Reconstruction(
        decoded,
        labels,
        result.residual**2,
        label_probabilities=soft,
        status=Status.EXACT if exact else Status.STALLED,
        iterations=result.steps,
        notes=tuple(n if isinstance(n, Note) else Note(n) for n in notes),
        features=result.features[None] if result.head else None,
        construction=construction,
        solved=torch.tensor([exact]),
    )


def _rounding(observation: Observation) -> float:
    return float(torch.finfo(next(iter(observation.update.tensors.values())).dtype).eps)


def _agrees(observation: Observation, inputs: Tensor, labels: Tensor | None) -> bool:
    """Tell whether the update re-simulated with the client's own scale agrees down to rounding."""
    if labels is None or not observation.simulator.known:
        return False
    return observation.simulator.relative(inputs, labels, observation.update.tensors) <= _FLOOR * _rounding(observation)


def hides(chain: Chain, inputs: Tensor) -> str | None:
    """Return which activation before the first layer hides the input at ``inputs`` (N, *shape), None if none does."""
    for step in chain.steps:
        if isinstance(step, Affine):
            return None
        if isinstance(step, Maximum):
            return f"{step.name!r} stands before the first layer and shows the largest values only."
        if isinstance(step, Elementwise) and not step.affine:
            flat = inputs.double().reshape(len(inputs), -1)
            slopes = torch.stack([step.derivatives(row)[0] for row in flat])
            if step.clips or float(slopes.abs().min()) < _FLAT:
                return f"{step.name!r} stands before the first layer and hides values where it is flat."
        inputs = step.forward(inputs.double(), {})
    return None


_FLAT = 1e-4
"""Derivative of an activation on the input below which float32 does not tell the input any longer."""


def invert_batch(observation: Observation, *, seed: int = 0, going: Callable[[], bool] | None = None) -> Reconstruction:
    """Return every example of a batch where the equations of all layers determine them.

    Raises:
        NotApplicable: they do not, as counted beforehand or as solved; the update is not one gradient of
            cross-entropy, how the client trained is not known, or ``going``, asked where a layer takes long, said no.
    """
    if Knowledge.TRAINING not in observation.knows or observation.training is None:
        raise NotApplicable(
            "The recursion of a batch takes the client's loss (TRAINING); grant it in the threat model."
        )
    separated = separate_batch(observation, disaggregate(), seed=seed, whole=True, going=going)
    peeled = separated.peeled
    assert peeled is not None  # Or counting would have refused.
    if peeled.stop is not None:
        raise NotApplicable(
            f"The recursion of {observation.batch_size} examples stops: {peeled.stop}; use feature_matching, which "
            "goes on from there."
        )
    return solved(observation, separated, going)


def solved(observation: Observation, separated: Separated, going: Callable[[], bool] | None = None) -> Reconstruction:
    """Return the batch whose layers were all solved; ``going`` says whether to go on."""
    peeled, found, simulator = separated.peeled, separated.found, observation.simulator
    assert peeled is not None and peeled.stop is None
    assert found.labels is not None and found.features is not None
    x, steps, seen = peeled.known.values.reshape(-1, *observation.space.shape), 0, observation.update.tensors
    rounding, residual = _rounding(observation), simulator.relative(x, found.labels, seen)
    if residual > _ROUGH * rounding:
        # Layer by layer, errors add up; all equations together take most of them back.
        problem = replace(Problem.of(replace(observation, labels=None), found.labels, 0, kinks=True), going=going)
        state = search(problem, x.to(problem.like).flatten(), iterations=_STEPS)
        x, steps = state.z.reshape(x.shape), state.steps
        residual = simulator.relative(x, found.labels, seen)
    order = order_as_granted(observation.labels, found.labels, None)
    order = torch.arange(len(x)) if order is None else order
    hidden = None if separated.chain is None else hides(separated.chain, x)
    exact = residual <= _FLOOR * rounding and hidden is None
    decoded, why = present(observation, x[order], exact=exact)
    notes = (
        *found.notes,
        *map(Note, map(str, peeled.layers)),
        Note(f"The re-simulated update agrees to {residual:.1e}."),
    )
    error = max(peeled.error, rounding * float(peeled.known.values.square().mean().sqrt()))
    return Reconstruction(
        decoded,
        found.labels[order],
        residual**2,
        status=Status.EXACT if exact else Status.STALLED,
        iterations=found.iterations + steps,
        notes=(*(n for n in (why, None if hidden is None else Note(hidden)) if n is not None), *notes),
        features=found.features[order],
        construction=None if hidden else Construction(peeled.known.values.numel(), error, _BATCHED, local=True),
        solved=torch.full((len(x),), exact),
    )


_BACKWARD = "solved backward, every layer's linear system has full rank"
_BATCHED = "solved backward from separated features, every layer's equations determine its inputs for all examples"

_SEARCHED = " with the values that max-pooling took, found by annealing"

_PROMPT = 0.5
"""Seconds that solving may take without asking whether to go on; most results are complete by then."""
_ROUGH = 8.0
"""Residual of a batch, in rounding units, above which steps on the whole update follow."""
_STEPS = 3
"""That many."""

_FLOOR = 100.0
"""Rounding accumulates over the layers: measured, residuals are one to five times the rounding unit."""


def check(observation: Observation) -> None:
    """Check that the update is a multiple of one example's gradient.

    Raises:
        NotApplicable: several examples, several local steps, an adaptive optimizer, or signs only.
    """
    if observation.batch_size != 1:
        raise NotApplicable(
            f"The recursion inverts the update of one example, but this one has {observation.batch_size}; "
            "use matching, or disaggregate the batch first."
        )
    observation.gradient.require_single()
    if is_signs(observation.update.tensors):
        raise NotApplicable(
            "The entries of each tensor all have one size, as signs do and the first step of an adaptive optimizer, so "
            "the update is no multiple of a gradient; use matching with what the client did stated."
        )


def recursion(*, polish: bool = True, quick: bool = True) -> Recursion:
    """Solve the network backward, layer by layer: exact where every layer is determined, and said so where not.

    Sources: Zhu & Blaschko, *R-GAP*, ICLR 2021, Section 3; *R-CONV*, arXiv 2406.04227. Deviations: see
    :mod:`gradleak.exact.one_example`. Neither label nor loss nor step size is needed: the system does not change when
    the update is scaled, so a weight delta of one plain step will do.

    A batch takes known cross-entropy, every example's features proved by ``disaggregate``, and layers that each
    determine their inputs for all examples (:mod:`gradleak.exact.backward`). Gauss–Newton steps on the whole update
    finish.

    Args:
        polish: finish with Gauss–Newton steps on the whole map, which brings float32 updates to their noise floor.
        quick: leave them out where the walk's estimated error is small enough: an order of magnitude above that floor,
            in a fraction of the time and memory.
    """
    return Recursion(polish=polish, quick=quick)
