"""From an attack's result to its certificate: which labels it is simulated with, and what it then proves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gradleak.attacks.labeling import read_labels
from gradleak.clock import Deadline
from gradleak.errors import InvalidModel, NotApplicable, reason
from gradleak.proof.certify import certify, unproved
from gradleak.proof.discrete import certify_discrete
from gradleak.proof.part import certify_part
from gradleak.threat import Observation
from gradleak.types import Certificate, Part, Reconstruction, Shows, Status

__all__ = ["better", "certified"]

_UNKNOWN = 0.1
"""Residual assumed when the update cannot be re-simulated."""


def certified(
    observation: Observation,
    found: Reconstruction,
    *,
    uniqueness: bool | None = None,
    deadline: Deadline | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Return ``found`` with its certificate, and with the labels that follow from its inputs where it had none.

    ``uniqueness`` says whether to compute the Jacobian (None: where it is cheap, and before the deadline); ``seed`` is
    of the random moves by which noise and curvature are measured.
    """
    if found.shows is not Shows.INPUTS:
        return replace(found, certificate=unproved(len(found), "Features are no inputs, which could be simulated."))
    space, device = observation.space, observation.simulator.device
    decoded = found.inputs.detach().to(device)
    inputs = space.encode(decoded.double() if decoded.is_floating_point() else decoded)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    hard, soft = found.labels, found.label_probabilities
    granted = observation.labels
    if found.construction is not None and found.construction.part is not None:
        proof = certify_part(
            observation.gradient.tensors,
            inputs,
            found.construction,
            found.construction.part,
            split=not observation.batch_size_stated and _sees_less(observation, found.construction.part),
            unit=space.unit,
        )
        return _told(found, proof)
    try:
        if granted is not None:  # They are taken as they are.
            hard, soft = (None, granted) if granted.is_floating_point() else (granted, None)
        elif hard is None and soft is None:
            hard, soft = read_labels(observation, inputs)
        best: Certificate | None = None
        simulated: Tensor | None = None
        for labels in (hard, soft):
            if labels is None or (best is not None and best.verdict.strength > 0):
                continue
            if not inputs.is_floating_point():
                best = certify_discrete(
                    observation.simulator,
                    observation.update.tensors,
                    inputs,
                    labels.to(device),
                    construction=found.construction,
                    stated=observation.batch_size_stated and observation.batch_size is not None,
                )
                continue
            proof = certify(
                observation.simulator,
                observation.update.tensors,
                inputs,
                labels.to(device),
                construction=found.construction,
                uniqueness=uniqueness,
                stated=observation.batch_size_stated and observation.batch_size is not None,
                granted=granted is not None,
                unit=space.unit,
                deadline=deadline,
                seed=seed,
            )
            if best is None or better(proof, best):
                best, simulated = proof, labels
    except (InvalidModel, NotApplicable) as refusal:
        return replace(found, certificate=unproved(len(found), str(refusal)))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:  # of a user's model or loss
        why = f"The update could not be re-simulated with this result ({reason(error)})."
        return replace(found, certificate=unproved(len(found), why))
    if best is None:
        return replace(
            found, certificate=unproved(len(found), "The labels are not known, so the update cannot be re-simulated.")
        )
    if found.labels is None and found.label_probabilities is None and granted is None:
        found = replace(found, labels=hard, label_probabilities=soft if simulated is soft else None)
    return _told(found, best)


def _told(found: Reconstruction, proof: Certificate) -> Reconstruction:
    if proof.mixture and found.status is Status.EXACT:  # Its equations hold, but not of single examples only.
        found = replace(found, status=Status.CONVERGED, solved=None)
    return replace(found, certificate=proof)


def _sees_less(observation: Observation, part: Part) -> bool:
    """Tell whether the layer of a part maps inputs that differ to one output, so that their mean has its gradient."""
    weights = [observation.params[k].double().flatten(1) for k in part.floors if observation.params[k].ndim > 1]
    return any(int(torch.linalg.matrix_rank(w)) < w.shape[1] for w in weights)


def better(one: Certificate, other: Certificate | None) -> bool:
    """Tell whether ``one`` says more than ``other``: by verdict, then by residual; both are the attacker's own."""
    return other is None or _order(one) > _order(other)


def _order(proof: Certificate) -> tuple[int, float]:
    # Nothing could be simulated: that loses against what explains the most, not against what explains little.
    known = proof.residual == proof.residual
    return proof.verdict.strength, -(proof.residual if known else _UNKNOWN)
