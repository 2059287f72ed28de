"""Runs an attack within its time, and writes the folder of its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.base import Progress, nothing_found
from gradleak.attacks.certifying import better
from gradleak.audit.build import build_record, build_refusal
from gradleak.audit.factories import ChosenAttack
from gradleak.audit.folder import Folder, write_folder
from gradleak.audit.scores import score
from gradleak.cli.console import progress_bar, tell, warn
from gradleak.cli.signals import Watch
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import MissingKnowledge, NotApplicable, clean
from gradleak.report import picture, render
from gradleak.threat import Observation
from gradleak.training import MeanSquaredError
from gradleak.types import Batch, Note, NoteKind, Reconstruction, Shows, Status, Verdict

__all__ = ["REFUSED", "Job", "about", "attack_one", "publish", "run"]

REFUSED = 3
"""Exit code of an attack that does not apply here, or is not told what it needs; that is recorded as well."""


@dataclass(frozen=True, eq=False)
class Job:
    """An attack that is ready to run, with what is needed to report on it.

    Attributes:
        observations: what was seen, once for each training that the client may have had, the likeliest first.
        captured: number type in which the update was captured.
        batch_size_source: "stated" or "assumed".
        warnings: what is suspicious about the capture.
        public: public images, for the null guesses.
    """

    observations: tuple[Observation, ...]
    chosen: ChosenAttack
    seed: int
    out: Path
    model: str
    captured: torch.dtype
    outputs: int
    command: str
    batch_size_source: str = "stated"
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    truth: Batch | None = None
    public: Tensor | None = None


def run(job: Job, watch: Watch) -> int:
    """Attack, write the folder and say what it holds; return the exit code. ``watch`` is entered already."""
    code = 0
    try:
        observation, found, notes = attack_all(job, watch)
    except (NotApplicable, MissingKnowledge) as refusal:
        watch.rest()
        code, folder = REFUSED, build_refusal(job.observations[0], refusal, **about(job, job.notes))
    else:
        watch.rest()
        folder = _reported(replace(job, notes=(*job.notes, *notes)), observation, found)
    publish(folder, job.out)
    if watch.signal is not None:
        warn("The attack was interrupted; this is the best it had found by then.")
    return watch.exit_code or code


def publish(folder: Folder, out: Path) -> None:
    """Write the folder of a result, whole or not at all, and print what it says."""
    pictures = picture(folder.record, folder.inputs, folder.truth, folder.snapshots)
    write_folder(out, folder, render(folder.record, pictures))
    tell(folder.record, out)


def attack_all(job: Job, watch: Watch) -> tuple[Observation, Reconstruction, tuple[Note, ...]]:
    """Return the observation that was explained best, by what, and what was assumed of the client's loss.

    Raises:
        NotApplicable: the attack applies to none of the observations.
        MissingKnowledge: it is not told what it needs.
    """
    tried: list[tuple[Observation, Reconstruction]] = []
    refusal: NotApplicable | None = None
    for index, observation in enumerate(job.observations):
        deadline = watch.deadline.part(1 / (len(job.observations) - index))
        try:
            tried.append((observation, attack_one(observation, job, watch, deadline)))
        except NotApplicable as error:
            refusal = refusal or error
        if watch.deadline.over or (tried and _verdict(tried[-1][1]) is Verdict.PROVED):
            break
    if not tried:
        assert refusal is not None
        raise refusal
    observation, found = tried[0]
    for other, result in tried[1:]:
        assert found.certificate is not None and result.certificate is not None  # the template method has made them
        if better(result.certificate, found.certificate):
            observation, found = other, result
    return observation, found, () if len(job.observations) == 1 else (_assumed(observation, found),)


def attack_one(observation: Observation, job: Job, watch: Watch, deadline: Deadline) -> Reconstruction:
    """Return what the attack finds on one observation in its time."""
    watch.limit(deadline)
    with progress_bar(job.chosen.name) as move:

        def callback(step: Progress) -> None:
            move(step)
            deadline.raise_if_over()

        try:
            found = job.chosen.attack.reconstruct(observation, seed=job.seed, callback=callback, deadline=deadline)
        except TimeSpent:
            found = nothing_found(observation)
        watch.rest()
    # A search that a signal ended is interrupted, whatever its own phases made of that.
    ended = watch.signal is not None and found.status in (Status.BUDGET, Status.STALLED)
    return replace(found, status=Status.INTERRUPTED) if ended else found


def _verdict(found: Reconstruction) -> Verdict:
    return Verdict.UNPROVED if found.certificate is None else Verdict(found.certificate.verdict)


def _assumed(observation: Observation, found: Reconstruction) -> Note:
    said = "The loss was not stated; of binary cross-entropy and squared error"
    if _verdict(found) is Verdict.UNPROVED:
        what = f"neither explains the update, and this is the result under {_loss(observation)}"
    else:
        what = f"{_loss(observation)} explains the update"
    return Note(f"{said}, {what}.", NoteKind.ASSUMPTION)


def _loss(observation: Observation) -> str:
    loss = None if observation.training is None else observation.training.loss
    return "squared error" if isinstance(loss, MeanSquaredError) else "binary cross-entropy"


def _reported(job: Job, observation: Observation, found: Reconstruction) -> Folder:
    truth, notes = job.truth, job.notes
    if truth is not None and found.shows is not Shows.INPUTS:
        truth = None
        unused = "The attack recovers features, which cannot be scored against private inputs; --truth is unused."
        notes = (*notes, Note(unused, NoteKind.LIMIT))
    folder = build_record(
        observation,
        found,
        scores=None if truth is None else score(found, truth, observation.space, public=job.public),
        truth=truth,
        **about(job, notes),
    )
    if len(job.observations) == 1 or truth is not None:
        return folder
    # Nobody stated the loss, and only what the update itself says stands here: a reader must see what it rests on.
    verdict = folder.record.verdict
    headline = f"Assuming {_loss(observation)}: {verdict.headline}"
    return replace(folder, record=replace(folder.record, verdict=replace(verdict, headline=headline)))


def about(job: Job, notes: Sequence[str]) -> dict[str, Any]:
    """Return what the record says of a job, with these notes."""
    return {
        "attack": clean(job.chosen.name),
        "options": job.chosen.options,
        "seed": job.seed,
        "model": job.model,
        "dtype": job.captured,
        "notes": (*notes, *job.warnings),
        "command": job.command,
        "classes": job.outputs,
        "batch_size_source": job.batch_size_source,
    }
