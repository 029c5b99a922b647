"""Tests whose expectations are those of one SGLang release."""

from __future__ import annotations

from importlib import metadata

BASELINE = "0.5.12.post1"
ONLY_THERE = ("bench", "cli/test_commands.py", "models/test_geometry_mm.py", "test_server.py")
"""Below ``tests/cpu``."""


def is_another() -> bool:
    """Whether the installed SGLang is not that release."""
    return metadata.version("sglang") != BASELINE
