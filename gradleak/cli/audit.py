"""The command ``gradleak audit``: a plan is tried, and what came of it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from gradleak.audit.running import EVIDENCE, exit_code
from gradleak.auditing import PAGE, run_audit
from gradleak.cli.audit_captures import audit_capture
from gradleak.cli.console import say, show, trial_bar
from gradleak.errors import InvalidInput

__all__ = ["audit"]

_ROWS = 12
"""Rows that are printed, the worst first."""


def audit(subject: Path, out: Path, **asked: Any) -> int:
    """Try the plan ``subject``, or the updates of that capture, write evidence into ``out``, return the exit code.

    ``asked`` are the options of :func:`gradleak.audit.running.run`.
    """
    with trial_bar() as told:
        if subject.is_dir():
            if asked.pop("data") is not None:
                raise InvalidInput("--data is for plans; a capture is scored by the truth that it holds.")
            found = audit_capture(subject, out.absolute(), told=told, **asked).evidence
        else:
            found = run_audit(subject, out, told=told, **asked).evidence
    _tell(found, out)
    return exit_code(found)


def _tell(found: Mapping[str, Any], out: Path) -> None:
    """Print the verdict, the worst rows, what remedies reached, and where the evidence lies."""
    verdict = found["verdict"]
    say("")
    say(verdict["headline"], style="bold")
    for sentence in verdict["reason"]:
        say(sentence)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("case", "stage", "batch", "attack", "recovered", "95 % interval", "proved"):
        table.add_column(name, justify="left" if name in ("case", "attack") else "right")
    for row in found["lower_bound"][:_ROWS]:
        got = row["recovered"]
        told = (
            f"{got['count']} of {row['examples']}",
            f"{got['low']:.3f} – {got['high']:.3f}",
            str(row["proved"]["count"]),
        )
        told = told if row["batches"] else ("not tried", "–", "–")
        table.add_row(row["case"], str(row["stage"]), str(row["batch_size"]), row["attack"], *told)
    say("")
    show(table)
    if len(found["lower_bound"]) > _ROWS:
        say(f"… and {len(found['lower_bound']) - _ROWS} better rows in {EVIDENCE}.")
    for remedy in verdict["remedies"]:
        got = remedy["recovered"]
        said = "not missed, but too few batches to be sure" if remedy["reached"] else "missed"
        said = f"{got['count']} of {remedy['examples']} came back, target {'reached' if remedy['sure'] else said}"
        say(f"Measured for case {remedy['case']}: {remedy['remedy']}: {said}.")
    say("")
    say(f"Evidence: {out.absolute() / PAGE}")
