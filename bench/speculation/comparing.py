"""Answers of engines with speculation beside those without: tokens, margins, verify steps."""

from __future__ import annotations

from typing import Any

PLAIN = "no speculation"
DRAFT_STEPS = 3
Rows = list[dict[str, Any]]


def compare(truth: Rows, other: Rows) -> dict[str, Any]:
    """Tokens that differ, and what the truth's margin was where a sequence first does."""
    found: dict[str, Any] = {"sequences": len(truth), "tokens": 0, "token_diffs": 0, "first": []}
    for number, (one, two) in enumerate(zip(truth, other, strict=True)):
        wrong = [i for i, (x, y) in enumerate(zip(one["ids"], two["ids"], strict=True)) if x != y]
        found["tokens"] += len(one["ids"])
        found["token_diffs"] += len(wrong)
        if wrong:
            at, margins = wrong[0], one.get("margins")
            found["first"].append(
                {
                    "sequence": number,
                    "position": at,
                    "margin": margins[at] if margins else None,
                    "second best": margins and one["seconds"][at] == two["ids"][at],
                }
            )
    return found


def told(found: dict[str, Any]) -> str:
    """One line."""
    line = (
        f"{found['token_diffs']} of {found['tokens']} tokens, "
        f"{len(found['first'])} of {found['sequences']} sequences"
    )
    if not found["first"]:
        return line
    positions = sorted(first["position"] for first in found["first"])
    line += f"; first at {', '.join(map(str, positions[:12]))}"
    margins = [first["margin"] for first in found["first"] if first["margin"] is not None]
    if margins:
        second = sum(bool(first["second best"]) for first in found["first"])
        line += f"; margins there up to {max(margins):.4f} nats; the second best in {second}"
    return line


def accept_length(rows: Rows) -> float | None:
    """Tokens per verify step; the first token of a prompt needs none. None without speculation."""
    verified = sum(row["verified"] for row in rows)
    return sum(len(row["ids"]) - 1 for row in rows) / verified if verified else None


def expected(agreement: Any, ids: list[list[int]], new: int) -> Rows:
    """What an agreeing target says, and the verify steps it takes to."""
    return [
        {
            "ids": agreement.tokens(one[-1], new),
            "verified": agreement.verifications(one[-1], new, DRAFT_STEPS),
        }
        for one in ids
    ]
