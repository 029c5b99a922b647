"""bench/pools.py with a stand-in for the engines, and what it asks of them."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from bench import pools
from bench.workers.engine import soak_requests
from tests.cpu.conftest import REPOSITORY, warm

WORKER = """
import json, os, sys

patched = os.environ["BENCH_PATCHED"] == "1"
with open(sys.argv[1], "a") as log:
    log.write(f"x full_layer_tokens={200 if patched else 100}, swa_layer_tokens=80\\n")
    log.write("full token usage: 0.50, swa token usage: 0.97\\nfull token usage: 0.99, swa\\n")
RAN = {"name": "yoco", "state": "inactive", "reason": "", "engaged": 1}
print(json.dumps({"ready_s": 1.0}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    rows = [
        {"ids": [i, 5, 6], "output": [float(-i).hex()] * 3, "left": i == 7}
        for i in range(command.get("count", 0))
    ]
    answer = {"rows": rows, "seconds": 2.0, "processes": [{"pid": 1, "patches": [RAN]}]}
    if command["do"] == "soak_alone":
        answer = {"rows": {str(i): rows[i] for i in range(command["only"])}}
    elif rows and patched and os.environ["DAMAGE"] == "1":
        rows[2]["ids"] = [9, 5, 6]  # nothing in common
        rows[3]["ids"] = [3, 5]  # too short
        rows[1]["output"][1] = (-1.5).hex()
    print(json.dumps(answer), flush=True)
"""
RUN = """
import sys
from pathlib import Path

import typer

from bench import pools
from bench.common import engines

engines.BENCH = Path(sys.argv.pop(1))
typer.run(pools.main)
"""


@pytest.mark.parametrize("damage", [False, True])
def test_a_run(environment: dict[str, str], tmp_path: Path, damage: bool):
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "engine.py").write_text(WORKER)
    options = ["--together", "--requests", "8", "--rounds", "1", "--alone", "6"]
    ran = warm(environment).run(
        code=RUN,
        arguments=[str(tmp_path), *options, "--out", str(tmp_path / "out.csv")],
        env={**os.environ, "DAMAGE": str(int(damage))},
        cwd=str(REPOSITORY),
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    frame = pd.read_csv(tmp_path / "out.csv").set_index(["variant", "quantity"])["value"]
    told = frame["patched vs stock, one at a time"]
    assert told["requests"] == 6
    assert told["tokens"] == 18
    assert told["left"] == 1
    assert told["lost"] == damage
    assert told["short"] == damage
    assert told["farthest"] == (0.5 if damage else 0)
    assert told["common"] == (14 if damage else 18)
    assert frame["stock, other prompts vs stock, one at a time"]["lost"] == 6
    assert frame["patched"]["pool of full layers"] == 200
    assert frame["stock"]["pool of full layers"] == 100
    assert frame["stock"]["pool of full layers, fullest"] == 0.99
    assert frame["stock"]["pool of sliding layers, fullest"] == 0.97


def test_a_log_without_sizes():
    with pytest.raises(ValueError, match="sizes of the KV pools"):
        pools.pool_sizes("ready")


def test_requests_share_beginnings_and_some_leave():
    requests = soak_requests(count=16, shortest=40, longest=90, new=20, seed=3)
    assert requests == soak_requests(count=16, shortest=40, longest=90, new=20, seed=3)
    ids = [request["ids"] for request in requests]
    assert all(40 <= len(one) <= 90 for one in ids)
    for first in range(0, 16, 4):
        assert len({tuple(one[:20]) for one in ids[first : first + 4]}) == 1
    assert len({tuple(one[:20]) for one in ids}) == 4
    assert len({tuple(one) for one in ids}) == 16
    assert [i for i, request in enumerate(requests) if request["leave"]] == [7, 15]
    assert all(10 <= request["new"] <= 20 for request in requests)
