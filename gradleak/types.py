"""The values that travel through gradleak: a private batch, a shared update, a reconstruction and what proves it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput, InvalidUpdate

__all__ = [
    "Attempt",
    "Batch",
    "Certificate",
    "Construction",
    "Finding",
    "FindingKind",
    "Note",
    "NoteKind",
    "Part",
    "Reconstruction",
    "Shows",
    "Status",
    "Trace",
    "Update",
    "UpdateKind",
    "Verdict",
    "as_update",
    "name_prefix",
]


@dataclass(frozen=True, eq=False)
class Batch:
    """A private batch: model inputs of shape (N, ...) and labels, (N,) class indices or (N, C) probabilities.

    Raises:
        InvalidInput: the numbers of inputs and labels differ, the batch is empty, or one of them has no batch axis.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if not (isinstance(self.inputs, Tensor) and isinstance(self.labels, Tensor)):
            raise InvalidInput(
                f"A batch is one tensor of inputs and one of labels, not {type(self.inputs).__name__} and "
                f"{type(self.labels).__name__}; concatenate what the model takes (codes as numbers), and wrap it in a "
                "module that takes it apart again."
            )
        if self.inputs.ndim == 0 or self.labels.ndim == 0:
            raise InvalidInput(
                "A batch needs inputs and labels with examples along the first axis, also for one example; "
                "pass for example inputs[None] and torch.tensor([3])."
            )
        if self.inputs.shape[0] != self.labels.shape[0] or self.inputs.shape[0] == 0:
            raise InvalidInput(
                f"A batch needs as many labels as inputs and at least one, but it has {self.inputs.shape[0]} inputs "
                f"and {self.labels.shape[0]} labels; pass matching tensors."
            )

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Move or cast the inputs as ``Tensor.to`` does; index labels keep their integer type."""
        inputs = self.inputs.to(*args, **kwargs)
        labels = self.labels.to(*args, **kwargs) if self.labels.is_floating_point() else self.labels.to(inputs.device)
        return Batch(inputs, labels)


class UpdateKind(enum.Enum):
    """What an update's numbers mean."""

    GRADIENT = "gradient"
    """The gradient of the client's loss at the model that was sent out."""
    WEIGHT_DELTA = "weight_delta"
    """Parameters after local training minus parameters before."""


