"""Jobs of other processes, and the rows of what they compiled."""

from __future__ import annotations

import math

import pytest

from bench.common import cuts


def broken() -> None:
    raise MemoryError("out of resource")


def test_only_what_could_not_be_compiled_is_told(capsys: pytest.CaptureFixture[str]):
    problems = [cuts.problem(lambda: None), cuts.problem(broken)]
    assert problems == ["", "MemoryError: out of resource"]
    cuts.tell([(1, "a"), (2, "b")], problems)
    assert capsys.readouterr().err == "(2, 'b'): MemoryError: out of resource\n"
    with pytest.raises(ValueError, match="shorter"):
        cuts.tell([1, 2], [""])


def test_rows_are_beside_what_they_replace():
    us = {("today", ""): 10.0, ("at once", cuts.text([(1, 2), (3, 4)])): 8.0}
    rows = cuts.rows(us, "today", 4e4, {"tokens": 1})
    assert rows[1] == {"tokens": 1, "what": "at once", "cut": "1/2 3/4", "us": 8.0, "ratio": 0.8, "gb_per_s": 5}  # fmt: skip
    assert rows[0]["ratio"] == 1.0
    (alone,) = cuts.rows({("at once", ""): 8.0}, "today", 4e4, {})
    assert math.isnan(alone["ratio"])
