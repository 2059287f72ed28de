"""From tensors to a record: the one place where results become words and numbers."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import gradleak
from gradleak.audit.folder import Folder
from gradleak.audit.records import (
    AttackRun,
    AttemptRecord,
    CertificateRecord,
    Curves,
    FindingRecord,
    Match,
    Outcome,
    Record,
    Shown,
    Subject,
    Threat,
)
from gradleak.audit.scores import Scores, error_curve
from gradleak.audit.verdict import judge, judge_refusal
from gradleak.errors import MissingKnowledge, NotApplicable
from gradleak.threat import Knowledge, Observation
from gradleak.training import FedAvg, FedSGD
from gradleak.training.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError
from gradleak.types import Batch, Certificate, Finding, Note, NoteKind, Reconstruction, Shows, Status

__all__ = ["build_record", "build_refusal"]

Array = npt.NDArray[Any]
Left = tuple[dict[str, float], float]


def build_record(
    observation: Observation,
    reconstruction: Reconstruction,
    *,
    attack: str,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    scores: Scores | None = None,
    truth: Batch | None = None,
    model: str = "",
    dtype: torch.dtype | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    classes: int | None = None,
    batch_size_source: str | None = None,
) -> Folder:
    """Return the record of one reconstruction, with its verdict, and the arrays beside it.

    ``attack`` is its name in ``gradleak.attacks`` and ``options`` are as the user would write them. ``scores`` and
    ``truth``, the decoded private batch (for the pictures and the error curve only), go together. ``dtype`` is the
    number format in which the update was captured, that of the observation if None; ``notes`` are added to those of the
    reconstruction, ``command`` repeats the run from a shell, and ``classes`` are otherwise read off the label
    probabilities. ``batch_size_source`` is "stated" or "assumed"; if None,
    whether it was assumed is asked of the observation.
    """
    assert (scores is None) == (truth is None), "scores and truth go together"
    dtype = dtype or _format(observation)
    left = _unexplained(observation, reconstruction)
    match = None if left is None else Match(left[1], float(torch.finfo(dtype).eps))
    curves, snapshots = _curves(observation, reconstruction, left, truth)
    if classes is None and reconstruction.label_probabilities is not None:
        classes = int(reconstruction.label_probabilities.shape[-1])
    subject = _subject(observation, model, dtype, classes, batch_size_source)
    outcome = _outcome(reconstruction, attack, (*notes, *(() if scores is None else scores.notes)))
    certificate = None if reconstruction.certificate is None else _certificate(reconstruction.certificate)
    examples, success, lifts, aggregates = (
        (None, None, (), ()) if scores is None else (scores.examples, scores.success, scores.lifts, scores.aggregates)
    )
    columns, found = ((), None) if scores is None else (scores.columns, scores.found)
    record = Record(
        subject=subject,
        threat=_threat(observation),
        attack=AttackRun(attack, {k: _option(v) for k, v in (options or {}).items()}, seed),
        outcome=outcome,
        verdict=judge(subject, outcome, examples, lifts, match, certificate, success, columns),
        match=match,
        certificate=certificate,
        examples=examples,
        aggregates=aggregates,
        success=success,
        lifts=lifts,
        columns=columns,
        curves=curves,
        shown=_shown(observation, reconstruction, truth, found),
        command=command,
        environment=_environment(_device(observation)),
        created=_now(),
    )
    return Folder(
        record,
        _array(reconstruction.inputs),
        None if reconstruction.labels is None else _array(reconstruction.labels),
        None if truth is None else _array(truth.inputs),
        snapshots,
    )


def build_refusal(
    subject: Observation | Subject,
    error: MissingKnowledge | NotApplicable,
    *,
    attack: str,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    model: str = "",
    dtype: torch.dtype | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    classes: int | None = None,
    batch_size_source: str | None = None,
) -> Folder:
    """Return the record of an attack that did not run, with its reason and what was found all the same.

    ``subject`` is what the attack saw, or, where no observation could be made, what is known of it. ``error`` says why
    the attack did not run; its ``findings`` and ``attempts``, where the attack left them there, are recorded. The other
    arguments are those of :func:`build_record`. The folder's ``inputs`` have no examples: (0, *shape).
    """
    threat, device = Threat(()), torch.device("cpu")
    if isinstance(subject, Observation):
        threat, device = _threat(subject), _device(subject)
        subject = _subject(subject, model, dtype or _format(subject), classes, batch_size_source)
    refused = Status.MISSING_KNOWLEDGE if isinstance(error, MissingKnowledge) else Status.NOT_APPLICABLE
    outcome = Outcome(
        status=refused.value,
        objective=float("nan"),
        iterations=0,
        evaluations=0,
        seconds=0.0,
        notes=tuple(str(n) for n in notes),
        note_kinds=tuple(_kind(n) for n in notes),
        findings=_findings(error.findings),
        attempts=_attempts(error.attempts),
    )
    record = Record(
        subject=subject,
        threat=threat,
        attack=AttackRun(attack, {k: _option(v) for k, v in (options or {}).items()}, seed),
        outcome=outcome,
        verdict=judge_refusal(outcome, str(error)),
        command=command,
        environment=_environment(device),
        created=_now(),
    )
    return Folder(record, np.empty((0, *subject.input_shape), dtype=np.float32))


def _unexplained(observation: Observation, reconstruction: Reconstruction) -> Left | None:
    """Compare the update that ``reconstruction`` would cause; None where the threat model cannot tell.

    It is computed from the decoded result, as it is handed over, in float64 whatever the attack searched in.

    Returns:
        The squared distance by parameter name, and the relative distance of all of them.

    """
    offered = (reconstruction.label_probabilities, reconstruction.labels, observation.labels)
    labels = next((found for found in offered if found is not None), None)
    if observation.training is None or labels is None or reconstruction.shows is not Shows.INPUTS:
        return None
    if reconstruction.certificate is not None and reconstruction.certificate.part:
        return None  # The rest may hold random masks.
    simulator = observation.simulator
    inputs = reconstruction.inputs.to(simulator.device)
    inputs = observation.space.encode(inputs.double() if inputs.is_floating_point() else inputs)
    seen = {k: v.double() for k, v in observation.update.tensors.items()}
    ours = simulator.update(inputs, labels.to(simulator.device))
    left = simulator.residual({k: ours[k].detach() for k in seen}, seen)
    squares = {k: float(v.square().sum()) for k, v in left.items()}
    total, length = sum(squares.values()), sum(float(v.square().sum()) for v in seen.values())
    return squares, ((total / length) ** 0.5 if length > 0 else float(total > 0))


def _curves(
    observation: Observation,
    reconstruction: Reconstruction,
    left: Left | None,
    truth: Batch | None,
) -> tuple[Curves | None, Array | None]:
    """Return the curves and the snapshots, both with the result itself as their last point where it is missing."""
    trace = reconstruction.trace
    if trace is None or not trace.iterations:
        return None, None
    iterations, objectives, layers = trace.iterations, trace.objectives, {k: tuple(v) for k, v in trace.layers.items()}
    snapshots = None if trace.snapshots is None else trace.snapshots.detach().cpu()
    result = reconstruction.inputs.detach().cpu()
    # A search for features may have led to inputs: its snapshots are no earlier states of the result.
    alike = snapshots is not None and snapshots.shape[1:] == result.shape
    ended = snapshots is not None and alike and torch.equal(snapshots[-1], result.to(snapshots.dtype))
    if left is not None and (snapshots is None or alike) and not ended:
        # What finished the search counted in other units, so the result stands one step behind it.
        iterations, objectives = (*iterations, iterations[-1] + 1), (*objectives, reconstruction.objective)
        layers = {k: (*v, left[0].get(k, float("nan"))) for k, v in layers.items()}
        if snapshots is not None:
            snapshots = torch.cat([snapshots, result.to(snapshots.dtype)[None]])
    errors: tuple[float, ...] = ()
    if truth is not None and snapshots is not None and alike:
        errors = error_curve(snapshots, truth, observation.space, final=reconstruction.inputs)
    kept = snapshots if alike else None
    return Curves(iterations, objectives, layers, errors), None if kept is None else _array(kept)


def _subject(
    observation: Observation, model: str, dtype: torch.dtype, classes: int | None, batch_size_source: str | None
) -> Subject:
    params, space = observation.params, observation.space
    known = observation.batch_size is not None and observation.batch_size_stated
    kind = type(observation.model)
    return Subject(
        model=model or kind.__name__,
        model_class=f"{kind.__module__}.{kind.__qualname__}",
        parameters=sum(p.numel() for p in params.values()),
        tensors=len(params),
        input_kind=space.kind,
        input_shape=tuple(space.shape),
        classes=classes,
        batch_size=observation.batch_size or 1,
        update_kind=observation.update.kind.value,
        dtype=str(dtype).removeprefix("torch."),
        training=_training(observation),
        normalization=space.normalization,
        batch_size_source=(batch_size_source or "stated") if known else "assumed",
        noun=space.noun,
        nouns=space.nouns,
        display=space.display,
        quoted=space.quoted,
    )


def _threat(observation: Observation) -> Threat:
    flags = [f for f in Knowledge if f.name]
    withheld = [f.name for f in flags if f not in observation.knows and f is not Knowledge.MALICIOUS]
    return Threat(tuple(f.name for f in flags if f in observation.knows and f.name), tuple(n for n in withheld if n))


def _training(observation: Observation) -> str:
    training = observation.training
    if training is None:
        return "not told to the attacker"
    if isinstance(training, FedSGD):
        return f"{_loss(training.loss)}, one gradient over the whole batch (FedSGD)"
    if isinstance(training, FedAvg):
        steps = training.count(observation.batch_size or 1)
        rule = f"learning rate {training.lr:g}" if training.lr is not None else str(training.optimizer)
        return f"{_loss(training.loss)}, {steps} local {'step' if steps == 1 else 'steps'} with {rule} (FedAvg)"
    return repr(training)


def _loss(loss: object) -> str:
    if isinstance(loss, CrossEntropy):
        words = "cross-entropy"
        words += f" with label smoothing {loss.label_smoothing:g}" if loss.label_smoothing else ""
        words += " with class weights" if loss.weight is not None else ""
    elif isinstance(loss, BinaryCrossEntropy):
        words = "binary cross-entropy"
        words += f" with weight {loss.pos_weight:g} of positive targets" if loss.pos_weight != 1 else ""
    elif isinstance(loss, MeanSquaredError):
        words = "squared error"
    elif getattr(loss, "class_axis", None) == -1:
        return "mean cross-entropy over tokens"
    else:
        return f"{getattr(loss, '__name__', None) or type(loss).__name__} as loss"
    return f"{'mean' if loss.reduction == 'mean' else 'summed'} {words}"


def _outcome(reconstruction: Reconstruction, attack: str, notes: Sequence[str]) -> Outcome:
    labels, solved = reconstruction.labels, reconstruction.solved
    told = (*reconstruction.notes, *notes)
    whole = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    return Outcome(
        status=reconstruction.status.value,
        objective=float(reconstruction.objective),
        iterations=reconstruction.iterations,
        evaluations=reconstruction.evaluations,
        seconds=reconstruction.seconds,
        labels=tuple(int(v) for v in labels) if whole and labels is not None else None,
        notes=tuple(str(note) for note in told),
        note_kinds=tuple(_kind(note) for note in told),
        shows=reconstruction.shows.value,
        attack=reconstruction.attack or attack,
        findings=_findings(reconstruction.findings),
        attempts=_attempts(reconstruction.attempts),
        solved=() if solved is None or bool(solved.all()) else tuple(solved.nonzero().flatten().tolist()),
    )


def _kind(note: str) -> str:
    return (note.kind if isinstance(note, Note) else NoteKind.METHOD).value


def _findings(findings: Sequence[Finding]) -> tuple[FindingRecord, ...]:
    return tuple(FindingRecord(f.kind.value, str(f.text), f.proved, f.count, f.of) for f in findings)


def _attempts(attempts: Sequence[Any]) -> tuple[AttemptRecord, ...]:
    return tuple(
        AttemptRecord(a.attack, a.taken, None if a.verdict is None else str(a.verdict), str(a.reason)) for a in attempts
    )


def _certificate(certificate: Certificate) -> CertificateRecord:
    values = {f.name: getattr(certificate, f.name) for f in dataclasses.fields(certificate)}
    values["verdict"], values["examples"] = str(certificate.verdict), tuple(str(e) for e in certificate.examples)
    return CertificateRecord(**{**values, "reason": str(certificate.reason), "factors": dict(certificate.factors)})


def _shown(
    observation: Observation,
    reconstruction: Reconstruction,
    truth: Batch | None,
    found: tuple[tuple[bool, ...], ...] | None,
) -> Shown | None:
    space = observation.space
    read = space.restored(reconstruction.inputs, reconstruction.labels)
    if reconstruction.shows is not Shows.INPUTS or (guess := space.texts(read)) is None:
        return None
    sure = reconstruction.confidence
    told = None if sure is None else tuple(tuple(round(v, 3) for v in row) for row in sure.tolist())
    private = None if truth is None else space.texts(truth.inputs)
    return Shown(space.names, guess, private, found, told, space.lines(read))


def _device(observation: Observation) -> torch.device:
    return next(iter(observation.params.values())).device


def _format(observation: Observation) -> torch.dtype:
    return next(iter(observation.update.tensors.values())).dtype


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _environment(device: torch.device) -> dict[str, str]:
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPUs"
    return {
        "gradleak": str(getattr(gradleak, "__version__", "unknown")),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {chip}",
    }


def _option(value: Any) -> bool | int | float | str | None:
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value).removeprefix("torch.")


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16, and half precision gains nothing on disk at these sizes.
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
