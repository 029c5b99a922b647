"""What a patch has counted so far."""

from __future__ import annotations

from typing import NamedTuple

from gemma4_turbo.engine.counters import CAPTURED, DECLINED, ENGAGED
from gemma4_turbo.instance import ENGINE


class Counted(NamedTuple):
    """Calls in this process; `captured` are among `engaged`."""

    engaged: int
    declined: int
    captured: int

    def and_(self, engaged: int = 0, declined: int = 0, captured: int = 0) -> Counted:
        """So many more."""
        return Counted(self.engaged + engaged, self.declined + declined, self.captured + captured)


def counted(patch: str) -> Counted:
    """By the patch's counters."""
    counters = ENGINE.runs[patch].counters
    cells, base = counters.cells, counters._base
    return Counted(*(cells[base + place] for place in (ENGAGED, DECLINED, CAPTURED)))
