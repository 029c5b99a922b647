"""Importing the patches' targets in a process that is no server."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from gemma4_turbo.engine import fingerprints
from gemma4_turbo.engine.imports import installed_release
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.instance import ENGINE

if TYPE_CHECKING:
    from gemma4_turbo.cli.report import Progress

NOT_INSTALLED = (
    "SGLang is not installed: pip install '.[sglang]' in a checkout of gemma4_turbo, or "
    "'FILE.whl[sglang]' with its wheel"
)


class CannotRunError(Exception):
    """Something outside the package is missing; the message says it in one line."""


def import_targets(
    names: Iterable[str] | None = None, progress: Progress | None = None
) -> list[str]:
    """Import every module that these patches, by name, or all touch: the problems, one line each.

    Those of ports whose modules SGLang has: of no other release line's.

    SGLang prints while it is imported: that goes to stderr, so that stdout stays the command's.
    """
    if installed_release() is None:
        return [NOT_INSTALLED]
    problems = []
    chosen = ENGINE.runs if names is None else names
    source_of = functools.cache(fingerprints.installed_source)  # patches share modules
    modules = sorted(
        {module for name in chosen for module in _modules(ENGINE.runs[name], source_of)}
    )
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, module in enumerate(modules, 1):
            if progress is not None:
                progress.detail(f"importing {module} ({number} of {len(modules)})")
            try:
                import_module(module)
            except Exception as error:
                problems.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
    ENGINE.give_up_waiting()  # what another line alone has is waited for in vain
    return problems


def _modules(run: PatchRun, source_of: fingerprints.SourceOf) -> Iterable[str]:
    ports = [port for port in run.ports if fingerprints.any_there([port], source_of)]
    return [module for port in ports for module in port.modules]


def require_sglang() -> None:
    """Raise `CannotRunError` if SGLang is not installed. Imports nothing."""
    if installed_release() is None:
        raise CannotRunError(NOT_INSTALLED)


def require_targets(
    progress: Progress | None = None, *, names: Iterable[str] | None = None
) -> None:
    """As `import_targets`, but a problem raises `CannotRunError`."""
    problems = import_targets(names, progress)
    if problems:
        raise CannotRunError("; ".join(problems))
