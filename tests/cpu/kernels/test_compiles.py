"""Every kernel compiles for the GPUs that there are, fits their shared memory and spills little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.cpu.conftest import REPOSITORY
from tests.cpu.kernels.compile_scenario import GPUS

# Plain kernels have no tiles: the oldest GPU and the newest. Extend's take seconds each: where memory is
# smallest, and where the matrix units are others than Hopper's, which the GPU tests compile for.
WANTED = {
    80: "plain,products",
    86: "products,extends",
    89: "products",
    90: "products",
    100: "products,extends",
    120: "plain,products",
}
SPILLED = 16  # bytes of a thread


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """One process for all: Triton compiles there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.kernels.compile_scenario",
         *(f"{capability}:{kinds}" for capability, kinds in WANTED.items())],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", list(WANTED))
def test_kernels_of_a_gpu(capability: int, rows: list[dict[str, Any]]):
    found = [row for row in rows if row["capability"] == capability]
    assert len(found) >= 3
    assert [row for row in found if "error" in row] == []
    wrong = []
    for row in found:
        assert row["kernels"], row
        for name, took in row["kernels"].items():
            if took["shared"] > GPUS[capability].shared_memory or took["spilled"] > SPILLED:
                wrong.append((row["case"], name, took))
    assert wrong == []
