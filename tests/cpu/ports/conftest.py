"""A release line's tests run where SGLang of that line is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import releases


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the other lines' folders out."""
    return collection_path in releases.other_lines() or None
