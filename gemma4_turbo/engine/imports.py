"""The package that is patched, as Python's import system knows it. Nothing here imports it."""

from __future__ import annotations

import functools
import sys
from importlib import metadata

root = ""
"""Its name, which whoever has ports gives: `gemma4_turbo.instance`."""


def installed_release() -> str | None:
    """Its installed version, without importing it; None where there is none, and before it has a name."""
    return _release(root, tuple(sys.path)) if root else None


@functools.cache
def _release(package: str, path: tuple[str, ...]) -> str | None:
    """By where Python looks: SGLang's metadata are long, and every patch asks."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def being_imported(name: str) -> bool:
    """Whether a module's code is running just now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
