"""What an update gives away besides whole inputs: labels, counts, categories and identifiers.

Looked for wherever the inputs did not come back: before a leak is called none, what was solved is said.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from gradleak.attacks.labeling import estimate_labels
from gradleak.errors import InvalidModel, NotApplicable
from gradleak.spaces import TokenSpace
from gradleak.threat import Observation
from gradleak.types import Finding, FindingKind

__all__ = ["embedding_rows", "find_besides", "named_ids"]

_SHOWN = 12
"""Identifiers that a sentence names."""


def find_besides(observation: Observation) -> tuple[Finding, ...]:
    """Return what the update shows without a search: labels at the head, rows of embeddings."""
    found = list(named_ids(observation))
    with suppress(NotApplicable, InvalidModel, RuntimeError, TypeError, IndexError):
        labels = _labels(observation)
        if labels is not None:
            found.append(labels)
    return tuple(found)


def named_ids(observation: Observation) -> tuple[Finding, ...]:
    """Return which ids the gradients of embeddings name; of sentences, which tokens."""
    rows, space = embedding_rows(observation), observation.space
    if isinstance(space, TokenSpace):  # positions and the like are named as well
        return tuple(_named_words(ids, space) for ids, size in rows.values() if size == len(space.table))
    return tuple(_named_rows(name, ids, size) for name, (ids, size) in rows.items())


def embedding_rows(observation: Observation) -> dict[str, tuple[list[int], int]]:
    """Return, for every embedding that was trained, the ids whose rows have a gradient, and the number of rows.

    The gradient of an embedding is zero but in the rows of the ids that were looked up; a table that serves as a
    decoder too (tied weights) has a gradient in all rows and is left out.
    """
    names = {id(p): k for k, p in observation.model.named_parameters()}
    rows: dict[str, tuple[list[int], int]] = {}
    for module in observation.model.modules():
        name = names.get(id(module.weight)) if isinstance(module, nn.Embedding) else None
        gradient = None if name is None else observation.gradient.tensors.get(name)
        if name is None or gradient is None:
            continue
        ids = (gradient != 0).flatten(1).any(1).nonzero().flatten().tolist()
        if 0 < len(ids) < len(gradient):
            rows[name] = ids, len(gradient)
    return rows


def _named_words(ids: list[int], space: TokenSpace) -> Finding:
    words = [text.removeprefix("##") for row in space.texts(torch.tensor(ids)[:, None]) for text in row if text]
    shown = ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")
    text = f"The gradient of the word embeddings names the {len(ids)} different tokens of the batch: {shown}."
    return Finding(FindingKind.TOKENS, text, proved=True, count=len(ids), of=len(ids))


def _named_rows(name: str, ids: list[int], size: int) -> Finding:
    shown = ", ".join(map(str, ids[:_SHOWN])) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
    return Finding(
        FindingKind.COLUMNS,
        f"The gradient of the embedding {name!r} names the {len(ids)} of {size} ids that the client used: {shown}.",
        proved=True,
        count=len(ids),
        of=size,
    )


def _labels(observation: Observation) -> Finding | None:
    """Return the class counts as the head's gradient shows them."""
    if observation.training is None or observation.labels is not None or observation.batch_size is None:
        return None
    size = observation.batch_size
    if not observation.gradient.single or observation.simulator.defended:
        return None
    estimate = estimate_labels(observation)
    doubt = estimate.raw - estimate.counts
    sure = size if estimate.exact else int(estimate.counts[doubt.abs() < 0.25].sum())
    if sure == 0:
        return None
    kind = "were read off" if estimate.exact else "are estimated from"
    return Finding(
        FindingKind.LABELS,
        f"The classes of {sure} of {size} examples {kind} the last layer's gradient: {_counted(estimate.counts)}.",
        proved=estimate.exact,
        count=sure,
        of=size,
    )


def _counted(counts: Tensor) -> str:
    present = [(int(c), int(counts[c])) for c in counts.nonzero().flatten()]
    shown = [f"{c}" if n == 1 else f"{c} ({n} times)" for c, n in present[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(present) - _SHOWN} more" if len(present) > _SHOWN else "")
