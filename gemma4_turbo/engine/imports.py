"""SGLang as Python's import system knows it. Nothing here imports it."""

from __future__ import annotations

import sys
from importlib import metadata

ROOT = "sglang"


def installed_release() -> str | None:
    """Version of the installed SGLang, without importing it."""
    try:
        return metadata.version(ROOT)
    except metadata.PackageNotFoundError:
        return None


def being_imported(name: str) -> bool:
    """Whether a module's code is running just now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
