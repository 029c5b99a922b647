"""By which ways processes that SGLang starts get the patches."""

from __future__ import annotations

import os
from pathlib import Path

PLUGIN_GROUP = "sglang.srt.plugins"


def bootstrap_routes() -> list[str]:
    """By which ways a process that SGLang spawns gets the patches: entry point, sitecustomize."""
    from importlib.metadata import entry_points

    routes = []
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    if any(
        entry.value.startswith("gemma4_turbo.") and (not allowed or entry.name in allowed)
        for entry in entry_points(group=PLUGIN_GROUP)
    ):
        routes.append("entry point")
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        candidate = Path(folder or ".", "sitecustomize.py")
        if candidate.is_file():
            if "gemma4_turbo" in candidate.read_text(errors="replace"):
                routes.append("sitecustomize")
            break  # Python runs the first one only
    return routes
