"""The command line: ``gradleak demo``, ``attack``, ``inspect``, ``audit``, ``report``, ``list``, ``reproduce``.

This module imports neither torch nor the packages that do: ``gradleak --help`` answers at once, and each command
imports what it needs. A new command is a function here (or in a file of its own) and one line under "commands".
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gradleak.cli import values
from gradleak.errors import GradleakError, InvalidInput, clean, is_memory

__all__ = ["main"]

app = typer.Typer(
    name="gradleak",
    help="What a shared gradient gives away: reconstruct private training data from federated-learning updates.",
    epilog="Audit your own federation, teach, do research; never attack data that you have no right to see.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# typer brings its own copy of click from some version on, so the base class is found through what typer exports.
_USAGE: type[Exception] = typer.BadParameter
_CLICK: tuple[type[Exception], ...] = tuple(c for c in _USAGE.__mro__ if c.__name__ == "ClickException")


def _option(parser: Callable[..., Any] | None, metavar: str | None, text: str, *names: str, **limits: int) -> Any:
    """Return an option whose text ``parser`` reads (typer's own if None), as ``metavar`` in the help."""
    return typer.Option(*names, parser=parser, metavar=metavar, help=text, **limits)  # type: ignore[call-overload]


Out = Annotated[
    Path, _option(values.folder, "PATH", "Folder for result.json, reconstruction.safetensors, report.html.", "--out")
]
Seed = Annotated[int, _option(None, None, "Seed of the attack.", "--seed", min=0, max=2**62)]
Number = float | None
Numbers = values.Numbers | None
Texts = list[str] | None


def demo(
    out: Out = Path("gradleak-demo"),
    seed: Seed = 0,
    image: Annotated[Path | None, typer.Option("--image", help="A picture of your own instead of the cat.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Messages out of a language model (extra 'text').")] = False,
) -> None:
    """Leak a real photograph from one gradient of a LeNet, on this machine, in under a minute; or four messages."""
    if text:
        from gradleak.cli.demo_text import prepare

        if image is not None:
            raise InvalidInput("--text and --image are two demonstrations; give one of them.")
        raise typer.Exit(_run([*prepare(out.absolute(), seed), "--seed", str(seed)]))
    from gradleak.cli.demo import demo as run

    raise typer.Exit(run(out, seed, image, _command()))


def attack(
    context: typer.Context,
    out: Out,
    capture: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CAPTURE]", help="Folder of a capture, whose manifest states what the options here do not."
        ),
    ] = None,
    round: Annotated[int | None, typer.Option(min=0, help="Of the capture: the round to attack.")] = None,
    client: Annotated[str | None, typer.Option(help="Of the capture: the client to attack.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model of gradleak's, module:factory from your own code, or hf:DIR.")
    ] = None,
    update: Annotated[Path | None, typer.Option(help="The captured update (.safetensors), by parameter name.")] = None,
    input_shape: Annotated[
        values.Shape | None, _option(values.shape, "C,H,W", "Shape of one input, such as 3,32,32.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="The inputs are rows of a table, which this schema (.json) describes.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Of hf:DIR: causal, masked, classification or token-classification (by its class)."),
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="Of hf:DIR: folder of the LoRA adapter that is trained.")] = None,
    model_arg: Annotated[Texts, _option(None, "KEY=VALUE", "An argument of the model (may be repeated).")] = None,
    weights: Annotated[Path | None, typer.Option(help="The weights that were sent out (.safetensors).")] = None,
    classes: Annotated[int | None, typer.Option(min=1, max=10**7, help="Number of classes.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**7, help="Number of examples behind the update; read off it where that is possible."
        ),
    ] = None,
    input_kind: Annotated[
        str,
        _option(
            values.word("auto", "image", "tensor"),
            "KIND",
            "image (values in [0, 1]) or tensor (any numbers); auto takes C,H,W for an image.",
        ),
    ] = "auto",
    mean: Annotated[Numbers, _option(values.numbers, "M,M,M", "Mean the model's inputs are reduced by.")] = None,
    std: Annotated[Numbers, _option(values.numbers, "S,S,S", "What they are divided by.")] = None,
    mode: Annotated[
        str,
        _option(
            values.word("as-is", "eval", "train", "batch"),
            "MODE",
            "The client's model mode: as-is, eval, train or batch (BatchNorm).",
        ),
    ] = "as-is",
    kind: Annotated[
        str,
        _option(
            values.word("gradient", "weight_delta"),
            "KIND",
            "gradient, or weight_delta (after minus before; needs --lr).",
        ),
    ] = "gradient",
    loss: Annotated[
        str | None,
        typer.Option(help="The client's loss: cross-entropy, bce, mse or module:callable (by the number of outputs)."),
    ] = None,
    reduction: Annotated[
        str, _option(values.word("mean", "sum"), "NAME", "The client's loss over examples: mean or sum.")
    ] = "mean",
    label_smoothing: Annotated[Number, _option(values.finite, "S", "The client's label smoothing, in [0, 1).")] = None,
    class_weights: Annotated[
        Numbers, _option(values.numbers, "W,W,…", "The client's loss weights, one for each class.")
    ] = None,
    lr: Annotated[Number, _option(values.positive, "LR", "Learning rate of the client, for a weight delta.")] = None,
    optimizer: Annotated[
        str | None, _option(values.word("sgd", "adam", "adamw"), "NAME", "The client's optimizer: sgd, adam, adamw.")
    ] = None,
    momentum: Annotated[Number, _option(values.finite, "M", "Momentum of the client's SGD.")] = None,
    weight_decay: Annotated[Number, _option(values.finite, "D", "Weight decay of the client's optimizer.")] = None,
    local_epochs: Annotated[int | None, typer.Option(min=1, help="The client's passes over its batch (1).")] = None,
    local_batch_size: Annotated[int | None, typer.Option(min=1, help="The client's examples per step (all).")] = None,
    local_steps: Annotated[
        int | None, typer.Option(min=1, help="The client's number of steps, instead of passes.")
    ] = None,
    defense: Annotated[
        Texts,
        _option(
            None,
            "NAME[:K=V,…]",
            "What the client does to its update: one of `gradleak list defenses` (may be repeated, in order).",
        ),
    ] = None,
    attack: Annotated[str, typer.Option(help="One of `gradleak list attacks`, or module:factory.")] = "auto",
    attack_option: Annotated[Texts, _option(None, "KEY=VALUE", "An option of the attack (may be repeated).")] = None,
    labels: Annotated[
        Numbers, _option(values.numbers, "K,K,…", "Labels the attacker is told: classes, or targets.")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="Private data to score against (.npz, .safetensors, picture; a table: .csv; text: .txt)."),
    ] = None,
    data: Annotated[
        str | None,
        _option(None, "SPEC", "Public data for the null guesses: images (.npz, folder, dataset) or rows (.csv)."),
    ] = None,
    seed: Seed = 0,
    budget: Annotated[Number, _option(values.seconds, "TIME", "Time limit such as 90s or 2m.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str,
        _option(
            values.word("as-is", "float32", "float64"),
            "TYPE",
            "Number type of model and update: as-is, float32, float64.",
        ),
    ] = "as-is",
) -> None:
    """Reconstruct the private batch behind a captured update; no ground truth is needed."""
    asked = dict(locals())  # the options by name, each parsed by itself
    from gradleak.cli.attack import attack as run
    from gradleak.cli.captures import completed

    raise typer.Exit(run(**completed(asked), command=_command()))


