"""What bench/serving.py asks SGLang's load generator for, and what it takes from it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

serving = pytest.importorskip("bench.serving", reason="the bench's own packages are not installed")
FIGURES = {name: float(number) for number, (name, _, _) in enumerate(serving.MEASURED)}


def test_the_figures_of_a_run():
    line = json.dumps({"completed": 5, **FIGURES, "std_itl_ms": 9.0})
    found = serving.measured(line, 5)
    assert [value for _, value, _ in found] == list(FIGURES.values())
    assert found[0] == ("time to first token, median", 0.0, "ms")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"completed": 4, **FIGURES}, "4 of 5 requests"),
        (FIGURES, "None of 5 requests"),
        ({"completed": 5, "duration": 1.0}, "does not tell median_ttft_ms"),
    ],
)
def test_a_run_that_cannot_count_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        serving.measured(json.dumps(line), 5)


def test_every_option_is_one_of_sglangs(tmp_path: Path):
    """SGLang's own parser reads the command, up to the server that is not there."""
    requests = {"num-prompts": 1, "random-input-len": 4, "request-rate": 8.0, "max-concurrency": 2}
    command = serving.command(1, tmp_path, requests, tmp_path / "out.jsonl")
    assert command[:3] == [sys.executable, "-m", "sglang.bench_serving"]
    ran = subprocess.run(
        [*command, "--ready-check-timeout-sec", "1"], capture_output=True, text=True
    )
    assert ran.returncode != 0
    assert "unrecognized arguments" not in ran.stderr
    assert "invalid choice" not in ran.stderr
    assert "Namespace(" in ran.stdout + ran.stderr


def test_the_package_of_data_sets_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert serving.environment(tmp_path)["PYTHONPATH"] == "/elsewhere"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = serving.environment(tmp_path)["PYTHONPATH"]
    assert path == f"{tmp_path / 'stand_in'}:/elsewhere"
    assert "load_dataset" in (tmp_path / "stand_in" / "datasets.py").read_text()
