"""SGLang as Python's import system knows it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gemma4_turbo.engine.imports import installed_release


def test_another_path_is_another_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Kept by where Python looks: a path that comes first is seen, and so is its end."""
    here = installed_release()
    made = tmp_path / "sglang-9.9.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9\n")
    with monkeypatch.context() as inside:
        inside.setattr(sys, "path", [str(tmp_path), *sys.path])
        assert installed_release() == "9.9"
    assert installed_release() == here
    with monkeypatch.context() as inside:
        inside.setattr(sys, "path", [])
        assert installed_release() is None
