"""What every attack is: a check of what it may know, a reconstruction from observations alone, and a certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.attacks.certifying import certified
from gradleak.attacks.findings import find_besides, named_ids
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import InvalidInput, MissingKnowledge, NotApplicable
from gradleak.proof.certify import unproved
from gradleak.threat import Knowledge, Observation
from gradleak.types import Note, NoteKind, Reconstruction, Status

__all__ = ["Attack", "Callback", "Progress", "nothing_found"]


@dataclass(frozen=True)
class Progress:
    """Where an attack stands: ``done`` of ``total`` iterations, the best objective so far, and a phrase."""

    done: int
    total: int
    objective: float
    message: str = ""


Callback = Callable[[Progress], None]
"""Called now and then; it may raise ``KeyboardInterrupt`` to stop the attack, which then returns its best so far."""


class Attack:
    """Reconstructs private batches from observations.

    Subclasses are frozen dataclasses of options; they set ``requires`` and implement ``_one``, or ``_reconstruct``
    where several observations advance together.
    """

    requires: Knowledge = Knowledge.NOTHING

    def reconstruct(
        self,
        observation: Observation,
        *,
        seed: int = 0,
        callback: Callback | None = None,
        deadline: Deadline | None = None,
    ) -> Reconstruction:
        """Reconstruct one batch, and say what the update proves about the result.

        Args:
            observation: what the threat model shows.
            seed: seeds a private generator; equal seeds give equal results, global generators are untouched.
            callback: receives :class:`Progress` now and then.
            deadline: when to end with the best so far (status "budget").

        Raises:
            MissingKnowledge: the threat model does not grant ``requires``.
            NotApplicable: the attack's structural conditions do not hold.
            InvalidModel: the forward map cannot be reproduced.
        """
        return self.reconstruct_all([observation], seed=seed, callback=callback, deadline=deadline)[0]

    def reconstruct_all(
        self,
        observations: Sequence[Observation],
        *,
        seed: int = 0,
        callback: Callback | None = None,
        deadline: Deadline | None = None,
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
            _check_inputs(observation)
        begin, limit = time.perf_counter(), Deadline(getattr(self, "budget", None), within=deadline)
        try:
            found = self._reconstruct(list(observations), seed, _timed(callback, limit))
        except NotApplicable as error:  # What an embedding's gradient names is there all the same.
            error.findings = error.findings or named_ids(observations[0])
            raise
        share = (time.perf_counter() - begin) / len(found)
        return [self._finished(o, r, share, seed, limit) for o, r in zip(observations, found, strict=True)]

    def _reconstruct(self, observations: list[Observation], seed: int, callback: Callback) -> list[Reconstruction]:
        """Reconstruct; knowledge has been checked, certificates follow. An attack overrides this or :meth:`_one`."""
        results: list[Reconstruction] = []
        for number, observation in enumerate(observations):
            results.append(self._one(observation, seed, callback))
            last = number + 1 == len(observations)
            with suppress(KeyboardInterrupt) if last else nullcontext():  # What is complete is not thrown away.
                callback(Progress(number + 1, len(observations), results[-1].objective, results[-1].status))
        return results

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        """Reconstruct one batch."""
        raise NotImplementedError

    def _finished(
        self, observation: Observation, found: Reconstruction, seconds: float, seed: int, deadline: Deadline
    ) -> Reconstruction:
        """Return a result with its certificate, the time it took, and why it ended."""
        if deadline.over and not deadline.cut_short and found.status in (Status.INTERRUPTED, Status.BUDGET):
            ended = Note("The time budget ended the attack.", NoteKind.LIMIT)
            found = replace(found, status=Status.BUDGET, notes=tuple(dict.fromkeys((*found.notes, ended))))
        if found.certificate is None:
            try:
                found = certified(observation, found, seed=seed, deadline=deadline)
            except TimeSpent:  # What was found stays, only unproved.
                why = "The time was over before the result could be compared with the update."
                found = replace(found, certificate=unproved(len(found), why))
        name = found.attack or getattr(type(self), "name", "")
        return replace(found, seconds=found.seconds or seconds, attack=name)


def _check_inputs(observation: Observation) -> None:
    """Check that the model takes inputs of the space, as many as were stated.

    Raises:
        NotApplicable: it does not, with what the update shows all the same.
    """
    error = observation.misfit
    if error is not None:
        besides = find_besides(observation)
        told = [*(f.text for f in besides), str(error), "Ids that are looked up are described by TokenSpace."]
        refusal = NotApplicable(" ".join(told))
        refusal.findings = besides
        raise refusal from error


def _timed(callback: Callback | None, deadline: Deadline) -> Callback:
    """Return a callback that also ends the attack when the time is over."""

    def tell(progress: Progress) -> None:
        if callback is not None:
            callback(progress)
        if deadline.over:
            raise TimeSpent

    return tell


def nothing_found(observation: Observation) -> Reconstruction:
    """Return the guess that says least, where the time ended before there was any other."""
    neutral = observation.space.neutral()
    guess = neutral.expand(observation.batch_size or 1, *neutral.shape)
    decoded = observation.space.decode(guess.to(observation.simulator.device))
    why = "The time was over before any attack had found anything; what is shown is the guess that says least."
    proof = unproved(len(decoded), why)
    return Reconstruction(decoded, None, math.inf, status=Status.BUDGET, attack="nothing", certificate=proof)


def present(observation: Observation, inputs: Tensor, *, exact: bool) -> tuple[Tensor, Note | None]:
    """Return solved model inputs (N, *shape) decoded, at least in float32, and what is wrong with exact ones."""
    first = next(iter(observation.update.tensors.values()))
    wide = inputs.to(torch.promote_types(first.dtype, torch.float32))
    if not exact:
        return observation.space.decode(wide), None
    decoded, why = observation.space.show(wide)
    return decoded, None if why is None else Note(why, NoteKind.RANGE)


def is_signs(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the entries of each tensor have one size, as signs do and the first step of adaptive optimizers.

    Tensors with one or two live rows are left out: a binary input legitimately gives equal sizes.
    """
    found = False
    for tensor in (t.flatten(1) for t in tensors.values() if t.ndim > 1):
        if int(tensor.any(1).sum()) > 2:
            sizes = tensor[tensor != 0].double().abs()
            if len(sizes) < _FEW or float(sizes.std()) > 1e-3 * float(sizes.mean()):
                return False
            found = True
    return found


_FEW = 16
"""Entries from which on it is no accident that all have one size."""
