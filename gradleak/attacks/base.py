"""What every attack is: a check of what it may know, and a reconstruction from observations alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InvalidInput, MissingKnowledge
from gradleak.threat import Knowledge, Observation
from gradleak.training import SGD, FedAvg
from gradleak.types import Reconstruction

__all__ = ["Attack", "Callback", "Progress", "as_gradient"]


@dataclass(frozen=True)
class Progress:
    """Where an attack stands: ``done`` of ``total`` iterations, the best objective so far, and a phrase."""

    done: int
    total: int
    objective: float
    message: str = ""


Callback = Callable[[Progress], None]
"""Called now and then; it may raise ``KeyboardInterrupt`` to stop the attack, which then returns its best so far."""


class Attack(ABC):
    """Reconstructs private batches from observations.

    Subclasses are frozen dataclasses of options; they set ``requires`` and implement ``_reconstruct``.
    """

    requires: Knowledge = Knowledge.NOTHING

    def reconstruct(
        self, observation: Observation, *, seed: int = 0, callback: Callback | None = None
    ) -> Reconstruction:
        """Reconstruct one batch.

        Args:
            observation: what the threat model shows.
            seed: seeds a private generator; equal seeds give equal results, global generators are untouched.
            callback: receives :class:`Progress` now and then.

        Raises:
            MissingKnowledge: the threat model does not grant ``requires``.
            NotApplicable: the attack's structural conditions do not hold.
            InvalidModel: the forward map cannot be reproduced.

        """
        return self.reconstruct_all([observation], seed=seed, callback=callback)[0]

    def reconstruct_all(
        self, observations: Sequence[Observation], *, seed: int = 0, callback: Callback | None = None
    ) -> list[Reconstruction]:
        """Reconstruct several batches; observations of equal shape advance together where the attack can."""
        if not observations:
            raise InvalidInput("There is nothing to reconstruct: pass at least one observation.")
        for observation in observations:
            missing = self.requires & ~observation.knows
            if missing:
                granted = str(observation.knows).removeprefix("Knowledge.")
                wanted = str(missing).removeprefix("Knowledge.")
                raise MissingKnowledge(
                    f"This attack needs {wanted}, but the threat model grants only {granted}; "
                    "grant it in ThreatModel(knows=...), or choose an attack that does without."
                )
        return self._reconstruct(list(observations), seed, callback)

    @abstractmethod
    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        """Reconstruct; knowledge has been checked."""


def as_gradient(observation: Observation) -> Mapping[str, Tensor]:
    """Return the update in the scale of a gradient: a delta over minus step size and steps is the mean gradient.

    Only SGD has such a scale; other updates are returned as they are.
    """
    tensors, training = observation.update.tensors, observation.training
    training = None if training is None else training.undefended
    if not isinstance(training, FedAvg) or not isinstance(training.rule, SGD):
        return tensors
    factor = -training.rule.lr * training.count(observation.batch_size or 1)
    return {k: t / factor for k, t in tensors.items()}


def present(observation: Observation, inputs: Tensor, *, exact: bool) -> tuple[Tensor, str | None]:
    """Return solved model inputs (N, *shape) decoded, at least in float32, and what is wrong with exact ones."""
    first = next(iter(observation.update.tensors.values()))
    wide = inputs.to(torch.promote_types(first.dtype, torch.float32))
    return observation.space.show(wide) if exact else (observation.space.decode(wide), None)


def is_signs(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the entries of each tensor have one size, as signs do and the first step of adaptive optimizers.

    A gradient of one or two live rows may have that by right, as of a binary input.
    """
    found = [t.double().abs().flatten(1) for t in tensors.values() if t.ndim > 1]
    large = [t[t > 0] for t in found if int(t.any(1).sum()) > 2]
    return bool(large) and all(len(t) >= _FEW and float(t.std()) <= 1e-3 * float(t.mean()) for t in large)


_FEW = 16
"""Entries from which on it is no accident that all have one size."""
