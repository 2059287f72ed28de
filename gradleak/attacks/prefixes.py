"""Sentences of a causal language model, token by token: which prefixes have inputs that the gradients span."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradleak.errors import NotApplicable
from gradleak.exact.counts import label_counts, multiplicities, output_gradients
from gradleak.exact.spans import Span, find_span
from gradleak.formats import number_format
from gradleak.spaces import TokenSpace
from gradleak.structure.sites import Sees, Site, find_sites, inputs_of
from gradleak.threat import Observation

__all__ = ["Prefixes", "Reading", "Refusal", "read_prefixes"]

Prefix = tuple[int, ...]

_SCREEN = 24
"""Random directions outside a span by which most tokens are ruled out."""
_CHUNK = 2**23
"""Numbers of one layer's inputs that are computed at a time."""
_CHECKS = 4
"""Layers behind the first attention in whose spans prefixes must lie, at most."""
_FULL = 0.05
"""Distance from a span within which most random sentences lie only where it holds everything."""
_DRAWN = 32
"""Random sentences by which that is told."""
_SAME = 1e-5
"""Relative distance of inputs that are the same but for rounding."""
_REPEATED = 4
"""Repetitions of one token from which on a row of them is not followed."""
_WIDE = 4
"""Prefixes that are followed at a time, as a multiple of those that the spans have room for."""
_WHOLE = 0.1
"""Distance from whole numbers within which counts are read."""
_REST = 1e-3
"""Share of the head's gradient that the right sentences leave at most."""
_ROUNDS = 6
"""Simulations by which last tokens are settled where the decoder is tied to the embedding, at most."""


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
        labels: one for each, as the loss takes them for ``sentences`` padded to the longest; None if not read.
        whole: whether every sentence was read to its end, as often as the update says, and the numbers agree.
        prefixes: of which they are made.
        reason: why it is not whole, one sentence; empty if it is.
    """

    sentences: list[Prefix]
    labels: list[int] | None
    whole: bool
    prefixes: Prefixes
    reason: str = ""


@dataclass
class _Reader:
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
            wanted = [s for s in self.sites if s.sees in (Sees.TOKEN, Sees.PREFIX)]
            seen = inputs_of(self.observation.model, ids.to(self.observation.simulator.device), wanted)
            self.drawn = {id(s): x.flatten(0, 1) for s, x in zip(wanted, seen, strict=True)}
        return self.drawn[id(site)]

    def distance(self, site: Site, x: Tensor, directions: int | None = None) -> Tensor:
        """Return how far the inputs ``x`` of a layer lie outside its span, in thresholds."""
        span = self.span(site)
        assert span is not None
        return span.distance(x, directions) / span.threshold

    def inputs(self, prefixes: Sequence[Prefix], sites: Sequence[Site]) -> list[Tensor]:
        """Return what each of ``sites`` sees at the last token of ``prefixes``, all of one length."""
        ids = torch.tensor(prefixes, device=self.observation.simulator.device)
        size = max(1, _CHUNK // (ids.shape[1] * max(s.width for s in sites)))
        parts = [[x[:, -1] for x in inputs_of(self.observation.model, part, sites)] for part in ids.split(size)]
        return [torch.cat(found) for found in zip(*parts, strict=True)]


def _full(reader: _Reader, sites: Sequence[Site]) -> Refusal:
    """Return why no layer tells tokens apart."""
    full = [(reader.full[id(s)], s.width) for s in sites if id(s) in reader.full]
    if full:
        rank, width = max(full)
        return Refusal(
            f"At least {rank} tokens, width {width}: the span of the layers' inputs is full, so that every token lies "
            "in it; use fewer tokens, or matching."
        )
    return Refusal(
        "The gradients of the layers' inputs have no clear rank (more tokens than the model is wide, noise, pruning), "
        "so that no token is told from another; use matching."
    )


def read_prefixes(observation: Observation, space: TokenSpace, tell: Callable[[str], None]) -> Reading | None:
    """Return the sentences behind the gradient of a causal model; None if the model is none.

    Source: Petrov et al. 2024 (DAGER), Section 4.3: a prefix is right where what the next layers see at its last token
    lies in the span of their gradients. Deviations: ranks and distances follow from the spectra; every prefix in the
    spans is kept, not a fixed number; prefixes are checked in several layers, whose ranks say how many there are; last
    tokens, duplicates and labels are counted in the gradient of the last layer (:mod:`gradleak.exact.counts`).

    Raises:
        NotApplicable: the spans do not tell tokens apart.
    """
    tensors = observation.gradient.require_single()
    sites = find_sites(observation.model, tensors, len(space.table), space.length)
    if not any(s.sees is Sees.PREFIX for s in sites) or any(s.sees is Sees.SENTENCE for s in sites):
        return None
    eps = torch.finfo(number_format(tensors)).eps
    reader = _Reader(observation, space, sites, dict(tensors), tell, eps)
    with torch.no_grad():
        found = _grow(reader)
        return _finish(reader, found)


def bag_of_tokens(observation: Observation, space: TokenSpace) -> list[int] | None:
    """Return the ids whose rows the gradient of the embedding names; None where it is not shared, or tied."""
    table = space.table
    for name, gradient in observation.gradient.tensors.items():
        own = observation.params.get(name)
        if own is not None and own.shape == table.shape and torch.equal(own, table.to(own)):
            ids = (gradient != 0).any(1).nonzero().flatten().tolist()
            return ids if 0 < len(ids) < len(table) / 2 else None
    return None


def _grow(reader: _Reader) -> Prefixes:
    """Return all prefixes in the spans."""
    first = [s for s in reader.sites if s.sees is Sees.TOKEN and not s.tied]
    tokens = [s for s in first if reader.span(s) is not None]
    width = max((s.width for s in first), default=0)
    deeper = [s for s in reader.sites if s.sees is Sees.PREFIX and not (s.tied or s.logits)]
    # The inner layers of blocks are wide, and their spectra take long; those of the blocks themselves will do.
    deeper = [s for s in deeper if s.width <= width] or deeper
    checks: list[Site] = []
    for site in deeper:
        if len(checks) < _CHECKS and reader.span(site) is not None:
            checks.append(site)
    if not checks:
        raise _full(reader, [*first, *deeper])
    spans = {id(s): span for s in checks if (span := reader.span(s)) is not None}
    rank = max(span.rank for span in spans.values())
    # Where only some tokens have a gradient, as behind the last attention of a classifier, the others are not spanned.
    checks = [s for s in checks if spans[id(s)].rank == rank]
    checks.sort(key=lambda s: -spans[id(s)].gap)
    allowed = bag_of_tokens(reader.observation, reader.space)
    choices = _Choices(reader, tokens, allowed)
    nodes: dict[Prefix, float] = {}
    frontier: list[Prefix] = [()]
    counts: list[int] = []
    limit = reader.space.length
    while frontier and len(counts) < limit:
        options = choices.at(len(counts))
        counts.append(len(options))
        trials = [(*node, token) for node in frontier for token in options]
        kept = _inside(reader, trials, checks)
        nodes |= kept
        frontier = list(kept)
        # One token over and over looks as it does once, where there are no positions; such a row has no end.
        if len(counts) > _REPEATED and all(len(set(node[-_REPEATED:])) == 1 for node in kept):
            break
        if len(kept) > _WIDE * rank:
            raise Refusal(
                f"{len(kept)} prefixes of {len(counts)} tokens lie in spans of rank {rank}: the spans do not tell them "
                "apart; use fewer tokens, or matching."
            )
        reader.tell(f"{len(nodes)} of {rank} prefixes")
    if not nodes:
        if reader.full:
            raise _full(reader, [*first, *deeper])
        raise Refusal("No token's inputs lie in the spans of the gradients: this update is not of such sentences.")
    found = _distinct(reader, list(nodes), checks[0])
    while len(found) > rank:  # The spans have no room for all: those at their edge go first.
        leaves = Prefixes(found, rank, ()).leaves
        found = tuple(n for n in found if n != max(leaves, key=lambda leaf: nodes[leaf]))
    return Prefixes(found, rank, tuple(counts))


def _distinct(reader: _Reader, nodes: list[Prefix], site: Site) -> tuple[Prefix, ...]:
    """Return ``nodes`` without repetitions of the first token that the layer cannot tell from less of them.

    They stay where other prefixes continue them.
    """
    kept = set(nodes)
    for node in sorted(nodes, key=len, reverse=True):
        if len(node) > 1 and len(set(node)) == 1 and not any((*node, t) in kept for t in _following(kept, node)):
            once, here = (reader.inputs([n], [site])[0][0] for n in (node[:-1], node))
            if float((once - here).norm()) <= _SAME * float(here.norm()):
                kept.discard(node)
    return tuple(node for node in nodes if node in kept)


def _following(nodes: set[Prefix], node: Prefix) -> list[int]:
    return [n[-1] for n in nodes if n[:-1] == node]


def _inside(reader: _Reader, trials: list[Prefix], checks: list[Site]) -> dict[Prefix, float]:
    """Return the prefixes whose last input lies in the span of every one of ``checks``, with their largest distance."""
    kept = dict.fromkeys(trials, 0.0)
    for part in (checks[:1], checks[1:]):
        if kept and part:
            seen = reader.inputs(list(kept), part)
            far = torch.stack([reader.distance(site, x.double()) for site, x in zip(part, seen, strict=True)]).amax(0)
            far = far.cpu().maximum(torch.tensor(list(kept.values()), dtype=torch.float64))
            kept = {node: d for node, d in zip(kept, far.tolist(), strict=True) if d <= 1}
    return kept


class _Choices:
    """The tokens that may stand at a position, by the layers that see one token only."""

    def __init__(self, reader: _Reader, sites: list[Site], allowed: list[int] | None) -> None:
        self.reader, self.sites = reader, sites
        self.ids = torch.arange(len(reader.space.table)) if allowed is None else torch.tensor(allowed)
        usable = reader.space._usable().cpu()
        self.ids = self.ids[usable[self.ids]]
        self.positional = any(s.positional for s in sites)
        self.found: list[list[int]] = []

    def at(self, position: int) -> list[int]:
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


# ------------------------------------------------------------------------------------------ ends, duplicates, labels


def _finish(reader: _Reader, found: Prefixes) -> Reading:
    size = reader.observation.batch_size or len(found.leaves)
    head = next((s for s in reader.sites if s.logits), None)
    complete = found.rank == len(found.nodes)
    why = "" if complete else f"{len(found.nodes)} prefixes were found, where the gradients have rank {found.rank}."
    if head is None:
        return Reading(found.leaves[:size], None, False, found, "The gradient of the last layer is not shared.")
    probe = reader.observation.model(torch.zeros(1, 2, dtype=torch.long, device=reader.observation.simulator.device))
    reading = _classes(reader, found, head, size) if probe.ndim == 2 else _continued(reader, found, head, size)
    if reading.whole and not complete:
        return Reading(reading.sentences, reading.labels, False, found, why)
    return reading


def _classes(reader: _Reader, found: Prefixes, head: Site, size: int) -> Reading:
    """Return sentences with their classes: which prefixes are whole sentences, how often, and of which class."""
    weight = reader.tensors[head.weights[0]]
    weight = weight.T if head.flipped[0] else weight
    why = "The counts of sentences and classes did not come out whole for the stated number of examples."
    for ends in (found.leaves, list(found.nodes)):
        hidden, logits = _at_ends(reader, ends, head)
        if len(ends) > hidden.shape[1]:
            break
        slopes = output_gradients(hidden, weight)
        rest = float((slopes.T @ hidden.double() - weight.double()).norm() / weight.double().norm().clamp_min(1e-300))
        if rest > _REST:  # Some sentence ends where others go on.
            continue
        shares = logits.double().softmax(-1)
        if len(ends) != len(found.leaves):  # Most prefixes are no sentences.
            live = slopes.abs().amax(1) > _REST / size
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
    return Reading(found.leaves, None, False, found, why)


def _at_ends(reader: _Reader, ends: Sequence[Prefix], head: Site) -> tuple[Tensor, Tensor]:
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


def _continued(reader: _Reader, found: Prefixes, head: Site, size: int) -> Reading:
    """Return sentences with their last tokens: which token follows each prefix how often."""
    weight = reader.tensors[head.weights[0]]
    weight = weight.T if head.flipped[0] else weight
    nodes = list(found.nodes)
    if len(nodes) >= head.width:
        why = f"{len(nodes)} tokens, width {head.width}: last tokens cannot be told."
        return Reading([(*leaf,) for leaf in found.leaves], None, False, found, why)
    hidden, shares = _at_nodes(reader, found, head)
    slopes = output_gradients(hidden, weight)
    ratio = multiplicities(shares, slopes)  # m / n
    inner = {node: i for i, node in enumerate(nodes)}
    roots = float(ratio[[i for node, i in inner.items() if len(node) == 1]].sum())
    total = size / roots if roots > 0 else math.nan
    often = [total * float(r) for r in ratio]
    ends = _ends(inner, often)
    why = "How often prefixes occur did not come out whole for the stated number of sentences."
    if ends is None:
        return Reading(found.leaves, None, False, found, why)
    follow = (ratio[:, None] * shares - slopes) * total  # c
    for _ in range(_ROUNDS):
        sentences = _enumerate(inner, ends, often, follow)
        if not head.tied:
            return Reading(sentences, None, True, found)
        change = output_gradients(hidden, _unexplained(reader, sentences, head)) * total
        if float(change.abs().max()) < 0.3:
            return Reading(sentences, None, True, found)
        # Rows of tokens that were read carry the embedding's part, which the simulation now knows.
        follow = _counted(sentences, inner, shares) - change
    why = "The last tokens did not settle."
    return Reading(sentences, None, False, found, why)


def _ends(inner: dict[Prefix, int], often: list[float]) -> list[int] | None:
    """Return how many sentences end one token behind each prefix; None if prefixes do not occur whole numbers of times.

    A prefix occurs as often as those that continue it, and as sentences end behind it.
    """
    if any(not math.isfinite(x) or abs(x - round(x)) > _WHOLE or round(x) < 1 for x in often):
        return None
    left = [round(x) for x in often]
    for node, i in inner.items():
        if len(node) > 1:
            left[inner[node[:-1]]] -= round(often[i])
    return None if min(left) < 0 else left


def _at_nodes(reader: _Reader, found: Prefixes, head: Site) -> tuple[Tensor, Tensor]:
    """Return what the decoder sees (n, d) and its probabilities (n, V) behind every prefix."""
    inner = {node: i for i, node in enumerate(found.nodes)}
    device = reader.observation.simulator.device
    hidden = torch.zeros(len(inner), head.width, dtype=torch.float64, device=device)
    shares = torch.zeros(len(inner), len(reader.space.table), dtype=torch.float32, device=device)
    for leaf in found.leaves:
        ids = torch.tensor([leaf], device=device)
        seen = inputs_of(reader.observation.model, ids, [head])[0][0]
        out = reader.observation.model(ids)[0].float().softmax(-1)
        where = [inner[leaf[: i + 1]] for i in range(len(leaf))]
        hidden[where], shares[where] = seen.double(), out
    return hidden, shares


def _enumerate(inner: dict[Prefix, int], ends: list[int], often: list[float], follow: Tensor) -> list[Prefix]:
    """Return the sentences that end one token behind prefixes: ``ends`` of them, by the counts ``follow`` (n, V)."""
    sentences: list[Prefix] = []
    for node, i in inner.items():
        if ends[i] == 0:
            continue
        left = follow[i].clone()
        for child, j in inner.items():
            if child[:-1] == node:
                left[child[-1]] -= round(often[j])
        for _ in range(ends[i]):
            token = int(left.argmax())
            left[token] -= 1
            sentences.append((*node, token))
    return sentences


def _counted(sentences: list[Prefix], inner: dict[Prefix, int], like: Tensor) -> Tensor:
    counts = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    for sentence in sentences:
        for i in range(1, len(sentence)):
            node = inner.get(sentence[:i])
            if node is not None:
                counts[node, sentence[i]] += 1
    return counts


def _unexplained(reader: _Reader, sentences: list[Prefix], head: Site) -> Tensor:
    """Return what the decoder's gradient (V, d) has beyond that of a batch of ``sentences``."""
    simulator = reader.observation.simulator
    ids = padded(sentences).to(simulator.device)
    with torch.enable_grad():
        ours = simulator.update(ids, ids.masked_fill(ids < 0, -100), None)[head.weights[0]].detach()
    rest = reader.tensors[head.weights[0]] - ours
    return rest.T if head.flipped[0] else rest


def padded(sentences: Sequence[Prefix]) -> Tensor:
    """Return sentences as ids (N, T), −1 behind their ends."""
    longest = max(map(len, sentences))
    return torch.tensor([[*s, *[-1] * (longest - len(s))] for s in sentences])
