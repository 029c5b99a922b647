"""``sitecustomize``: the folder that turns the package on where the entry point does not reach."""

from __future__ import annotations

from pathlib import Path

import gemma4_turbo
from gemma4_turbo.cli.modules import CannotRunError

NAME = "sitecustomize_example"


def folder() -> Path:
    """For PYTHONPATH; it may be inside a zip, if the package is. `CannotRunError` if it is not there."""
    where = Path(gemma4_turbo.__file__).resolve().parent / NAME
    archive = next((above for above in where.parents if above.is_file()), None)
    if archive is None and not (where / "sitecustomize.py").is_file():
        raise CannotRunError(f"{where} is not there: install gemma4_turbo again")
    return where


def run() -> int:
    """The command."""
    print(folder())
    return 0
