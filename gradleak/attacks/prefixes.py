"""Sentences of a causal language model, token by token: which prefixes have inputs that the gradients span."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradleak.attacks.reading import (
    Prefix,
    Prefixes,
    Reader,
    Reading,
    Refusal,
    count_classes,
    fitted,
    full_span,
    padded,
    unexplained,
)
from gradleak.exact.counts import multiplicities, output_gradients
from gradleak.structure.sites import Sees, Site, inputs_of

__all__ = ["read_prefixes"]

_SAME = 1e-5
"""Relative distance of inputs that are the same but for rounding."""
_REPEATED = 4
"""Repetitions of one token from which on a row of them is not followed."""
_TRIALS = 200_000
"""Prefixes of one length that are tried at most."""
_WIDE = 4
"""Prefixes that are followed at a time, as a multiple of those that the spans have room for."""
_WHOLE = 0.1
"""Distance from whole numbers within which counts are read."""
_ROUNDS = 6
"""Simulations by which last tokens are settled where the decoder is tied to the embedding, at most."""


def read_prefixes(reader: Reader) -> Reading:
    """Return the sentences behind the gradient of a causal model.

    Source: Petrov et al. 2024 (DAGER), Section 4.3: a prefix is right where what the next layers see at its last token
    lies in the span of their gradients. Deviations: ranks and distances follow from the spectra; every prefix in the
    spans is kept, not a fixed number; prefixes are checked in several layers, whose ranks say how many there are; last
    tokens, duplicates and labels are counted in the gradient of the last layer (:mod:`gradleak.exact.counts`).

    Raises:
        NotApplicable: the spans do not tell tokens apart.
    """
    found = _grow(reader)
    return _finish(reader, found)


def _grow(reader: Reader) -> Prefixes:
    """Return all prefixes in the spans."""
    first = [s for s in reader.sites if s.sees is Sees.TOKEN and not s.tied]
    tokens = [s for s in first if reader.span(s) is not None]
    checks, rank = reader.checks(Sees.PREFIX)
    if not checks:
        raise full_span(reader, reader.sites)
    choices = reader.choices(tokens)
    nodes: dict[Prefix, float] = {}
    frontier: list[Prefix] = [()]
    counts: list[int] = []
    limit = reader.space.length
    while frontier and len(counts) < limit:
        options = choices.at(len(counts))
        counts.append(len(options))
        if len(frontier) * len(options) > _TRIALS:
            raise Refusal(
                f"{len(options)} tokens may stand at position {len(counts)} behind each of {len(frontier)} beginnings, "
                "too many to try: the first layer's gradient does not limit them; use matching."
            )
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
            raise full_span(reader, reader.sites)
        raise Refusal("No token's inputs lie in the spans of the gradients: this update is not of such sentences.")
    found = _distinct(reader, list(nodes), checks[0])
    while len(found) > rank:  # The spans have no room for all: those at their edge go first.
        leaves = Prefixes(found, rank, ()).leaves
        found = tuple(n for n in found if n != max(leaves, key=lambda leaf: nodes[leaf]))
    return Prefixes(found, rank, tuple(counts))


def _distinct(reader: Reader, nodes: list[Prefix], site: Site) -> tuple[Prefix, ...]:
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


def _inside(reader: Reader, trials: list[Prefix], checks: list[Site]) -> dict[Prefix, float]:
    """Return the prefixes whose last input lies in the span of every one of ``checks``, with their largest distance."""
    kept = dict.fromkeys(trials, 0.0)
    for part in (checks[:1], checks[1:]):
        if kept and part:
            seen = reader.inputs(list(kept), part)
            far = torch.stack([reader.distance(site, x.double()) for site, x in zip(part, seen, strict=True)]).amax(0)
            far = far.cpu().maximum(torch.tensor(list(kept.values()), dtype=torch.float64))
            kept = {node: d for node, d in zip(kept, far.tolist(), strict=True) if d <= 1}
    return kept


# ------------------------------------------------------------------------------------------ ends, duplicates, labels


def _finish(reader: Reader, found: Prefixes) -> Reading:
    size = reader.observation.batch_size or len(found.leaves)
    head = next((s for s in reader.sites if s.logits), None)
    complete = found.rank == len(found.nodes)
    why = "" if complete else f"{len(found.nodes)} prefixes were found, where the gradients have rank {found.rank}."
    if head is None:
        return fitted(reader, found, found.leaves, size)
    probe = reader.observation.model(torch.zeros(1, 2, dtype=torch.long, device=reader.observation.simulator.device))
    reading = (
        count_classes(reader, found, head, size, (found.leaves, list(found.nodes)))
        if probe.ndim == 2
        else _continued(reader, found, head, size)
    )
    if reading.whole and not complete:
        return Reading(reading.sentences, reading.labels, False, found, why)
    return reading


def _continued(reader: Reader, found: Prefixes, head: Site, size: int) -> Reading:
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
        ids = padded(sentences)
        change = output_gradients(hidden, unexplained(reader, ids, ids.masked_fill(ids < 0, -100), head)) * total
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


def _at_nodes(reader: Reader, found: Prefixes, head: Site) -> tuple[Tensor, Tensor]:
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
