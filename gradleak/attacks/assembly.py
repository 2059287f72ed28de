"""Sentences of an encoder's batch: tokens by the first layer's span, told apart by who attended to whom."""

from __future__ import annotations

import itertools

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
from gradleak.exact.attention import companions, marginals
from gradleak.exact.counts import multiplicities, output_gradients
from gradleak.structure.sites import Sees, Site, inputs_of

__all__ = ["assemble"]

_HEADS = (64, 32, 128, 96, 80, 48, 16, 24, 8)
"""Widths of an attention head that are tried, the usual ones first."""
_TRIED = 40
"""Tokens by which the right one is told."""
_SAME = 1e-3
"""Share that a sentence of a token may leave unexplained."""
_CLOSED = 1e-5
"""Relative dependence of four inputs from which on a token's direction does not depend on its position."""
_ROUNDS = 4
"""Simulations by which labels are settled where the decoder is tied to the embedding, at most."""
_ROWS = 512
"""Rows of the decoder by which the predicted tokens are told."""
_REST = 1e-3
"""Share of them that the predicted tokens leave unexplained at most."""
_FAINT = 1e-2
"""Share of the predictions, relative to the largest, from which on a token has a label."""
_NEAR = 0.05
"""Distance from whole numbers of what is counted."""
_MOST = 20_000
"""Candidates, tokens times positions, with which sentences are assembled at most."""


def assemble(reader: Reader) -> Reading:
    """Return the sentences behind the gradient of an encoder.

    Raises:
        NotApplicable: the spans do not tell tokens apart.
    """
    first = [s for s in reader.sites if s.sees is Sees.TOKEN and not s.tied and len(s.modules) > 1]
    first = [s for s in first if reader.span(s) is not None]
    if not first:
        raise full_span(reader, [s for s in reader.sites if s.sees is Sees.TOKEN])
    site = first[-1]
    span = reader.span(site)
    assert span is not None
    choices = reader.choices([site])
    columns = list(itertools.takewhile(bool, (choices.at(p) for p in range(reader.space.length))))
    pairs = [(t, p) for p, column in enumerate(columns) for t in column]
    if not pairs:
        raise Refusal("No token's inputs lie in the span of the first layer: this update is not of such sentences.")
    if len(pairs) > _MOST:
        raise Refusal(f"{len(pairs)} tokens and positions lie in a span of rank {span.rank}, too many; use matching.")
    sentences = _told_apart(reader, site, pairs, span.rank)
    rank = reader.checks(Sees.SENTENCE)[1]
    nodes = tuple(s[: i + 1] for s in sentences for i in range(len(s)))
    found = Prefixes(nodes, rank, tuple(map(len, columns)))
    reader.tell(f"{len(sentences)} sentences, {len(nodes)} of {rank} tokens")
    return _finish(reader, found, sentences, complete=rank <= len(nodes))


def _told_apart(reader: Reader, site: Site, pairs: list[tuple[int, int]], rank: int) -> list[Prefix]:
    """Return the sentences that the candidates ``pairs`` (token, position) make up."""
    device = reader.observation.simulator.device
    tokens = sorted({t for t, _ in pairs})
    place = {t: i for i, t in enumerate(tokens)}
    length = max(p for _, p in pairs) + 1
    ids = torch.tensor(tokens, device=device)[:, None].expand(-1, length)
    table = inputs_of(reader.observation.model, ids, [site])[0].double()
    which = torch.tensor([place[t] for t, _ in pairs], device=device)
    where = torch.tensor([p for _, p in pairs], device=device)
    x = table[which, where]
    # A token that occurs once has its δ as the sum over its positions, in which wrong ones count zero: where a norm
    # scales the sum of token and position, those sums are determined although wrong pairs lie in the span, too.
    scales = _scales(x, table, which, where)
    sums = torch.zeros(len(tokens), len(pairs), dtype=torch.float64, device=device)
    sums[which, torch.arange(len(pairs), device=device)] = scales
    sums = torch.cat([sums, torch.eye(len(pairs), dtype=torch.float64, device=device)]).unique(dim=0)
    turn, sure = marginals(x, rank, sums)
    turn = turn[:, sure]
    like = next(iter(reader.tensors.values())).dtype
    outputs = [module(x.to(like)).double() for module in site.modules]
    deltas = [
        (reader.tensors[k].double().T if f else reader.tensors[k].double()) @ turn
        for k, f in zip(site.weights, site.flipped, strict=True)
    ]
    roles = _roles(deltas, outputs, where, length)
    if roles is None:
        return []
    sides, width = roles
    sentences: dict[Prefix, float] = {}
    for i in range(turn.shape[1]):
        chosen, left = companions(*_sides(deltas, outputs, sides, width, i), where, length)
        if left <= _SAME:
            at = sorted((pairs[j][1], pairs[j][0]) for j in chosen)
            if [p for p, _ in at] == list(range(len(at))):
                sentences[tuple(t for _, t in at)] = left
    return list(sentences)


