"""A release line's tests run where SGLang of that line is installed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINES = {"v0_5_12": ("0.5.12", "0.5.12.post1"), "v0_5_23": ("0.5.22", "0.5.23")}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the other lines' folders out."""
    if collection_path.parent != HERE or collection_path.name not in LINES:
        return None
    return importlib.metadata.version("sglang") not in LINES[collection_path.name] or None
