"""Rows with categories that a model looks up in embeddings: the codes by their rows, the numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from gradleak.attacks.base import Attack, Callback
from gradleak.attacks.findings import embedding_rows
from gradleak.attacks.linear_inversion import linear_inversion
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.exact.first_layer import agreement
from gradleak.formats import number_format
from gradleak.proof.certify import unproved
from gradleak.proof.explained import Explanation
from gradleak.spaces import Category, TableSpace, TensorSpace
from gradleak.structure.lookups import Lookups, find_lookups, tail_of
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.training import FedSGD
from gradleak.types import Certificate, Finding, FindingKind, Note, Reconstruction, Update, UpdateKind, Verdict

__all__ = ["EntityEmbeddings", "entity_embeddings"]

_SHOWN = 8
"""Values of a column that a sentence names."""


@final
@dataclass(frozen=True, eq=False)
class _Seen(TensorSpace):
    """What the first linear layer sees of rows: embeddings of codes beside numbers, which mixtures are not."""

    lookups: Lookups = field(kw_only=True)
    allowed: Mapping[int, Sequence[int]] = field(kw_only=True)

    def neutral(self) -> Tensor:
        return self.lookups.seen.cpu()

    def plausible(self, candidates: Tensor, tolerance: float = 1e-3) -> Tensor:
        """Return which of ``candidates`` (N, M) a row looks like, (N,)."""
        return self.lookups.decode(candidates.double(), self.allowed)[1] <= tolerance


@final
@dataclass(frozen=True)
class EntityEmbeddings(Attack):
    """Reads rows off what the first linear layer sees; made by :func:`entity_embeddings`."""

    inner: Attack = field(default_factory=linear_inversion)

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        space = observation.space
        codes = {} if not isinstance(space, TableSpace) else _sizes(space)
        lookups = find_lookups(
            observation.model, observation.params, space.neutral().to(observation.simulator.device), codes
        )
        rows = {name: ids for name, (ids, _) in embedding_rows(observation).items()}
        # A table of one column has a gradient in the rows of that column's codes only.
        alone = [j for j, n in lookups.embeddings.items() if list(lookups.embeddings.values()).count(n) == 1]
        allowed = {j: rows[n] for j in alone if (n := lookups.embeddings[j]) in rows}
        allowed = {j: ids for j, ids in allowed.items() if max(ids) < len(lookups.codes[j])}
        findings = tuple(_named(observation, lookups, j, ids) for j, ids in allowed.items())
        try:
            found = self._behind(observation, lookups, allowed, seed, callback)
        except NotApplicable as error:
            error.findings = findings
            raise
        close = agreement(number_format(observation.update.tensors))
        return _as_rows(observation, lookups, allowed, found, findings, close, seed)

    def _behind(
        self,
        observation: Observation,
        lookups: Lookups,
        allowed: Mapping[int, Sequence[int]],
        seed: int,
        callback: Callback,
    ) -> Reconstruction:
        """Return what the model from the layer on shows of what the layer sees."""
        if observation.simulator.defended:
            raise NotApplicable("The client defends its whole update, which cannot be taken apart; use matching.")
        gradient = observation.gradient.require_single()
        tail = tail_of(observation.model, observation.params, lookups)
        update = {k: gradient[k.removeprefix("model.")] for k, p in tail.named_parameters() if p.requires_grad}
        training = observation.training
        behind = ThreatModel(observation.knows & ~Knowledge.PUBLIC_DATA).observe(
            tail,
            Update(update, UpdateKind.GRADIENT),
            space=_Seen(tuple(lookups.seen.shape), lookups=lookups, allowed=allowed),
            training=None if training is None else FedSGD(training.loss),
            batch_size=observation.batch_size,
            labels=observation.labels,
            batch_size_stated=observation.batch_size_stated,
        )
        return self.inner.reconstruct(behind, seed=seed, callback=callback)


def _sizes(space: TableSpace) -> dict[int, int]:
    """Return the number of codes of every column of them, by its place among the model inputs."""
    coded = [c for c in space.columns if isinstance(c, Category) and not c.one_hot]
    return {space.place(c.name).start: len(c.values) for c in coded}


def _named(observation: Observation, lookups: Lookups, column: int, ids: Sequence[int]) -> Finding:
    """Return the finding that an embedding's gradient names these codes of a column."""
    space, size = observation.space, len(lookups.codes[column])
    name, shown = f"column {column + 1}", [str(i) for i in ids]
    if isinstance(space, TableSpace):
        found = next((c for c in space.columns if space.place(c.name).start == column), None)
        if isinstance(found, Category):
            name, shown = repr(found.name), [found.text(i) for i in ids]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return Finding(
        FindingKind.COLUMNS,
        f"The gradient of {lookups.embeddings[column]!r} names the {len(ids)} of {size} values of {name} that the "
        f"client used: {', '.join(shown[:_SHOWN])}{more}.",
        proved=True,
        count=len(ids),
        of=size,
    )


