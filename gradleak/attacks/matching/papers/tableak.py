"""TabLeak: Vero, Balunović, Dimitrov, Vechev, ICML 2023."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.base import Attack, Callback
from gradleak.attacks.matching.coordinates import Coordinates
from gradleak.attacks.matching.engine import GradientMatching
from gradleak.attacks.matching.objectives import Cosine
from gradleak.attacks.matching.problem import Fixed
from gradleak.clock import Deadline
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.metrics.assignment import cheapest
from gradleak.solve import LBFGS, Adam
from gradleak.spaces import Category, InputSpace, Number, TableSpace
from gradleak.threat import Knowledge, Observation, ThreatModel
from gradleak.types import Note, Reconstruction

__all__ = ["TabLeak", "tableak"]

_OTHER = 1e3
"""Cost of taking a row for one of another class, above that of all cells."""
_NEAR, _EXPLAINED = 0.5, 1e-3
"""Relative distance of the rows' update up to which finishing their numbers is tried, and at which it has succeeded."""
_STEPS = 200


@final
@dataclass(frozen=True)
class _Soft(TableSpace):
    """A table whose candidates are not decoded: members of an ensemble are pooled while they are soft."""

    def decode(self, candidates: Tensor) -> Tensor:
        return candidates

    def encode(self, inputs: Tensor) -> Tensor:
        return inputs


@final
@dataclass(frozen=True)
class Relaxed(Coordinates):
    """Coordinates of rows: softmax makes one-hot groups of them, a sigmoid keeps numbers in range."""

    def inputs(self, z: Tensor, space: InputSpace) -> Tensor:
        """Return the model inputs (N, D) of a table at coordinates ``z`` (N, D)."""
        assert isinstance(space, TableSpace)
        return space.relax(z)


@final
@dataclass(frozen=True, eq=False)
class _Numbers(Coordinates):
    """The numbers of ``rows`` (N, D), at ``places`` (D,); their categories stay."""

    rows: Tensor
    places: Tensor

    def shape(self, space: InputSpace) -> tuple[int, ...]:
        """Return how many numbers a row has."""
        return (int(self.places.sum()),)

    def start(self, count: int, space: InputSpace, generator: torch.Generator, std: float) -> Tensor:
        """Return the numbers of the rows."""
        return self.rows[:, self.places].cpu().double()

    def inputs(self, z: Tensor, space: InputSpace) -> Tensor:
        """Return the rows with the numbers ``z``."""
        rows, places = self.rows.to(z), self.places.to(z.device)
        back = torch.eye(len(places), dtype=z.dtype, device=z.device)[places]
        return torch.where(places, z @ back, rows)


@final
@dataclass(frozen=True)
class TabLeak(Attack):
    """Searches rows by an ensemble whose members vote; made by :func:`tableak`."""

    search: GradientMatching
    members: int = 30
    fixed: Fixed | None = field(default=None, repr=False, compare=False)

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def __post_init__(self) -> None:
        if self.members < 1:
            raise InvalidInput(f"An ensemble has at least one member, not {self.members}; give members=1 or more.")

    @property
    def budget(self) -> float | None:
        """Seconds for all observations together."""
        return self.search.budget

    def around(
        self,
        observation: Observation,
        solved_inputs: Tensor,
        solved_mask: Tensor,
        *,
        seed: int = 0,
        callback: Callback | None = None,
        deadline: Deadline | None = None,
    ) -> Reconstruction:
        """Reconstruct a batch of which some rows are known; see :meth:`GradientMatching.around`."""
        fixed = Fixed(solved_inputs.detach(), solved_mask)
        return replace(self, fixed=fixed).reconstruct(observation, seed=seed, callback=callback, deadline=deadline)

    def reconstruct_all(
        self,
        observations: Sequence[Observation],
        *,
        seed: int = 0,
        callback: Callback | None = None,
        deadline: Deadline | None = None,
    ) -> list[Reconstruction]:
        """Reconstruct several batches, one after another, each in its share of the time."""
        until = Deadline(self.budget, within=deadline).left() / max(len(observations), 1)
        limited = self if until == float("inf") else replace(self, search=replace(self.search, budget=max(until, 1e-3)))
        return super(TabLeak, limited).reconstruct_all(observations, seed=seed, callback=callback, deadline=deadline)

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        space = observation.space
        if not isinstance(space, TableSpace):
            raise NotApplicable("Only rows of a table are pooled cell by cell; give observe() a TableSpace.")
        if any(isinstance(c, Category) and not c.one_hot for c in space.columns):
            raise NotApplicable("Integer codes cannot be searched by gradients; use entity_embeddings().")
        soft = _softly(observation, space, observation.labels)
        search, fixed = self.search, self.fixed
        if fixed is not None:
            search = replace(search, fixed=replace(fixed, inputs=space.encode(fixed.inputs)))
        members = search._reconstruct([soft] * self.members, seed, callback)
        best = min(members, key=lambda m: m.objective)
        known = torch.zeros(len(best), dtype=torch.bool) if fixed is None else fixed.mask.cpu()
        aligned = torch.stack([_aligned(space, m, best, known) for m in members])
        pooled = aligned.median(0).values
        rows = space.decode(pooled)
        if fixed is not None:  # bit for bit
            rows[known] = fixed.inputs[fixed.mask].to(rows)
        sure, explained = _confidence(space, aligned), _finished(observation, space, best, rows, seed, callback)
        agreed = float((sure >= 0.9).double().mean())
        told = Note(f"Pooled from {len(members)} searches, which are sure of {agreed:.0%} of the cells.")
        return replace(
            best,
            inputs=rows if explained is None else explained,
            evaluations=sum(m.evaluations for m in members),
            seconds=0.0,
            notes=(*best.notes, told),
            confidence=sure,
            trace=None,
        )


