"""What an update gives away, told in seconds: layer by layer, way by way, with a prediction that can be checked."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.auto import WAYS, Auto, Case, Way
from gradleak.attacks.counting import CountedExamples, count_examples, gradient_rank
from gradleak.attacks.findings import find_besides
from gradleak.clock import Deadline, TimeSpent
from gradleak.errors import GradleakError, InvalidInput, NotApplicable, reason
from gradleak.spaces import TokenSpace
from gradleak.structure.first_layer import find_input_layer
from gradleak.structure.head import find_head
from gradleak.structure.probe import run_quietly
from gradleak.structure.ranks import RankBound, rank_bound
from gradleak.threat import Observation
from gradleak.types import Finding, FindingKind, Reconstruction, Status, Verdict

__all__ = ["Gives", "Inspection", "LayerReading", "Prediction", "WayReading", "inspect"]

_DROWNED = 0.5
"""Deviation of a known defense, relative to the update, from which on a match cannot be told from a guess."""
_READ = {FindingKind.ROWS, FindingKind.COLUMNS, FindingKind.TOKENS, FindingKind.FEATURES}
"""Findings that are part of the inputs, or of what the model makes of them."""
_COVERED = 0.1
"""The same for one layer, from which on its gradient tells nothing by itself."""
_SHARE = 0.3
"""Of the time, for the layers; the ways have the rest."""


class Prediction(enum.StrEnum):
    """What an attack will get."""

    EXACT = "exact"
    """All inputs, by solving equations."""
    PARTIAL = "partial"
    """Some examples, or some of what each consists of; the rest is left to a search."""
    MATCHING = "matching only"
    """No equations determine an input; whether a search comes close depends on its time and its prior."""
    NOTHING = "nothing"
    """No attack here applies, or the noise of a defense drowns the update."""


class Gives(enum.StrEnum):
    """What a layer's gradient gives away by itself."""

    INPUTS = "inputs"
    """Rows of it are inputs of the model: of each unit that one example alone activates, that example."""
    LABELS = "labels"
    IDS = "ids"
    """Which tokens or categories were looked up."""
    SPAN = "span"
    """The space in which all vectors that the layer saw lie; its dimension is at most their number."""
    EQUATIONS = "equations"
    """Sums over examples or places, which determine something only together with other layers."""


@dataclass(frozen=True)
class LayerReading:
    """What the gradient of one layer gives away.

    Attributes:
        name: as in ``model.get_submodule``.
        kind: its type.
        numbers: of its gradient.
        vectors: that it sees of one example, None where they differ in kind.
        rank: of its weight's gradient, None where that says nothing or time was short.
        largest: rank that the gradient can have.
        gives: what follows by itself.
        text: the same in one sentence.
    """

    name: str
    kind: str
    numbers: int
    vectors: int | None
    rank: int | None
    largest: int | None
    gives: tuple[Gives, ...]
    text: str


@dataclass(frozen=True)
class WayReading:
    """Whether one way of :func:`gradleak.attacks.auto` applies; ``searches`` tells those that optimize.

    ``solved`` is the number of examples that it solved, ``verdict`` what the update proves about them; a way that
    ``applies`` and has neither was not tried, or not to its end. ``reason`` is one sentence.
    """

    name: str
    searches: bool
    applies: bool
    solved: int | None
    verdict: Verdict | None
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What an update gives away; as text it is a page for a reader.

    Attributes:
        prediction: what an attack will get.
        reason: why, in one sentence.
        examples: number of examples that was stated, None where it was not.
        counted: how many the update shows by itself.
        layers: in the order in which the model runs them.
        ways: in the order in which ``auto`` tries them.
        bound: what all layers together can determine at most, None for models that counting does not understand.
        noise: deviation of the known defenses relative to the update.
        findings: labels, ids and counts that were read.
        seconds: that it took.
    """

    prediction: Prediction
    reason: str
    examples: int | None
    counted: CountedExamples
    layers: tuple[LayerReading, ...]
    ways: tuple[WayReading, ...]
    bound: RankBound | None
    noise: float
    findings: tuple[Finding, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return all of it as text."""
        lines = [f"{self.prediction.capitalize()}. {self.reason}", "", f"Examples: {self.counted.reason}"]
        lines += [self.bound.reason] if self.bound is not None else []
        lines += [f.text for f in self.findings]
        lines += ["", "Layers"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines += [f"  {r.name:<{width}}  {r.kind:<12} {'+'.join(r.gives) or '–':<12} {r.text}" for r in self.layers]
        lines += ["", "Ways"]
        for way in self.ways:
            mark = "applies" if way.applies else "no"
            lines.append(f"  {way.name:<18} {mark:<8} {way.reason}")
        return "\n".join(lines)


def inspect(observation: Observation, *, seconds: float = 10.0, seed: int = 0) -> Inspection:
    """Tell what an update gives away, and predict what an attack will get.

    Exact ways that solve in part of the time are not predicted but run, and the update says what they prove. Of a way
    that takes longer, its conditions and the rank of the equations decide; searches are not run.

    Args:
        observation: what the attacker sees.
        seconds: time to spend, roughly.
        seed: of the ways that draw random numbers.

    Raises:
        InvalidInput: ``seconds`` is not above 0.
    """
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"An inspection cannot take {seconds} seconds; give a number above 0.")
    begin, deadline = time.perf_counter(), Deadline(seconds)
    layers = _layers(observation, deadline.part(_SHARE))
    counted = count_examples(observation.model, observation.update, observation.training, observation.space)
    bound = None
    with suppress(NotApplicable, GradleakError, RuntimeError, IndexError, AttributeError, TypeError):
        if not isinstance(observation.space, TokenSpace):
            shape = tuple(observation.space.shape)
            bound = rank_bound(observation.model, observation.params, shape, observation.batch_size or 1)
    ways, best = _ways(observation, deadline, seed)
    findings = () if best is None else best.findings
    kinds = {f.kind for f in findings}
    findings = (*findings, *(f for f in find_besides(observation) if f.kind not in kinds))
    noise = _relative(_deviation(observation).values(), observation.update.tensors.values())
    prediction, why = _predict(observation, ways, best, bound, noise, findings)
    return Inspection(
        prediction, why, observation.batch_size, counted, layers, ways, bound, noise, findings,
        time.perf_counter() - begin,
    )  # fmt: skip


