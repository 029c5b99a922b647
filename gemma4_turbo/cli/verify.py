"""``verify``: run stock and patched side by side on this machine and compare."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gemma4_turbo.cli import report
from gemma4_turbo.cli.modules import CannotRunError, require_targets
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.instance import ENGINE


def prepare_device() -> str:
    """``cuda``, or ``cpu`` with Triton's interpreter switched on for what is imported next."""
    try:
        import torch
    except ImportError as error:
        raise CannotRunError(f"PyTorch is not installed: {error}") from None
    if torch.cuda.is_available():
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


def check_all(device: str) -> list[Check]:
    """Every check of every patch that is switched on and fits this SGLang."""
    checks: list[Check] = []
    for run in ENGINE.runs.values():
        if run.swaps:
            checks += run.verify(device)
    return checks


def check_table(checks: Sequence[Check]) -> Table:
    """The checks for the terminal."""
    grid = Table(title="Stock against patched", title_justify="left")
    for heading in ("patch", "inputs", "against", "compared", "bits differ", "allowed", "result"):
        grid.add_column(heading, overflow="fold")
    for check in checks:
        grid.add_row(
            *map(report.plain, (check.patch, check.what, check.against)),
            f"{check.compared:,}",
            f"{check.differing:,}",
            report.plain(check.allowed),
            report.plain("equal", "green") if check.passed else report.plain("DIFFERENT", "red"),
        )
    return grid


def run(as_json: bool) -> int:
    """The command: 0 all equal, 1 a mismatch, 3 nothing could be compared."""
    device = prepare_device()
    ENGINE.bootstrap()
    require_targets()
    checks = check_all(device)
    if as_json:
        records = [check._asdict() for check in checks]
        print(
            json.dumps(
                {"versions": report.versions(), "device": report.device(), "checks": records},
                indent=1,
            )
        )
    else:
        console = Console()
        console.print(report.table(ENGINE.status()))
        console.print(check_table(checks))
    if not checks:
        return 3
    return 0 if all(check.passed for check in checks) else 1
