"""Importing the patches' targets in a process that is no server."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module

from gemma4_turbo.catalogue import CATALOGUE, Patch
from gemma4_turbo.patching import installed_release

NOT_INSTALLED = "SGLang is not installed: pip install 'gemma4-turbo[sglang]'"


class CannotRunError(Exception):
    """Something outside the package is missing; the message says it in one line."""


def import_targets(patches: Iterable[Patch] = CATALOGUE) -> list[str]:
    """Import every module that these patches touch. Returns the problems, one line each.

    SGLang prints while it is imported: that goes to stderr, so that stdout stays the command's.
    """
    if installed_release() is None:
        return [NOT_INSTALLED]
    problems = []
    modules = sorted({module for patch in patches for module in patch.modules})
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            try:
                import_module(module)
            except Exception as error:
                problems.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
    return problems


def require_sglang() -> None:
    """Raise `CannotRunError` if SGLang is not installed. Imports nothing."""
    if installed_release() is None:
        raise CannotRunError(NOT_INSTALLED)


def require_targets() -> None:
    """As `import_targets`, but a problem raises `CannotRunError`."""
    problems = import_targets()
    if problems:
        raise CannotRunError("; ".join(problems))
