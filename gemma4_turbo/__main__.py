"""``gemma4-turbo COMMAND``, or ``python -m gemma4_turbo COMMAND``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    TOLD = "the command line needs typer and rich: pip install typer rich"
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": TOLD}, indent=1))
    print(f"gemma4_turbo: {TOLD}", file=sys.stderr)
    sys.exit(3)  # as CANNOT_RUN

from gemma4_turbo.cli.commands import Command, Commands
from gemma4_turbo.version import __version__

NAMES = {"help_option_names": ["-h", "--help"]}
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
WRONG_VARIABLE = 2
CANNOT_RUN = 3
PIPE_CLOSED = 141  # as of a program that SIGPIPE ends, so that it is no command's verdict

app = typer.Typer(
    name="gemma4-turbo",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=NAMES,
    help=(
        "Runtime accelerator for stock SGLang serving Gemma 4.\n\n"
        "Exit 2 of every command: an option or a variable is wrong. Exit 3: the machine lacks what "
        "the command needs. Exit 141: who read the output has closed the pipe. Each command's --help "
        "has the others. With --json stdout is one object; on failure, which is exit 2, exit 3 or a "
        "traceback on stderr, it has the key error."
    ),
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, also on failure.")]
All = Annotated[bool, typer.Option("--all", help="Everything known of each patch.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gemma4-turbo {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="The version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command(cls=Command)
def doctor(
    as_json: Json = False,
    everything: All = False,
    imported: Annotated[
        bool,
        typer.Option(
            "--import",
            help="Install the patches in this process, which takes a minute, to see what "
            "sources do not tell: wrappers of other packages, modules that cannot be imported.",
        ),
    ] = False,
) -> None:
    """Versions, GPU and every patch: state, reason, numerics.

    Exit 0: all well. Exit 1: a patch that is on drifted, conflicts or failed. Exit 2: a variable has
    a wrong value. Exit 3: nothing can work: SGLang, PyTorch or wrapt cannot be used, or the server's
    processes would stay stock.
    """
    from gemma4_turbo.cli import doctor as command

    _answer(as_json, lambda: command.run(as_json, everything, imported), checked=False)


@app.command(cls=Command)
def verify(as_json: Json = False, everything: All = False) -> None:
    """Run stock and patched side by side and compare.

    Exit 0: all within bounds. Exit 1: a comparison differs. Exit 3: nothing could be compared.
    """
    from gemma4_turbo.cli import verify as command

    _answer(as_json, lambda: command.run(as_json, everything))


@app.command(cls=Command)
def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A model's folder, or one of 26b-a4b, 31b, 12b, e4b, e2b; may be repeated. All "
            "five by default.",
        ),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(
            "--minutes",
            min=0.1,
            max=1440,
            metavar="MINUTES",
            help="Stop so long after the start; the same command goes on.",
        ),
    ] = 5.0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what the profile has already.")
    ] = False,
    share: Annotated[
        bool,
        typer.Option("--share", help="Print the profile, without names and paths, and do no more."),
    ] = False,
) -> None:
    """Measure stock's kernels and ours on this GPU, and write the GPU profile that the patches read.

    Each kernel is compared with stock and with fp32 first, then timed beside stock at the model's shapes.
    The profile says which patches are on here, and with which tiles. It is written after each
    measurement. The GPU must be idle.

    Exit 0: measured, or the time is up. Exit 3: no GPU, a busy one, too little free memory, no Gemma 4,
    another tune, or the profile cannot be written. Exit 130 or 143: interrupted or terminated; what was measured is kept.
    """
    from gemma4_turbo.cli import tune as command

    _answer(False, lambda: command.run(model or (), minutes, fresh, share))


@app.command(
    cls=Command,
    options_metavar="[OPTIONS] --",
    context_settings={"allow_interspersed_args": False},
)
def bisect(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="Exit status 0 passes, others fail.")
    ],
    timeout: Annotated[
        int | None,
        typer.Option("--timeout", min=1, metavar="SECONDS", help="A run that takes longer fails."),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            "--repeat",
            min=1,
            metavar="RUNS",
            help="Runs per set of patches; the set fails if one of them does.",
        ),
    ] = 1,
    as_json: Json = False,
    logs: Annotated[
        Path | None,
        typer.Option(
            "--logs",
            metavar="DIR",
            help="Keep what each run prints in this new folder: run-NN.stdout, run-NN.stderr.",
        ),
    ] = None,
) -> None:
    """Find the patch, or the smallest set of patches, that makes COMMAND fail.

    Run it with every patch off, then with those that the environment asks for,
    then with fewer and fewer of them, each set once: GEMMA4_TURBO_<PATCH>=0 or 1.
    Patches that cannot be active with the SGLang that is installed here take no part.

    No run has a stdin, and no process of its group outlives it. Progress goes to
    stderr. The last line, on stdout, names the culprit and what to set instead.

    Exit 0: culprit found. Exit 1: COMMAND fails without any patch, or passes
    with all. Exit 2: COMMAND cannot be started, a variable or an option is
    wrong, or no patch is on. Exit 130: interrupted.
    """
    from gemma4_turbo.cli import bisect as implementation

    _answer(
        as_json,
        lambda: implementation.run(command, timeout, repeat, as_json, logs),
        failed=2,
        checked=False,
    )


@app.command(cls=Command)
def demo(
    layers: Annotated[
        int,
        typer.Option(
            "--layers", metavar="NUMBER", help="Layers of the model on a GPU, multiple of 6."
        ),
    ] = 6,
    port: Annotated[
        int, typer.Option("--port", metavar="NUMBER", help="HTTP port; 0 takes a free one.")
    ] = 0,
) -> None:
    """The main job on what this machine has.

    With a GPU: the real server, requests over HTTP; every active patch must run. Without: small layers
    of the stock model classes on the CPU, with the patches that can run there.

    Exit 0: it worked. Exit 1: stock and patched differ, or a patch never ran; on the CPU, none did in
    a model. Exit 3: the machine lacks what it needs.
    """
    from gemma4_turbo.cli import demo as command

    _answer(False, lambda: command.run(layers, port))


@app.command(cls=Command, context_settings=PASSED_ON)
def serve(context: typer.Context) -> None:
    """`sglang serve` with the patches on: serve -- --model-path ...

    Starts `python -m sglang.launch_server` with all arguments, and ends with its exit status. Exit 3:
    the server's processes would stay stock, or SGLang is not installed.
    """
    from gemma4_turbo.cli import serve as command

    _answer(False, lambda: command.run(context.args))


@app.command(cls=Command)
def sitecustomize() -> None:
    """Print the folder for PYTHONPATH that turns the patches on without the entry point.

    PYTHONPATH=$(gemma4-turbo sitecustomize) sglang serve ..., or python -m sglang.launch_server ...

    Needed only where gemma4_turbo is not installed with pip, or SGLANG_PLUGINS names other plugins.

    Exit 3: the installation is incomplete. No variable is looked at: the server names wrong ones.
    """
    from gemma4_turbo.cli import sitecustomize as command

    # In $(...) its exit status is lost: the server would stay stock.
    _answer(False, command.run, checked=False)


@app.command(cls=Command)
def record(
    wheels: Annotated[list[Path], typer.Argument(metavar="WHEEL...", help="SGLang's wheels.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to; the package's own by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the fingerprints of SGLang's releases, which the patches are recognised by.

    Exit 0: written. Exit 2: a file is no wheel of SGLang, or cannot be read or written.
    """
    from gemma4_turbo.cli import releases as command

    _answer(as_json, lambda: command.record(wheels, out, as_json), failed=2)


