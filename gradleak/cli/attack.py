"""What the commands ``demo``, ``attack`` and ``list`` do; imported only when one of them runs."""

from __future__ import annotations

import inspect
import math
import re
import signal
import threading
import time
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import gradleak.attacks
import gradleak.defenses
import gradleak.metrics
import gradleak.models
from gradleak.attacks.base import Attack
from gradleak.attacks.base import Progress as Step
from gradleak.attacks.sentences import ReadSentences
from gradleak.audit.build import build_record
from gradleak.audit.folder import Folder, check_writable, write_folder
from gradleak.audit.numbers import duration, sig
from gradleak.audit.scores import score
from gradleak.data import demo_image, load_images, read_tensors
from gradleak.data.tensors import named
from gradleak.errors import InvalidFile, InvalidInput, InvalidModel, InvalidUpdate, UnknownName
from gradleak.exchange import Client
from gradleak.metrics import Metric
from gradleak.models import load, locate, parse_options
from gradleak.report import picture, render
from gradleak.spaces import ImageSpace, InputSpace, TensorSpace
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.training import (
    CrossEntropy,
    FedAvg,
    FedSGD,
    LocalTraining,
    batch_statistics,
    check_reproducible,
    parameters,
)
from gradleak.types import Batch, Reconstruction, Shows, Trace, Update, UpdateKind, name_prefix

__all__ = ["Request", "attack", "demo", "list_names"]

_NAMED = {
    "attacks": gradleak.attacks,
    "models": gradleak.models,
    "metrics": gradleak.metrics,
    "defenses": gradleak.defenses,
}
_DTYPES = {"as-is": None, "float32": torch.float32, "float64": torch.float64}
# A minute is promised, start-up included, on a machine with other work to do as well.
_DEMO_ITERATIONS, _DEMO_SECONDS = 3000, 30.0
_PUBLIC = 256
"""Public images that are read for the null guesses."""
_TOKENS = (
    "takes tokens, which the command line cannot describe; in Python, gl.attacks.read_sentences() reads the masked "
    "language models of gradleak.integrations.huggingface."
)


@dataclass(frozen=True)
class Request:
    """What ``gradleak attack`` was asked to do, as typed; `gradleak attack --help` explains every field."""

    model: str
    update: Path
    input_shape: str
    out: Path
    model_args: tuple[str, ...] = ()
    weights: Path | None = None
    classes: int | None = None
    batch_size: int = 1
    attack: str = "auto"
    attack_options: tuple[str, ...] = ()
    mean: str | None = None
    std: str | None = None
    kind: str = "gradient"
    lr: float | None = None
    local_epochs: int = 1
    local_batch_size: int | None = None
    mode: str = "as-is"
    reduction: str = "mean"
    label_smoothing: float = 0.0
    labels: str | None = None
    truth: Path | None = None
    data: str | None = None
    seed: int = 0
    budget: str | None = None
    device: str = "cpu"
    dtype: str = "as-is"
    command: str = ""


@dataclass(frozen=True, eq=False)
class _Job:
    """An attack that is ready to run, with what is needed to report on it."""

    observation: Observation
    attack: Attack
    name: str
    options: Mapping[str, Any]
    seed: int
    model: str
    out: Path
    classes: int | None = None
    truth: Batch | None = None
    dtype: torch.dtype | None = None
    public: Tensor | None = None
    command: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)
    budget: float | None = None
    trace: Trace | None = None
    """How another attack went on the same update, for a result that has no iterations of its own."""


# --------------------------------------------------------------------------------------------------- commands


def demo(out: Path, seed: int, image: Path | None, command: str) -> None:
    """Leak one photograph from one gradient of the paper's LeNet."""
    out = out.absolute()
    check_writable(out)
    private = demo_image(32) if image is None else _one_image(image, (3, 32, 32))
    # Drawn, not chosen: the attacker does not know the label, and no seed is better than another.
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(100, (1,), generator=generator)
    model = gradleak.models.lenet(seed=seed)
    batch = Batch(private, label)
    training = FedSGD()
    observation = ThreatModel().observe(
        model,
        Client(model, batch, training).send(),
        space=ImageSpace((3, 32, 32)),
        training=training,
        batch_size=1,
    )
    what = "a photograph of a cat" if image is None else f"{image.name!r}"
    _say(f"A client computes one gradient of a LeNet on {what} and shares nothing else.")
    _say("The server looks for an image that causes the same gradient, by search, as Zhu et al. proposed in 2019 …")
    matching, options = _build_attack("dlg", {"iterations": _DEMO_ITERATIONS})
    job = _Job(observation, matching, "dlg", options, seed, "lenet", out, 100, batch, command=command)
    matched = _attack_with_progress(replace(job, budget=_DEMO_SECONDS))
    error = sig(score(matched, batch, observation.space).aggregate("mse").mean, 2)
    how = f"{matched.evaluations:,} evaluations, {duration(matched.seconds)}, MSE {error}"
    _say(f"Search: {how}.")
    _say("Now the same gradient by linear algebra …")
    exact, options = _build_attack("auto", {})
    note = f"Slider and curves show the search, dlg(): {how}. Their last stop is this result, which needed no search."
    _run(replace(job, attack=exact, name="auto", options=options, notes=(note,), trace=matched.trace))


