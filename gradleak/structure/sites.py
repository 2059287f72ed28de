"""The linear layers of a language model by what they see: one token, the tokens before, or all of them.

Nothing goes by names of classes or modules: the model is run on a few ids, and layers are told apart by which tokens
change their inputs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable

__all__ = ["Sees", "Site", "find_sites", "inputs_of"]

_PROBE = 5
"""Tokens of the sentences by which layers are told apart."""
_CHANGED = 3
"""The position at which they differ; one is left behind it."""


class Sees(enum.StrEnum):
    """What the input of a layer at a position depends on."""

    TOKEN = "token"
    """The token there, and perhaps the position."""
    PREFIX = "prefix"
    """The tokens up to there."""
    SENTENCE = "sentence"
    """All tokens of the sentence."""
    POOLED = "pooled"
    """There is one input for the whole sentence."""


@dataclass(frozen=True, eq=False)
class Site:
    """Linear layers that see the same input (such as query, key and value) and are run once.

    Attributes:
        modules: the layers.
        weights: names of their weights.
        flipped: which weights have their inputs along the first axis (``Conv1D``), not the last one.
        width: number of values they see at a position.
        sees: what these depend on.
        positional: whether the same token looks different at another position.
        logits: whether what comes out is what the model returns, at every position or at the pooled one.
        tied: whether a weight serves as an embedding, too, whose part of the gradient no input of the layer spans.
    """

    modules: tuple[nn.Module, ...]
    weights: tuple[str, ...]
    flipped: tuple[bool, ...]
    width: int
    sees: Sees
    positional: bool
    logits: bool
    tied: bool

    def gradient(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the stacked gradients (outputs, width) of the layers that are in ``tensors``.

        Each is divided by its norm: it carries rounding in proportion to its own size, and must not bury the others.
        """
        parts = [
            g.T if flip else g for k, flip in zip(self.weights, self.flipped, strict=True) if (g := tensors[k]).any()
        ]
        return torch.cat([p / p.norm() for p in parts]) if parts else next(iter(tensors.values())).new_zeros(0, 1)


class _Reached(Exception):
    pass


@contextmanager
def _listening(modules: Collection[nn.Module], hook: Callable[..., None], *, after: bool = False) -> Iterator[None]:
    handles = [m.register_forward_hook(hook) if after else m.register_forward_pre_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_of(model: nn.Module, ids: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """Return what each of ``sites`` sees of sentences ``ids`` (N, T), computing nothing behind the last of them.

    Raises:
        NotApplicable: the model does not reach a layer that it reached before.
    """
    wanted = {site.modules[0]: i for i, site in enumerate(sites)}
    seen: dict[int, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[wanted[module]] = arguments[0]
        if len(seen) == len(wanted):
            raise _Reached

    with _listening(wanted, note):
        try:
            model(ids)
        except _Reached:
            return [seen[i] for i in range(len(sites))]
    raise NotApplicable("The model did not reach a layer that it reached before; it must be deterministic.")


@torch.no_grad()
def find_sites(model: nn.Module, trained: Collection[str], vocabulary: int, limit: int) -> list[Site]:
    """Return the linear layers whose weights are ``trained``, grouped by what they see, in the order of their calls.

    Layers that run more than once are left out: their gradients are spanned by more than one input. ``vocabulary`` is
    the number of ids, ``limit`` the most tokens of a sentence.
    """
    if limit < _PROBE:
        raise NotApplicable(f"The model takes {limit} tokens at most, too few to tell its layers apart.")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (4, _PROBE), generator=draw)
    ids[1:] = ids[0]
    ids[1, _CHANGED] = (ids[0, _CHANGED] + 1 + vocabulary // 3) % vocabulary
    ids[2] = ids[0, 0]
    device = next(model.parameters()).device
    names = {id(p): k for k, p in model.named_parameters() if k in trained}
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    candidates = [
        m
        for m in model.modules()
        if isinstance(w := m._parameters.get("weight"), Tensor) and w.ndim == 2 and not isinstance(m, nn.Embedding)
    ]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            calls.append((module, arguments[0], output))

    with _listening([m for m in candidates if id(m.weight) in names], note, after=True):
        logits = model(ids.to(device))
    often = [m for m, _, _ in calls]
    groups: dict[tuple[int, ...], list[tuple[nn.Module, Tensor, Tensor]]] = {}
    for call in calls:
        if often.count(call[0]) == 1:
            groups.setdefault((call[1].data_ptr(), *call[1].shape), []).append(call)
    sites: list[Site] = []
    for group in groups.values():
        flips = [_flipped(*call) for call in group]
        kept = [(m, flip) for (m, _, _), flip in zip(group, flips, strict=True) if flip is not None]
        if not kept:
            continue
        x = group[0][1]
        sees, positional = _dependence(x)
        same = isinstance(logits, Tensor) and any(o.data_ptr() == logits.data_ptr() for _, _, o in group)
        if isinstance(logits, Tensor) and not same and len(group) == 1:  # pooled after the head, as of GPT-2
            out = group[0][2]
            same = out.ndim == logits.ndim + 1 and bool(torch.equal(out[:, -1], logits))
        sites.append(
            Site(
                tuple(m for m, _ in kept),
                tuple(names[id(m.weight)] for m, _ in kept),
                tuple(flip for _, flip in kept),
                int(x.shape[-1]),
                sees,
                positional,
                same,
                any(id(m.weight) in looked_up for m, _ in kept),
            )
        )
    return sites


def _flipped(module: nn.Module, x: Tensor, output: Tensor) -> bool | None:
    """Tell which way round a layer's weight is; None if the layer is not linear."""
    weight, bias = module.weight, module._parameters.get("bias")
    assert isinstance(weight, Tensor)
    found = output if bias is None else output - bias
    for flip, w in ((False, weight.T), (True, weight)):
        if x.ndim > 1 and x.shape[-1] == w.shape[0] and output.shape[-1] == w.shape[1]:
            expected = x @ w
            if torch.allclose(expected, found, rtol=1e-2, atol=1e-3 * float(expected.abs().max()) + 1e-12):
                return flip
    return None


def _dependence(x: Tensor) -> tuple[Sees, bool]:
    """Return what a layer's inputs (4, T, w) depend on, and whether a token looks different elsewhere."""
    if x.ndim != 3 or x.shape[1] != _PROBE:
        return Sees.POOLED, False
    scale = float(x.abs().max()) or 1.0
    moved = (x[1] - x[0]).abs().amax(-1) > 1e-6 * scale
    positional = bool((x[2, 0] - x[2, 1]).abs().amax() > 1e-6 * scale)
    if bool(moved[:_CHANGED].any()):
        return Sees.SENTENCE, positional
    return (Sees.PREFIX if bool(moved[_CHANGED + 1 :].any()) else Sees.TOKEN), positional
