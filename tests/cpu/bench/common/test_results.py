"""bench/common/results.py: rows behind those of a CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.common.results import append


def test_rows_come_behind(tmp_path: Path):
    out = tmp_path / "a.csv"
    append(pd.DataFrame({"a": [1], "b": [0.25]}), out)
    append(pd.DataFrame({"a": [2], "b": [0.5]}), out)
    assert out.read_text() == "a,b\n1,0.25\n2,0.5\n"


def test_other_columns_keep_their_values(tmp_path: Path):
    """A value under another's name would be taken for it; what was measured is not thrown away either."""
    out = tmp_path / "a.csv"
    out.write_text("a,b\n1.00,\n")
    append(pd.DataFrame({"a": [2.5], "c": ["x"], "b": [True]}), out)
    assert out.read_text() == "a,b,c\n1.00,,\n2.5,True,x\n"
    assert list(tmp_path.iterdir()) == [out]
    append(pd.DataFrame({"a": [3]}), out)
    assert out.read_text() == "a,b,c\n1.00,,\n2.5,True,x\n3,,\n"