def attack(request: Request) -> None:
    """Reconstruct the batch behind a captured update."""
    out = request.out.absolute()
    check_writable(out)
    space = _space(request)
    attack, options, budget = _timed_attack(request)
    if isinstance(attack, ReadSentences):
        raise InvalidInput(f"The attack 'read_sentences' {_TOKENS}")
    stored = read_tensors(request.update)
    device = _device(request.device)
    model, spec, notes = _model(request, space)
    shared, positional = named(stored, request.update, parameters(model), model.state_dict())
    if positional:
        notes += ("The update's arrays have no names; they were taken in the order of the model's parameters.",)
    idle = [k for k in shared if k in _statistics(model)]
    if idle:
        notes += (f"Left out of the update: {_such(idle)}, which the client does not train but keeps as buffers.",)
    update = _floats({k: v for k, v in shared.items() if k not in idle}, request.update)
    captured = next((v.dtype for v in update.values()), None)
    update = {k: v.to(device, next(model.parameters()).dtype) for k, v in update.items()}
    training = _training(request)
    kind = _choice("kind", request.kind, UpdateKind)
    sent = Update(update, kind)
    sent.check(model)
    check_reproducible(model)
    classes = _probe(model, space, request)
    labels = _labels(request, classes)
    truth = _truth(request, space, labels, classes)
    public = None
    if request.data is not None:
        public = _public(request.data, space)
    knows = Knowledge.BATCH_SIZE | Knowledge.TRAINING
    observation = ThreatModel(knows if labels is None else knows | Knowledge.LABELS).observe(
        model, sent, space=space, training=training, batch_size=request.batch_size, labels=labels
    )
    _run(
        _Job(
            observation,
            attack,
            request.attack,
            options,
            request.seed,
            spec,
            out,
            classes,
            truth,
            captured,
            public,
            request.command,
            notes,
            budget,
        )
    )


def list_names(kind: str | None) -> None:
    """Print names with the first line of their documentation."""
    if kind is not None and kind not in _NAMED:
        raise UnknownName("list", kind, _NAMED)
    for group, package in _NAMED.items():
        # Factories and instances; base classes are for those who write new ones.
        names = [n for n in getattr(package, "__all__", ()) if not inspect.isclass(getattr(package, n))]
        if kind not in (None, group):
            continue
        if kind is None:
            _say(group, style="bold")
        if not names:
            _say("  (none yet)")
        for name in names:
            _say(f"  {name:<22} {_summary(getattr(package, name))}")


def _summary(thing: object) -> str:
    # A metric is an object, documented by the file that it is alone in; everything else documents itself.
    documented = inspect.getmodule(thing.fn) if isinstance(thing, Metric) else thing
    line = " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", line).replace("``", "")


# --------------------------------------------------------------------------------------------------- one attack


def _run(job: _Job) -> None:
    reconstruction = _attack_with_progress(job)
    if reconstruction.trace is None:
        reconstruction = replace(reconstruction, trace=job.trace)
    truth, notes = job.truth, job.notes
    if truth is not None and reconstruction.shows is Shows.FEATURES:
        truth = None
        notes = (
            *notes,
            "The attack recovers features, which cannot be scored against private inputs; --truth is unused.",
        )
    scores = None if truth is None else score(reconstruction, truth, job.observation.space, public=job.public)
    folder = build_record(
        job.observation,
        reconstruction,
        attack=job.name,
        options=job.options,
        seed=job.seed,
        scores=scores,
        truth=truth,
        model=job.model,
        dtype=job.dtype,
        notes=notes,
        command=job.command,
        classes=job.classes,
    )
    pictures = picture(folder.record, folder.inputs, folder.truth, folder.snapshots)
    write_folder(job.out, folder, render(folder.record, pictures))
    _tell(folder, job.out)
    if reconstruction.status == "interrupted":
        _warn("The attack was interrupted; this is the best it had found by then.")
        raise typer.Exit(130)


