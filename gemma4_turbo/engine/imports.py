"""SGLang as Python's import system knows it. Nothing here imports it."""

from __future__ import annotations

import functools
import sys
from importlib import metadata

ROOT = "sglang"


def installed_release() -> str | None:
    """Version of the installed SGLang, without importing it."""
    return _release(tuple(sys.path))


@functools.cache
def _release(path: tuple[str, ...]) -> str | None:
    """By where Python looks: SGLang's metadata are long, and every patch asks."""
    try:
        return metadata.version(ROOT)
    except metadata.PackageNotFoundError:
        return None


def being_imported(name: str) -> bool:
    """Whether a module's code is running just now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
