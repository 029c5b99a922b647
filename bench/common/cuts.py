"""Kernels that can be cut in several ways: compiled by other processes, and set beside what they replace."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Way = tuple[str, str]
"""What runs, and how it is cut, as `text` has it."""


def text(tiles: Iterable[Iterable[object]]) -> str:
    """As a table shows a cut."""
    return " ".join("/".join(map(str, product)) for product in tiles)


def problem(run: Callable[[], object]) -> str:
    """Why a call cannot be made, or nothing: an answer that any process can give."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def tell(jobs: Iterable[object], problems: Iterable[str]) -> None:
    """Those that could not be compiled; returns when all are."""
    for job, found in zip(jobs, problems, strict=True):
        if found:
            print(f"{job}: {found}", file=sys.stderr)


def rows(
    us: Mapping[Way, float], replaced: str, size: float, base: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Of the CSV.

    Args:
        us: microseconds of each way that could be timed.
        replaced: what the ratio is to; NaN where that was not timed.
        size: bytes of weights that a call reads.
        base: columns that all rows have.
    """
    before = us.get((replaced, ""), math.nan)
    return [
        {**base, "what": what, "cut": cut, "us": round(time, 2)}
        | {"ratio": round(time / before, 3), "gb_per_s": round(size / time / 1e3)}
        for (what, cut), time in us.items()
    ]
