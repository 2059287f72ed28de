"""From tensors to a record: the one place where results become words and numbers."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

import gradleak
from gradleak.audit.folder import Folder
from gradleak.audit.records import (
    Aggregate,
    AttackRun,
    CertificateRecord,
    Curves,
    Example,
    Lift,
    Match,
    Outcome,
    Record,
    Subject,
    Success,
    Threat,
)
from gradleak.audit.scores import ExampleScore, Scores, error_curve
from gradleak.audit.verdict import judge
from gradleak.spaces import ImageSpace
from gradleak.threat import Knowledge, Observation
from gradleak.training import CrossEntropy, FedAvg, FedSGD
from gradleak.types import Batch, Reconstruction, Trace

__all__ = ["build_record", "resimulate"]

Array = npt.NDArray[Any]

LABELS = "label_accuracy"

_FORMATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


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
) -> Folder:
    """Return the record of one reconstruction, with its verdict, and the arrays beside it.

    Args:
        observation: what the attack saw.
        reconstruction: what it returned.
        attack: its name in ``gradleak.attacks``.
        options: its options, as the user would write them.
        seed: its seed.
        scores: against the private batch, where that is known.
        truth: the decoded private batch, for the pictures and the error curve only.
        model: how the user named the model.
        dtype: number format in which the update was captured; that of the observation if None.
        notes: sentences to add to those of the reconstruction.
        command: how to repeat the run from a shell.
        classes: number of classes, where it is known; otherwise read off the label probabilities.

    """
    assert (scores is None) == (truth is None), "scores and truth go together"
    dtype = dtype or next(iter(observation.update.tensors.values())).dtype
    simulated = resimulate(observation, reconstruction)
    match = None if simulated is None else Match(_residual(simulated, observation), float(torch.finfo(dtype).eps))
    curves, snapshots = _curves(observation, reconstruction, simulated, truth)
    if classes is None and reconstruction.label_probabilities is not None:
        classes = int(reconstruction.label_probabilities.shape[-1])
    subject = _subject(observation, model, dtype, classes)
    outcome = _outcome(observation, reconstruction, (*notes, *(() if scores is None else scores.notes)))
    certificate = None
    if reconstruction.certificate is not None:
        known = {f.name for f in dataclasses.fields(CertificateRecord)}
        certificate = CertificateRecord(**{k: v for k, v in dataclasses.asdict(reconstruction.certificate).items() if k in known})
    examples = None if scores is None else _examples(scores)
    lifts = () if scores is None else tuple(Lift(b.description, b.psnr, b.lift, b.oracle) for b in scores.baselines)
    withheld = [f.name for f in Knowledge if f not in observation.knows and f is not Knowledge.MALICIOUS and f.name]
    record = Record(
        subject=subject,
        threat=Threat(tuple(f.name for f in Knowledge if f in observation.knows and f.name), tuple(withheld)),
        attack=AttackRun(attack, {k: _option(v) for k, v in (options or {}).items()}, seed),
        outcome=outcome,
        verdict=judge(subject, outcome, examples, lifts, match, certificate),
        match=match,
        certificate=certificate,
        examples=examples,
        aggregates=() if scores is None else _aggregates(scores),
        success=None if scores is None else _success(scores),
        lifts=lifts,
        curves=curves,
        command=command,
        environment=_environment(observation),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Folder(
        record,
        _array(reconstruction.inputs),
        None if reconstruction.labels is None else _array(reconstruction.labels),
        None if truth is None else _array(truth.inputs),
        snapshots,
    )


def resimulate(observation: Observation, reconstruction: Reconstruction) -> dict[str, Tensor] | None:
    """Return the update that ``reconstruction`` would cause, in float64; None where the threat model cannot tell.

    It is computed from the decoded result, as it is handed over, in float64 whatever the attack searched in.
    """
    labels = reconstruction.label_probabilities
    labels = reconstruction.labels if labels is None else labels
    if observation.training is None or labels is None:
        return None
    if tuple(reconstruction.inputs.shape[1:]) != tuple(observation.space.shape):
        return None  # Features, not inputs: nothing that the model could be run on.
    params = {k: v.double() for k, v in observation.params.items()}
    others = {k: v.detach() for k, v in observation.model.named_parameters() if not v.requires_grad}
    others |= dict(observation.model.named_buffers())
    buffers = {k: v.double() if v.is_floating_point() else v for k, v in others.items()}
    device = next(iter(params.values())).device
    inputs = reconstruction.inputs.to(device)
    inputs = observation.space.encode(inputs.double() if inputs.is_floating_point() else inputs)
    labels = labels.to(device, torch.float64) if labels.is_floating_point() else labels.to(device)
    return observation.training.tensors(observation.model, params, inputs, labels, buffers=buffers)


def _residual(simulated: Mapping[str, Tensor], observation: Observation) -> float:
    seen = {k: v.double() for k, v in observation.update.tensors.items()}
    distance = sum(float((simulated[k] - seen[k]).square().sum()) for k in seen)
    length = sum(float(v.square().sum()) for v in seen.values())
    return (distance / length) ** 0.5 if length > 0 else float(distance > 0)


def _curves(
    observation: Observation,
    reconstruction: Reconstruction,
    simulated: Mapping[str, Tensor] | None,
    truth: Batch | None,
) -> tuple[Curves | None, Array | None]:
    """Return the curves and the snapshots, both with the result itself as their last point where it is missing."""
    trace = reconstruction.trace
    if trace is None or not trace.iterations:
        return None, None
    iterations, objectives, layers = trace.iterations, trace.objectives, {k: tuple(v) for k, v in trace.layers.items()}
    snapshots = None if trace.snapshots is None else trace.snapshots.detach().cpu()
    whole = snapshots is None or tuple(snapshots.shape[1:]) == tuple(reconstruction.inputs.shape)
    ended = (
        snapshots is not None and whole and torch.equal(snapshots[-1], reconstruction.inputs.cpu().to(snapshots.dtype))
    )
    if simulated is not None and whole and not ended:
        # What finished the search counted in other units, so the result stands one step behind it.
        end = iterations[-1] + 1
        seen = observation.update.tensors
        last = {k: float((simulated[k] - seen[k].double()).square().sum()) for k in layers}
        iterations, objectives = (*iterations, end), (*objectives, reconstruction.objective)
        layers = {k: (*v, last[k]) for k, v in layers.items()}
        if snapshots is not None:
            snapshots = torch.cat([snapshots, reconstruction.inputs.detach().cpu().to(snapshots.dtype)[None]])
    errors: tuple[float, ...] = ()
    if truth is not None and snapshots is not None and whole:
        curve = error_curve(
            Trace(iterations, objectives, layers, snapshots),
            truth,
            final=reconstruction.inputs,
            images=isinstance(observation.space, ImageSpace),
        )
        errors = () if curve is None else tuple(math.nan if v is None else v for v in curve.means)
    return Curves(iterations, objectives, layers, errors), None if snapshots is None else _array(snapshots)


def _subject(observation: Observation, model: str, dtype: torch.dtype, classes: int | None) -> Subject:
    params, space = observation.params, observation.space
    kind = type(observation.model)
    normalization = ""
    if isinstance(space, ImageSpace) and (space.mean or space.std):
        normalization = f"normalized with mean {_list(space.mean or (0.0,))} and std {_list(space.std or (1.0,))}"
    return Subject(
        model=model or kind.__name__,
        model_class=f"{kind.__module__}.{kind.__qualname__}",
        parameters=sum(p.numel() for p in params.values()),
        tensors=len(params),
        input_kind="image" if isinstance(space, ImageSpace) else "tensor",
        input_shape=tuple(space.shape),
        classes=classes,
        batch_size=observation.batch_size or 1,
        update_kind=observation.update.kind.value,
        dtype=_FORMATS.get(dtype, str(dtype).removeprefix("torch.")),
        training=_training(observation),
        normalization=normalization,
    )


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
    if not isinstance(loss, CrossEntropy):
        return f"{getattr(loss, '__name__', None) or type(loss).__name__} as loss"
    smoothing = f" with label smoothing {loss.label_smoothing:g}" if loss.label_smoothing else ""
    return f"{'mean' if loss.reduction == 'mean' else 'summed'} cross-entropy{smoothing}"


def _examples(scores: Scores) -> tuple[Example, ...]:
    return tuple(
        Example(
            e.index,
            e.reconstruction,
            e.label if _known(e) else None,
            e.guessed_label,
            {k: v for k, v in e.values.items() if _known(e) or k != LABELS},
        )
        for e in scores.examples
    )


def _known(example: ExampleScore) -> bool:
    # A truth without labels carries −1, which no class is.
    return example.label is None or example.label >= 0


def _aggregates(scores: Scores) -> tuple[Aggregate, ...]:
    result = []
    for name, unit in scores.units.items():
        values = [v for e in scores.examples if (v := e.values.get(name)) is not None and (_known(e) or name != LABELS)]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else None
            mean, median = statistics.fmean(values), statistics.median(values)
            result.append(Aggregate(name, unit, len(values), mean, sd, min(values), median, max(values)))
    return tuple(result)


def _success(scores: Scores) -> Success:
    low, high = scores.interval
    labels = scores.labels_recovered if all(map(_known, scores.examples)) else None
    return Success(scores.threshold, scores.successes, len(scores.examples), low, high, labels)


def _outcome(observation: Observation, reconstruction: Reconstruction, notes: Sequence[str]) -> Outcome:
    labels = reconstruction.labels
    whole = tuple(reconstruction.inputs.shape[1:]) == tuple(observation.space.shape)
    return Outcome(
        status=reconstruction.status,
        objective=float(reconstruction.objective),
        iterations=reconstruction.iterations,
        evaluations=reconstruction.evaluations,
        seconds=reconstruction.seconds,
        labels=None if labels is None or labels.ndim != 1 else tuple(int(v) for v in labels),
        notes=(*reconstruction.notes, *notes),
        shows="inputs" if whole else "features",
    )


def _environment(observation: Observation) -> dict[str, str]:
    device = next(iter(observation.params.values())).device
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPUs"
    return {
        "gradleak": str(getattr(gradleak, "__version__", "unknown")),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {chip}",
    }


def _option(value: Any) -> bool | int | float | str | None:
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value).removeprefix("torch.")


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16, and half precision gains nothing on disk at these sizes.
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
