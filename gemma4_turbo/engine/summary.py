"""The state of the patches in one line for the server's log."""

from __future__ import annotations

from collections.abc import Sequence

from gemma4_turbo.catalogue import DEFECTS
from gemma4_turbo.engine import states
from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.version import __version__

_DEFECTS = frozenset(patch.name for patch in DEFECTS)


def summary_line(rows: Sequence[PatchStatus]) -> str:
    """One line for the server's log: which patches are installed, which stand aside and why."""
    active = [row.name for row in rows if row.state == states.ACTIVE]
    absent = [row.name for row in rows if is_absent(row.name, row.state, row.engaged)]
    alone = ""
    aside: dict[tuple[str, str], list[str]] = {}  # a reason is told once, not forty times
    for row in rows:
        reason, note, why = row.reason.partition(f"; {states.ALONE}: ")
        alone = alone or note.removeprefix("; ") + why  # the same for all of them
        if row.state != states.ACTIVE and row.name not in absent:
            aside.setdefault((row.state, reason), []).append(row.name)
    parts = [f"gemma4_turbo {__version__}: installed: {', '.join(active) or 'none'}"]
    if aside:
        told = (f"{', '.join(names)} {state} ({why})" for (state, why), names in aside.items())
        parts.append(f"standing aside: {'; '.join(told)}")
    if absent:
        parts.append(f"{looked_for(len(absent))}: none found ({', '.join(absent)})")
    if alone:
        parts.append(alone)
    return "; ".join(parts)


def is_absent(name: str, state: str, engaged: int) -> bool:
    """Whether this is a defect that was looked for in vain, which needs no row."""
    return name in _DEFECTS and state == states.UPSTREAMED and not engaged


def looked_for(count: int) -> str:
    """So many defects."""
    return f"{count} defect{'' if count == 1 else 's'} looked for"
