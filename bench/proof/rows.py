"""What became of each patched server, and its tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from bench.common.servers import console
from bench.proof.comparing import Comparison
from bench.proof.doctor import by_state, reasons

REASONS = 14  # lines of reasons in a table


@dataclass
class Row:
    """What became of one patched server."""

    scenario: str
    run: str
    alone: Comparison | None = None
    together: Comparison | None = None
    itself: Comparison | None = None  # stock's answers, asked twice
    patches: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # any: FAIL
    notes: list[str] = field(default_factory=list)
    not_shown: bool = False  # stock does not start

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or that there is nothing to compare with."""
        if self.problems:
            return "FAIL"
        return "NOT SHOWN" if self.not_shown else "PASS"


def tell(row: Row) -> None:
    """A scenario's table."""
    grid = Table(title=f"{row.scenario}, {row.run}: {row.verdict}", title_justify="left")
    grid.add_column("what")
    grid.add_column("seen", overflow="fold")
    for name, found in (("one at a time", row.alone), ("together", row.together)):
        if found:
            grid.add_row(f"tokens equal, {name}", str(found))
            told = f"{found.distance:.2e} nats at most, {found.mean:.2e} on average"
            grid.add_row("distance of logprobs", told)
    if row.itself:
        told = "bit for bit" if row.itself.bits else str(row.itself)
        grid.add_row("stock asked again", told)
    if row.patches:
        grid.add_row("patches", by_state(row.patches))
        engaged = [f"{p['name']} {p['engaged']}" for p in row.patches if p["engaged"]]
        grid.add_row("engaged", ", ".join(engaged) or "none")
        grid.add_row("aside", "\n".join(reasons(row.patches)[:REASONS]) or "none")
    for heading, lines in (("note", row.notes), ("PROBLEM", row.problems)):
        for line in lines:
            grid.add_row(heading, line)
    console.print(grid, markup=False)


def summary(rows: list[Row]) -> Table:
    """The last table."""
    grid = Table(title="Stock against patched", title_justify="left")
    for heading in ("scenario", "tokens equal", "together", "distance", "patches", "engaged", ""):
        grid.add_column(heading, overflow="fold")
    for row in rows:
        both = [found for found in (row.alone, row.together) if found]
        grid.add_row(
            f"{row.scenario}, {row.run}",
            str(row.alone or "-"),
            str(row.together or "-"),
            f"{max(found.distance for found in both):.1e}" if both else "-",
            by_state(row.patches),
            str(sum(patch["engaged"] for patch in row.patches)),
            row.verdict,
        )
    return grid