def inspect(context: typer.Context, out: Path | None, json: bool, **asked: Any) -> None:
    """Tell in seconds what an update gives away: which layers, how many examples, which way applies, what to expect.

    Takes the options of `gradleak attack`; those that say how to attack are not needed, --budget is the time (10s).
    """
    from gradleak.cli.captures import completed
    from gradleak.cli.inspect import inspect as run

    run(out, json, completed({"context": context, **asked}), _command())


def _options_of(command: Callable[..., Any], **more: Any) -> tuple[Signature, dict[str, Any]]:
    """Return signature and annotations of ``command``, with ``more`` options, or others in place of its own."""
    shown = signature(command, eval_str=True)
    options = [Parameter(k, Parameter.KEYWORD_ONLY, default=d, annotation=a) for k, (a, d) in more.items()]
    kept = [p.replace(kind=Parameter.KEYWORD_ONLY) for k, p in shown.parameters.items() if k not in more]
    return Signature([*kept, *options]), {p.name: p.annotation for p in (*kept, *options)}


inspect.__signature__, inspect.__annotations__ = _options_of(  # type: ignore[attr-defined]
    attack,
    out=(Annotated[Path | None, _option(values.folder, "PATH", "Folder for inspection.json.", "--out")], None),
    json=(Annotated[bool, typer.Option("--json", help="Print JSON.")], False),
)


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that attack or demo wrote.")],
) -> None:
    """Render report.html anew from the files in DIR."""
    from gradleak.audit.folder import REPORT, read_folder, write_report
    from gradleak.report import picture, render

    directory = directory.absolute()
    folder = read_folder(directory)
    pictures = picture(folder.record, folder.inputs, folder.truth, folder.snapshots)
    write_report(directory, render(folder.record, pictures))
    typer.echo(f"Report: {directory / REPORT}")


