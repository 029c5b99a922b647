"""Runs of patches that no engine knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gemma4_turbo.catalogue import CATALOGUE, by_name
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.instance import PORTS


def unpublished(name: str) -> PatchRun:
    """Of a patch of the catalogue; other processes are told nothing."""
    host: Any = SimpleNamespace(publish=lambda: None)
    index = [patch.name for patch in CATALOGUE].index(name)
    return PatchRun(by_name(name), tuple(PORTS[name]), index, host)
