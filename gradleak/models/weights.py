"""Weights from a file into a model, whose every tensor they must name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradleak.errors import InvalidFile
from gradleak.types import Note, NoteKind, name_prefix

__all__ = ["load_weights", "statistics", "such"]


def statistics(model: nn.Module) -> set[str]:
    """Return the names of the model's buffers, and of running statistics that its normalization does without."""
    names = {k for k, _ in model.named_buffers()}
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            names |= {f"{path}.{k}" if path else k for k in ("running_mean", "running_var", "num_batches_tracked")}
    return names


def such(names: list[str]) -> str:
    """Return the first of ``names``, and how many more there are."""
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> tuple[Note, ...]:
    """Load ``weights``, which must name every parameter and buffer that the model stores; return notes.

    Of other names, only running statistics that the model's normalization does without are allowed, and left out.
    """
    own = model.state_dict()
    unused = [k for k in weights if k not in own and k in statistics(model)]
    weights = {k: v for k, v in weights.items() if k not in unused}
    # Counters of BatchNorm do not enter the computation, and some tools drop them.
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    # Tied parameters appear under each of their names in a state dict, but often once in a file.
    stored = {v.data_ptr() for k, v in own.items() if k in weights and v.numel()}
    missing = [k for k in missing if own[k].data_ptr() not in stored or not own[k].numel()]
    extra = [k for k in weights if k not in own]
    wrapped = name_prefix(missing, extra) if missing and extra else None
    if wrapped is not None:
        raise InvalidFile(f"The names in the weights file {str(path)!r} {wrapped}")
    if missing or extra:
        what = f"lacks {such(missing)}" if missing else f"has {such(extra)}, which the model does not know"
        raise InvalidFile(f"The weights file {str(path)!r} {what}; check --model and --model-arg against the client's.")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise InvalidFile(
                f"{name!r} has shape {tuple(own[name].shape)} in the model but {tuple(tensor.shape)} in the weights "
                "file; check --model-arg and --classes against the client's."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidFile(f"{name!r} of the weights has NaN or infinite values; save the weights again.")
    model.load_state_dict({**own, **weights})
    if not unused:
        return ()
    return (Note(f"Left out of the weights: {such(unused)}, which the model does without.", NoteKind.METHOD),)
