"""The state of the patches in one line for the server's log."""

from __future__ import annotations

from collections.abc import Sequence

from gemma4_turbo.engine import states
from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.version import __version__


def summary_line(rows: Sequence[PatchStatus]) -> str:
    """One line for the server's log: which patches are installed, which stand aside and why."""
    active = [row.name for row in rows if row.state == states.ACTIVE]
    alone = ""
    aside: dict[tuple[str, str], list[str]] = {}  # a reason is told once, not forty times
    for row in rows:
        reason, note, why = row.reason.partition(f"; {states.ALONE}: ")
        alone = alone or note.removeprefix("; ") + why  # the same for all of them
        if row.state != states.ACTIVE:
            aside.setdefault((row.state, reason), []).append(row.name)
    parts = [f"gemma4_turbo {__version__}: installed: {', '.join(active) or 'none'}"]
    if aside:
        told = (f"{', '.join(names)} {state} ({why})" for (state, why), names in aside.items())
        parts.append(f"standing aside: {'; '.join(told)}")
    if alone:
        parts.append(alone)
    return "; ".join(parts)