class _Interrupts:
    """The first Ctrl-C asks the attack to stop and return its best so far; the second stops the program."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> _Interrupts:
        # Only the main thread may set handlers; elsewhere Ctrl-C keeps its usual meaning.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        _warn("Stopping at the next step; press Ctrl-C again to give up at once.")


def _attack_with_progress(job: _Job) -> Reconstruction:
    console = Console(stderr=True)
    with (
        _Interrupts() as interrupts,
        Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
            TextColumn("objective {task.fields[objective]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # Where nobody watches, a bar is noise in a log.
            disable=not console.is_terminal,
        ) as bar,
    ):
        task: TaskID = bar.add_task(job.name, total=1, objective="–", visible=False)

        began, late = time.monotonic(), False

        def callback(step: Step) -> None:
            nonlocal late
            bar.update(task, completed=step.done, total=step.total, objective=sig(step.objective), visible=True)
            late = job.budget is not None and time.monotonic() - began > job.budget
            if interrupts.asked or late:
                raise KeyboardInterrupt

        reconstruction = job.attack.reconstruct(job.observation, seed=job.seed, callback=callback)
    if late and not interrupts.asked and reconstruction.status == "interrupted":
        note = f"The attack was stopped by its time budget of {duration(job.budget or 0.0)}."
        return replace(reconstruction, status="budget", notes=(*reconstruction.notes, note))
    return reconstruction


def _tell(folder: Folder, out: Path) -> None:
    record = folder.record
    _say("")
    _say(record.verdict.headline, style="bold")
    _say(record.verdict.reason)
    if record.examples is not None:
        names = [a.metric for a in record.aggregates]
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("example", justify="right")
        table.add_column("class", justify="right")
        for a in record.aggregates:
            table.add_column(a.metric + (f", {a.unit}" if a.unit else ""), justify="right")
        for e in record.examples[:20]:
            label = "–" if e.label is None else str(e.label)
            table.add_row(str(e.index + 1), label, *(sig(e.values.get(name), 3) for name in names))
        _say("")
        _console().print(table)
        if len(record.examples) > 20:
            _say(f"… and {len(record.examples) - 20} better ones in result.json.")
    _say("")
    outcome = record.outcome
    search = f"{outcome.iterations:,} iterations, {outcome.evaluations:,} evaluations"
    _say(f"{'In closed form' if outcome.evaluations == 0 else search}, {duration(outcome.seconds)}")
    _say(f"Report: {out / 'report.html'}")


# ------------------------------------------------------------------------------------------ reading the request


def _timed_attack(request: Request) -> tuple[Attack, dict[str, Any], float | None]:
    """Return the attack, its options, and the seconds after which it must be stopped from outside, if it must."""
    options, budget = parse_options(request.attack_options), _seconds(request.budget)
    known = request.attack in gradleak.attacks.__all__
    takes = inspect.signature(getattr(gradleak.attacks, request.attack)).parameters if known else ()
    if budget is not None and "budget" in takes:
        if "budget" in options:
            raise InvalidInput("--budget and --attack-option budget=… both limit the time; give one of them.")
        # Stopped from outside it would not know that its later phases have no time either.
        options, budget = {**options, "budget": budget}, None
    return *_build_attack(request.attack, options), budget


def _build_attack(name: str, options: Mapping[str, Any]) -> tuple[Attack, dict[str, Any]]:
    """Return the attack and all its options, defaults included."""
    factory: Any
    if ":" in name:
        factory = locate(name)
        if not callable(factory):
            raise InvalidInput(f"{name!r} is a {type(factory).__name__}; name a function that returns an Attack.")
    elif name in gradleak.attacks.__all__:
        factory = getattr(gradleak.attacks, name)
    else:
        raise UnknownName("attack", name, [*gradleak.attacks.__all__, "module:factory"])
    signature = inspect.signature(factory)
    hints = typing.get_type_hints(factory)
    given = {}
    for key, value in options.items():
        if key not in signature.parameters:
            raise UnknownName(f"option of {name}", key, signature.parameters or ["(it takes none)"])
        given[key] = _convert(name, key, value, hints.get(key, Any))
    try:
        built = factory(**given)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"The attack {name} cannot be built with {dict(options)} ({error}); correct the options."
        ) from error
    if not isinstance(built, Attack):
        raise InvalidInput(f"The factory {name!r} returned a {type(built).__name__}; it must return an Attack.")
    every = {k: p.default for k, p in signature.parameters.items() if p.default is not p.empty} | given
    return built, every


def _convert(attack: str, key: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type that the option is annotated with."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, str) and value.lower() == "none" and type(None) in choices:
        return None
    if torch.dtype in choices:
        if value in ("float32", "float64"):
            return getattr(torch, value)
        raise InvalidInput(f"Option {key!r} of {attack} is a number type; use float32 or float64, not {value!r}.")
    if Any in choices or type(value) in choices:
        return value
    if float in choices and type(value) is int:
        return float(value)
    if str in choices:
        return str(value)
    if any(typing.get_origin(c) is typing.Literal and value in typing.get_args(c) for c in choices):
        return value
    wanted = " or ".join(getattr(c, "__name__", str(c)) for c in choices if c is not type(None))
    raise InvalidInput(f"Option {key!r} of {attack} is {wanted}, not {value!r}; give such a value.")


def _space(request: Request) -> InputSpace:
    shape = tuple(int(v) for v in _list("--input-shape", request.input_shape, whole=True))
    if min(shape) < 1:
        raise InvalidInput(f"--input-shape {request.input_shape!r} has a size below 1; write for example 3,32,32.")
    mean, std = (
        tuple(_list(name, text)) if text else () for name, text in (("--mean", request.mean), ("--std", request.std))
    )
    if len(shape) == 3:
        return ImageSpace(shape, mean=mean, std=std)
    if mean or std:
        raise InvalidInput("--mean and --std are for images; leave them out, or give --input-shape as C,H,W.")
    return TensorSpace(shape)


def _list(option: str, text: str, *, whole: bool = False) -> list[float]:
    try:
        return [float(int(part)) if whole else float(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        example = "3,32,32" if option == "--input-shape" else "3,7" if whole else "0.5,0.5,0.5"
        raise InvalidInput(
            f"{option} {text!r} is not a list of {'whole ' if whole else ''}numbers; write for example {example}."
        ) from None


def _choice(option: str, text: str, kind: type[UpdateKind]) -> UpdateKind:
    names = [k.value for k in kind]
    if text not in names:
        raise UnknownName(option, text, names)
    return kind(text)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:].lower())
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"--budget {text!r} is not a time; write for example 90s, 2m or 1h.")
    return seconds


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnknownName("device", name, ["cpu", "cuda"]) from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InvalidInput(f"There is no CUDA device {name!r} here; use --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UnknownName("device", name, ["cpu", "cuda"])
    return device


def _model(request: Request, space: InputSpace) -> tuple[nn.Module, str, tuple[str, ...]]:
    """Return the model with its weights, type, mode and device; how to name it; and notes."""
    options = parse_options(request.model_args)
    shown = dict(options)
    if request.model in gradleak.models.__all__:
        # gradleak's own models are sized to the data that were described anyway.
        accepted = inspect.signature(getattr(gradleak.models, request.model)).parameters
        sizes: dict[str, Any] = {}
        if len(space.shape) == 3:
            sizes = {"in_channels": space.shape[0], "image_size": (space.shape[1], space.shape[2])}
        if request.classes is not None:
            sizes["classes"] = request.classes
        options = {k: v for k, v in sizes.items() if k in accepted} | options
    if request.mode not in _MODES:
        raise UnknownName("mode", request.mode, _MODES)
    if request.dtype not in _DTYPES:
        raise UnknownName("dtype", request.dtype, _DTYPES)
    model = load(request.model, options)
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidModel(f"The model {request.model!r} has no trainable parameter, so there is nothing to attack.")
    dtype = _DTYPES[request.dtype]
    notes: tuple[str, ...] = ()
    if request.weights is not None:
        weights, positional = named(
            read_tensors(request.weights), request.weights, parameters(model), model.state_dict()
        )
        loaded = [v.dtype for v in weights.values() if v.is_floating_point()]
        dtype = dtype or (max(loaded, key=lambda d: torch.finfo(d).bits) if loaded else None)
        # Half-precision weights are exact in float32, where the forward map has second derivatives on every device.
        dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        model = model.to(dtype=dtype) if dtype is not None else model
        notes = _load_weights(model, weights, request.weights)
        if positional:
            notes += ("The weights' arrays have no names; they were taken in the order of the model's parameters.",)
    else:
        model = model.to(dtype=dtype) if dtype is not None else model
        notes = ("No weights were given: the values that the model factory sets were taken for those sent out.",)
    if request.mode == "batch":
        model = batch_statistics(model)
    elif request.mode != "as-is":
        model.train(request.mode == "train")
    spec = request.model + (f" ({', '.join(f'{k}={v}' for k, v in shown.items())})" if shown else "")
    return model.to(_device(request.device)), spec, notes


_MODES = ("as-is", "eval", "train", "batch")


def _statistics(model: nn.Module) -> set[str]:
    """Return the names of the model's buffers, and of running statistics that its normalization does without."""
    names = {k for k, _ in model.named_buffers()}
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            names |= {f"{path}.{k}" if path else k for k in ("running_mean", "running_var", "num_batches_tracked")}
    return names


