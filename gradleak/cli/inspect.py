"""The command ``gradleak inspect``: what an update gives away, before anything is attacked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from gradleak.cli.attack import prepare
from gradleak.cli.console import say
from gradleak.files import check_writable, write_files
from gradleak.inspection import inspect as look

__all__ = ["inspect"]

_SECONDS = 10.0


def inspect(out: Path | None, as_json: bool, asked: Mapping[str, Any], command: str) -> None:
    """Print what an update gives away, as text or JSON, and write ``inspection.json`` into the folder ``out``.

    ``asked`` are the options of :func:`gradleak.cli.request.read_request`.
    """
    if out is not None:
        check_writable(out.absolute())
    seconds = asked["budget"] or _SECONDS
    job = prepare({**asked, "budget": None, "out": Path(), "command": command})
    found = look(job.observations[0], seconds=seconds, seed=asked["seed"])
    told = {
        "schema": "gradleak-inspection", "version": 1, "model": job.model, "command": command, **found.to_json(),
        "notes": [*job.notes, *job.warnings],
    }  # fmt: skip
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    if out is not None:
        write_files(out.absolute(), {"inspection.json": f"{text}\n".encode()})
    if as_json:
        typer.echo(text)
        return
    for line in str(found).splitlines():
        say(line)
    for note in job.notes:
        say(note)
