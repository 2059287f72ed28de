"""What the manifest of a capture states takes the place of options that were not given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from gradleak.capture import read_capture
from gradleak.errors import InvalidFile, InvalidInput

__all__ = ["completed"]

_LOCAL = ("optimizer", "lr", "momentum", "weight_decay", "local_epochs", "local_steps", "local_batch_size")
_REPLACED = {
    "kind": _LOCAL,
    "optimizer": ("momentum", "weight_decay"),
    "local_steps": ("local_epochs",),
    "local_epochs": ("local_steps",),
    "loss": ("reduction", "label_smoothing", "class_weights"),
    "table": ("input_shape", "input_kind", "mean", "std"),
    "input_shape": ("table",),
    "input_kind": ("mean", "std"),
}
"""What an option on the command line says anew, beside itself: of the manifest, these no longer count."""


def completed(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``gradleak attack``: those given, then those of the capture, each read as if given.

    ``asked`` also has the ``context`` of the command, and ``capture``, ``round`` and ``client``.

    Raises:
        InvalidInput: model or update are stated nowhere, or the capture cannot be read.
    """
    options = dict(asked)
    context, folder, which = (
        options.pop("context"),
        options.pop("capture"),
        (options.pop("round"), options.pop("client")),
    )
    options["notes"] = ()
    if folder is not None:
        entry = read_capture(folder).entry(*which)
        given = {p.name for p in context.command.params if context.get_parameter_source(p.name).name != "DEFAULT"}
        options |= _parsed(context, folder, entry.options(given | {n for g in given for n in _REPLACED.get(g, ())}))
        options["notes"] = entry.notes
    elif which != (None, None):
        raise InvalidInput("--round and --client choose from a capture; name its folder, or leave them out.")
    for name in ("model", "update"):
        if options[name] is None:
            raise InvalidInput(f"There is nothing to attack without --{name}; give it, or the folder of a capture.")
    return options


def _parsed(context: typer.Context, folder: Path, words: Mapping[str, Any]) -> dict[str, Any]:
    by_name = {p.name: p for p in context.command.params}
    found = {}
    for name, word in words.items():
        try:
            found[name] = word if isinstance(word, Path) else by_name[name].process_value(context, word)
        except typer.BadParameter as error:
            said = " ".join(error.message.split())
            raise InvalidFile(f"{name!r} in the manifest of {str(folder)!r} cannot be used: {said}") from error
    return found
