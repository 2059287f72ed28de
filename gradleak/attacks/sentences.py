"""Exact sentences from the gradient of a transformer encoder: linear algebra and a look-up, no optimization."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.attacks.base import Attack, Callback, Progress
from gradleak.errors import NotApplicable
from gradleak.spaces import TokenSpace
from gradleak.threat import Knowledge, Observation
from gradleak.types import Certificate, Reconstruction, UpdateKind

__all__ = ["ReadSentences", "read_sentences"]

_IGNORED = -100
_LIKELY = 3
"""Candidates kept at a position after the first step, as a multiple of the sentences."""
_WHOLE = 0.02
"""How far from whole numbers the counts of labels may lie; those of a wrong mask token are off by far more."""


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@final
@dataclass(frozen=True)
class ReadSentences(Attack):
    """Reads the tokens of a batch off attention gradients, and the masked ones' labels; made by :func:`read_sentences`.

    The gradient of a query, key or value matrix is Σ δ xᵀ over all tokens, so its row space is spanned by the layer's
    inputs x. In the first layer x depends on the token and its position only: a token stands at a position where its
    x lies in the span (Petrov et al. 2024, DAGER, Section 4.1). Several sentences are told apart in the second layer,
    whose inputs depend on the whole sentence (Section 4.2): one token is fixed, and Gauss–Newton finds the mixture of
    the others' candidates whose second-layer inputs lie in the second span; its rounding is the sentence. The
    masked positions are those where the mask token stands. Their labels are counted in the decoder bias's gradient
    and put into place by least squares on the gradient of the last linear layer before the decoder, which is linear
    in the labels once the inputs are known.

    Deviations: DAGER enumerates or beam-searches sentences; labels are not among its unknowns. Thresholds follow the
    gap in the spectrum instead of fixed constants. Sentences must have equal length and no padding.

    Attributes:
        mask: id of the mask token; None for the one that makes the labels' counts whole numbers.
        starts: fixed tokens tried, at most.
        steps: Gauss–Newton steps from one fixed token, at most.
        sweeps: rounds of changing up to three tokens afterwards, at most.

    Raises:
        NotApplicable: not a token space, not a plain gradient, attention whose inputs cannot be found, or a gradient
            whose rank is full (too many tokens for the width, or noise).

    """

    mask: int | None = None
    starts: int = 16
    steps: int = 5
    sweeps: int = 20

    requires = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def _reconstruct(
        self, observations: list[Observation], seed: int, callback: Callback | None
    ) -> list[Reconstruction]:
        found = []
        for i, observation in enumerate(observations):
            found.append(self._read(observation, torch.Generator().manual_seed(seed)))
            if callback is not None:
                callback(Progress(i + 1, len(observations), found[-1].objective, "read"))
        return found

    def _read(self, observation: Observation, generator: torch.Generator) -> Reconstruction:
        began = time.perf_counter()
        space = observation.space
        if not isinstance(space, TokenSpace):
            raise NotApplicable("Only sentences can be read this way; give observe() a TokenSpace, or use matching.")
        if observation.update.kind is not UpdateKind.GRADIENT:
            raise NotApplicable("The update is a weight delta, not a gradient; scale a one-step delta by -1/lr first.")
        reader = _Reader(observation, space)
        notes: list[str] = []
        first = _span(reader.gradient(0), "first", 0.05)
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
            notes.append("The sentences were not told apart with certainty: the second layer's span was not reached.")
        labels = reader.labels(sentences, self.mask)
        if labels is None:
            notes.append("The labels were not read: no decoder bias is shared, or no token stands where labels belong.")
        certificate = reader.certificate(sentences, labels)
        return Reconstruction(
            inputs=sentences.to(reader.device),
            labels=labels,
            objective=certificate.residual**2,
            status="exact" if certificate.verdict != "unproved" else "stalled",
            evaluations=1,
            seconds=time.perf_counter() - began,
            notes=tuple(notes),
            certificate=certificate,
        )

    def _assemble(
        self, reader: _Reader, candidates: list[Tensor], size: int, generator: torch.Generator
    ) -> tuple[Tensor, bool]:
        """Return sentences (N, T) made of ``candidates`` and whether each reaches the second layer's span."""
        if all(len(c) == 1 for c in candidates):
            return torch.stack([c[0] for c in candidates]).expand(size, -1).clone(), True
        span = _span(reader.gradient(1), "second", 1e-3)
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
        reader: _Reader,
        candidates: list[Tensor],
        span: _Span,
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
        weights = _shared_out(torch.where(spent, 0.1, 1.0).double(), where)
        pinned = where == position
        weights[pinned] = (tokens[pinned] == token).double()
        before = float("inf")
        for step in range(self.steps):
            directions = _exchanges(where, pinned)
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
            sentence = torch.stack([tokens[where == p][weights[where == p].argmax()] for p in range(len(candidates))])
            if reader.distance(sentence, span) <= span.clear:
                break
            if float(rest.norm()) > 0.97 * before:  # a local minimum: what is left is for single tokens to solve
                break
            before = float(rest.norm()) if step else before  # the first step counted other candidates
        return sentence, [tokens[where == p] for p in range(len(candidates))]

    @staticmethod
    def _settle(
        reader: _Reader, candidates: list[Tensor], span: _Span, sentence: Tensor, fixed: int, sweeps: int
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


def _sums(values: Tensor, where: Tensor) -> Tensor:
    """Return the sums of ``values`` (R,) over each position, (T,)."""
    return torch.zeros(int(where.max()) + 1, dtype=values.dtype).index_add_(0, where, values)


def _shared_out(values: Tensor, where: Tensor) -> Tensor:
    return values / _sums(values, where)[where]


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


@dataclass(frozen=True, eq=False)
class _Span:
    """An orthonormal basis (d, r) of a layer's inputs and the relative distance within which a vector is inside."""

    basis: Tensor
    threshold: float

    @property
    def clear(self) -> float:
        """The distance below which a vector is inside beyond doubt: neighbors of a sentence can be close."""
        return self.threshold / 30

    def distance(self, x: Tensor) -> Tensor:
        """Return the relative distances of ``x`` (..., d) to the span, (...)."""
        basis = self.basis.to(x)
        rest = x - (x @ basis) @ basis.T
        return rest.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)


