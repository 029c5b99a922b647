"""Tests of one release line run where SGLang of that line is installed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

BASELINE = "0.5.12.post1"
PORTS = Path(__file__).parent / "cpu" / "ports"
LINES = {"v0_5_12": ("0.5.12", "0.5.12.post1"), "v0_5_23": ("0.5.22", "0.5.23")}
"""Folders below ``PORTS``, and the releases that they are for."""


def is_another() -> bool:
    """Whether the installed SGLang is not the first release that was patched."""
    return metadata.version("sglang") != BASELINE


def other_lines() -> dict[Path, tuple[str, ...]]:
    """The folders that the installed SGLang is not for."""
    installed = metadata.version("sglang")
    return {PORTS / name: of for name, of in LINES.items() if installed not in of}
