"""Models that look integer columns up in embeddings and hand them, beside numbers, to a linear layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.structure.probe import linear_inputs, run_quietly

__all__ = ["Lookups", "Tail", "find_lookups", "tail_of"]

Tensors = Mapping[str, Tensor]

_CODES = 100_000
_COLUMNS = 4096
_FRACTION = 0.25
"""Part of a code by which a column of codes may grow without a change: the model drops it."""
_DIGITS = 1e-5
"""Relative distance at which what the layer sees counts as put together from its columns."""
_ROWS = 16


@dataclass(frozen=True, eq=False)
class Lookups:
    """How the first linear layer sees a row: each column in places of its own, codes by a table, numbers by a factor.

    Attributes:
        layer: name of the linear layer.
        row: (D,) a row that the model takes, float64.
        seen: (M,) what the layer sees of it.
        places: for each column, where the layer sees it.
        codes: column → (K, places) what the layer sees of each code.
        slopes: column → (places,) what one unit of a number adds.
        embeddings: column → name of the embedding's weight.
    """

    layer: str
    row: Tensor
    seen: Tensor
    places: tuple[Tensor, ...]
    codes: Mapping[int, Tensor]
    slopes: Mapping[int, Tensor]
    embeddings: Mapping[int, str]

    def encode(self, rows: Tensor) -> Tensor:
        """Return what the layer sees (N, M) of rows (N, D)."""
        seen = self.seen.repeat(len(rows), 1)
        for j, table in self.codes.items():
            seen[:, self.places[j]] = table[rows[:, j].long()]
        for j, slope in self.slopes.items():
            seen[:, self.places[j]] += (rows[:, j] - self.row[j])[:, None] * slope
        return seen

    def decode(self, seen: Tensor, allowed: Mapping[int, Sequence[int]] | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows (N, D) that the layer sees as nearly ``seen`` (N, M), and the relative distance (N,).

        ``allowed`` are the codes that a column may have, all if it is not named.
        """
        rows = self.row.repeat(len(seen), 1)
        for j, table in self.codes.items():
            choice = torch.as_tensor((allowed or {}).get(j, range(len(table))), device=table.device)
            rows[:, j] = choice[torch.cdist(seen[:, self.places[j]], table[choice]).argmin(1)].double()
        for j, slope in self.slopes.items():
            rows[:, j] += (seen - self.seen)[:, self.places[j]] @ slope / slope.square().sum()
        return rows, (self.encode(rows) - seen).norm(dim=1) / seen.norm(dim=1).clamp_min(1e-300)

    def told_apart(self, rows: Tensor, allowed: Mapping[int, Sequence[int]] | None = None) -> bool:
        """Tell whether no other code looks to the layer like one that ``rows`` (N, D) have."""
        for j, table in self.codes.items():
            choice = torch.as_tensor((allowed or {}).get(j, range(len(table))), device=table.device)
            own = table[rows[:, j].long()]
            near = torch.cdist(own, table[choice]) <= 1e-3 * own.norm(dim=1, keepdim=True)
            if bool((near.sum(1) > 1).any()):
                return False
        return True


class Tail(nn.Module):
    """The model from a linear layer on, as a function of what that layer sees."""

    row: Tensor

    def __init__(self, model: nn.Module, layer: str, row: Tensor) -> None:
        """Take what runs before ``layer`` from ``row`` (D,): it has no say in the outputs."""
        super().__init__()
        self.model, self.layer = model, layer
        self.register_buffer("row", row, persistent=False)

    def forward(self, seen: Tensor) -> Tensor:
        """Return the model's outputs where the layer sees ``seen`` (N, M)."""
        layer = self.model.get_submodule(self.layer)
        # Before the hooks of probes, which see what the layer sees.
        handle = layer.register_forward_pre_hook(lambda _module, _inputs: (seen,), prepend=True)
        try:
            outputs: Tensor = self.model(self.row.expand(len(seen), -1))
        finally:
            handle.remove()
        return outputs


