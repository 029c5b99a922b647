"""``verify``: run stock and patched side by side on this machine and compare."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any

from gemma4_turbo.cli import report
from gemma4_turbo.cli.modules import CannotRunError, require_targets
from gemma4_turbo.cli.report import Console
from gemma4_turbo.engine import states
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.instance import ENGINE

SAME, WITHIN, DIFFERENT = "same bits", "within bounds", "DIFFERENT"
NOTHING_COMPARED = 3


def prepare_device() -> str:
    """``cuda``, or ``cpu`` with Triton's interpreter switched on for what is imported next."""
    problem = report.torch_problem()
    if problem is not None:
        raise CannotRunError(problem)
    import torch

    if torch.cuda.is_available():
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


def check_all(
    device: str, begin: Callable[[str], None] = lambda text: None, but: Container[str] = ()
) -> list[Check]:
    """Every check of every patch that is switched on and fits this SGLang.

    Args:
        device: ``cuda`` or ``cpu``.
        begin: told what is compared next.
        but: patches that are left out.
    """
    checks: list[Check] = []
    runs = [run for run in ENGINE.runs.values() if run.swaps and run.patch.name not in but]
    for number, run in enumerate(runs, 1):
        begin(f"comparing {run.patch.name} with stock ({number} of {len(runs)})")
        try:
            with warnings.catch_warnings():
                # Triton's interpreter is numpy, which tells of infinities that are drawn on purpose.
                warnings.filterwarnings(
                    "ignore", "", RuntimeWarning, r"triton\.runtime\.interpreter"
                )
                checks += run.verify(device)
        except Exception as error:  # the others are compared all the same
            told = f"{type(error).__name__}: {error}"
            checks.append(Check(run.patch.name, "the comparison", "-", 0, 0, told, False))
    return checks


def result(check: Check) -> str:
    """What a comparison has found; "" if there was nothing to compare."""
    if not check.passed:
        return DIFFERENT
    if not check.compared:
        return ""
    return WITHIN if check.differing else SAME


def check_table(checks: Sequence[Check], everything: bool = False) -> report.Listing:
    """A line a patch, by result, and all that was not equal.

    Args:
        checks: of all patches.
        everything: each comparison of each patch.
    """
    lines = report.Listing()
    by_patch: dict[str, list[Check]] = {}
    for check in checks:
        by_patch.setdefault(check.patch, []).append(check)
    groups: dict[str, list[str]] = {}
    for name, found in by_patch.items():
        groups.setdefault(_worst(found), []).append(name)
    for worst, style in ((SAME, "green"), (WITHIN, "green"), ("", "bold"), (DIFFERENT, "red")):
        if worst not in groups:
            continue
        lines.add(f"{worst or report.NOT_EXERCISED} ({len(groups[worst])})", 2, style)
        for name in groups[worst]:
            found = by_patch[name]
            lines.add(f"  {name:<18}{_summed(found, worst)}", 6)
            for check in found:
                if everything or result(check) == DIFFERENT:
                    lines.add(f"      {_detail(check)}", 8)
    return lines


def _worst(checks: Sequence[Check]) -> str:
    found = {result(check) for check in checks}
    return next((one for one in (DIFFERENT, WITHIN, SAME) if one in found), "")


def _summed(checks: Sequence[Check], worst: str) -> str:
    compared = [check for check in checks if result(check)]
    if not compared:
        return "; ".join(check.what for check in checks)
    values, bits = (sum(getattr(c, field) for c in compared) for field in ("compared", "differing"))
    noun = "comparison" if len(compared) == 1 else "comparisons"
    if worst == SAME:
        return f"{len(compared)} {noun}, {values:,} values"
    allowed = ", ".join(dict.fromkeys(check.allowed for check in compared if check.differing))
    return f"{len(compared)} {noun}, bits of {bits:,} of {values:,} values differ" + (
        f" (allowed: {allowed})" if worst == WITHIN else ""
    )


def _detail(check: Check) -> str:
    return (
        f"{check.what} against {check.against}: {result(check) or report.NOT_EXERCISED}, bits of "
        f"{check.differing:,} of {check.compared:,} values differ (allowed: {check.allowed})"
    )


def verdict(checks: Sequence[Check], command: str = "verify") -> str:
    """The last line."""
    results = [found for found in map(result, checks) if found]
    if not results:
        return f"{command}: nothing compared"
    noun = "comparison" if len(results) == 1 else "comparisons"
    told = f"{command}: {len(results)} {noun}"
    if DIFFERENT in results:
        names = dict.fromkeys(c.patch for c in checks if result(c) == DIFFERENT)
        return f"{told}, {results.count(DIFFERENT)} {DIFFERENT}: {', '.join(names)}"
    if WITHIN not in results:
        return f"{told}, all with the same bits"
    return f"{told}, all within bounds, {results.count(SAME)} of them with the same bits"


def not_compared(rows: Sequence[PatchStatus], checks: Sequence[Check]) -> dict[str, list[str]]:
    """By what is the matter: the patches that no comparison looked at."""
    compared = {check.patch for check in checks}
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.name not in compared:
            why = report.NOT_EXERCISED if row.state == states.ACTIVE else row.state
            found.setdefault(why, []).append(row.name)
    return found


def remainder(rows: Sequence[PatchStatus], checks: Sequence[Check]) -> report.Listing:
    """`not_compared` for the terminal."""
    lines = report.Listing()
    for why, names in not_compared(rows, checks).items():
        hint = ": no comparison of their own" if why == report.NOT_EXERCISED else ""
        lines.add(f"{why} ({len(names)}){hint}", 2, report.STYLES.get(why, "bold"))
        lines.add(f"  {', '.join(names)}", 2)
    return lines


def run(as_json: bool, everything: bool = False) -> int:
    """The command: 0 all equal, 1 a mismatch, 3 nothing could be compared."""
    with report.Progress() as progress:
        progress.stage("importing PyTorch")
        device = prepare_device()
        ENGINE.bootstrap()
        progress.stage("importing SGLang, which takes a minute")
        require_targets(progress)
        checks = check_all(device, progress.stage)
    rows = ENGINE.status()
    if as_json:
        records: list[dict[str, Any]] = [
            {**check._asdict(), "result": result(check) or report.NOT_EXERCISED} for check in checks
        ]
        found = {
            "versions": report.versions(),
            "device": report.device(),
            "checks": records,
            "not_compared": not_compared(rows, checks),
            "verdict": verdict(checks),
        }
        if not any(map(result, checks)):
            found["error"] = found["verdict"]
        print(json.dumps(found, indent=1))
    else:
        console = Console()
        where = report.device() or "the CPU, kernels in Triton's interpreter"
        bad = [row for row in rows if row.state in states.REFUSED_WHEN_STRICT]
        report.show(
            console,
            report.Listing().add(f"Stock against patched on {where}", 2, "bold"),
            check_table(checks, everything),
            remainder([row for row in rows if row not in bad], checks),
            report.table(bad),
            report.Listing().add(verdict(checks)),
        )
    if not any(map(result, checks)):
        return NOTHING_COMPARED
    return 0 if all(check.passed for check in checks) else 1
