"""The command ``gradleak attack``, from the options to the exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gradleak.attacks.counting import count_examples
from gradleak.attacks.sentences import ReadSentences
from gradleak.audit.folder import check_writable
from gradleak.capture_checks import check_capture
from gradleak.cli.console import warn
from gradleak.cli.request import Request, read_request
from gradleak.cli.running import Job, run
from gradleak.cli.signals import Watch
from gradleak.cli.subject import Subject, load_subject
from gradleak.cli.threads import choose_threads
from gradleak.cli.truth import granted_labels, public_images, read_truth
from gradleak.clock import Deadline
from gradleak.errors import InvalidInput, blaming_the_model
from gradleak.structure.probe import probe_inputs
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.training import Loss, Simulator, TargetKind, relax, target_kind
from gradleak.types import Note, NoteKind

__all__ = ["attack", "prepare"]


def attack(*, budget: float | None, **asked: Any) -> int:
    """Reconstruct the batch behind a captured update and write the folder of the result; return the exit code.

    ``budget`` is in seconds; ``asked`` are the options of :func:`gradleak.cli.request.read_request`.
    """
    check_writable(asked["out"].absolute())
    job = prepare({"budget": budget, **asked})
    with Watch(Deadline(budget)) as watch:
        return run(job, watch)


def prepare(asked: Mapping[str, Any]) -> Job:
    """Return what was asked for, read, checked and tried out; what is suspicious about it has been said."""
    if asked["model"].startswith("hf:"):
        from gradleak.cli.text import read_language  # takes the extra 'text', and seconds to import

        request, subject, losses = read_language(asked)
    else:
        request = read_request(asked)
        _check_no_language(request, asked)
        subject = load_subject(request.model, request.space, request.update, request.kind, request.batch_size)
        losses = request.loss.among(subject.outputs)
    count, source, noted = _count(request, subject, losses[0])
    job = _job(request, subject, losses, count, source, noted)
    step = _one_step(job.observations[0], count, subject.outputs)
    if not subject.tokens:
        what = f"The update of the model {request.model.spec!r} cannot be simulated"
        remedy = "its forward pass and the loss must be differentiable operations of PyTorch."
        with blaming_the_model(what, remedy):
            step()
        choose_threads(step)
    for note in job.warnings:
        warn(note)
    return job


def _check_no_language(request: Request, asked: Mapping[str, Any]) -> None:
    given = next((name for name in ("task", "lora") if asked.get(name) is not None), None)
    if given is not None or isinstance(request.attack.attack, ReadSentences):
        what = "The attack 'read_sentences'" if given is None else f"--{given}"
        raise InvalidInput(f"{what} is for language models; name the folder of one with --model hf:DIR.")


def _count(request: Request, subject: Subject, loss: Loss) -> tuple[int, str, tuple[Note, ...]]:
    """Return the number of examples, whether it was "stated" or "assumed", and what must be said about that."""
    if request.batch_size is not None:
        return request.batch_size, "stated", ()
    training = request.training(loss, 1)
    counted = count_examples(subject.model, subject.update, training, request.space)
    if counted.count is None:
        raise InvalidInput(
            f"The update does not tell how many examples are behind it ({counted.reason.rstrip('.')}); state the "
            "number with --batch-size."
        )
    examples = "one example" if counted.count == 1 else f"{counted.count} examples"
    said = f"The batch size was not stated; {examples} assumed. {counted.reason}"
    return counted.count, "assumed", (Note(said, NoteKind.ASSUMPTION),)


def _job(
    request: Request, subject: Subject, losses: tuple[Loss, ...], count: int, source: str, noted: tuple[Note, ...]
) -> Job:
    kinds = [target_kind(loss, torch.zeros(1, subject.outputs)) for loss in losses]
    suspicious = check_capture(subject.model, subject.update, request.training(losses[0], count), count, request.space)
    observations = tuple(
        _observe(request, subject, loss, kind, count, stated=source != "assumed")
        for loss, kind in zip(losses, kinds, strict=True)
    )
    truth = None
    if request.truth is not None:
        truth = read_truth(request.truth, request.space, count, observations[0].labels, kinds, subject.outputs)
    return Job(
        observations,
        request.attack,
        request.seed,
        request.out,
        subject.name,
        subject.captured,
        subject.outputs,
        request.command,
        batch_size_source=source,
        notes=(*request.notes, *subject.notes, *noted),
        warnings=suspicious,
        truth=truth,
        public=None if request.data is None else public_images(request.data, request.space),
    )


def _observe(
    request: Request, subject: Subject, loss: Loss, kind: TargetKind, count: int, *, stated: bool
) -> Observation:
    """Return what the attacker sees who is told the client's training, defenses included."""
    knows = Knowledge.BATCH_SIZE | Knowledge.TRAINING
    labels = None
    if request.labels is not None:
        if len(request.labels) != count:
            raise InvalidInput(f"--labels names {len(request.labels)} labels for {count} examples; give one for each.")
        labels = granted_labels(request.labels, kind, subject.outputs)
        knows |= Knowledge.LABELS
    if request.defense is not None:
        knows |= Knowledge.DEFENSE
    return ThreatModel(knows).observe(
        subject.model,
        subject.update,
        space=request.space,
        training=request.training(loss, count),
        batch_size=count,
        labels=labels,
        batch_size_stated=stated,
    )


def _one_step(observation: Observation, count: int, outputs: int) -> Callable[[], object]:
    """Return a small piece of what the attack will do over and over: one simulated update."""
    simulator = Simulator(observation.model, observation.training)
    inputs = probe_inputs(tuple(observation.space.shape), count, next(iter(observation.params.values())))
    loss = simulator.training.loss
    labels = relax(target_kind(loss, torch.zeros(1, outputs)), inputs.new_zeros(count, outputs))
    return lambda: simulator.update(inputs, labels, None)
