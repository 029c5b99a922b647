"""What `apply` costs a process that never loads a model: nothing is imported for it."""

from __future__ import annotations

from pathlib import Path

from tests.cpu.conftest import Python

HEAVY = ("torch", "sglang", "triton", "wrapt", "typer", "rich", "numpy")

PROBE = f"""
import sys
{{statements}}
print(sorted({{{{name.partition(".")[0] for name in sys.modules}}}} & set({HEAVY!r})))
"""


def loaded(python: Python, statements: str) -> str:
    """Which of the heavy packages a fresh process has after ``statements``."""
    done = python(PROBE.format(statements=statements))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_apply_imports_nothing_heavy(python: Python) -> None:
    """Nor do revert and status: every Python process of a machine may call them."""
    calls = "import gemma4_turbo as g; g.apply(); g.status(); g.revert(); g.apply(skip=['router'])"
    assert loaded(python, calls) == "[]"


def test_bootstrap_imports_nothing_heavy(python: Python) -> None:
    """What ``sitecustomize`` runs at the start of every process."""
    assert loaded(python, "import gemma4_turbo.plugin as p; p.register()") == "[]"


def test_the_probe_sees_what_is_imported(python: Python) -> None:
    """So that the empty lists above mean something."""
    assert loaded(python, "import wrapt") == "['wrapt']"


def test_apply_says_and_writes_nothing(python: Python, tmp_path: Path) -> None:
    """Nothing is left behind by a process in which no patch was installed."""
    done = python("import gemma4_turbo; gemma4_turbo.apply()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