def _such(names: list[str]) -> str:
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> tuple[str, ...]:
    """Load ``weights``, which must name every parameter and buffer that the model stores; return notes.

    Of other names, only running statistics that the model's normalization does without are allowed, and left out.
    """
    own = model.state_dict()
    unused = [k for k in weights if k not in own and k in _statistics(model)]
    weights = {k: v for k, v in weights.items() if k not in unused}
    # Counters of BatchNorm do not enter the computation, and some tools drop them.
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    # Tied parameters appear under each of their names in a state dict, but often once in a file.
    stored = {v.data_ptr() for k, v in own.items() if k in weights and v.numel()}
    missing = [k for k in missing if own[k].data_ptr() not in stored or not own[k].numel()]
    extra = [k for k in weights if k not in own]
    wrapped = name_prefix(missing, extra) if missing and extra else None
    if wrapped is not None:
        raise InvalidFile(f"The names in the weights file {str(path)!r} {wrapped}")
    if missing or extra:
        what = f"lacks {_such(missing)}" if missing else f"has {_such(extra)}, which the model does not know"
        raise InvalidFile(f"The weights file {str(path)!r} {what}; check --model and --model-arg against the client's.")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise InvalidFile(
                f"{name!r} has shape {tuple(own[name].shape)} in the model but {tuple(tensor.shape)} in the weights "
                "file; check --model-arg and --classes against the client's."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidFile(f"{name!r} of the weights has NaN or infinite values; save the weights again.")
    model.load_state_dict({**own, **weights})
    return (f"Left out of the weights: {_such(unused)}, which the model does without.",) if unused else ()


def _floats(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InvalidUpdate(
                f"{name!r} of {str(path)!r} holds {tensor.dtype} values, not floats; "
                "share the gradients or weight differences of the parameters only."
            )
    # Copied into memory of their own: views into a file lie at odd addresses, where sums may round differently.
    return {k: v.clone() for k, v in tensors.items()}


def _training(request: Request) -> LocalTraining:
    loss = CrossEntropy(request.reduction, request.label_smoothing)
    if request.kind != "weight_delta":
        if request.lr is not None or request.local_epochs != 1 or request.local_batch_size is not None:
            raise InvalidInput(
                "--lr, --local-epochs and --local-batch-size describe local training; give them with "
                "--kind weight_delta only."
            )
        return FedSGD(loss)
    if request.lr is None:
        raise InvalidInput("A weight delta depends on the client's learning rate; give it with --lr.")
    return FedAvg(request.lr, epochs=request.local_epochs, batch_size=request.local_batch_size, loss=loss)


def _probe(model: nn.Module, space: InputSpace, request: Request) -> int | None:
    """Check that the model takes such inputs; return its number of classes."""
    like = next(model.parameters())
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(request.batch_size, *space.shape, dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "argument #1 'indices'" in reason:  # an embedding that was given numbers
            raise InvalidModel(f"The model {request.model!r} {_TOKENS}") from error
        raise InvalidInput(
            f"The model does not take {request.batch_size} inputs of shape {tuple(space.shape)} ({reason}); "
            "check --input-shape."
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InvalidModel(
            f"The model returns {found}, where logits (examples, classes) are needed; wrap it so that it returns them."
        )
    if request.classes is not None and outputs.shape[1] != request.classes:
        raise InvalidInput(
            f"The model has {outputs.shape[1]} classes, not {request.classes}; correct --classes or --model-arg."
        )
    return int(outputs.shape[1])


def _labels(request: Request, classes: int | None) -> Tensor | None:
    if request.labels is None:
        return None
    labels = [int(v) for v in _list("--labels", request.labels, whole=True)]
    if len(labels) != request.batch_size:
        raise InvalidInput(
            f"--labels names {len(labels)} classes for {request.batch_size} examples; give one for each."
        )
    _in_range(labels, classes, "--labels")
    return torch.tensor(labels)


def _in_range(labels: list[int], classes: int | None, source: str) -> None:
    wrong = [v for v in labels if v < 0 or (classes is not None and v >= classes)]
    if wrong:
        raise InvalidInput(
            f"{source} names class {wrong[0]}, but classes run from 0 to {(classes or 1) - 1}; correct it."
        )


def _truth(request: Request, space: InputSpace, told: Tensor | None, classes: int | None) -> Batch | None:
    """Return the decoded private batch; unknown labels are −1, which no class equals."""
    if request.truth is None:
        return None
    inputs, labels = _read_truth(request.truth, space)
    if len(inputs) != request.batch_size:
        raise InvalidInput(
            f"{str(request.truth)!r} has {len(inputs)} examples, but --batch-size is {request.batch_size}; "
            "score against the batch that was attacked."
        )
    if tuple(inputs.shape[1:]) != tuple(space.shape):
        raise InvalidInput(
            f"{str(request.truth)!r} has examples of shape {tuple(inputs.shape[1:])}, but --input-shape is "
            f"{tuple(space.shape)}; score against the batch that was attacked."
        )
    if not bool(torch.isfinite(inputs).all()):
        raise InvalidInput(f"{str(request.truth)!r} has NaN or infinite values; save the private inputs again.")
    if isinstance(space, ImageSpace) and not bool(((inputs >= 0) & (inputs <= 1)).all()):
        raise InvalidInput(
            f"{str(request.truth)!r} has values from {float(inputs.min()):.4g} to {float(inputs.max()):.4g}, outside "
            "[0, 1]; undo its normalization (and tell it with --mean and --std), or divide bytes by 255."
        )
    labels = told if labels is None else labels
    if labels is None:
        labels = torch.full((len(inputs),), -1)
    else:
        if labels.shape != (len(inputs),) or labels.is_floating_point():
            raise InvalidInput(f"The labels in {str(request.truth)!r} must be one class number for each example.")
        _in_range([int(v) for v in labels], classes, str(request.truth))
    return Batch(inputs, labels.long())


def _read_truth(path: Path, space: InputSpace) -> tuple[Tensor, Tensor | None]:
    arrays: Mapping[str, Tensor]
    if path.suffix.lower() == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                named = "inputs" in file.files
                arrays = {k: torch.from_numpy(file[k]) for k in ("inputs", "labels") if k in file.files}
        except FileNotFoundError:
            raise InvalidFile(f"There is no file {str(path)!r}; check the path.") from None
        except Exception as error:  # damaged archives fail in many ways
            raise InvalidFile(
                f"{str(path)!r} cannot be read as .npz; save it with numpy.savez(path, inputs=…, labels=…)."
            ) from error
        if not named:
            images = load_images(path)
            return images.inputs.double(), images.labels
    elif path.suffix.lower() in (".safetensors", ".pt", ".pth"):
        arrays = read_tensors(path)
    else:
        shape = tuple(space.shape)
        if len(shape) != 3:
            raise InvalidInput(f"{str(path)!r} is no .npz or .safetensors file, which inputs other than images need.")
        return _one_image(path, (shape[0], shape[1], shape[2])).double(), None
    if "inputs" not in arrays:
        raise InvalidFile(f"{str(path)!r} has no tensor named 'inputs'; name them inputs and labels.")
    inputs = arrays["inputs"]
    inputs = inputs.double() / 255 if inputs.dtype == torch.uint8 else inputs.double()
    return inputs, arrays.get("labels")


def _one_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Return one picture from a file, resized to ``shape``, (1, C, H, W)."""
    return load_images(path, shape=shape).inputs[:1]


def _public(spec: str, space: InputSpace) -> Tensor:
    if len(space.shape) != 3:
        raise InvalidInput("--data holds images; leave it out for other inputs.")
    images = load_images(spec, shape=(space.shape[0], space.shape[1], space.shape[2]))
    if len(images) <= _PUBLIC:
        return images.inputs
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_PUBLIC]
    return images.inputs[order]


# --------------------------------------------------------------------------------------------------- output


def _console() -> Console:
    return Console(highlight=False)


def _say(text: str, style: str = "") -> None:
    # Text, not markup: a path may contain brackets.
    _console().print(Text(text, style=style), soft_wrap=True)


def _warn(text: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)