def find_lookups(model: nn.Module, params: Tensors, row: Tensor, sizes: Mapping[int, int] | None = None) -> Lookups:
    """Return how the first linear layer sees rows, found by running the model on variations of ``row`` (D,).

    A column holds codes where an embedding's ids follow its whole part. ``sizes`` are the numbers of codes of columns
    where they are known; otherwise the embedding has one for each row.

    Raises:
        NotApplicable: nothing is looked up, or the layer does not see every column in places of its own.
    """
    if not any(isinstance(m, nn.Embedding) for m in model.modules()) or row.ndim != 1 or len(row) > _COLUMNS:
        raise NotApplicable("The model looks no column up in an embedding; use linear_inversion() or matching.")
    like, row = next(iter(params.values())), row.double()
    found = _code_columns(model, params, row, sizes or {})
    count = max(size for size, _ in found.values())
    steps = torch.eye(len(row), dtype=torch.float64, device=row.device)
    every = row.repeat(count, 1)
    for j, (size, _) in found.items():
        every[:, j] = torch.arange(count).clamp_max(size - 1)
    varied = torch.cat([row[None], row + steps, every])
    draw = torch.Generator().manual_seed(0)
    mixed = row + torch.randn(_ROWS, len(row), generator=draw, dtype=torch.float64).to(row)
    for j, (size, _) in found.items():
        mixed[:, j] = torch.randint(0, size, (_ROWS,), generator=draw)
    names = {id(p): k for k, p in model.named_parameters()}
    for layer, values in linear_inputs(model, params, torch.cat([varied, mixed]).to(like)).items():
        weight = names.get(id(model.get_submodule(layer).weight))
        if len(values) != 1 or values[0].ndim != 2 or weight not in params:
            continue
        seen = values[0].double()
        moved = seen[1 : 1 + len(row)] - seen[0]
        table = seen[1 + len(row) : len(varied)]
        places = [(table != seen[0]).any(0) & (moved[j] != 0) if j in found else moved[j] != 0 for j in range(len(row))]
        # All codes run side by side, so a place belongs to the column that moves it alone.
        places = [p.nonzero().flatten() for p in places]
        lookups = Lookups(
            layer,
            row,
            seen[0],
            tuple(places),
            {j: table[:size, places[j]] for j, (size, _) in found.items()},
            {j: moved[j, places[j]] for j in range(len(row)) if j not in found},
            {j: name for j, (_, name) in found.items()},
        )
        off = (lookups.encode(mixed) - seen[len(varied) :]).norm() / seen[len(varied) :].norm().clamp_min(1e-300)
        if all(len(p) for p in places) and float(off) <= _DIGITS:
            return lookups
    raise NotApplicable(
        "No linear layer sees numbers and embedded columns side by side, each in places of its own; the embedding's "
        "gradient names the codes all the same."
    )


def tail_of(model: nn.Module, params: Tensors, lookups: Lookups) -> Tail:
    """Return a copy of the model from the layer on, whose parameters before it are frozen.

    Raises:
        NotApplicable: the columns reach the outputs past the layer, too.
    """
    draw = torch.Generator().manual_seed(1)
    rows = lookups.row.repeat(_ROWS, 1)
    for j, table in lookups.codes.items():
        rows[:, j] = torch.randint(0, len(table), (_ROWS,), generator=draw)
    for j in lookups.slopes:
        rows[:, j] += torch.randn(_ROWS, generator=draw, dtype=torch.float64)
    like = next(iter(params.values()))
    tail = Tail(copy.deepcopy(model), lookups.layer, lookups.row.to(like))
    outputs = run_quietly(tail, {f"model.{k}": p for k, p in params.items()}, lookups.encode(rows).to(like))
    whole = run_quietly(model, params, rows.to(like))
    if not torch.allclose(outputs, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
        raise NotApplicable("The columns reach the outputs past the first linear layer, too; use matching.")
    trained = {k: p for k, p in tail.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        reached = torch.autograd.grad(
            tail(lookups.encode(rows).to(like)).sum(), list(trained.values()), allow_unused=True
        )
    for parameter, gradient in zip(trained.values(), reached, strict=True):
        parameter.requires_grad_(gradient is not None)
    return tail


def _code_columns(
    model: nn.Module, params: Tensors, row: Tensor, sizes: Mapping[int, int]
) -> dict[int, tuple[int, str]]:
    """Return the columns of codes, with the number of codes and the name of the embedding's weight."""
    steps = torch.eye(len(row), dtype=torch.float64, device=row.device)
    names = {id(p): k for k, p in model.named_parameters()}
    calls: list[tuple[nn.Embedding, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Embedding)
        calls.append((module, args[0].detach()))

    handles = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        with torch.no_grad():
            rows = torch.cat([row[None], row + steps, row + _FRACTION * steps])
            run_quietly(model, params, rows.to(next(iter(params.values()))))
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, tuple[int, str]] = {}
    for module, ids in calls:
        if len(ids) != 1 + 2 * len(row) or id(module.weight) not in names:
            continue
        flat = ids.reshape(len(ids), -1)
        changed, part = flat[1 : 1 + len(row)] != flat[0], flat[1 + len(row) :] != flat[0]
        for j in changed.any(1).nonzero().flatten().tolist():
            if bool(part[j].any()) or j in found:
                raise NotApplicable("An embedding's ids do not follow one whole number each; use matching.")
            size = sizes.get(j, module.num_embeddings - int(flat[0][changed[j]].max()) + int(row[j]))
            found[j] = min(size, _CODES), names[id(module.weight)]
    if not found:
        raise NotApplicable("The model looks no column up in an embedding; use linear_inversion() or matching.")
    return found