def audit(
    plan: Annotated[
        Path,
        typer.Argument(metavar="PLAN", help="A plan in TOML, as docs/audit.md describes it, or a capture's folder."),
    ],
    out: Annotated[Path, _option(values.folder, "PATH", "Folder for the evidence and the trials.", "--out")],
    data: Annotated[Path | None, typer.Option(help="Folder of named data sets, in place of the plan's own.")] = None,
    fail_above: Annotated[
        Number, _option(values.share, "SHARE", "Exit with code 1 where a larger share came back, such as 0.05.")
    ] = None,
    executor: Annotated[
        str, _option(values.word("here", "processes", "ray"), "WHERE", "Where trials run: here, processes or ray.")
    ] = "here",
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster, such as auto or HOST:PORT.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure failed trials again.")] = False,
) -> None:
    """Say what a federation as it ships gives away, what nobody can get, and what its filters cost."""
    from gradleak.cli.audit import audit as run

    options = {"data": data, "fail_above": fail_above, "executor": executor, "jobs": jobs, "address": address}
    try:
        code = run(plan, out, **options, retry_failed=retry_failed, command=_command())
    except KeyboardInterrupt:
        typer.echo("Interrupted; what was measured stays: run the same command again to go on.", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def list_names(
    kind: Annotated[str | None, typer.Argument(help="attacks, models, metrics or defenses; all if left out.")] = None,
) -> None:
    """List what there is, by name, with one line each."""
    from gradleak.cli.names import list_names as run

    run(kind)


def reproduce(
    paper: Annotated[str, typer.Argument(help="Folder name of the paper, such as 2019_zhu_dlg.")],
    only: Annotated[Texts, typer.Option(help="Run this experiment only (may be repeated).")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Seconds per experiment, to see that all of it runs.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The paper's scale; wants a GPU.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder laid out as docs/data.md says.")] = None,
    out: Annotated[Path | None, _option(values.folder, "PATH", "Folder for what is measured (runs/PAPER).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that measure side by side.")] = 1,
) -> None:
    """Run the experiments of a paper and set its numbers beside ours."""
    from gradleak.audit.store import count_measured
    from gradleak.cli.threads import choose_threads, typical_work
    from gradleak.papers.reproduce import default_out
    from gradleak.papers.reproduce import reproduce as run

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


class _Command(TyperCommand):
    """A command whose help is plain text: typer escapes brackets where rich is installed, and nothing renders them."""

    def get_help(self, ctx: Any) -> str:
        return super().get_help(ctx).replace("\\[", "[")


_CODES = (
    "Exit codes: 0 a result, whatever its verdict; 2 bad input, nothing written; 3 the attack does not apply or is not "
    "told what it needs, recorded; 130, 143, 129 interrupted (Ctrl-C, SIGTERM, SIGHUP), best so far written; 141 the "
    "reader of a pipe has gone."
)
_AUDIT_CODES = (
    "Exit codes: 0 the evidence is written; 1 a target is missed, or was not measured in full; 2 the plan cannot run, "
    "nothing was tried; 130 interrupted, what was measured stays."
)

# Commands, in the order of `gradleak --help`.
app.command(cls=_Command)(demo)
app.command(cls=_Command, epilog=_CODES)(attack)
app.command(cls=_Command, epilog=_AUDIT_CODES)(audit)
app.command(cls=_Command)(inspect)
app.command(cls=_Command)(report)
app.command("list", cls=_Command)(list_names)
app.command(cls=_Command)(reproduce)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        import gradleak

        typer.echo(f"gradleak {gradleak.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line; every expected failure is one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a mark in its place: that is no reason to lose a result.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code = _run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _no_reader()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        # Invoked without click's own main(), which would swallow Ctrl-C and print usage errors in its own way.
        with command.make_context("gradleak", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return int(ended.exit_code)
    except GradleakError as error:
        return _fail(str(error))
    except _CLICK as error:
        return _fail(f"{_sentence(error)} See gradleak {_subcommand(arguments)}--help.")
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("Interrupted; nothing was written.", err=True)
        return 130
    except BrokenPipeError:
        return _no_reader()
    except OSError as error:
        where = f" {error.filename!r}" if error.filename is not None else ""
        return _fail(f"The system refused to go on{where}: {error.strerror or error}; mend that and run again.")
    except (MemoryError, RuntimeError) as error:
        if is_memory(error):
            return _fail("The run does not fit in memory; take a smaller batch, fewer restarts or float32.")
        raise
    return 0


def command_of(name: str) -> Any:
    """Return one command, with which words are read as on the command line."""
    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def _no_reader() -> int:
    """The reader of a pipe has gone; the interpreter must not stumble over its own last flush either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _fail(sentence: str) -> int:
    typer.echo(f"gradleak: {clean(' '.join(sentence.split()))}", err=True)
    return 2


def _sentence(error: Exception) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = " ".join(str(message).split())
    return message if message.endswith((".", "?", "!")) else f"{message}."


def _subcommand(arguments: list[str]) -> str:
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return f"{arguments[0]} " if arguments and arguments[0] in names else ""


def _command() -> str:
    import shlex

    return clean(shlex.join(["gradleak", *sys.argv[1:]]), 10_000)
