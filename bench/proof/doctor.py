"""What ``gemma4_turbo doctor`` says of a server, read over its processes."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any


def merged(servers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each patch over a server's processes: of that which has most to say of it."""
    rows: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for process in servers:
        for row in process["patches"]:
            weight = (
                row["state"] == "failed",
                row["engaged"],
                "scheduler" in process["command"],
                row["state"] == "active",
            )
            if row["name"] not in rows or weight > rows[row["name"]][0]:
                rows[row["name"]] = (weight, row)
    return [row for _, row in rows.values()]


def by_state(rows: list[dict[str, Any]]) -> str:
    """``active 20, off 3``: how many patches are in each state."""
    counts = Counter(row["state"] for row in rows)
    return ", ".join(f"{state} {count}" for state, count in counts.most_common()) or "none"


def reasons(rows: list[dict[str, Any]], width: int = 110) -> list[str]:
    """Why patches stand aside, those with one reason together."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["state"] != "active":
            names.setdefault((row["state"], row["reason"]), []).append(row["name"])
    lines = []
    for (state, reason), who in names.items():
        them = ", ".join(who) if len(who) < 4 else f"{len(who)} patches"
        short = " ".join(reason.split())
        lines.append(
            f"{state}: {them}: {short if len(short) <= width else short[: width - 3] + '...'}"
        )
    return lines


def not_aside(rows: list[dict[str, Any]], architecture: str) -> list[str]:
    """Patches that do not stand aside for this model, off and waiting ones left out."""
    expected = re.compile(rf"the model is (a )?{architecture}\b")
    return [
        f"{row['name']} is {row['state']}: {row['reason'][:80]}"
        for row in rows
        if row["state"] not in ("off", "waiting")
        and not (row["state"] == "unsupported" and expected.search(row["reason"]))
    ]
