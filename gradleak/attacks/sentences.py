"""Exact sentences from the gradient of a transformer encoder: linear algebra and a look-up, no optimization."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradleak.attacks.assembly import assemble
from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.attacks.encoder import Encoder, Span, read_span
from gradleak.attacks.prefixes import read_prefixes
from gradleak.attacks.reading import Reader, Reading, padded
from gradleak.errors import NotApplicable
from gradleak.formats import number_format
from gradleak.proof.certify import unproved
from gradleak.spaces import TokenSpace
from gradleak.structure.sites import Sees, find_sites
from gradleak.threat import Knowledge, Observation
from gradleak.types import Construction, Finding, FindingKind, Note, NoteKind, Reconstruction, Status, UpdateKind

__all__ = ["ReadSentences", "read_sentences"]

_LIKELY = 3
"""Candidates kept at a position after the first step, as a multiple of the sentences."""


@final
@dataclass(frozen=True)
class ReadSentences(Attack):
    """Reads the tokens of a batch off attention gradients, and the masked ones' labels; made by :func:`read_sentences`.

    The gradient of a query, key or value matrix is Σ δ xᵀ over all tokens, so its row space is spanned by the layer's
    inputs x. In the first layer x depends on the token and its position only: a token stands at a position where its
    x lies in the span (Petrov et al. 2024, DAGER, Section 4.1). Several sentences are told apart in the second layer,
    whose inputs depend on the whole sentence (Section 4.2): one token is fixed, and Gauss–Newton finds the mixture of
    the others' candidates whose second-layer inputs lie in the second span; its rounding is the sentence. Masked
    positions are those of the mask token; their labels are counted in the decoder bias's gradient and put into place by
    least squares on the gradient of the last linear layer before the decoder, which is linear in the labels once the
    inputs are known.

    Deviations: DAGER enumerates or beam-searches sentences; labels are not among its unknowns. Thresholds follow the
    gap in the spectrum instead of fixed constants. Sentences must have equal length and no padding.

    Attributes:
        steps: Gauss–Newton steps from one fixed token, at most.
        sweeps: rounds of changing up to three tokens afterwards, at most.
    """

    mask: int | None = None
    starts: int = 16
    steps: int = 5
    sweeps: int = 20

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def _one(self, observation: Observation, seed: int, callback: Callback) -> Reconstruction:
        generator, space = torch.Generator().manual_seed(seed), observation.space
        if not isinstance(space, TokenSpace):
            raise NotApplicable("Only sentences can be read this way; give observe() a TokenSpace, or use matching.")
        if space.looked_up:
            return _as_result(observation, _read(observation, space, callback))
        if observation.update.kind is not UpdateKind.GRADIENT:
            raise NotApplicable("The update is a weight delta, not a gradient; scale a one-step delta by -1/lr first.")
        reader = Encoder(observation, space)
        notes: list[Note] = []
        first = read_span(reader.gradient(0), "first", 0.05)
        candidates = reader.candidates(first)
        if any(len(c) == 0 for c in candidates):
            empty = sum(len(c) == 0 for c in candidates)
            raise NotApplicable(
                f"At {empty} of {space.length} positions no token lies in the span of the first layer's inputs; "
                "the gradient is not that of these sentences alone (noise, pruning, padding): use matching."
            )
        if max(len(c) for c in candidates) > len(space.table) / 2:
            raise NotApplicable(
                "The attention gradient of the first layer has full rank, so that every token lies in its span: more "
                "tokens than the model is wide; use matching."
            )
        size = observation.batch_size or 1
        sentences, exact = self._assemble(reader, candidates, size, generator)
        if not exact:
            why = "The sentences were not told apart with certainty: the second layer's span was not reached."
            notes.append(Note(why, NoteKind.LIMIT))
        labels = reader.labels(sentences, self.mask)
        if labels is None:
            why = "The labels were not read: no decoder bias is shared, or no token stands where labels belong."
            notes.append(Note(why, NoteKind.LABELS))
        found = Finding(
            FindingKind.TOKENS,
            f"{size} sentences of {space.length} tokens were read off the attention gradients.",
            proved=exact,
            count=size if exact else 0,
            of=size,
        )
        proof = Construction(
            sentences.numel(),
            0.0,
            "every token's input lies in the span of its layer's gradient, and every sentence's in that of the next",
            local=True,
        )
        return Reconstruction(
            inputs=sentences.to(reader.device),
            labels=labels,
            objective=0.0 if exact else math.inf,
            status=Status.EXACT if exact else Status.STALLED,
            evaluations=1,
            notes=tuple(notes),
            construction=proof if exact else None,
            solved=torch.full((size,), exact),
            findings=(found,) if exact else (),
        )

    def _assemble(
        self, reader: Encoder, candidates: list[Tensor], size: int, generator: torch.Generator
    ) -> tuple[Tensor, bool]:
        """Return sentences (N, T) made of ``candidates`` and whether each reaches the second layer's span."""
        if all(len(c) == 1 for c in candidates):
            return torch.stack([c[0] for c in candidates]).expand(size, -1).clone(), True
        span = read_span(reader.gradient(1), "second", 1e-3)
        found: dict[tuple[int, ...], float] = {}
        inside: list[tuple[int, ...]] = []
        for position, token in self._anchors(candidates, size, generator):
            if any(s[position] == token for s in inside):
                continue
            choice, likely = self._relax(reader, candidates, span, position, token, inside, size)
            sentence = self._settle(reader, likely, span, choice, position, self.sweeps)
            if sum(map(len, likely)) < sum(map(len, candidates)):
                sentence = self._settle(reader, candidates, span, sentence, position, self.sweeps)
            key = tuple(sentence.tolist())
            found[key] = reader.distance(sentence, span)
            # Right sentences leave the span by its rounding alone, so none lies far above the best.
            level = min(max(span.clear, 10 * min(found.values())), span.threshold)
            inside = [s for s, distance in found.items() if distance <= level]
            if len(inside) >= size or len(found) >= self.starts:
                break
        # The attacker's own measure decides; sentences that occur twice leave fewer than ``size`` distinct ones.
        chosen = sorted(found, key=lambda s: found[s])[:size]
        exact = len(chosen) == size and found[chosen[-1]] <= span.threshold
        return torch.tensor(chosen + [chosen[0]] * (size - len(chosen))), exact

    @staticmethod
    def _anchors(candidates: list[Tensor], size: int, generator: torch.Generator) -> Iterator[tuple[int, int]]:
        """Yield tokens to fix: first at positions where every sentence seems to have its own."""
        order = torch.randperm(len(candidates), generator=generator).tolist()
        for p in sorted(order, key=lambda p: abs(len(candidates[p]) - size)):
            yield from ((p, t) for t in candidates[p].tolist() if len(candidates[p]) > 1)

    def _relax(
        self,
        reader: Encoder,
        candidates: list[Tensor],
        span: Span,
        position: int,
        token: int,
        inside: list[tuple[int, ...]],
        size: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens of the sentence that has ``token`` at ``position``, by Gauss–Newton on mixed embeddings.

        Also return every position's likely candidates, to which later steps are limited.

        Every position is a mixture of its candidates. What leaves the second span is nearly linear in the mixtures,
        so that the sentences are the corners of its (affine) solution set, and one fixed token selects one corner.
        Tokens of the sentences ``inside``, found before, start with a tenth of the others' weight.
        """
        tokens = torch.cat(candidates)
        where = torch.repeat_interleave(torch.arange(len(candidates)), torch.tensor([len(c) for c in candidates]))
        spent = torch.tensor(
            [any(s[p] == t for s in inside) for p, t in zip(where.tolist(), tokens.tolist(), strict=True)]
        )
        weights = torch.where(spent, 0.1, 1.0).double()
        weights = weights / _sums(weights, where)[where]
        pinned = where == position
        weights[pinned] = (tokens[pinned] == token).double()
        before = float("inf")
        sentence = _heaviest(tokens, where, weights, len(candidates))
        for step in range(self.steps):
            directions = _exchanges(where, pinned)
            if len(directions) == 0:  # The fixed token is the only one that is not known.
                break
            rest, jacobian = reader.sensitivity(tokens, where, weights, directions, span)
            normal = jacobian @ jacobian.T
            ridge = 1e-9 * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
            change = directions.T @ torch.linalg.solve(normal + ridge, -(jacobian @ rest)).cpu()
            weights = weights + change
            if step == 0:
                ranks = torch.cat([weights[where == p].argsort(descending=True).argsort() for p in where.unique()])
                kept = ranks < _LIKELY * size
                tokens, where, pinned = tokens[kept], where[kept], pinned[kept]
                weights = (
                    weights[kept]
                    + ((1 - _sums(weights[kept], where)) / _sums(torch.ones_like(weights[kept]), where))[where]
                )
            sentence = _heaviest(tokens, where, weights, len(candidates))
            if reader.distance(sentence, span) <= span.clear:
                break
            if float(rest.norm()) > 0.97 * before:  # a local minimum: what is left is for single tokens to solve
                break
            before = float(rest.norm()) if step else before  # the first step counted other candidates
        return sentence, [tokens[where == p] for p in range(len(candidates))]

    @staticmethod
    def _settle(
        reader: Encoder, candidates: list[Tensor], span: Span, sentence: Tensor, fixed: int, sweeps: int
    ) -> Tensor:
        """Return the sentence to which changing up to three tokens at a time leads, the best change first.

        The token at ``fixed`` stays: a sentence found before would attract all others. Pairs and triples are
        proposed by adding up what single changes do (a Gram matrix), and then measured: two exchanged tokens hardly
        change the sentence's average, so single changes would not undo them.
        """
        open_ = [p for p, c in enumerate(candidates) if len(c) > 1 and p != fixed]
        if not open_:
            return sentence
        positions = torch.cat([torch.full((len(candidates[p]),), p) for p in open_])
        tokens = torch.cat([candidates[p] for p in open_])
        here = reader.leaving(sentence[None], span).flatten()
        for _ in range(sweeps):
            current = float(_spread(here[None], len(sentence)))
            if reader.distance(sentence, span) <= span.clear:
                break
            changed = tokens != sentence[positions]
            where, what = positions[changed], tokens[changed]
            singles = sentence.repeat(len(where), 1)
            singles[torch.arange(len(where)), where] = what
            effects = reader.leaving(singles, span).flatten(1) - here
            sets = _promising(effects, here, where)
            trials = sentence.repeat(len(sets), 1)
            for row, members in enumerate(sets):
                trials[row, where[members]] = what[members]
            left = reader.leaving(trials, span).flatten(1)
            values = _spread(left, len(sentence))
            best = int(values.argmin())
            if float(values[best]) >= current:
                break
            sentence, here = trials[best], left[best]
        return sentence


@torch.no_grad()
def _read(observation: Observation, space: TokenSpace, callback: Callback) -> Reading:
    """Return the sentences of a model that looks ids up, whose layers are told apart by what they see."""
    tensors = dict(observation.gradient.require_single())
    sites = find_sites(observation.model, tensors, len(space.table), space.length)
    eps = torch.finfo(number_format(tensors)).eps
    reader = Reader(observation, space, sites, tensors, lambda told: callback(Progress(0, 1, math.inf, told)), eps)
    if any(s.sees is Sees.SENTENCE for s in sites):
        return assemble(reader)
    return read_prefixes(reader)


def _as_result(observation: Observation, read: Reading) -> Reconstruction:
    """Return what was read of a causal model's batch, filled up with empty sentences where some are missing."""
    size = observation.batch_size or len(read.sentences)
    kept = read.sentences[:size]
    ids = padded([*kept, *[()] * (size - len(kept))]).to(observation.simulator.device)
    loss = observation.simulator.undefended.loss
    labels: Tensor | None = None
    if read.labels is not None:
        rows = [row if isinstance(row, list) else [row] for row in read.labels]
        labels = padded([tuple(row) for row in rows], -100).to(ids.device)
        labels = labels if isinstance(read.labels[0], list) else labels[:, 0]
    elif getattr(loss, "shift", 0):
        labels = ids.masked_fill(ids < 0, -100)
    prefixes = read.prefixes
    said = (
        f"{len(read.sentences)} sentences with {sum(map(len, read.sentences))} tokens were read off the gradients: "
        f"{len(prefixes.nodes)} different beginnings of sentences lie in the spans of the layers' inputs"
        + (", which have just as many dimensions." if prefixes.rank == len(prefixes.nodes) else ".")
    )
    found = Finding(FindingKind.TOKENS, said, proved=read.whole, count=len(kept), of=size)
    proof = Construction(
        len(prefixes.nodes),
        0.0,
        "every token's inputs lie in the spans of several layers' gradients, which leave room for no others, and last "
        "tokens and repetitions were counted in the last layer's",
    )
    return Reconstruction(
        inputs=ids,
        labels=labels,
        objective=0.0 if read.whole else math.inf,
        status=Status.EXACT if read.whole else Status.STALLED,
        evaluations=1,
        notes=() if read.whole else (Note(read.reason, NoteKind.LIMIT),),
        construction=proof if read.whole else None,
        solved=torch.full((size,), read.whole),
        findings=(found,),
        certificate=None if len(kept) == size else unproved(size, read.reason),
    )


def _heaviest(tokens: Tensor, where: Tensor, weights: Tensor, length: int) -> Tensor:
    """Return the sentence (T,) of the tokens with the largest weight at every position."""
    return torch.stack([tokens[where == p][weights[where == p].argmax()] for p in range(length)])


def _sums(values: Tensor, where: Tensor) -> Tensor:
    """Return the sums of ``values`` (R,) over each position, (T,)."""
    return torch.zeros(int(where.max()) + 1, dtype=values.dtype).index_add_(0, where, values)


def _exchanges(where: Tensor, pinned: Tensor) -> Tensor:
    """Return the directions (n, R) that keep every position's weights at sum one: one against its position's mean."""
    counts = torch.bincount(where)
    columns = ((counts[where] > 1) & ~pinned).nonzero().flatten()
    same = where[columns][:, None] == where[None]
    directions = -same.double() / counts[where[columns]][:, None]
    directions[torch.arange(len(columns)), columns] += 1.0
    return directions


def _spread(leaving: Tensor, length: int) -> Tensor:
    """Return the sums (M,) of the logarithms of the distances of ``leaving`` (M, T·d).

    Weak tokens keep a distance even in the right sentence, and would hide the others' in a sum of squares.
    """
    return leaving.unflatten(1, (length, -1)).square().sum(-1).clamp_min(1e-14).log().sum(1)


def _promising(effects: Tensor, here: Tensor, where: Tensor, keep: int = 24) -> list[list[int]]:
    """Return the sets of one to three changes at different positions that promise the smallest sum of squares."""
    gram = effects @ effects.T
    alone = gram.diagonal() + 2 * effects @ here
    clash = where[:, None] == where[None]
    pairs = (alone[:, None] + alone[None] + 2 * gram).masked_fill(clash, torch.inf)
    sets = [[int(i)] for i in alone.topk(min(keep, len(alone)), largest=False).indices]
    order = pairs.triu(1).masked_fill(torch.ones_like(clash).tril(), torch.inf).flatten().argsort()[:keep]
    for i, j in zip((order // len(where)).tolist(), (order % len(where)).tolist(), strict=True):
        if not clash[i, j]:
            sets.append([i, j])
            third = (pairs[i, j] + alone + 2 * gram[i] + 2 * gram[j]).masked_fill(clash[i] | clash[j], torch.inf)
            if bool(torch.isfinite(third.min())):
                sets.append([i, j, int(third.argmin())])
    return sets


def read_sentences(*, mask: int | None = None, starts: int = 16) -> ReadSentences:
    """Read the sentences of a masked language model's batch off its attention gradients: no optimization, no prior.

    Source: Petrov et al., *DAGER*, NeurIPS 2024, Sections 4.1 and 4.2. Deviations: see :class:`ReadSentences`.

    Args:
        mask: id of the mask token; None finds the token that makes the labels' counts whole numbers.
        starts: fixed tokens from which the sentences of a batch are told apart, at most.

    Raises:
        NotApplicable: not a token space, not a plain gradient, attention whose inputs cannot be found, or a gradient
            whose rank is full (too many tokens for the width, or noise).
    """
    return ReadSentences(mask=mask, starts=starts)
