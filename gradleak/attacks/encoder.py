"""A transformer encoder as an attacker looks at it: its attention layers and the spans of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradleak.errors import NotApplicable
from gradleak.spaces import TokenSpace
from gradleak.threat import Observation

__all__ = ["Encoder", "Span", "read_span"]

_IGNORED = -100
_WHOLE = 0.02
"""How far from whole numbers the counts of labels may lie; those of a wrong mask token are off by far more."""


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True, eq=False)
class Span:
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


def read_span(gradient: Tensor, layer: str, loosest: float) -> Span:
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
    return Span(vh[:rank].T.contiguous(), min(max(ratio**0.5, 1e-5), loosest))


class Encoder:
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
    def candidates(self, span: Span) -> list[Tensor]:
        """Return for every position the tokens whose first-layer input lies in ``span``."""
        table, found = self.space.table, []
        length, first = self.space.length, self.layers[0][0]
        for chunk in torch.arange(len(table)).split(max(1, 2**22 // (length * table.shape[1]))):
            # The first layer's input at a position knows no other position: one token everywhere serves all.
            x = self.hidden(table[chunk][:, None].expand(-1, length, -1), first)
            found.append(span.distance(x) <= span.threshold)
        inside = torch.cat(found)
        return [inside[:, p].nonzero().flatten().cpu() for p in range(length)]

    def distance(self, sentence: Tensor, span: Span) -> float:
        """Return how far the second layer's inputs of ``sentence`` (T,) leave ``span``: that of the tenth nearest.

        Every one of them depends on the whole sentence. The nearest are those of the masked positions, whose gradient
        is the strongest; that of the weakest tokens can be below rounding, so that nothing of them is in the span.
        """
        distances = self.leaving(sentence[None], span).norm(dim=-1).flatten()
        return float(distances.kthvalue(-(-len(distances) // 10)).values)

    @torch.no_grad()
    def leaving(self, sentences: Tensor, span: Span) -> Tensor:
        """Return the part (M, T, d) of the second layer's inputs outside ``span``, relative to their norms."""
        parts, basis = [], span.basis.to(self.device)
        for part in sentences.to(self.device).split(128):
            x = self.hidden(self.space.table[part], self.layers[1][0]).double()
            parts.append((x - (x @ basis) @ basis.T) / x.norm(dim=-1, keepdim=True))
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def sensitivity(
        self, tokens: Tensor, where: Tensor, weights: Tensor, directions: Tensor, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Return what leaves the second ``span``, (T·d,), and its derivatives (n, T·d) along ``directions`` (n, R).

        A mixture has ``weights`` (R,) of the candidate ids ``tokens`` (R,) at the positions ``where`` (R,).
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