def _predict(
    observation: Observation,
    ways: tuple[WayReading, ...],
    best: Reconstruction | None,
    bound: RankBound | None,
    noise: float,
    findings: tuple[Finding, ...],
) -> tuple[Prediction, str]:
    """Return what an attack will get, and why."""
    exact = [w for w in ways if not w.searches and w.applies]
    searches = [w for w in ways if w.searches and w.applies]
    count = observation.batch_size or 1
    if best is not None:
        proof = best.certificate
        explained = proof is not None and proof.verdict is not Verdict.UNPROVED
        solved = 0 if best.solved is None else int(best.solved.sum())
        if explained or (best.status is Status.EXACT and solved in (0, count)):
            verdict = "" if proof is None else f", {proof.verdict}"
            return Prediction.EXACT, f"{best.attack} solves all of {count}{verdict}."
        if solved:
            return Prediction.PARTIAL, f"{best.attack} solves {solved} of {count} examples."
    open_ways = [w for w in exact if w.verdict is None and w.solved is None]
    # With several examples, a way that takes long searches for choices (of max-pooling, say) that it seldom finds.
    if open_ways and count == 1 and noise == 0 and (bound is None or bound.determined):
        return Prediction.EXACT, f"{open_ways[0].name} applies, but was not done in the time of an inspection."
    read = [f for f in findings if f.kind in _READ]
    if read:
        return Prediction.PARTIAL, read[0].text
    if noise >= _DROWNED:
        return Prediction.NOTHING, (
            f"The noise of the stated defense is {noise:.3g} times as large as the update, so that a match cannot be "
            "told from a guess."
        )
    if searches:
        names = ", ".join(w.name for w in searches)
        return Prediction.MATCHING, f"No equations determine an input; a search is left ({names})."
    return Prediction.NOTHING, "No attack applies."


def _ways(
    observation: Observation, deadline: Deadline, seed: int
) -> tuple[tuple[WayReading, ...], Reconstruction | None]:
    """Return what becomes of each way, and the best result of those that are done in time."""
    case = Case(observation, Auto())
    found: list[WayReading] = []
    for way in WAYS:
        if way.continues:
            continue
        try:
            why = way.against(case)
        except GradleakError as error:
            why = str(error)
        if why is not None:
            found.append(WayReading(way.name, way.searches, False, None, None, why))
        elif way.searches:
            found.append(WayReading(way.name, True, True, None, None, "Its conditions hold; it is not run here."))
        elif not case.open:
            found.append(WayReading(way.name, False, True, None, None, "It is not needed."))
        else:
            found.append(_tried(way, case, deadline.part(0.5), seed))
    return tuple(found), case.best


def _tried(way: Way, case: Case, deadline: Deadline, seed: int) -> WayReading:
    """Run one exact way within its time."""
    try:
        result = case.options.go(way, case, seed, None, deadline)
    except TimeSpent:
        return WayReading(way.name, False, True, None, None, "Its conditions hold; it takes longer than an inspection.")
    except GradleakError as error:
        return WayReading(way.name, False, False, None, None, str(error))
    if result.status is Status.BUDGET:
        return WayReading(way.name, False, True, None, None, "Its conditions hold; it takes longer than an inspection.")
    case.offer(way.name, result)
    assert result.certificate is not None  # the template method has made it
    solved = None if result.solved is None else int(result.solved.sum())
    return WayReading(way.name, False, True, solved, result.certificate.verdict, result.certificate.reason)


def _deviation(observation: Observation) -> Mapping[str, Tensor]:
    """Return the deviation that the known defenses leave in each tensor."""
    return {} if observation.training is None else observation.training.deviation(observation.update.tensors)


def _relative(deviations: Iterable[Tensor], tensors: Iterable[Tensor]) -> float:
    """Return the size of finite deviations relative to that of the tensors."""
    left = sum(float(torch.where(torch.isfinite(d), d, 0.0).double().square().sum()) for d in deviations)
    size = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(left / size) if size else 0.0


