"""The command line: ``gradleak demo``, ``attack``, ``report``, ``list``, ``reproduce``.

This module imports neither torch nor the packages that do: ``gradleak --help`` answers at once, and each command
imports what it needs. A new command is a function here (or in a file of its own) and one line under "commands".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gradleak.cli.reproduce import read_folder_name, reproduce
from gradleak.errors import GradleakError

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

Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="PATH",
        parser=read_folder_name,
        help="Folder for result.json, reconstruction.safetensors, report.html.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the attack.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]


def demo(
    out: Out = Path("gradleak-demo"),
    seed: Seed = 0,
    image: Annotated[Path | None, typer.Option("--image", help="A picture of your own instead of the cat.")] = None,
) -> None:
    """Leak a real photograph from one gradient of a LeNet, on this machine, in under a minute."""
    from gradleak.cli import attack as cli_attack

    cli_attack.demo(out, seed, image, _command())


def attack(
    model: Annotated[str, typer.Option(help="A model of gradleak's, or module:factory from your own code.")],
    update: Annotated[Path, typer.Option(help="The captured update (.safetensors), by parameter name.")],
    input_shape: Annotated[str, typer.Option(metavar="C,H,W", help="Shape of one input, such as 3,32,32.")],
    out: Out,
    weights: Annotated[Path | None, typer.Option(help="The weights that were sent out (.safetensors).")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of examples behind the update.")] = 1,
    attack: Annotated[str, typer.Option(help="One of `gradleak list attacks`.")] = "auto",
    attack_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the attack (may be repeated).")
    ] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument of the model (may be repeated).")
    ] = None,
    mean: Annotated[str | None, typer.Option(metavar="M,M,M", help="Mean the model's inputs are reduced by.")] = None,
    std: Annotated[str | None, typer.Option(metavar="S,S,S", help="What they are divided by.")] = None,
    kind: Annotated[str, typer.Option(help="gradient, or weight_delta (after minus before; needs --lr).")] = "gradient",
    lr: Annotated[float | None, typer.Option(help="Learning rate of the client's SGD, for a weight delta.")] = None,
    local_epochs: Annotated[int, typer.Option(min=1, help="The client's passes over its batch.")] = 1,
    local_batch_size: Annotated[int | None, typer.Option(min=1, help="The client's examples per step (all).")] = None,
    mode: Annotated[
        str, typer.Option(help="The client's model mode: as-is, eval, train or batch (BatchNorm).")
    ] = "as-is",
    reduction: Annotated[str, typer.Option(help="The client's loss over examples: mean or sum.")] = "mean",
    label_smoothing: Annotated[float, typer.Option(help="The client's label smoothing, in [0, 1).")] = 0.0,
    labels: Annotated[str | None, typer.Option(metavar="K,K,…", help="Classes the attacker is told.")] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Private data to score against (.npz, .safetensors or a picture).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Public images for the null guesses: .npz, folder or dataset.")
    ] = None,
    seed: Seed = 0,
    budget: Annotated[str | None, typer.Option(metavar="TIME", help="Time limit such as 90s or 2m.")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Number type of model and update: as-is, float32, float64.")] = "as-is",
) -> None:
    """Reconstruct the private batch behind a captured update; no ground truth is needed."""
    from gradleak.cli import attack as cli_attack

    cli_attack.attack(
        cli_attack.Request(
            model=model,
            model_args=tuple(model_arg or ()),
            weights=weights,
            update=update,
            input_shape=input_shape,
            classes=classes,
            batch_size=batch_size,
            attack=attack,
            attack_options=tuple(attack_option or ()),
            mean=mean,
            std=std,
            kind=kind,
            lr=lr,
            local_epochs=local_epochs,
            local_batch_size=local_batch_size,
            mode=mode,
            reduction=reduction,
            label_smoothing=label_smoothing,
            labels=labels,
            truth=truth,
            data=data,
            seed=seed,
            budget=budget,
            device=device,
            dtype=dtype,
            out=out,
            command=_command(),
        )
    )


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that attack or demo wrote.")],
) -> None:
    """Render report.html anew from the files in DIR."""
    from gradleak.audit.folder import REPORT, read_folder, write_files
    from gradleak.report import picture, render

    directory = directory.absolute()
    folder = read_folder(directory)
    pictures = picture(folder.record, folder.inputs, folder.truth, folder.snapshots)
    write_files(directory, {REPORT: render(folder.record, pictures).encode()})
    typer.echo(f"Report: {directory / REPORT}")


def list_names(
    kind: Annotated[str | None, typer.Argument(help="attacks, models, metrics or defenses; all if left out.")] = None,
) -> None:
    """List what there is, by name, with one line each."""
    from gradleak.cli import attack as cli_attack

    cli_attack.list_names(kind)


class _Command(TyperCommand):
    """A command whose help is plain text: typer escapes brackets where rich is installed, and nothing renders them."""

    def get_help(self, ctx: Any) -> str:
        return super().get_help(ctx).replace("\\[", "[")


# Commands, in the order of `gradleak --help`.
app.command(cls=_Command)(demo)
app.command(cls=_Command)(attack)
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
    sys.exit(_run(sys.argv[1:]))


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
        # The reader of a pipe has gone; the interpreter must not stumble over its own last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return _fail("The run does not fit in memory; take a smaller batch, fewer restarts or float32.")
    except OSError as error:
        where = f" {error.filename!r}" if error.filename is not None else ""
        return _fail(f"The system refused to go on{where}: {error.strerror or error}; mend that and run again.")
    return 0


def _fail(sentence: str) -> int:
    typer.echo(f"gradleak: {' '.join(sentence.split())}", err=True)
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

    return shlex.join(["gradleak", *sys.argv[1:]])
