"""The exact attack on batches whose first linear layer is followed by an activation that is flat on one side."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback, Progress, is_signs, present
from gradleak.attacks.labeling import align, read_labels
from gradleak.errors import InvalidInput, InvalidModel, NotApplicable
from gradleak.exact.sparse_directions import Factors, Separated, separate, together
from gradleak.formats import number_format
from gradleak.structure.first_layer import InputLayer, find_input_layer, find_rectified_layer, reached_units
from gradleak.structure.probe import probe_inputs
from gradleak.threat import Knowledge, Observation
from gradleak.types import Construction, Finding, FindingKind, Note, NoteKind, Reconstruction, Status

__all__ = ["Spear", "spear"]

_FLAT = 0.02
"""Share of units that random inputs must leave unreached, for zeros to tell examples apart."""


@final
@dataclass(frozen=True)
class Spear(Attack):
    """Takes a batch apart by the zeros of a ReLU; made by :func:`spear`, which says its options."""

    starts: int = 1024

    requires = Knowledge.NOTHING

    def __post_init__(self) -> None:
        if self.starts < 1:
            raise InvalidInput(f"spear cannot search from starts={self.starts}; give one start at least.")

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        layer, factors = _factors(observation)
        size, rank = observation.batch_size, factors.rank
        if size is not None and rank != size:
            raise NotApplicable(_other_rank(rank, size))
        units = int(factors.live.sum())
        if rank > max(units // 2, 1):
            raise NotApplicable(
                f"The first layer shows {rank} examples in {units} units, and about half of the units are silent for "
                "each, too few to tell examples by; use matching."
            )
        stopped: list[KeyboardInterrupt] = []

        def going(found: int) -> bool:
            try:
                callback(Progress(found, rank, float(rank - found), "examples found"))
            except KeyboardInterrupt as reason:  # What was found stays.
                stopped.append(reason)
            return not stopped

        draw = torch.Generator().manual_seed(seed)
        weight = torch.cat([observation.params[layer.weight_name], observation.params[_bias(layer)][:, None]], 1)
        back, seen = _next_layer(observation, layer, rank)
        wide = {**observation.simulator.params(torch.float64), **observation.simulator.buffers(torch.float64)}

        def reached(rows: Tensor) -> Tensor:
            shaped = rows.reshape(-1, *observation.space.shape)
            return reached_units(observation.model, wide, layer, shaped) & factors.live

        search = partial(together, factors, reached, back, patience=self.starts, generator=draw, going=going)
        if seen is None:
            found = search()
        else:
            found = separate(factors, weight, seen, patience=self.starts, generator=draw, going=going)
            if len(found.inputs) < rank and seen.shape[1] < rank and not stopped:
                # Where gradients of examples depend on each other there, the layer shows mixtures of these.
                whole = search(found)
                found = whole if len(whole.inputs) == rank else found
        status = Status.INTERRUPTED if stopped else Status.STALLED
        if len(found.inputs) == rank:
            return _complete(observation, found)
        if len(found.inputs) == 0 or size is None:
            if stopped:
                raise stopped[0]
            raise NotApplicable(
                f"Of {rank} examples {len(found.inputs)} were found in {found.starts} starts; SPEAR needs fewer "
                "examples for the layer's width, or more starts=."
            )
        return _partial(observation, found, size, status)


def _bias(layer: InputLayer) -> str:
    assert layer.bias_name is not None  # :func:`_factors` refuses a layer without one.
    return layer.bias_name


def _factors(observation: Observation) -> tuple[InputLayer, Factors]:
    """Return the first layer and its gradient's factors, with the bias gradient as last column.

    Raises:
        NotApplicable: there is no such layer, or its gradient has no zeros that tell examples apart.
    """
    model, params, shape = observation.model, observation.params, tuple(observation.space.shape)
    layer = find_input_layer(model, params, shape)
    if layer is None or layer.bias_name is None:
        what = "this model has none" if layer is None else f"{layer.weight_name!r} has no trained bias"
        raise NotApplicable(
            f"SPEAR needs a linear layer with bias that sees the flattened input itself, and {what}; "
            "use recursion() or matching."
        )
    observation.gradient.require_single()
    tensors = {k: observation.gradient.tensors[k] for k in (layer.weight_name, layer.bias_name)}
    if is_signs({"first layer": tensors[layer.weight_name]}):
        raise NotApplicable(
            "The entries of the first layer's update all have one size, as signs do and the first step of an adaptive "
            "optimizer; use matching with what the client did stated."
        )
    probe = 8 * (probe_inputs(shape, 8, next(iter(params.values()))) - 0.5)
    if float((~reached_units(model, params, layer, probe)).double().mean()) < _FLAT:
        raise NotApplicable(
            "What follows the first layer lets every unit through (no ReLU, or a leaky one, GELU, a sigmoid), so its "
            "gradient has no zeros to tell examples apart; use recursion() or matching."
        )
    gradient = torch.cat([tensors[layer.weight_name], tensors[layer.bias_name][:, None]], 1)
    return layer, Factors.of(gradient, _eps(observation))


def _other_rank(rank: int, size: int) -> str:
    if rank > size:
        return (
            f"The first layer's gradient has rank {rank}, more than the {size} examples that were stated, so it has "
            "noise on it or more examples behind it; state their number, or use matching."
        )
    return (
        f"The first layer's gradient has rank {rank} for {size} examples: some are equal, reach the loss with no unit, "
        "or pull on the same units alike, and then only a mixture of them shows; use matching."
    )


def _next_layer(observation: Observation, layer: InputLayer, rank: int) -> tuple[Tensor | None, Tensor | None]:
    """Return what the gradient of a layer that sees max(z, 0) says; None where there is no such layer, or it does not.

    That is a space (m, k) of what comes back to the units, and an orthonormal basis (m, s) of what it sees.
    """
    name = find_rectified_layer(observation.model, observation.params, layer, tuple(observation.space.shape))
    if name is None:
        return None, None
    back = observation.params[name].double().T
    try:
        factors = Factors.of(observation.gradient.tensors[name], _eps(observation))
    except NotApplicable:
        return back, None
    return back @ factors.left, factors.right if factors.rank <= rank else None


def _eps(observation: Observation) -> float:
    return torch.finfo(number_format(observation.update.tensors)).eps


def _complete(observation: Observation, found: Separated) -> Reconstruction:
    """Return the whole batch, in the order of the labels, granted or sorted."""
    inputs = found.inputs[:, :-1].reshape(-1, *observation.space.shape)
    labels = soft = None
    with suppress(InvalidModel):
        labels, soft = read_labels(observation, inputs)
    wanted = labels.sort().values if labels is not None and observation.labels is None else observation.labels
    inputs, (labels, soft) = align(wanted, inputs, labels, soft)
    exact = observation.batch_size is not None and not math.isnan(found.error)
    decoded, why = present(observation, inputs, exact=exact)
    count, width = found.active.shape
    note = Note(
        f"The gradient of the first layer has rank {count} and was taken apart into {count} examples, each of which "
        f"activates just the units, of {width}, that its part of the gradient does not leave zero."
    )
    nested = Note("Some examples activate part of another's units only, so the units alone do not determine them.")
    proof = Construction(
        inputs.numel(),
        found.error,
        "the first layer's gradient is taken apart by which units each example activates, and the equations for these "
        "units have full rank",
        local=True,
    )
    known = not math.isnan(found.error)
    return Reconstruction(
        decoded,
        labels,
        0.0,
        label_probabilities=soft,
        status=Status.EXACT if exact else Status.CONVERGED,
        iterations=found.starts,
        notes=tuple(n for n in (why, note, None if known else nested) if n is not None),
        construction=proof if known else None,
        solved=torch.ones(count, dtype=torch.bool) if exact else None,
    )


def _partial(observation: Observation, found: Separated, size: int, status: Status) -> Reconstruction:
    """Return the examples that were found, and their mean in the place of the others."""
    rows = found.inputs[:, :-1].reshape(-1, *observation.space.shape)
    count = len(rows)
    every = torch.cat([rows, rows.mean(0, keepdim=True).expand(size - count, *rows.shape[1:])])
    decoded, _ = present(observation, every, exact=False)
    text = f"The inputs of {count} of {size} examples were taken out of the first layer's gradient."
    rest = Note(
        f"{text} Each activates just the units that its part of the gradient does not leave zero. In the place of the "
        f"other {size - count} stands a mean.",
        NoteKind.LIMIT,
    )
    result = Reconstruction(decoded, None, float(size - count), status=status, iterations=found.starts, notes=(rest,))
    finding = Finding(FindingKind.ROWS, text, proved=observation.batch_size_stated, count=count, of=size)
    return replace(result, solved=torch.arange(size) < count, findings=(finding,))


def spear(*, starts: int = 1024) -> Spear:
    """Take the gradient of a first linear layer before a ReLU apart into the examples of a batch, exactly.

    Sources: Dimitrov et al., *SPEAR: Exact Gradient Inversion of Batches in Federated Learning*, NeurIPS 2024: low rank
    (Theorem 3.1), sparse directions (Theorem 3.3), scale from the bias gradient (Theorem 3.5), and the check by the
    units that the solution activates; *SPEAR++*, arXiv 2510.16200, which learns a dictionary instead of sampling.
    Deviations: where the next linear layer sees the ReLU's output itself, its gradient is used as well: active units
    and inputs are searched in turn, one example after another, each of which is taken out before the search goes on.
    Elsewhere sparse directions are searched by reweighted least squares from sampled kernels. Directions and inputs
    are solved again together. It takes as many examples as the gradient has rank, so none equal, and no noise. Neither
    labels nor loss nor step size is needed.

    Args:
        starts: starts without finding another example after which the search ends.

    Raises:
        InvalidInput: ``starts`` is below 1.
    """
    return Spear(starts)