# ---------------------------------------------------------------------------------------------------------- layers


def _layers(observation: Observation, deadline: Deadline) -> tuple[LayerReading, ...]:
    """Return what each layer gives away, in the order in which the layers run."""
    model, params, shape = observation.model, observation.params, tuple(observation.space.shape)
    seen = _seen(observation)
    first = head = None
    with suppress(GradleakError, RuntimeError, TypeError, IndexError, AttributeError):
        first = find_input_layer(model, params, shape, mapped=True)
    with suppress(GradleakError, RuntimeError, TypeError, IndexError, AttributeError):
        head = find_head(model, params, shape)
    names = {id(p): k for k, p in model.named_parameters()}
    left = _deviation(observation)
    readings = []
    order = [*seen, *(k for k, m in model.named_modules() if k not in seen and _own(m))]
    for name in dict.fromkeys(order):
        module = model.get_submodule(name)
        own = {k: observation.update.tensors.get(names[id(p)]) for k, p in _own(module).items()}
        tensors = {k: t for k, t in own.items() if t is not None}
        covered = _relative(
            [left[names[id(p)]] for p in _own(module).values() if names[id(p)] in left], tensors.values()
        )
        if covered >= _COVERED:
            text = f"What a stated defense adds is {covered:.2g} times as large, so that nothing shows by itself."
            numbers = sum(t.numel() for t in tensors.values())
            readings.append(LayerReading(name, type(module).__name__, numbers, None, None, None, (), text))
        elif tensors:
            roles = (first is not None and first.module == name, head is not None and head.module == name)
            # How many tokens a sentence has is not known, so neither is the number of vectors.
            values = None if isinstance(observation.space, TokenSpace) else seen.get(name)
            readings.append(_reading(name, module, tensors, values, observation.batch_size, roles, deadline))
    return tuple(readings)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _seen(observation: Observation) -> dict[str, list[Tensor]]:
    """Return what every layer with parameters sees of two inputs, in the order of the calls; nothing if they misfit."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(name, []).append(args[0].detach())

    model = observation.model
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args))
        for name, module in model.named_modules()
        if _own(module)
    ]
    like = observation.space.neutral().to(observation.simulator.device, observation.simulator.dtype)
    try:
        with torch.no_grad(), suppress(NotApplicable):
            run_quietly(model, observation.params, like[None].repeat(2, *(1,) * like.ndim))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _reading(
    name: str,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    seen: list[Tensor] | None,
    batch: int | None,
    roles: tuple[bool, bool],
    deadline: Deadline,
) -> LayerReading:
    """Return what the gradient ``tensors`` of one layer give away; ``roles``: whether it is the first, or the head."""
    kind, numbers = type(module).__name__, sum(t.numel() for t in tensors.values())
    weight = tensors.get("weight")

    def told(
        text: str, *gives: Gives, vectors: int | None = None, rank: int | None = None, most: int | None = None
    ) -> LayerReading:
        return LayerReading(name, kind, numbers, vectors, rank, most, gives, text)

    if isinstance(module, nn.Embedding) and weight is not None:
        used = int((weight != 0).flatten(1).any(1).sum())
        if 0 < used < len(weight):
            return told(f"Names the {used:,} of {len(weight):,} ids that were looked up.", Gives.IDS)
        return told("All rows have a gradient, so no id shows (tied weights, weight decay or noise).", Gives.EQUATIONS)
    if weight is None or weight.ndim != 2 or isinstance(module, nn.modules.batchnorm._NormBase):
        return told(f"{numbers:,} sums over all examples and places.", Gives.EQUATIONS)
    vectors = None
    if seen is not None and len(seen) == 1:
        vectors = math.prod(seen[0].shape[1:-1])
    if deadline.over:
        return told(f"{numbers:,} sums; time was short to look further.", Gives.EQUATIONS, vectors=vectors)
    try:
        rank, most = gradient_rank(weight)
    except RuntimeError as error:  # a decomposition that does not converge
        return told(f"Its rank could not be found ({reason(error)}).", Gives.EQUATIONS, vectors=vectors)
    first, head = roles
    gives: list[Gives] = []
    said = []
    if first and (batch == 1 or rank < most or "bias" in tensors):
        gives.append(Gives.INPUTS)
        said.append("sees the input itself, so each unit that one example alone moves gives that example")
    if head:
        gives.append(Gives.LABELS)
        said.append("the signs of its rows give labels")
    if rank < most:
        gives.append(Gives.SPAN)
        total = "" if batch is None or vectors is None else f" of at most {batch * vectors:,}"
        space = f"a known space of {rank} dimensions" if rank > 1 else "one known direction"
        said.append(f"rank {rank}{total}: the vectors that it sees lie in {space}")
    else:
        said.append(f"rank {rank}, the largest there is, so that nothing shows of single vectors")
    text = "; ".join(said)
    return told(text[0].upper() + text[1:] + ".", *(gives or [Gives.EQUATIONS]), vectors=vectors, rank=rank, most=most)
