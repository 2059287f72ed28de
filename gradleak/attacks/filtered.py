"""One example's input from an update that a filter has zeroed in part and limited in part."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from gradleak.attacks.base import present
from gradleak.attacks.labeling import labels_to_try
from gradleak.errors import InvalidModel
from gradleak.exact.first_layer import untouched, untouched_input
from gradleak.proof.alternatives import tells_examples_apart
from gradleak.structure.first_layer import InputLayer
from gradleak.threat import Observation
from gradleak.training import target_kind
from gradleak.types import Construction, Note, NoteKind, Reconstruction, Status

__all__ = ["read_filtered"]


def read_filtered(
    observation: Observation, layer: InputLayer, bias: str, dw: Tensor, db: Tensor, close: float
) -> Reconstruction | None:
    """Return the input of the only example from what a filter left alone, None where that does not show it.

    Numbers that were neither zeroed nor limited still divide. The input is called exact if the update simulated for it
    agrees with all of these numbers, scale included.

    Args:
        observation: of one example.
        layer: the first layer.
        bias: name of its bias.
        dw: (m, n) its weight gradient.
        db: (m,) its bias gradient.
        close: relative distance at which numbers of the update count as equal.
    """
    kept = untouched(observation.update.tensors)
    if kept is None:
        return None
    found = untouched_input(dw, db, kept[layer.weight_name], kept[bias])
    if found is None or found[1] > close:
        return None
    x, misfit, hidden = found
    inputs = layer.undo(x[None]).reshape(1, *observation.space.shape)
    label, apart = _simulated(observation, inputs, kept)
    guessed, rounding = int((hidden > 0).sum()), float(torch.finfo(dw.dtype).eps)
    # Zeroed values may be zeros, as of black pixels: then all else agrees down to rounding.
    exact = apart <= (64 * rounding if guessed else 10 * close)
    share = sum(int(m.sum()) for m in kept.values()) / sum(m.numel() for m in kept.values())
    told = f"The update was limited and small numbers zeroed; the {share:.0%} that were left alone give this input"
    if exact:
        note = Note(f"{told} and agree with its simulated update to {apart:.1e}.", NoteKind.METHOD)
    elif apart > 10 * close:
        note = Note(f"{told}, but do not agree with its simulated update, so its scale is not sure.", NoteKind.LIMIT)
    else:
        least = float(hidden.max())
        note = Note(f"{told}, but for {guessed} of its values, which lie within ±{least:.1e}.", NoteKind.LIMIT)
    alone = tells_examples_apart(observation.simulator, bias, torch.where(kept[bias], db, 0.0), inputs)
    off = max(misfit, rounding) * x.abs() + hidden
    error = float((layer.undo((x + off)[None]).flatten() - inputs.flatten()).square().mean().sqrt())
    decoded, why = present(observation, inputs, exact=exact)
    real = label is not None and label.is_floating_point()
    return Reconstruction(
        decoded,
        None if real else label,
        misfit**2,
        label_probabilities=label if real else None,
        status=Status.EXACT if exact else Status.CONVERGED,
        notes=(note,) if why is None else (why, note),
        construction=Construction(
            inputs.numel(),
            error,
            "the numbers that a filter left alone are the input times a known vector",
            alone=alone,
            scaled=exact,
        ),
        solved=torch.tensor([exact]),
    )


def _simulated(observation: Observation, inputs: Tensor, kept: dict[str, Tensor]) -> tuple[Tensor | None, float]:
    """Return the label whose update agrees best with the numbers that were left alone, and their relative distance."""
    simulator, seen = observation.simulator, observation.update.tensors
    best: tuple[Tensor | None, float] = (None, math.inf)
    if not simulator.known:
        return best
    outputs = simulator.outputs(inputs, torch.float64)
    size = torch.cat([seen[k].double()[m] for k, m in kept.items()]).norm()
    for label in labels_to_try(observation, target_kind(simulator.undefended.loss, outputs), outputs.detach()):
        with suppress(RuntimeError, ValueError, TypeError, IndexError, InvalidModel), torch.no_grad():
            ours = simulator.update(inputs, label)
            left = torch.cat([(ours[k] - seen[k].double())[m] for k, m in kept.items()])
            best = min(best, (label, float(left.norm() / size)), key=lambda b: b[1])
    return best
