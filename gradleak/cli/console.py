"""What the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gradleak.attacks.base import Progress as Step
from gradleak.audit.numbers import duration, sig
from gradleak.audit.records import Record
from gradleak.errors import clean

__all__ = ["progress_bar", "say", "show", "tell", "trial_bar", "warn"]

_ROWS = 20
"""Examples that the table shows."""
_QUIET = 30.0
"""Seconds between two lines about an audit where nobody watches."""


class _Console(Console):
    """A console that lets a closed pipe end the command with its own exit code."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def say(text: str, style: str = "") -> None:
    """Print one line; it is text, not markup: a path may contain brackets, or codes that a terminal would obey."""
    _Console(highlight=False).print(Text(clean(text), style=style), soft_wrap=True)


def show(table: Table) -> None:
    """Print a table."""
    _Console(highlight=False).print(table)


def warn(text: str) -> None:
    """Print one line on stderr."""
    Console(stderr=True, highlight=False).print(Text(clean(text)), soft_wrap=True)


def tell(record: Record, out: Path) -> None:
    """Print the verdict, the scores of the worst examples, the effort, and where the report lies."""
    say("")
    say(record.verdict.headline, style="bold")
    say(record.verdict.reason)
    if record.subject.display == "text" and record.shown is not None:
        _sentences(record)
    elif record.examples is not None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("example", "class", *(a.metric + (f", {a.unit}" if a.unit else "") for a in record.aggregates)):
            table.add_column(name, justify="right")
        for e in record.examples[:_ROWS]:
            values = (sig(e.values.get(a.metric), 3) for a in record.aggregates)
            table.add_row(str(e.index + 1), "–" if e.label is None else str(e.label), *values)
        say("")
        show(table)
        if len(record.examples) > _ROWS:
            say(f"… and {len(record.examples) - _ROWS} better ones in result.json.")
    say("")
    outcome = record.outcome
    if outcome.evaluations:
        say(f"{outcome.iterations:,} iterations, {outcome.evaluations:,} evaluations, {duration(outcome.seconds)}")
    elif outcome.status in ("exact", "converged"):
        say(f"In closed form, {duration(outcome.seconds)}")
    say(f"Report: {out / 'report.html'}")


def _sentences(record: Record) -> None:
    """Print the sentences that were read, the worst first where that is known, with what is known of each."""
    shown, certificate = record.shown, record.certificate
    assert shown is not None
    proofs = () if certificate is None else certificate.examples
    table = Table(box=None, pad_edge=False, header_style="dim")
    scored = record.examples is not None
    for name in ("sentence", *(("ROUGE-1", "ROUGE-2") if scored else ()), "", "read"):
        table.add_column(name, overflow="fold")
    rows = [(e.index, e.guess, e.values) for e in record.examples or ()] if scored else [
        (i, i, {}) for i in range(len(shown.lines))
    ]  # fmt: skip
    for index, guess, values in rows[:_ROWS]:
        proved = "proved" if guess is not None and guess < len(proofs) and proofs[guess] == "proved" else ""
        scores = (sig(values.get(name), 3) for name in ("rouge_1", "rouge_2")) if scored else ()
        line = shown.lines[guess] if guess is not None and guess < len(shown.lines) else "–"
        table.add_row(str(index + 1), *scores, proved, Text(clean(line)))
    say("")
    _Console(highlight=False).print(table)
    if len(rows) > _ROWS:
        say(f"… and {len(rows) - _ROWS} more in sentences.txt.")


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[Step], None]]:
    """Show a bar on stderr while the block runs, and give what moves it; where nobody watches there is none."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TextColumn("objective {task.fields[objective]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(clean(name), total=1, objective="–", visible=False)

        def move(step: Step) -> None:
            bar.update(task, completed=step.done, total=step.total, objective=sig(step.objective), visible=True)

        yield move


@contextmanager
def trial_bar() -> Iterator[Callable[[int, int, str], None]]:
    """Show on stderr how many trials are done and how long the rest takes; without a terminal, a line now and then."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.completed:,.0f} of {task.total:,.0f} trials"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal) as bar:
        task, told = bar.add_task("", total=None), 0.0

        def move(done: int, total: int, what: str) -> None:
            nonlocal told
            if console.is_terminal:
                bar.update(task, completed=done, total=total, description=clean(what))
            elif done in (0, total) or time.monotonic() - told > _QUIET:
                told = time.monotonic()
                warn(f"{done:,} of {total:,} trials: {what}")

        yield move