def _span(gradient: Tensor, layer: str, loosest: float) -> _Span:
    """Return the row space of ``gradient`` (rows, d), cut at the widest gap of its spectrum."""
    s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)[1:]
    logs = (s / s[0].clamp_min(1e-300)).clamp_min(1e-17).log10()
    gaps = logs[:-1] - logs[1:]
    rank = int(gaps.argmax()) + 1
    if float(gaps.max()) < 1.0:
        # Weak tokens reach down into the rounding: what stands clear of it still spans the others.
        rank = int((s > 4 * torch.finfo(gradient.dtype).eps * s[0]).sum())
        gaps = logs[rank - 1] - logs[rank:]
    if float(s[0]) == 0.0 or rank >= len(s) or float(gaps.max()) < 0.1:
        raise NotApplicable(
            f"The attention gradient of the {layer} layer has full rank: more tokens than the model is wide, or "
            "noise; use matching."
        )
    ratio = 10.0 ** float(-gaps.max())
    return _Span(vh[:rank].T.contiguous(), min(max(ratio**0.5, 1e-5), loosest))


class _Reader:
    """What a model's structure gives: the inputs of its attention layers, and the gradients that belong to them."""

    def __init__(self, observation: Observation, space: TokenSpace) -> None:
        self.observation, self.space, self.model = observation, space, observation.model
        self.update = observation.update.tensors
        self.params: dict[str, Tensor] = dict(self.model.named_parameters())
        self.casts: dict[torch.dtype, dict[str, Tensor]] = {}
        self.device = space.table.device
        self.names = {module: name for name, module in self.model.named_modules()}
        with torch.no_grad():
            self.layers, self.tail, self.decoder = self._structure()

    def _structure(self) -> tuple[list[list[nn.Linear]], nn.Linear | None, nn.Linear | None]:
        """Return groups of linear layers that share one input (query, key, value), the last two linear layers."""
        calls: list[tuple[nn.Linear, int]] = []
        inputs: list[Tensor] = []  # keeps them alive, so that identities stay distinct

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            inputs.append(arguments[0])
            calls.append((module, id(arguments[0])))

        with self._hooks([m for m in self.model.modules() if isinstance(m, nn.Linear)], note):
            ids = torch.zeros(self.observation.batch_size or 1, self.space.length, dtype=torch.long, device=self.device)
            self.model(self.space.table[ids])
        groups: dict[int, list[nn.Linear]] = {}
        for module, key in calls:
            groups.setdefault(key, []).append(module)
        # Layers that share their weights count once: one gradient is spanned by the inputs of all of them.
        distinct = {g[0]: g for g in reversed(groups.values()) if len(g) >= 3 and all(self._trained(m) for m in g)}
        layers = list(reversed(distinct.values()))
        if not layers:
            raise NotApplicable("No layers for query, key and value that share an input were found; use matching.")
        decoder = calls[-1][0] if calls[-1][0].out_features == len(self.space.table) else None
        tail = calls[-2][0] if decoder is not None and len(calls) > 1 and self._trained(calls[-2][0]) else None
        return layers, tail, decoder

    def _trained(self, module: nn.Module) -> bool:
        return f"{self.names[module]}.weight" in self.update

    @staticmethod
    @contextmanager
    def _hooks(modules: list[nn.Linear], hook: Callable[[nn.Module, tuple[Tensor, ...]], None]) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(hook) for m in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradient(self, layer: int) -> Tensor:
        """Return the stacked query, key and value gradients (3d, d) of a layer.

        Raises:
            NotApplicable: the model has no such layer.

        """
        if layer >= len(self.layers):
            raise NotApplicable(
                "A model with a single attention layer, or the same one throughout, does not tell sentences of a batch "
                "apart; use matching."
            )
        parts = [self.update[f"{self.names[m]}.weight"] for m in self.layers[layer]]
        # Each carries rounding in proportion to its own size: the value gradient's must not bury the others.
        return torch.cat([part / part.norm().clamp_min(1e-300) for part in parts])

    def _cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if dtype not in self.casts:
            own = {**self.params, **dict(self.model.named_buffers())}
            self.casts[dtype] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in own.items()}
        return self.casts[dtype]

    def hidden(self, embedded: Tensor, module: nn.Linear, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the input of ``module`` for ``embedded`` (N, T, d), computing nothing behind it.

        ``replaced`` stands in for parameters of these names.
        """

        def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            raise _Reached(arguments[0])

        values = self._cast(embedded.dtype) | dict(replaced or {})
        with self._hooks([module], stop):
            try:
                functional_call(self.model, values, (embedded,))
            except _Reached as reached:
                return reached.hidden
        raise NotApplicable("The model did not reach a layer that it reached before; it must be deterministic.")

    @torch.no_grad()
    def candidates(self, span: _Span) -> list[Tensor]:
        """Return for every position the tokens whose first-layer input lies in ``span``."""
        table, found = self.space.table, []
        length, first = self.space.length, self.layers[0][0]
        for chunk in torch.arange(len(table)).split(max(1, 2**22 // (length * table.shape[1]))):
            # The first layer's input at a position knows no other position: one token everywhere serves all.
            x = self.hidden(table[chunk][:, None].expand(-1, length, -1), first)
            found.append(span.distance(x) <= span.threshold)
        inside = torch.cat(found)
        return [inside[:, p].nonzero().flatten().cpu() for p in range(length)]

    def distance(self, sentence: Tensor, span: _Span) -> float:
        """Return how far the second layer's inputs of ``sentence`` (T,) leave ``span``: that of the tenth nearest.

        Every one of them depends on the whole sentence. The nearest are those of the masked positions, whose gradient
        is the strongest; that of the weakest tokens can be below rounding, so that nothing of them is in the span.
        """
        distances = self.leaving(sentence[None], span).norm(dim=-1).flatten()
        return float(distances.kthvalue(-(-len(distances) // 10)).values)

    @torch.no_grad()
    def leaving(self, sentences: Tensor, span: _Span) -> Tensor:
        """Return the part (M, T, d) of the second layer's inputs outside ``span``, relative to their norms."""
        parts, basis = [], span.basis.to(self.device)
        for part in sentences.to(self.device).split(128):
            x = self.hidden(self.space.table[part], self.layers[1][0]).double()
            parts.append((x - (x @ basis) @ basis.T) / x.norm(dim=-1, keepdim=True))
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def sensitivity(
        self, tokens: Tensor, where: Tensor, weights: Tensor, directions: Tensor, span: _Span
    ) -> tuple[Tensor, Tensor]:
        """Return what leaves the second span, (T·d,), and its derivatives (n, T·d) along ``directions``.

        Args:
            tokens: (R,) candidate ids.
            where: (R,) their positions.
            weights: (R,) their weights in the mixtures.
            directions: (n, R) changes of the weights.
            span: the second layer's span.

        """
        rows = self.space.table[tokens.to(self.device)].double()
        place = torch.nn.functional.one_hot(where, self.space.length).double().to(self.device)  # (R, T)

        def embed(w: Tensor) -> Tensor:
            return torch.einsum("nr,rt,rd->ntd", w.to(self.device), place, rows)

        point, module = embed(weights[None]), self.layers[1][0]
        basis = span.basis.to(rows)

        def outside(embedded: Tensor) -> Tensor:
            x = self.hidden(embedded, module) / scale
            return (x - (x @ basis) @ basis.T).flatten(1)

        scale = self.hidden(point, module).norm(dim=-1, keepdim=True)
        rest = outside(point)[0]
        # Differences, not forward mode: half the work, and eight digits are plenty for a step that is rounded anyway.
        width = 1e-5
        parts = [(outside(point + width * embed(part)) - rest) / width for part in directions.split(64)]
        return rest, torch.cat(parts)

    def labels(self, sentences: Tensor, mask: int | None) -> Tensor | None:
        """Return the ids (N, T) behind the mask tokens of ``sentences``, −100 elsewhere; None if they do not show.

        A model that predicts K positions only gives (N, K).
        """
        if self.tail is None or self.decoder is None or self.decoder.bias is None:
            return None
        bias = next((k for k, p in self.params.items() if p is self.decoder.bias), None)
        if bias is None or bias not in self.update:
            return None
        decoder_weight, decoder_bias = self.decoder.weight.detach().double(), self.decoder.bias.detach().double()
        name = f"{self.names[self.tail]}.weight"
        leaf = self.params[name].detach().double().requires_grad_()
        states = self.hidden(self.space.table.double()[sentences.to(self.device)], self.decoder, {name: leaf})
        # A model that predicts some positions only shows which; else they are those of the mask token.
        told = states.shape[:2] != sentences.shape
        choices = [torch.ones(states.shape[:2], dtype=torch.bool)] if told else []
        if not told:
            choices = [sentences == t for t in (sentences.unique().tolist() if mask is None else [mask])]
        slope = self.update[bias].double()  # Σ (p − y) over the K predicted positions, divided by K
        best, closest = None, _WHOLE
        for chosen in choices:
            hidden = states[chosen.to(self.device)]
            p = (hidden.detach() @ decoder_weight.T + decoder_bias).softmax(-1)
            raw = p.sum(0) - len(hidden) * slope
            counts = raw.round().clamp_min(0).long()
            error = float((raw - counts).abs().max())
            if len(hidden) and int(counts.sum()) == len(hidden) and error < closest:
                best, closest = (chosen, hidden, p, counts.cpu()), error
        if best is None:
            return None
        chosen, hidden, p, counts = best
        total = len(hidden)
        ids = torch.repeat_interleave(torch.arange(len(counts)), counts)
        kinds = ids.unique()

        def response(position: int, row: Tensor) -> Tensor:
            seed = torch.zeros_like(hidden)
            seed[position] = row / total
            return torch.autograd.grad(hidden, leaf, seed, retain_graph=True)[0].flatten()

        base = torch.autograd.grad(hidden, leaf, p @ decoder_weight / total, retain_graph=True)[0].flatten()
        design = torch.stack([response(k, decoder_weight[c]) for k in range(total) for c in kinds])
        normal = design @ design.T
        wanted = design @ (base - self.update[name].double().flatten())
        weights = torch.linalg.lstsq(normal, wanted[:, None], driver="gelsd").solution.view(total, len(kinds))
        score = weights[:, torch.searchsorted(kinds, ids).to(weights.device)].detach().cpu().numpy()
        from scipy.optimize import linear_sum_assignment  # Not at the top: it takes long to import.

        order = linear_sum_assignment(-np.asarray(score))[1]
        labels = torch.full(chosen.shape, _IGNORED)
        labels[chosen] = ids[torch.from_numpy(order)]
        return labels.to(self.device)

    def certificate(self, sentences: Tensor, labels: Tensor | None) -> Certificate:
        """Return what re-simulating the update with the sentences and labels found proves."""
        own = next(iter(self.update.values()))
        floor = 1e3 * torch.finfo(own.dtype).eps
        training = self.observation.training
        if labels is None or training is None:
            return Certificate("unproved", float("inf"), floor, reason="Without labels the update was not simulated.")
        simulated = training.tensors(
            self.model, self.observation.params, self.space.table[sentences.to(self.device)], labels
        )
        total = sum(float(v.double().square().sum()) for v in self.update.values())
        wrong = sum(float((simulated[k] - v).double().square().sum()) for k, v in self.update.items())
        residual = (wrong / max(total, 1e-300)) ** 0.5
        verdict = "proved" if residual <= floor else "unproved"
        reason = (
            "Every tokens' input lies in the gradient's span and the simulated update equals the seen one."
            if verdict == "proved"
            else "The simulated update differs from the seen one by more than its rounding."
        )
        return Certificate(verdict, residual, floor, examples=(verdict,) * len(sentences), reason=reason)


def read_sentences(*, mask: int | None = None, starts: int = 16) -> ReadSentences:
    """Read the sentences of a masked language model's batch off its attention gradients: no optimization, no prior.

    Source: Petrov et al., *DAGER*, NeurIPS 2024, Sections 4.1 and 4.2. Deviations: see :class:`ReadSentences`.

    Args:
        mask: id of the mask token; None finds the token that makes the labels' counts whole numbers.
        starts: fixed tokens from which the sentences of a batch are told apart, at most.

    """
    return ReadSentences(mask=mask, starts=starts)
