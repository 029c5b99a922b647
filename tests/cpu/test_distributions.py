"""The quickened look-up of distributions answers what the standard library's does."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests import distributions

pytestmark = pytest.mark.skipif(
    distributions.packages_distributions is not metadata.packages_distributions,
    reason="this Python's rule is another one",
)


def site(folder: Path) -> None:
    """What is declared, inferred, gone, hidden, of two distributions, and listed in no RECORD."""
    wheels = {
        "declared": {"top_level.txt": "alpha\nbeta\n", "RECORD": "gamma/__init__.py,,\n"},
        "inferred": {
            "RECORD": "delta/__init__.py,sha256=x,1\nepsilon.py,,\nzeta.so,,\n"
            'gone/__init__.py,,\ngone.py,,\n"eta/a,b.py",,\n../../bin/tool,,\nnotes.txt,,\n'
            "inferred-1.dist-info/RECORD,,\n.hidden/x.py,,\n"
        },
        "second": {"RECORD": "gone_first/a.py,,\ngone_first/b.py,,\ndelta/more.py,,\n"},
        "silent": {},
    }
    for name, files in wheels.items():
        info = folder / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        for file, text in files.items():
            (info / file).write_text(text)
    for path in ("delta/__init__.py", "delta/more.py", "epsilon.py", "zeta.so", "eta/a,b.py"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    for path in ("gone_first/b.py", "notes.txt", ".hidden/x.py", "gamma/__init__.py"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    egg = folder / "old-1.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: old\nVersion: 1\n")
    (egg / "SOURCES.txt").write_text("epsilon.py\nabsent.py\n")


def test_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    expected = distributions.STOCK()
    assert {"alpha", "delta", "epsilon", "zeta", "eta", "gone_first"} <= set(expected)
    assert not {"gone", "gamma", ".hidden"} & set(expected)
    found = distributions.packages_distributions()
    assert {name: sorted(of) for name, of in found.items()} == {
        name: sorted(of) for name, of in expected.items()
    }
