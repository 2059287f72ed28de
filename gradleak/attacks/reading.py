"""What the gradients of a language model say of its sentences, for causal models and encoders alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradleak.errors import NotApplicable
from gradleak.exact.counts import label_counts, output_gradients
from gradleak.exact.spans import Span, find_span
from gradleak.spaces import TokenSpace
from gradleak.structure.sites import Sees, Site, inputs_of
from gradleak.threat import Observation

__all__ = ["Choices", "Prefix", "Prefixes", "Reader", "Reading", "Refusal", "bag_of_tokens"]

Prefix = tuple[int, ...]

_CHUNK = 2**23
"""Numbers of one layer's inputs that are computed at a time."""
_SCREEN = 24
"""Random directions outside a span by which most tokens are ruled out."""
_CHECKS = 4
"""Layers behind the first attention in whose spans prefixes must lie, at most."""
_FULL = 0.05
"""Distance from a span within which most random sentences lie only where it holds everything."""
_DRAWN = 32
"""Random sentences by which that is told."""
_GUESSES = 12
"""Guesses of all labels, each from what the last one leaves unexplained, at most."""
_REST = 1e-3
"""Share of the head's gradient that the right sentences leave at most."""


class Refusal(NotApplicable):
    """The spans do not determine the tokens."""


@dataclass(frozen=True, eq=False)
class Prefixes:
    """All prefixes whose inputs lie in the spans.

    Attributes:
        nodes: the prefixes, shorter ones first.
        rank: how many independent inputs the layers' gradients have.
        candidates: how many tokens were possible at each position.
    """

    nodes: tuple[Prefix, ...]
    rank: int
    candidates: tuple[int, ...]

    @property
    def leaves(self) -> list[Prefix]:
        """The prefixes that no other one continues."""
        inner = {node[:-1] for node in self.nodes}
        return [node for node in self.nodes if node not in inner]


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read of a batch.

    Attributes:
        sentences: the sentences, as often as they occur.
        labels: one for each, or one for each of its tokens (−100 where there is none); None if not read.
        whole: whether every sentence was read to its end, as often as the update says, and the numbers agree.
        prefixes: of which they are made.
        reason: why it is not whole, one sentence; empty if it is.
    """

    sentences: list[Prefix]
    labels: list[int] | list[list[int]] | None
    whole: bool
    prefixes: Prefixes
    reason: str = ""


@dataclass
class Reader:
    """What the gradients' spans say of prefixes; computed where it is asked for."""

    observation: Observation
    space: TokenSpace
    sites: list[Site]
    tensors: dict[str, Tensor]
    tell: Callable[[str], None]
    eps: float
    spans: dict[int, Span | None] = field(default_factory=dict)
    full: dict[int, int] = field(default_factory=dict)
    drawn: dict[int, Tensor] = field(default_factory=dict)

    def span(self, site: Site) -> Span | None:
        """Return the span of a layer's inputs; None where there is no clear one, or everything lies in it."""
        if id(site) not in self.spans:
            found = find_span(site.gradient(self.tensors), self.eps)
            if found is not None and float(found.distance(self.random(site).double()).median()) <= _FULL:
                self.full[id(site)] = found.rank
                found = None
            self.spans[id(site)] = found
        return self.spans[id(site)]

    def random(self, site: Site) -> Tensor:
        """Return what a layer sees of random sentences, (n, d)."""
        if not self.drawn:
            draw = torch.Generator().manual_seed(1)
            ids = torch.randint(len(self.space.table), (_DRAWN, min(4, self.space.length)), generator=draw)
            wanted = [s for s in self.sites if s.sees is not Sees.POOLED]
            seen = inputs_of(self.observation.model, ids.to(self.observation.simulator.device), wanted)
            self.drawn = {id(s): x.flatten(0, 1) for s, x in zip(wanted, seen, strict=True)}
        return self.drawn[id(site)]

    def distance(self, site: Site, x: Tensor, directions: int | None = None) -> Tensor:
        """Return how far the inputs ``x`` of a layer lie outside its span, in thresholds."""
        span = self.span(site)
        assert span is not None
        return span.distance(x, directions) / span.threshold

    def checks(self, kind: Sees) -> tuple[list[Site], int]:
        """Return layers behind the first attention whose spans hold what they see of all tokens, and their rank.

        The clearest first; none where no layer has a clear span.
        """
        width = max((s.width for s in self.sites if s.sees is Sees.TOKEN), default=0)
        deeper = [s for s in self.sites if s.sees is kind and not (s.tied or s.logits)]
        # The inner layers of blocks are wide, and their spectra take long; those of the blocks themselves will do.
        deeper = [s for s in deeper if s.width <= width] or deeper
        found: list[tuple[Site, Span]] = []
        for site in deeper:
            span = self.span(site) if len(found) < _CHECKS else None
            if span is not None:
                found.append((site, span))
        rank = max((span.rank for _, span in found), default=0)
        # Where only some tokens have a gradient, as behind the last attention of a classifier, others are not spanned.
        clear = sorted((pair for pair in found if pair[1].rank == rank), key=lambda pair: -pair[1].gap)
        return [site for site, _ in clear], rank

    def choices(self, sites: list[Site]) -> Choices:
        """Return the tokens that may stand at each position, by layers that see one token only."""
        return Choices(self, sites, bag_of_tokens(self.observation, self.space))

    def inputs(self, prefixes: Sequence[Prefix], sites: Sequence[Site]) -> list[Tensor]:
        """Return what each of ``sites`` sees at the last token of ``prefixes``, all of one length."""
        ids = torch.tensor(prefixes, device=self.observation.simulator.device)
        size = max(1, _CHUNK // (ids.shape[1] * max(s.width for s in sites)))
        parts = [[x[:, -1] for x in inputs_of(self.observation.model, part, sites)] for part in ids.split(size)]
        return [torch.cat(found) for found in zip(*parts, strict=True)]


class Choices:
    """The tokens that may stand at a position, by the layers that see one token only."""

    def __init__(self, reader: Reader, sites: list[Site], allowed: list[int] | None) -> None:
        self.reader, self.sites = reader, sites
        self.ids = torch.arange(len(reader.space.table)) if allowed is None else torch.tensor(allowed)
        usable = reader.space._usable().cpu()
        self.ids = self.ids[usable[self.ids]]
        self.positional = any(s.positional for s in sites)
        self.found: list[list[int]] = []

    def at(self, position: int) -> list[int]:
        """Return the tokens that may stand at a position."""
        if not self.sites:
            return self.ids.tolist()
        if not self.positional:
            position = 0
        while len(self.found) <= position:
            have = len(self.found)
            upto = min(max(2 * have, 16), self.reader.space.length) if self.positional else 1
            self.found.extend(self._look(have, upto))
        return self.found[position]

    def _look(self, begin: int, end: int) -> list[list[int]]:
        """Return the tokens in the spans at each position from ``begin`` on, before ``end``."""
        device = self.reader.observation.simulator.device
        model, width = self.reader.observation.model, max(s.width for s in self.sites)
        inside: list[list[Tensor]] = [[] for _ in range(begin, end)]
        for chunk in self.ids.split(max(1, _CHUNK // (end * width))):
            # What a token looks like at a position knows no other token: one token everywhere serves all.
            seen = inputs_of(model, chunk[:, None].expand(-1, end).to(device), self.sites)
            good = torch.ones(len(chunk), end - begin, dtype=torch.bool, device=device)
            for site, x in zip(self.sites, seen, strict=True):
                good &= self.reader.distance(site, x[:, begin:], _SCREEN) <= 1
            where = good.nonzero()
            if len(where):
                sure = torch.ones(len(where), dtype=torch.bool, device=device)
                for site, x in zip(self.sites, seen, strict=True):
                    sure &= self.reader.distance(site, x[:, begin:][where[:, 0], where[:, 1]].double()) <= 1
                for row, column in where[sure].tolist():
                    inside[column].append(chunk[row])
        return [torch.stack(column).tolist() if column else [] for column in inside]


_NEARLY = 0.9
"""Share of the width from which on the span counts as full."""


def full_span(reader: Reader, sites: Sequence[Site]) -> Refusal:
    """Return why no layer tells tokens apart."""
    full = [(reader.full[id(s)], s.width) for s in sites if id(s) in reader.full]
    if full:
        rank, width = max(full)
        if rank < _NEARLY * width:
            return Refusal(
                f"At least {rank} tokens, width {width}: where the span of the layers' inputs ends cannot be told from "
                "rounding, so that no token is told from another; use fewer tokens, or matching."
            )
        return Refusal(
            f"At least {rank} tokens, width {width}: the span of the layers' inputs is full, so that every token lies "
            "in it; use fewer tokens, or matching."
        )
    return Refusal(
        "The gradients of the layers' inputs have no clear rank (more tokens than the model is wide, noise, pruning), "
        "so that no token is told from another; use matching."
    )


def bag_of_tokens(observation: Observation, space: TokenSpace) -> list[int] | None:
    """Return the ids whose rows the gradient of the embedding names; None where it is not shared, or tied."""
    table = space.table
    for name, gradient in observation.gradient.tensors.items():
        own = observation.params.get(name)
        if own is not None and own.shape == table.shape and torch.equal(own, table.to(own)):
            ids = (gradient != 0).any(1).nonzero().flatten().tolist()
            return ids if 0 < len(ids) < len(table) / 2 else None
    return None


def padded(sentences: Sequence[Prefix], filler: int = -1) -> Tensor:
    """Return sentences as ids (N, T), ``filler`` behind their ends."""
    longest = max(map(len, sentences))
    return torch.tensor([[*s, *[filler] * (longest - len(s))] for s in sentences])


def at_ends(reader: Reader, ends: Sequence[Prefix], head: Site) -> tuple[Tensor, Tensor]:
    """Return what the head sees of whole sentences (n, d), and their logits (n, C)."""
    hidden: list[Tensor | None] = [None] * len(ends)
    logits: list[Tensor | None] = [None] * len(ends)
    for length in {len(e) for e in ends}:
        rows = [i for i, e in enumerate(ends) if len(e) == length]
        for part in torch.tensor(rows).split(max(1, _CHUNK // (length * head.width))):
            ids = torch.tensor([ends[i] for i in part.tolist()], device=reader.observation.simulator.device)
            seen = inputs_of(reader.observation.model, ids, [head])[0]
            out = reader.observation.model(ids)
            for i, h, o in zip(part.tolist(), seen if seen.ndim == 2 else seen[:, -1], out, strict=True):
                hidden[i], logits[i] = h, o
    return torch.stack([h for h in hidden if h is not None]), torch.stack([o for o in logits if o is not None])


def count_classes(reader: Reader, found: Prefixes, head: Site, size: int, options: Sequence[list[Prefix]]) -> Reading:
    """Return sentences with their classes: which prefixes are whole sentences, how often, and of which class.

    ``options`` are sets of prefixes that may be whole sentences; the first one that explains the head is taken.
    """
    weight = reader.tensors[head.weights[0]]
    weight = weight.T if head.flipped[0] else weight
    why = "The counts of sentences and classes did not come out whole for the stated number of examples."
    for ends in options:
        hidden, logits = at_ends(reader, ends, head)
        if len(ends) > hidden.shape[1]:
            break
        slopes = output_gradients(hidden, weight)
        rest = float((slopes.T @ hidden.double() - weight.double()).norm() / weight.double().norm().clamp_min(1e-300))
        if rest > _REST:  # Some sentence ends where others go on.
            continue
        shares = logits.double().softmax(-1)
        live = slopes.abs().amax(1) > _REST / size  # Most prefixes are no sentences.
        ends = [e for e, alive in zip(ends, live.tolist(), strict=True) if alive]
        shares, slopes = shares[live], slopes[live]
        counted = label_counts(shares, slopes, size)
        if counted is None:
            continue
        sentences: list[Prefix] = []
        labels: list[int] = []
        for end, counts in zip(ends, counted[1].tolist(), strict=True):
            for label, times in enumerate(counts):
                sentences.extend([end] * times)
                labels.extend([label] * times)
        if len(sentences) == size:
            return Reading(sentences, labels, True, found)
        why = f"{len(sentences)} sentences were counted, {size} were stated."
    return Reading(options[0], None, False, found, why)


def unexplained(reader: Reader, ids: Tensor, labels: Tensor, head: Site) -> Tensor:
    """Return what the decoder's gradient (V, d) has beyond that of a batch of sentences ``ids`` with ``labels``."""
    simulator = reader.observation.simulator
    name = head.weights[0]
    with torch.enable_grad():
        ours = simulator.update(ids.to(simulator.device), labels.to(simulator.device), None)[name].detach()
    rest = reader.tensors[name] - ours
    return rest.T if head.flipped[0] else rest


def fitted(reader: Reader, found: Prefixes, ends: list[Prefix], size: int) -> Reading:
    """Return sentences with classes or last tokens where the last layer's gradient is not shared, as with LoRA.

    The update is linear in the labels. So what a guess of them leaves unexplained points, for each sentence, to the
    output whose derivative it contains: all of them at once by one directional derivative of the logits.
    """
    observation, simulator = reader.observation, reader.observation.simulator
    why = "The gradient of the last layer is not shared, and classes or last tokens did not follow from the others."
    if len(ends) != size:
        return Reading(ends[:size], None, False, found, f"{len(ends)} sentences were read, {size} were stated.")
    at = torch.tensor([len(end) - 1 for end in ends], device=simulator.device)
    each = torch.arange(size, device=simulator.device)
    ids = padded(ends).to(simulator.device)
    logits = observation.model(ids)
    causal = logits.ndim == 3
    if causal and not getattr(simulator.undefended.loss, "shift", 0):
        return Reading(ends, None, False, found, why)
    if causal:
        ids = torch.nn.functional.pad(ids, (0, 1), value=-1)

    def derivative(along: dict[str, Tensor]) -> Tensor:
        """Return the derivatives of the outputs (B, V) along a direction of the parameters."""
        with torch.enable_grad():
            leaves = {k: p.detach().requires_grad_() for k, p in observation.params.items()}
            made = torch.func.functional_call(observation.model, leaves, (ids,))
            made = made[each, at] if causal else made
            seed = torch.zeros_like(made, requires_grad=True)
            backward = torch.autograd.grad(made, list(leaves.values()), seed, create_graph=True, materialize_grads=True)
            total = sum(((g * along[k]).sum() for k, g in zip(leaves, backward, strict=True)), seed.new_zeros(()))
            return torch.autograd.grad(total, seed)[0]

    guess = (logits[each, at] if causal else logits).argmax(-1)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in reader.tensors.values()))
    for _ in range(_GUESSES):
        if causal:
            ids[each, at + 1] = guess
        labels = ids.masked_fill(ids < 0, -100) if causal else guess
        with torch.enable_grad():
            ours = simulator.update(ids, labels, None)
        rest = {k: t - ours[k].detach() for k, t in reader.tensors.items()}
        if math.sqrt(sum(float(t.double().square().sum()) for t in rest.values())) <= _REST * norm:
            sentences = [(*end, int(g)) for end, g in zip(ends, guess, strict=True)] if causal else ends
            return Reading(sentences, None if causal else guess.tolist(), True, found)
        better = derivative(rest).argmin(-1)
        if torch.equal(better, guess):
            break
        guess = better
    return Reading(ends, None, False, found, why)
