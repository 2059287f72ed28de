"""The exact attack on models whose first layer is linear: divide the weight gradient by the bias gradient."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback, Progress, is_signs, present
from gradleak.attacks.labeling import aligned, distance, hides_mixtures, read_labels
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.exact.first_layer import agreement, invert_linear, single_example_inputs
from gradleak.formats import number_format, storage_deviation
from gradleak.structure.first_layer import find_input_layer
from gradleak.threat import Knowledge, Observation
from gradleak.training import SGD, FedAvg
from gradleak.types import Reconstruction, UpdateKind

__all__ = ["LinearInversion", "invert_first_layer", "linear_inversion"]


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
            results.append(invert_first_layer(observation)[0])
            if callback is not None:
                callback(Progress(number + 1, len(observations), results[-1].objective, results[-1].status))
        return results


def invert_first_layer(observation: Observation) -> tuple[Reconstruction, bool]:
    """Return what the first layer shows, and whether its gradient tells one example from a mixture of several."""
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
    _check(observation, dw)
    x = invert_linear(dw, db)
    explained = db.double()[:, None] * x
    misfit = float((explained - dw.double()).norm() / dw.double().norm().clamp_min(1e-300))
    size, several = observation.batch_size, hides_mixtures(observation, db)
    close = agreement(number_format(observation.update.tensors))  # What was rounded may be stored in a wider format.
    notes: list[str] = []
    if misfit <= max(close, _subtraction(observation, layer.weight_name)):
        alone = "as of one example" if not several else "as any batch may give where only one output can vary"
        notes.append(f"The layer's gradient is an outer product down to {misfit:.1e}, {alone}.")
        inputs, status = x.expand(size or 1, -1), "exact" if (size or 1) == 1 and not several else "converged"
        if size is not None and size > 1:
            only = "one of them reaches the loss" if not several else "a mixture of them is shown"
            notes.append(f"All {size} examples show the same input, or only {only}.")
    elif size == 1:
        inputs, status = x[None], "stalled"
        notes.append(
            f"The layer's gradient deviates from an outer product by {misfit:.1e}, so the update is noised, pruned or "
            "not of one example; the input is a least-squares estimate."
        )
    else:
        inputs, status = _batch(dw, db, size, misfit, close, notes)
    inputs = inputs.reshape(-1, *shape)
    labels, soft = _labels(observation, inputs)
    if status == "exact" and len(inputs) > 1:
        inputs, labels, soft, status = _verified(observation, inputs, labels, soft, close, notes)
    elif several and size == 1 and status == "converged" and labels is not None and observation.training is not None:
        # The scale of the update tells an example from a mixture; the direction cannot.
        residual = distance(observation, inputs, labels if soft is None else soft)
        status = "exact" if residual <= 10 * close else status
    decoded, why = present(observation, inputs, exact=status == "exact")
    found = Reconstruction(
        decoded,
        labels,
        misfit**2,
        label_probabilities=soft,
        status=status,
        seconds=time.perf_counter() - begin,
        notes=tuple(notes) if why is None else (why, *notes),
    )
    return found, not several


def _check(observation: Observation, dw: Tensor) -> None:
    """Check that the update has more of a gradient than its signs.

    Raises:
        NotApplicable: an adaptive optimizer made it, or all its entries have one size.

    """
    training = None if observation.training is None else observation.training.undefended
    if isinstance(training, FedAvg) and not isinstance(training.rule, SGD):
        raise NotApplicable(
            "Linear inversion divides gradients, but the client's optimizer is adaptive and rescales each entry; use "
            "matching, which simulates it."
        )
    if is_signs({"first layer": dw}):
        raise NotApplicable(
            "The entries of the first layer's update all have one size, as signs do and the first step of an adaptive "
            "optimizer; they show the input's signs only; use matching with what the client did stated."
        )


def _subtraction(observation: Observation, name: str) -> float:
    """Return what subtracting rounded weights does to a weight delta, relative; zero for a gradient."""
    if observation.update.kind is not UpdateKind.WEIGHT_DELTA:
        return 0.0
    delta, weight = observation.update.tensors[name].double(), observation.params[name]
    rounding = float(storage_deviation(weight.double(), weight.dtype).norm())
    return min(4 * rounding / max(float(delta.norm()), 1e-300), 1e-2)


def _batch(
    dw: Tensor, db: Tensor, size: int | None, misfit: float, close: float, notes: list[str]
) -> tuple[Tensor, str]:
    """Return the inputs that several rows of the layer agree on, padded with the batch's mean mixture."""
    found, rows = single_example_inputs(dw, db, tolerance=close)
    if len(found) == 0:
        raise NotApplicable(
            "The update mixes several examples in every row of the first layer (its gradient deviates from an outer "
            f"product by {misfit:.1e}); linear inversion needs one example, or units that a single one activates "
            "(ReLU, more units, fewer examples)."
        )
    count = len(found) if size is None else min(size, len(found))
    notes.append(
        f"{count} inputs are shown by several units, as where no other example activates them (by "
        f"{rows[:count].tolist()} units)."
    )
    found = found[:count]
    if count == size:
        return found, "exact"
    if size is None:
        notes.append("Without the number of examples they cannot be verified by simulating the client.")
        return found, "converged"
    notes.append(f"The other {size - count} of {size} examples never act alone; in their place stands a mixture.")
    mixture = dw.double().T @ db.double().abs() / db.double().square().sum().clamp_min(1e-300)
    return torch.cat([found, mixture.expand(size - count, -1)]), "stalled"


def _labels(observation: Observation, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the labels of inputs (N, *shape), as read or as granted, and probabilities where they are soft."""
    granted = observation.labels
    if granted is not None and len(inputs) == 1:
        return (None, granted) if granted.is_floating_point() else (granted, None)
    try:
        return read_labels(observation, inputs)
    except InvalidModel:  # Dropout and the like: the inputs stand without labels.
        return None, None


def _verified(
    observation: Observation,
    inputs: Tensor,
    labels: Tensor | None,
    soft: Tensor | None,
    close: float,
    notes: list[str],
) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """Re-simulate a batch that rows agree on: mixtures agree as well where examples activate the same units.

    Returns inputs, labels and probabilities, in the order of granted labels where these are the same, and the status.
    """
    training = observation.training
    if labels is None or training is None:
        notes.append("Their labels are not known, so they cannot be verified by simulating the client.")
        return inputs, labels, soft, "converged"
    residual = distance(observation, inputs, labels if soft is None else soft)
    order = aligned(observation.labels, labels, soft)
    if order is not None:
        inputs, labels, soft = inputs[order], labels[order], None if soft is None else soft[order]
    notes.append(f"The re-simulated update agrees to {residual:.1e}.")
    return inputs, labels, soft, "exact" if residual <= close else "stalled"


def linear_inversion() -> LinearInversion:
    """Divide the first layer's weight gradient by its bias gradient: exact for one example, in milliseconds.

    Sources: Phong et al., *Privacy-preserving deep learning via additively homomorphic encryption*, 2018, Section III;
    Geiping et al. 2020, Proposition 3.1. Deviations: least squares over all rows instead of one; in a batch, inputs
    that at least two rows agree on are returned as well (units that a single example activates). Neither batch size nor
    loss nor step size is needed; several plain local steps on one example change nothing.

    """
    return LinearInversion()