@app.command(cls=Command)
def release(
    wheel: Annotated[Path, typer.Argument(metavar="WHEEL", help="SGLang's wheel.")],
    diff: Annotated[
        str | None, typer.Option("--diff", metavar="PATCH", help="What changed under this patch.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="WHEEL",
            help="With --diff: the older one; else SGLang as installed.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every function.")] = False,
    as_json: Json = False,
) -> None:
    """What each patch needs for a release of SGLang: same, moved, changed, gone.

    Exit 0: nothing. Exit 1: some patches need a port. Exit 2: not a wheel of SGLang, or no patch.
    """
    from gemma4_turbo.cli import releases as command

    _answer(as_json, lambda: command.release(wheel, diff, against, everything, as_json), failed=2)


def _answer(
    as_json: bool, run: Callable[[], int], failed: int = CANNOT_RUN, checked: bool = True
) -> None:
    """Run a command. What the machine lacks is said in one line, without a traceback.

    Args:
        as_json: a failure is told in JSON.
        run: the command; imports what takes long.
        failed: its status where it cannot do its work.
        checked: it does nothing where a variable is wrong; else it reads none, or tells them itself.
    """
    from gemma4_turbo.cli.modules import CannotRunError
    from gemma4_turbo.engine import switches

    told = "; ".join(switches.read().problems) if checked else ""
    status = WRONG_VARIABLE
    try:
        try:
            status = status if told else run()
        except CannotRunError as error:
            told, status = str(error), failed
        except BrokenPipeError:
            raise
        except Exception as error:
            if not as_json:
                raise
            traceback.print_exc()
            told, status = f"{type(error).__name__}: {error}", 1
        if told and as_json:
            print(json.dumps({"error": told}, indent=1))
        elif told:
            print(f"gemma4_turbo: {told}", file=sys.stderr)
        sys.stdout.flush()  # here, where a closed pipe can be told from a verdict
    except BrokenPipeError:  # head and its like have seen enough
        _to_nowhere()
        status = PIPE_CLOSED
    raise typer.Exit(status)


def _to_nowhere() -> None:
    """Nothing is written to a closed pipe once more at exit, where Python would complain of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def main() -> None:
    """The command line."""
    app()


if __name__ == "__main__":
    main()