def _softly(observation: Observation, space: TableSpace, labels: Tensor | None) -> Observation:
    """Return the observation of a table that decodes nothing, with these labels."""
    knows = observation.knows & ~Knowledge.PUBLIC_DATA
    return ThreatModel(knows if labels is None else knows | Knowledge.LABELS).observe(
        observation.model,
        observation.update,
        space=_Soft(space.columns),
        training=observation.training,
        batch_size=observation.batch_size,
        labels=labels,
        batch_size_stated=observation.batch_size_stated,
    )


def _finished(
    observation: Observation, space: TableSpace, best: Reconstruction, rows: Tensor, seed: int, callback: Callback
) -> Tensor | None:
    """Return ``rows`` with numbers that explain the update, where their categories allow it; None where they do not."""
    given = (observation.labels, best.labels, best.label_probabilities)
    labels = next((y for y in given if y is not None), None)
    simulator, seen = observation.simulator, observation.update.tensors
    if labels is None or not simulator.relative(space.encode(rows), labels, seen) <= _NEAR:
        return None
    places = torch.cat([torch.full((c.width,), isinstance(c, Number)) for c in space.columns])
    finer = GradientMatching(
        solver=LBFGS(iterations=_STEPS), coordinates=_Numbers(space.encode(rows), places), trace=False
    )
    solved = space.decode(finer._reconstruct([_softly(observation, space, labels)], seed, callback)[0].inputs)
    written = solved.clone()
    for i, column in enumerate(space.columns):
        if isinstance(column, Number) and column.decimals is not None:
            written[:, i] = solved[:, i].round(decimals=column.decimals).clamp(column.low, column.high)
    for found in (written, solved):
        if simulator.relative(space.encode(found), labels, seen) <= _EXPLAINED:
            return found
    return None


def _aligned(space: TableSpace, member: Reconstruction, best: Reconstruction, known: Tensor) -> Tensor:
    """Return a member's rows (N, D) in the order of the best member's, classes and ``known`` rows (N,) apart."""
    rows, wanted = space.decode(member.inputs), space.decode(best.inputs)
    costs = torch.stack([1 - space.cells(rows, row).double().mean(1) for row in wanted]).cpu()
    apart = (space.encode(rows)[None] - space.encode(wanted)[:, None]).square().mean(-1).cpu()
    costs = costs + apart / (1 + apart)
    if member.labels is not None and best.labels is not None and member.labels.ndim == 1:
        costs = costs + _OTHER * (best.labels[:, None] != member.labels).cpu()
    costs = costs + _OTHER * (known[:, None] != known)
    return member.inputs[cheapest(costs).to(member.inputs.device)]


def _confidence(space: TableSpace, members: Tensor) -> Tensor:
    """Return how sure the members (M, N, D) are of each cell (N, C), in [0, 1]: one minus the entropy of their mean.

    Of a category, in units of the entropy of values drawn evenly; of numbers, the share within the tolerance of the
    median.
    """
    cells = []
    for column, part in space.parts(members):
        if isinstance(column, Category):
            mean = column.whole(part.mean(0))
            entropy = -torch.special.xlogy(mean, mean).sum(-1)
            full = torch.tensor(float(max(len(column.values), 2))).log().to(entropy)
            cells.append((1 - entropy / full).clamp(0, 1))
        else:
            off = (part[..., 0] - part[..., 0].median(0).values).abs() * column.std
            cells.append((off <= column.close).to(part).mean(0))
    return torch.stack(cells, -1).double()


def tableak(
    *,
    members: int = 30,
    iterations: int = 1500,
    lr: float = 0.06,
    labels: str = "recovered",
    dtype: torch.dtype | None = None,
    budget: float | None = None,
) -> TabLeak:
    """Match the gradient's direction with softmax-relaxed rows, many times over, and pool the cells of all searches.

    Source: Vero, Balunović, Dimitrov, Vechev, *TabLeak*, ICML 2023, Section 4 and Algorithm 1: cosine distance, signed
    Adam, softmax of one-hot groups, sigmoid bounds of numbers, alignment of all members to the best by the Hungarian
    method, median pooling, entropy as confidence.

    Deviations: the sigmoid has the column's mean, not the middle of its range, at its center; starts are normal, not
    uniform; each member returns its best iterate; rows of different classes are never pooled; where the categories
    allow it, numbers are solved to explain the update, and rounded as people write them.

    ``members`` is the size of the ensemble, ``iterations`` the steps of each; the other options are those of
    :func:`inverting_gradients`. Members advance together, along the batch axis.
    """
    search = GradientMatching(
        Cosine(),
        Adam(iterations=iterations, lr=lr, signed=True),
        labels=labels,
        init_std=0.6,
        dtype=dtype,
        coordinates=Relaxed(),
        backend="trace",
        budget=budget,
        trace=False,
    )
    return TabLeak(search, members)
