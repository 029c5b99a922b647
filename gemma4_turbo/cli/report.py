"""The state of the patches as a log line, a table and JSON."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from gemma4_turbo import __version__
from gemma4_turbo.catalogue import CATALOGUE, by_name
from gemma4_turbo.engine.states import PatchStatus

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def versions() -> dict[str, str | None]:
    """Versions of everything that decides what the patches do; None where not installed."""
    found: dict[str, str | None] = {
        "gemma4_turbo": __version__,
        "python": platform.python_version(),
    }
    for package in ("sglang", "torch", "triton", "wrapt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            module = sys.modules.get(package)
            found[package] = getattr(module, "__version__", None)
    return found


def device() -> str | None:
    """The first GPU by name, None without one. Imports torch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def as_records(rows: Sequence[PatchStatus]) -> list[dict[str, Any]]:
    """One JSON-ready object per patch."""
    records = []
    for row in rows:
        patch = by_name(row.name)
        records.append(
            {
                "name": row.name,
                "summary": patch.summary,
                "env": patch.env,
                "default": "on" if patch.default else "off",
                "state": row.state,
                "reason": row.reason,
                "numerics": patch.numerics,
                "targets": list(row.targets),
                "engaged": row.engaged,
                "origin": patch.origin,
            }
        )
    return records


def plain(text: object, style: str = "") -> Text:
    """For the terminal as it is: what comes from data may hold brackets, colons, half characters."""
    from rich.text import Text

    return Text(str(text).encode(errors="backslashreplace").decode(), style)


def table(rows: Sequence[PatchStatus | dict[str, Any]], title: str = "Patches") -> Table:
    """The rows as a table for the terminal: `PatchStatus`, or records that hold the same."""
    from rich.table import Table

    grid = Table(title=plain(title), title_justify="left")
    for heading in ("patch", "switch", "state", "engaged", "numerics", "reason"):
        grid.add_column(heading, overflow="fold")
    for row in rows:
        record = row if isinstance(row, dict) else row._asdict()
        patch = next((p for p in CATALOGUE if p.name == record["name"]), None)
        engaged = str(record["engaged"])
        if record.get("captured"):
            engaged += f" ({record['captured']} into CUDA graphs)"
        cells = (
            record["name"],
            patch.env if patch else "?",  # a server that runs another version of this package
            record["state"],
            engaged,
            patch.numerics if patch else "?",
            record["reason"],
        )
        grid.add_row(*map(plain, cells))
    return grid