def _as_rows(
    observation: Observation,
    lookups: Lookups,
    allowed: Mapping[int, Sequence[int]],
    found: Reconstruction,
    findings: tuple[Finding, ...],
    close: float,
    seed: int,
) -> Reconstruction:
    """Return the rows behind what the layer saw, with what the whole update proves of them."""
    space = observation.space
    rows, distances = lookups.decode(found.inputs.double().to(lookups.row), allowed)
    fit = (distances <= 10 * close) & space.plausible(rows)
    solved = None if found.solved is None else found.solved.to(fit) & fit
    decoded = space.decode(rows)
    said = f"{int(fit.sum())} of {len(rows)} rows look to the first linear layer like what was found behind it."
    kept = tuple(f for f in found.findings if f.kind is not FindingKind.COLUMNS)
    told = dict.fromkeys((Note(said), *found.notes))
    result = replace(
        found, inputs=decoded, solved=solved, construction=None, trace=None, notes=tuple(told), attack="",
        findings=(*findings, *kept), certificate=None, features=None,
    )  # fmt: skip
    labels = next((y for y in (observation.labels, found.labels, found.label_probabilities) if y is not None), None)
    inner = found.certificate
    if inner is None or labels is None:
        return replace(result, certificate=unproved(len(rows), "The labels are not known, so nothing was simulated."))
    return replace(result, certificate=_certified(observation, lookups, allowed, rows, labels, inner, seed))


def _certified(
    observation: Observation,
    lookups: Lookups,
    allowed: Mapping[int, Sequence[int]],
    rows: Tensor,
    labels: Tensor,
    inner: Certificate,
    seed: int,
) -> Certificate:
    """Return what the whole update proves of ``rows``: it must be explained, embeddings included.

    What was proved of the layer's inputs holds for the rows where no other code looks the same.
    """
    fit, simulator = None, observation.simulator
    with suppress(InvalidModel, NotApplicable, RuntimeError, ValueError, IndexError):
        labels = labels.to(simulator.device)
        inputs = observation.space.encode(observation.space.decode(rows))
        tensors = observation.update.tensors
        fit = Explanation(simulator, tensors, inputs, labels, granted=observation.labels is not None, seed=seed).fit()
    if fit is None or not fit.matched:
        residual = float("nan") if fit is None else fit.residual
        why = "The rows' update differs from the seen one, embeddings included, so not all of them are right."
        return unproved(len(rows), why, residual, 0.0 if fit is None else fit.noise.floor)
    told = (
        f"The re-simulated update, embeddings included, agrees with the seen one to {fit.residual:.1e} (rounding: "
        f"{fit.noise.floor:.1e}); of what the first linear layer sees: {inner.reason}"
    )
    proof = replace(inner, residual=fit.residual, floor=fit.noise.floor, factor=fit.factor, reason=told)
    if inner.verdict is Verdict.PROVED and lookups.told_apart(rows, allowed) and not fit.free:
        return proof
    verdict = Verdict.MATCHED
    return replace(proof, verdict=verdict, examples=tuple(verdict for _ in rows), factors=dict(fit.factors))


def entity_embeddings(*, inner: Attack | None = None) -> EntityEmbeddings:
    """Read rows of which a model looks categories up in embeddings: ``inner`` attacks the model from the next layer on.

    Where the first linear layer sees embeddings and numbers side by side, each in places of its own, the model from
    there on is a model of plain numbers. What ``inner`` (:func:`linear_inversion` if None) solves of these is looked up
    backward: the nearest embedding names the code, among those whose rows have a gradient, and what is near none is a
    mixture. A gradient of zero in all other rows names the codes of the batch in any case, as findings.

    Source: the rows of word embeddings, Melis et al. 2019, Section 4.1; Gupta et al. 2022, Section 3.1. Numbers, and
    the codes of each row, are ours.
    """
    return EntityEmbeddings(linear_inversion() if inner is None else inner)
