"""Our attacker at its best: the one place that says which it is."""

from __future__ import annotations

from collections.abc import Sequence

import gradleak as gl
from gradleak.errors import NotApplicable

__all__ = ["reconstruct"]


def reconstruct(
    observations: Sequence[gl.Observation], *, iterations: int = 3000, seed: int = 0, restarts: int = 1
) -> list[gl.Reconstruction]:
    """Reconstruct every observation: layer by layer where that is exact, by gradient matching elsewhere.

    Nothing here sees the truth: between the two the choice is made by what the update itself certifies.

    Args:
        observations: of equal shape, so that matching advances them together.
        iterations: evaluations of the objective per candidate, where it comes to matching.
        seed: of the starts.
        restarts: starts per observation, chosen by the objective.

    """
    found: list[gl.Reconstruction | None] = [_exact(o, seed) for o in observations]
    rest = [i for i, r in enumerate(found) if r is None]
    for joint in (False, True):
        chosen = [i for i in rest if _joint(observations[i]) is joint]
        if chosen:
            paper = gl.attacks.dlg if joint else gl.attacks.idlg
            attack = paper(iterations=iterations, restarts=restarts)
            matched = attack.reconstruct_all([observations[i] for i in chosen], seed=seed)
            for i, result in zip(chosen, matched, strict=True):
                found[i] = result
    return [r for r in found if r is not None]


def _exact(observation: gl.Observation, seed: int) -> gl.Reconstruction | None:
    if observation.batch_size != 1:
        return None
    try:
        result = gl.attacks.recursion().reconstruct(observation, seed=seed)
    except NotApplicable:
        return None
    return result if result.status == "exact" else None


def _joint(observation: gl.Observation) -> bool:
    """Tell whether labels must be optimized: several steps, or a head kept secret, hide the class counts."""
    head = [k for k, _ in observation.model.named_parameters()][-1]
    return observation.update.kind is gl.UpdateKind.WEIGHT_DELTA or head not in observation.update.tensors
