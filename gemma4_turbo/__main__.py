"""``python -m gemma4_turbo doctor | verify | bisect | demo | serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit("gemma4_turbo: the command line needs typer and rich: pip install typer rich")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Runtime accelerator for stock SGLang serving Gemma 4.",
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, GPU and every patch: switch, state, reason, numerics.

    Exit 2: a variable has a wrong value. Exit 1: a patch that is on drifted, conflicts or failed.
    """
    from gemma4_turbo.cli import doctor as command

    raise typer.Exit(command.run(as_json))


@app.command()
def verify(as_json: Json = False) -> None:
    """Run stock and patched side by side and compare. Exit 1 on any mismatch."""
    from gemma4_turbo.cli import verify as command

    raise typer.Exit(command.run(as_json))


@app.command(context_settings={"allow_interspersed_args": False})
def bisect(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="Exit status 0 passes, others fail.")
    ],
    timeout: Annotated[
        int | None, typer.Option(min=1, metavar="SECONDS", help="A run that takes longer fails.")
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="Runs per set of patches; the set fails if one of them does.")
    ] = 1,
    as_json: Json = False,
    logs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep what each run prints: run-NN.stdout, run-NN.stderr."
        ),
    ] = None,
) -> None:
    """Find the patch, or the smallest set of patches, that makes COMMAND fail.

    Run it with every patch off, then with those that the environment asks for,
    then with fewer and fewer of them, each set once: GEMMA4_TURBO_<PATCH>=0 or 1.

    No run has a stdin, and no process of its group outlives it. Progress goes to
    stderr. The last line, on stdout, names the culprit and what to set instead.

    Exit 0: culprit found. Exit 1: COMMAND fails without any patch, or passes
    with all. Exit 2: COMMAND cannot be started, a variable or an option is
    wrong, or no patch is on. Exit 130: interrupted.
    """
    from gemma4_turbo.cli import bisect as implementation

    raise typer.Exit(implementation.run(command, timeout, repeat, as_json, logs))


@app.command()
def demo(
    layers: Annotated[int, typer.Option(help="Layers of the model on a GPU, multiple of 6.")] = 6,
    port: Annotated[int, typer.Option(help="HTTP port; 0 takes a free one.")] = 0,
) -> None:
    """The main job on what this machine has.

    With a GPU: the real server, requests over HTTP. Without: the stock model classes on the CPU.
    """
    from gemma4_turbo.cli import demo as command

    raise typer.Exit(command.run(layers, port))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """sglang.launch_server with the patches on: serve -- --model-path ..."""
    from gemma4_turbo.cli import serve as command

    raise typer.Exit(command.run(context.args))


def main() -> None:
    """The command line. What the machine lacks is said in one line, without a traceback."""
    from gemma4_turbo.cli.modules import CannotRunError

    try:
        app()
    except CannotRunError as error:
        sys.exit(f"gemma4_turbo: {error}")


if __name__ == "__main__":
    main()
