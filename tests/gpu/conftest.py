"""These tests need a CUDA device; on any other machine they are not collected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the folder out without a GPU, and say so once."""
    return None if torch.cuda.is_available() else True
