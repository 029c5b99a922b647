"""``python -m gemma4_turbo doctor | verify | demo | serve``."""

from __future__ import annotations

import sys
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
    from gemma4_turbo.commands import doctor as command

    raise typer.Exit(command.run(as_json))


@app.command()
def verify(as_json: Json = False) -> None:
    """Run stock and patched side by side and compare. Exit 1 on any mismatch."""
    from gemma4_turbo.commands import verify as command

    raise typer.Exit(command.run(as_json))


@app.command()
def demo(
    layers: Annotated[int, typer.Option(help="Layers of the model on a GPU, multiple of 6.")] = 6,
    port: Annotated[int, typer.Option(help="HTTP port; 0 takes a free one.")] = 0,
) -> None:
    """The main job on what this machine has.

    With a GPU: the real server, requests over HTTP. Without: the stock model classes on the CPU.
    """
    from gemma4_turbo.commands import demo as command

    raise typer.Exit(command.run(layers, port))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """sglang.launch_server with the patches on: serve -- --model-path ..."""
    from gemma4_turbo.commands import serve as command

    raise typer.Exit(command.run(context.args))


def main() -> None:
    """The command line. What the machine lacks is said in one line, without a traceback."""
    from gemma4_turbo.commands.modules import CannotRunError

    try:
        app()
    except CannotRunError as error:
        sys.exit(f"gemma4_turbo: {error}")


if __name__ == "__main__":
    main()