@dataclass(frozen=True, eq=False)
class Update:
    """What a client shares: one tensor per trainable parameter, by name, and what the numbers mean.

    ``buffers`` are values after local training, by name, where the client shares them (running statistics).
    """

    tensors: Mapping[str, Tensor]
    kind: UpdateKind = UpdateKind.GRADIENT
    buffers: Mapping[str, Tensor] | None = None

    def to(self, *args: Any, **kwargs: Any) -> Update:
        """Move or cast every tensor as ``Tensor.to`` does."""
        return replace(self, tensors={k: v.to(*args, **kwargs) for k, v in self.tensors.items()})

    def detach(self) -> Update:
        """Cut every tensor from its autograd graph."""
        return replace(self, tensors={k: v.detach() for k, v in self.tensors.items()})

    def check(self, model: nn.Module) -> None:
        """Check names, shapes and values against the trainable parameters of ``model``: finite, and not all zero.

        Raises:
            InvalidUpdate: with the first offending parameter and the remedy.
        """
        expected = {k: tuple(p.shape) for k, p in model.named_parameters() if p.requires_grad}
        missing = [k for k in expected if k not in self.tensors]
        extra = [k for k in self.tensors if k not in expected]
        if missing and extra:
            wrapped = name_prefix(expected, self.tensors)
            if wrapped is not None:
                raise InvalidUpdate(f"The update's names {wrapped}")
            raise InvalidUpdate(
                f"The update lacks {missing[0]!r} and has {extra[0]!r}, which the model does not train; "
                "use the model factory and parameter names that the client used."
            )
        if missing:
            raise InvalidUpdate(
                f"The update lacks {_some(missing)}; share every trainable parameter, or set requires_grad=False "
                "on those the client keeps to itself."
            )
        buffers = [k for k in extra if k in dict(model.named_buffers())]
        if buffers:
            raise InvalidUpdate(
                f"The update has {_some(buffers)}, which the model keeps as buffers and does not train; leave them "
                "out: an update is made of trainable parameters only."
            )
        if extra:
            raise InvalidUpdate(
                f"The update has {_some(extra)}, which the model does not train; "
                "use the model factory and parameter names that the client used."
            )
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape:
                raise InvalidUpdate(
                    f"Parameter {name!r} has shape {shape} in the model but {tuple(tensor.shape)} in the update; "
                    "check the model's options (classes, width) against the client's."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidUpdate(
                    f"Parameter {name!r} of the update has NaN or infinite values; "
                    "capture it again before loss scaling overflows or training diverges."
                )
        if expected and not any(bool(self.tensors[name].any()) for name in expected):
            remedy = (
                "capture gradients after loss.backward() and before zero_grad()"
                if self.kind is UpdateKind.GRADIENT
                else "copy the weights with clone() before training, or before and after are the same tensors"
            )
            raise InvalidUpdate(f"The update is zero in every parameter, so it says nothing about the batch; {remedy}.")


def as_update(update: Update | Mapping[str, Any] | Sequence[Any], model: nn.Module) -> Update:
    """Return what people hold in their hands as an :class:`Update` of dense floating-point tensors.

    That is an update, gradients by parameter name, or gradients in the order of the trainable parameters of ``model``;
    tensors, numpy arrays or nested lists, dense or sparse.

    Raises:
        InvalidUpdate: a value is no array of real floating-point numbers, or a sequence does not fit the parameters.
    """
    tensors = update.tensors if isinstance(update, Update) else update
    whole = update if isinstance(update, Update) else Update({})
    if not isinstance(tensors, Mapping):
        names = [k for k, p in model.named_parameters() if p.requires_grad]
        values = list(tensors)
        if len(values) != len(names):
            raise InvalidUpdate(
                f"The update is a list of {len(values)} values for {len(names)} trainable parameters; pass one for "
                "each, in the order of model.named_parameters(), or a mapping from names."
            )
        tensors = dict(zip(names, values, strict=True))
    return replace(whole, tensors={str(k): _dense(str(k), v) for k, v in tensors.items()})


def _dense(name: str, value: Any) -> Tensor:
    if value is None:
        raise InvalidUpdate(
            f"The update has None for {name!r}, as of a parameter that the loss does not reach; set its "
            "requires_grad=False in the model, or pass zeros."
        )
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
        tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidUpdate(
            f"The update's {name!r} is a {type(value).__name__}, not an array of numbers; pass tensors or arrays."
        ) from error
    if tensor.is_floating_point():
        return tensor
    raise InvalidUpdate(
        f"The update's {name!r} holds {str(tensor.dtype).removeprefix('torch.')} values, as a quantized one does; "
        "multiply them by their scale and pass floats."
    )


def name_prefix(expected: Iterable[str], found: Iterable[str]) -> str | None:
    """Return by what prefix the names ``found`` differ from ``expected``, with the remedy; None if by no prefix."""
    wanted, given = sorted(expected), set(found)
    if not wanted:
        return None
    for prefix in (n.removesuffix(wanted[0]) for n in sorted(given) if n.endswith(f".{wanted[0]}")):
        if all(prefix + n in given for n in wanted):
            return (
                f"begin with {prefix!r}{_wrapper(prefix)}, those of the model do not; "
                f"save {{k.removeprefix({prefix!r}): v for k, v in tensors.items()}} instead."
            )
    parts = wanted[0].split(".")
    for prefix in (".".join(parts[:i]) + "." for i in range(1, len(parts))):
        if all(n.startswith(prefix) and n.removeprefix(prefix) in given for n in wanted):
            return (
                f"lack {prefix!r}{_wrapper(prefix)}, with which those of the model begin; "
                f"use the model inside, or save {{{prefix!r} + k: v for k, v in tensors.items()}} instead."
            )
    return None


def _wrapper(prefix: str) -> str:
    wrapper = {"module": "DistributedDataParallel", "_orig_mod": "torch.compile"}.get(prefix.split(".")[0])
    return f" (from {wrapper})" if wrapper else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(n) for n in names[:3]) + more


