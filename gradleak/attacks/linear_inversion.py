"""The exact attack on models whose first layer is linear: divide the weight gradient by the bias gradient."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.analytic.labels import recover_labels
from gradleak.analytic.linear import find_input_layer, invert_linear, single_example_inputs
from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.errors import NotApplicable
from gradleak.threat import Knowledge, Observation
from gradleak.training import CrossEntropy
from gradleak.types import Reconstruction, UpdateKind

__all__ = ["LinearInversion", "linear_inversion"]


@final
@dataclass(frozen=True)
class LinearInversion(Attack):
    """Reads inputs off the gradient of a first linear layer; made by :func:`linear_inversion`."""

    requires = Knowledge.NOTHING

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        del seed
        results: list[Reconstruction] = []
        for number, observation in enumerate(observations):
            results.append(_invert(observation))
            if callback is not None:
                callback(Progress(number + 1, len(observations), results[-1].objective, results[-1].status))
        return results


def _invert(observation: Observation) -> Reconstruction:
    begin = time.perf_counter()
    shape = tuple(observation.space.shape)
    layer = find_input_layer(observation.model, observation.params, shape)
    if layer is None:
        raise NotApplicable(
            "Linear inversion needs a linear layer that sees the flattened input itself, and this model has none; "
            "use recursion() or matching."
        )
    if layer.bias_name is None:
        raise NotApplicable(
            f"Linear inversion divides by the bias gradient, but {layer.weight_name!r} has no trained bias; "
            "use matching."
        )
    dw, db = observation.update.tensors[layer.weight_name], observation.update.tensors[layer.bias_name]
    rounding = torch.finfo(dw.dtype).eps
    x = invert_linear(dw, db)
    explained = db.double()[:, None] * x
    misfit = float((explained - dw.double()).norm() / dw.double().norm().clamp_min(1e-300))
    size = observation.batch_size
    notes: list[str] = []
    if misfit <= 1e3 * rounding:
        if size is not None and size > 1:
            notes.append(f"All {size} examples show the same input, or only one of them reaches the loss.")
            inputs, status = x.expand(size, -1), "converged"
        else:
            inputs, status = x[None], "exact"
        notes.append(f"The layer's gradient is an outer product down to {misfit:.1e}, as of one example.")
    elif size == 1:
        inputs, status = x[None], "stalled"
        notes.append(
            f"The layer's gradient deviates from an outer product by {misfit:.1e}, so the update is noised, pruned or "
            "not of one example; the input is a least-squares estimate."
        )
    else:
        inputs, status = _batch(dw, db, size, misfit, notes)
    decoded = observation.space.decode(inputs.to(torch.promote_types(dw.dtype, torch.float32)).reshape(-1, *shape))
    return Reconstruction(
        decoded,
        _labels(observation, len(decoded), notes),
        misfit**2,
        status=status,
        seconds=time.perf_counter() - begin,
        notes=tuple(notes),
    )


def _batch(dw: Tensor, db: Tensor, size: int | None, misfit: float, notes: list[str]) -> tuple[Tensor, str]:
    """Return the inputs that several rows of the layer agree on, padded with the batch's mean mixture."""
    found, rows = single_example_inputs(dw, db)
    if len(found) == 0:
        raise NotApplicable(
            "The update mixes several examples in every row of the first layer (its gradient deviates from an outer "
            f"product by {misfit:.1e}); linear inversion needs one example, or units that a single one activates "
            "(ReLU, more units, fewer examples)."
        )
    count = len(found) if size is None else min(size, len(found))
    notes.append(
        f"{count} inputs are shown by several units that no other example activates (by {rows[:count].tolist()} units)."
    )
    found = found[:count]
    if size is None or count == size:
        return found, "exact"
    notes.append(f"The other {size - count} of {size} examples never act alone; in their place stands a mixture.")
    mixture = dw.double().T @ db.double().abs() / db.double().square().sum().clamp_min(1e-300)
    return torch.cat([found, mixture.expand(size - count, -1)]), "stalled"


def _labels(observation: Observation, count: int, notes: list[str]) -> Tensor | None:
    """Return the label of one example where the head's gradient shows it; for more, which is whose is not known."""
    if observation.labels is not None and count == 1 and not observation.labels.is_floating_point():
        return observation.labels
    loss = observation.training.loss if observation.training is not None else CrossEntropy()
    if count != 1 or observation.update.kind is not UpdateKind.GRADIENT:
        return None
    try:
        estimate = recover_labels(
            observation.model,
            observation.params,
            observation.update.tensors,
            tuple(observation.space.shape),
            1,
            loss,
        )
    except NotApplicable as reason:
        notes.append(str(reason))
        return None
    return estimate.labels


def linear_inversion() -> LinearInversion:
    """Divide the first layer's weight gradient by its bias gradient: exact for one example, in milliseconds.

    Sources: Phong et al., *Privacy-preserving deep learning via additively homomorphic encryption*, 2018, Section III;
    Geiping et al. 2020, Proposition 3.1. Deviations: least squares over all rows instead of one; in a batch, inputs
    that at least two rows agree on are returned as well (units that a single example activates). Neither batch size nor
    loss nor step size is needed; several plain local steps on one example change nothing.

    """
    return LinearInversion()
