"""Without a GPU, kernels run in Triton's interpreter: it must be chosen before triton is imported."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import pytest

# Products of a few rows are made by one core, not by two that wait for each other; and a worker of
# pytest-xdist has about one core. To be said before numpy and torch are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests import distributions, interpreter, op_sources, releases

# SGLang's and torch's millions of objects stay; each search among them for cycles takes half a second.
gc.set_threshold(100_000, 50, 100)
distributions.quicken()
op_sources.quicken()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.quicken()


HERE = Path(__file__).parent


def pytest_report_header() -> str:
    """Say what the kernels run on."""
    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}"
    return "no CUDA device: kernels run in Triton's interpreter"


def not_collected(arguments: list[str]) -> list[str]:
    """What was asked for and this machine cannot even collect, and what it lacks for it."""
    folder = HERE / "gpu"
    asked = [Path(argument.partition("::")[0]).resolve() for argument in arguments]
    if torch.cuda.is_available() or not any(folder.is_relative_to(path) for path in asked):
        return []
    count = len(list(folder.glob("test_*.py")))
    return [f"{folder.relative_to(HERE.parent)}, {count} files, needs a CUDA device"]


def of_other_lines(arguments: list[str]) -> list[str]:
    """What was asked for and is for SGLang's releases of another line."""
    asked = [Path(argument.partition("::")[0]).resolve() for argument in arguments]
    return [
        f"{folder.relative_to(HERE.parent)}: for SGLang {', '.join(of)}"
        for folder, of in releases.other_lines().items()
        if any(folder.is_relative_to(one) for one in asked)
    ]


def skipped(reports: list[pytest.TestReport]) -> list[str]:
    """How many tests were skipped, by reason."""
    reasons = Counter(
        str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        for report in reports
    )
    return [
        f"{count} skipped, {reason.removeprefix('Skipped: ')}"
        for reason, count in sorted(reasons.items())
    ]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """A green run must not be taken for one of all tests."""
    lines = not_collected(config.args) + of_other_lines(config.args)
    lines += skipped(terminalreporter.stats.get("skipped", []))
    for line in lines:
        terminalreporter.write_line(f"not run here: {line}")