@dataclass(frozen=True, eq=False)
class Trace:
    """How an iterative attack went: values at recorded iterations of the returned candidate.

    Attributes:
        iterations: K iteration numbers, ascending: evaluations of the objective's gradient so far.
        objectives: the attacker's objective at each.
        layers: parameter name → K squared gradient distances (Figure 5 of Zhu et al. 2019).
        snapshots: decoded candidates, shape (K, N, *shape), in the units of ``Reconstruction.inputs``.
    """

    iterations: tuple[int, ...] = ()
    objectives: tuple[float, ...] = ()
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    snapshots: Tensor | None = None


class Status(enum.StrEnum):
    """How an attack ended."""

    CONVERGED = "converged"
    BUDGET = "budget"
    """Iterations or time were used up; the best so far was returned."""
    STALLED = "stalled"
    INTERRUPTED = "interrupted"
    EXACT = "exact"
    """Linear algebra determined the inputs, and its equations hold down to rounding."""
    NOT_APPLICABLE = "not_applicable"
    """No attack's structural conditions hold; the reasons are recorded."""
    MISSING_KNOWLEDGE = "missing_knowledge"
    """The threat model does not grant what the attack needs."""


class Verdict(enum.StrEnum):
    """What the update alone proves; ``docs/threat-models.md`` says what each word means."""

    PROVED = "proved"
    MATCHED = "matched"
    UNPROVED = "unproved"

    @property
    def strength(self) -> int:
        """Return 2 for proved, 1 for matched, 0 for unproved."""
        return ("unproved", "matched", "proved").index(self.value)


class Shows(enum.StrEnum):
    """What the inputs of a reconstruction are."""

    INPUTS = "inputs"
    FEATURES = "features"
    """Inputs of the classification head, not of the model."""


class NoteKind(enum.StrEnum):
    """What a note is about."""

    ATTEMPT = "attempt"
    """An attack that was tried or left out, and why."""
    ASSUMPTION = "assumption"
    """Something that was not stated and had to be taken for granted."""
    RANGE = "range"
    """Solved values that cannot be inputs of the stated space."""
    LABELS = "labels"
    LIMIT = "limit"
    """What the attack cannot tell here."""
    METHOD = "method"
    """How the result was reached."""


class Note(str):
    """A sentence that a reader of the result must know; programs ask its ``kind``, never the text."""

    kind: NoteKind
    __slots__ = ("kind",)

    def __new__(cls, text: str, kind: NoteKind = NoteKind.METHOD) -> Self:
        """Return the sentence ``text``."""
        note = super().__new__(cls, text)
        note.kind = kind
        return note


class FindingKind(enum.StrEnum):
    """What was found besides, or instead of, whole inputs."""

    LABELS = "labels"
    COUNTS = "counts"
    BATCH_SIZE = "batch_size"
    FEATURES = "features"
    ROWS = "rows"
    """Examples of a batch whose inputs were read."""
    COLUMNS = "columns"
    """Categories or identifiers that an embedding's gradient names."""
    TOKENS = "tokens"


@dataclass(frozen=True)
class Finding:
    """Something that an update gives away although the inputs did not all come back: ``count`` of ``of`` there are.

    ``text`` is one sentence for a reader; ``proved`` says whether the update proves it, otherwise it is an estimate.
    """

    kind: FindingKind
    text: str
    proved: bool
    count: int
    of: int


@dataclass(frozen=True, eq=False)
class Part:
    """Tensors of an update that the input and others determine, whatever loss, labels and random masks there were.

    Attributes:
        inputs: (N, *shape) the solution, in float64 and model-input units, before it was decoded.
        simulate: model inputs (N, *shape) → these tensors by name, in float64.
        floors: name → distance from the seen tensor that rounding explains.
        given: names of the tensors that they are simulated from.
        factors: name → factor of its own that a tensor carries.
        spare: equations that are left for each unknown's column; without any, nothing shows that they hold.
        hidden: root mean square distance from their mean at which two examples look like one.
    """

    inputs: Tensor
    simulate: Callable[[Tensor], Mapping[str, Tensor]]
    floors: Mapping[str, float]
    given: tuple[str, ...]
    factors: Mapping[str, float]
    spare: int
    hidden: float


