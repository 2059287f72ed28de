"""The command ``gradleak reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradleak.cli.values import folder

__all__ = ["reproduce"]


def reproduce(
    paper: Annotated[str, typer.Argument(help="Folder name of the paper, such as 2019_zhu_dlg.")],
    only: Annotated[list[str] | None, typer.Option(help="Run this experiment only (may be repeated).")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Seconds per experiment, to see that all of it runs.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The paper's scale; wants a GPU.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder laid out as docs/data.md says.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", parser=folder, help="Folder for what is measured (runs/PAPER)."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that measure side by side.")] = 1,
) -> None:
    """Run the experiments of a paper and set its numbers beside ours."""
    from gradleak.cli.threads import choose_threads, typical_work
    from gradleak.errors import InvalidInput
    from gradleak.papers.reproduce import default_out
    from gradleak.papers.reproduce import reproduce as run
    from gradleak.papers.store import count_measured

    if smoke and full:
        raise InvalidInput("--smoke and --full exclude each other; give one of them, or none for the default scale.")
    scale = "smoke" if smoke else "full" if full else "default"
    out = default_out(paper) if out is None else out
    if jobs == 1:  # side by side, each process has one
        choose_threads(typical_work())
    try:
        done = run(
            paper, only=only, scale=scale, data=data, out=out, jobs=jobs, callback=lambda s: typer.echo(s, err=True)
        )
    except KeyboardInterrupt:
        kept = count_measured(out)
        cases = "1 measured case stays" if kept == 1 else f"{kept:,} measured cases stay"
        said = f"{cases} in {str(out)!r}" if kept else "no case was measured yet"
        typer.echo(f"Interrupted; {said}; run the same command again to go on.", err=True)
        raise typer.Exit(130) from None
    for name, stored in done.results.items():
        for title, text in stored["texts"].items():
            typer.echo(f"\n{name}: {title}\n{text}")
    for sentence in done.drift:
        typer.echo(f"Left its tolerance: {sentence}", err=True)
    for name, reason in done.failures.items():
        typer.echo(f"{name} has no result: {reason}", err=True)
    typer.echo(f"\nTable: {done.page}\nFigures: {done.html}")
    if done.failures:
        raise typer.Exit(1)
