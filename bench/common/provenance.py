"""What every row of a result carries: when, on what, with which versions."""

from __future__ import annotations

from datetime import UTC, datetime

from gemma4_turbo.cli import report


def provenance() -> dict[str, str | None]:
    """Timestamp, GPU and versions, as columns of a CSV."""
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": report.device() or "none",
        **report.versions(),
    }