@dataclass(frozen=True)
class Construction:
    """How a result was constructed: a proof of uniqueness that came with the solution.

    Attributes:
        unknowns: number of values determined.
        error: estimated root mean square error, model-input units.
        statement: one clause for the reader ("every layer's linear system has full rank").
        local: whether a step on the way was unique nearby only, as the solution of nonlinear equations is.
        alone: whether the steps tell one example from a mixture of several; else only the update's scale does.
        scaled: whether the steps fix the inputs' scale, whatever factors the layers' gradients carry.
        part: what is compared with the update in place of all of it, where the steps need no more.
    """

    unknowns: int
    error: float
    statement: str
    local: bool = False
    alone: bool = True
    scaled: bool = True
    part: Part | None = None


@dataclass(frozen=True)
class Certificate:
    """What the re-simulated update alone proves about one reconstruction; no ground truth is involved.

    Attributes:
        verdict: proved (matched to the noise floor, and unique), matched (matched, not unique or uniqueness unknown),
            or unproved (not matched).
        residual: relative distance of the re-simulated update to the seen one.
        floor: the relative noise floor of the update: number format, accumulated rounding, known defense.
        rank: numerical rank of the update's Jacobian at the solution, None where it was not computed.
        unknowns: number of unknowns, None where it was not computed.
        examples: one verdict per example of the batch.
        reason: one sentence for a reader.
        factor: by which the re-simulated update was multiplied to match; 1 where the client's own scale fits.
        bound: largest root mean square error that the update leaves, model-input units; None where it was not bounded.
        local: whether the proof excludes inputs nearby only: another one that the model cannot tell from it may exist.
        mixture: whether a mean of several examples explains the update as well.
        factors: tensor name → factor, where each tensor needed its own.
        part: the tensors that were compared, where these determine the result whatever the rest is; empty for all.
    """

    verdict: Verdict
    residual: float
    floor: float
    rank: int | None = None
    unknowns: int | None = None
    examples: tuple[Verdict, ...] = ()
    reason: str = ""
    factor: float = 1.0
    bound: float | None = None
    local: bool = False
    mixture: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)
    part: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One way that an attack tried, by name.

    ``taken`` says whether it gave a result, ``verdict`` what that proves, ``reason`` why, or why the way did not apply.
    """

    attack: str
    taken: bool
    verdict: Verdict | None
    reason: str


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack returns: decoded inputs (N, *shape; images in [0, 1]) and labels, with how it got there.

    Attributes:
        labels: (N,) class indices, or None where the attack says nothing about labels.
        objective: the attacker's own final objective (lower is better; comparable within one attack only).
        label_probabilities: (N, C) where labels were optimized or recovered as distributions, or real targets.
        iterations: iterations of the returned candidate.
        evaluations: evaluations of the gradient of the objective, over all restarts.
        seconds: wall-clock time spent for this observation (a batched run's time divided by its observations).
        trace: iteration curves, None for closed forms.
        notes: sentences that a reader of the result must know.
        certificate: what the update itself proves.
        features: (N, d) exact inputs of the classification head, where an attack found them.
        attack: name of the attack that led to the result.
        construction: how the result was constructed, where that makes it unique.
        solved: (N,) mask of the examples that linear algebra solved, None for none.
        findings: what was found besides.
        shows: what ``inputs`` are.
        attempts: the ways that were tried, in order.
        confidence: (N, K) in [0, 1], how sure the attack is of each piece of each example, such as a cell of a row;
            its own estimate, which proves nothing. None where it has none.
    """

    inputs: Tensor
    labels: Tensor | None
    objective: float
    label_probabilities: Tensor | None = None
    status: Status = Status.CONVERGED
    iterations: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    trace: Trace | None = None
    notes: tuple[str, ...] = ()
    certificate: Certificate | None = None
    features: Tensor | None = None
    attack: str = ""
    construction: Construction | None = None
    solved: Tensor | None = None
    findings: tuple[Finding, ...] = ()
    shows: Shows = Shows.INPUTS
    attempts: tuple[Attempt, ...] = ()
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))

    def __len__(self) -> int:
        return int(self.inputs.shape[0])