def _heads(outputs: Tensor, width: int) -> Tensor:
    """Return (H, N, dh) of (N, H·dh)."""
    return outputs.view(len(outputs), -1, width).transpose(0, 1)


def _sides(
    deltas: list[Tensor], outputs: list[Tensor], sides: list[tuple[int, int]], width: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return one token's gradients at queries and keys, and all tokens' keys and queries."""
    (query, key), _ = sides
    # What a query's gradient takes of the keys sums to zero, as a softmax's does: their mean has no say.
    centered = outputs[key] - outputs[key].mean(0)
    return (
        [deltas[query][:, seed].view(-1, width), deltas[key][:, seed].view(-1, width)],
        [_heads(centered, width), _heads(outputs[query], width)],
    )


def _roles(
    deltas: list[Tensor], outputs: list[Tensor], where: Tensor, length: int
) -> tuple[list[tuple[int, int]], int] | None:
    """Return which layers are queries and keys, and the width of a head: those that explain some tokens' gradients."""
    tried = torch.linspace(0, deltas[0].shape[1] - 1, min(_TRIED, deltas[0].shape[1])).long().tolist()
    count = len(deltas)
    for width in _HEADS:
        if any(o.shape[1] % width for o in outputs):
            continue
        for a, b in itertools.permutations(range(count), 2):
            if outputs[a].shape != outputs[b].shape:
                continue
            sides = [(a, b), (b, a)]
            for i in tried:
                chosen, left = companions(*_sides(deltas, outputs, sides, width, i), where, length)
                if left <= _SAME and len(chosen) < width - 2:
                    return sides, width
    return None


def _scales(x: Tensor, table: Tensor, which: Tensor, where: Tensor) -> Tensor:
    """Return by which factor each input scales its token's direction, relative to position 0; one where none does.

    Four inputs of two tokens at two positions are dependent where a norm scales the sum of a token and a position.
    """
    corner = table[0, 0].expand_as(x)
    four = torch.stack([x, table[which, 0], table[0, where], corner], 1)
    values, vectors = torch.linalg.eigh(four @ four.transpose(1, 2))
    weak = vectors[:, :, 0]
    closed = values[:, 0].clamp_min(0).sqrt() <= _CLOSED * values[:, 3].sqrt()
    usable = closed & (which > 0) & (where > 0) & (weak[:, 0].abs() > 1e-6)
    return torch.where(usable, (weak[:, 1] / weak[:, 0]).abs(), 1.0)


def _finish(reader: Reader, found: Prefixes, sentences: list[Prefix], *, complete: bool) -> Reading:
    size = reader.observation.batch_size or len(sentences)
    head = next((s for s in reader.sites if s.logits), None)
    why = f"{len(found.nodes)} tokens were put into sentences, where the gradients have rank {found.rank}."
    if not sentences:
        return Reading([], None, False, found, why)
    if head is None:
        return fitted(reader, found, sentences, size)
    read = count_classes(reader, found, head, size, [sentences]) if head.sees is Sees.POOLED else None
    if read is None:
        read = _behind_masks(reader, found, sentences, head, size)
    return read if complete or not read.whole else Reading(read.sentences, read.labels, False, found, why)


def _behind_masks(reader: Reader, found: Prefixes, sentences: list[Prefix], head: Site, size: int) -> Reading:
    """Return sentences with the labels of their predicted positions, as often as they occur."""
    why = "The labels of the predicted tokens did not come out whole."
    weight = reader.tensors[head.weights[0]]
    weight = weight.T if head.flipped[0] else weight
    states, shares = [], []
    for s in sentences:
        ids = torch.tensor([s], device=reader.observation.simulator.device)
        states.append(inputs_of(reader.observation.model, ids, [head])[0][0].double())
        shares.append(reader.observation.model(ids)[0].softmax(-1).double())
    hidden, p = torch.cat(states), torch.cat(shares)
    told, ratio, slopes = _predicted(reader, sentences, hidden, p, weight)
    most = size * max(map(len, sentences))
    total = next((n for n in range(max(1, int(told.sum())), most + 1) if _whole(ratio[told] * n)), None)
    if total is None or not bool(told.any()):
        return Reading(sentences[:size], None, False, found, why)
    counts = (ratio[:, None] * p - slopes) * total
    for _ in range(_ROUNDS if head.tied else 1):
        often = (ratio * total).round()
        # Rows with an embedding's part are off by any amount, others by nothing.
        near = (counts - often[:, None]).abs().masked_fill(counts < 0.5, torch.inf)
        best = torch.where(near.amin(1).isfinite(), near.argmin(1), counts.argmax(1))
        read = _labeled(sentences, told.cpu(), best.cpu(), often.cpu(), size)
        if read is None:
            return Reading(sentences[:size], None, False, found, "The number of sentences is not the stated one.")
        listed, labels = read
        if not head.tied:
            return Reading(listed, labels, True, found)
        ids, targets = padded(listed), padded([tuple(row) for row in labels], -100)
        change = torch.zeros_like(counts)
        change[told] = output_gradients(hidden[told], unexplained(reader, ids, targets, head)) * total
        if float(change.abs().max()) < 0.3:
            return Reading(listed, labels, True, found)
        # Rows of tokens that were read carry the embedding's part, which the simulation now knows.
        guess = torch.zeros_like(counts)
        guess[told, best[told]] = often[told]
        counts = guess - change
    return Reading(sentences[:size], None, False, found, why)


def _whole(counts: Tensor) -> bool:
    return float((counts - counts.round()).abs().max()) < _NEAR and float(counts.min()) > 0.5


def _predicted(
    reader: Reader, sentences: list[Prefix], hidden: Tensor, p: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens have labels (n,), their shares of the predictions (n,), and output gradients (n, V).

    They are those of one token, the mask, if these explain the decoder's gradient; else any.
    """
    flat = torch.tensor([t for s in sentences for t in s], device=hidden.device)
    draw = torch.Generator().manual_seed(2)
    rows = torch.randperm(len(weight), generator=draw)[:_ROWS].to(hidden.device)
    rows = rows[~torch.isin(rows, flat)]  # without an embedding's part
    every = torch.ones_like(flat, dtype=torch.bool)
    kinds, many = flat.unique(return_counts=True)
    options = [flat == t for t in kinds[many.argsort(descending=True)]]
    part = weight[rows].double()
    for here in [*options, every]:
        fit = output_gradients(hidden[here], part)
        rest = float((fit.T @ hidden[here] - part).norm() / part.norm().clamp_min(1e-300))
        if rest <= _REST or here is every:
            slopes = torch.zeros_like(p)
            slopes[here] = output_gradients(hidden[here], weight)
            ratio = torch.zeros(len(flat), dtype=p.dtype, device=p.device)
            ratio[here] = multiplicities(p[here], slopes[here])
            told = here & (ratio > _FAINT * ratio.max())
            return told, ratio * told, slopes * told[:, None]
    raise AssertionError


def _labeled(
    sentences: list[Prefix], told: Tensor, best: Tensor, often: Tensor, size: int
) -> tuple[list[Prefix], list[list[int]]] | None:
    """Return ``size`` sentences with a label for each predicted token; None if they are more or fewer."""
    listed: list[Prefix] = []
    labels: list[list[int]] = []
    begin = 0
    for s in sentences:
        here = slice(begin, begin + len(s))
        times = max(1, int(often[here].max()))
        row = torch.where(told[here], best[here], -100).tolist()
        listed.extend([s] * times)
        labels.extend([row] * times)
        begin += len(s)
    return (listed, labels) if len(listed) == size else None
