"""What typer's commands lack: help without ragged lines, JSON for a wrong option, completion of a name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# Newer releases of typer bring a click of their own: what both raise is found by what they export.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
# A shell completes one word, not ``python -m gemma4_turbo``, of which typer makes a broken variable.
SCRIPT = "gemma4-turbo"
COMPLETION = {"--show-completion", "--install-completion"}


def _without_types_of_flags(params: list[Any]) -> list[Any]:
    """``--json``, not ``--json <bool>``."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class Command(TyperCommand):
    """A command whose help is wrapped at the terminal's width alone."""

    def __init__(self, *args: Any, help: str | None = None, **settings: Any) -> None:
        # typer keeps the line ends of all paragraphs but the first, and wraps once more.
        paragraphs = (help or "").split("\n\n")
        joined = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        super().__init__(*args, help=joined, **settings)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


class Commands(TyperGroup):
    """The group of them."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As typer's; a wrong option is told in JSON where that was asked for."""
        given = sys.argv[1:] if args is None else list(args)
        ours = given[: given.index("--")] if "--" in given else given
        if COMPLETION & set(ours):
            prog_name = SCRIPT
        in_json = standalone_mode and "--json" in ours
        settings = (prog_name, complete_var, standalone_mode and not in_json, windows_expand_args)
        if not in_json:
            return super().main(args, *settings, **extra)
        try:
            status = super().main(given, *settings, **extra)
        except _USAGE_ERROR as error:
            error.show()
            print(json.dumps({"error": error.format_message()}, indent=1))
            status = error.exit_code
        except typer.Abort:
            status = 1
        sys.exit(status)
