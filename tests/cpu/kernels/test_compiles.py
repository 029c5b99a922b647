"""Every kernel compiles for the GPUs that there are, fits their shared memory and spills little."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.cpu.conftest import REPOSITORY
from tests.cpu.kernels.compile_scenario import GPUS, KINDS

# Plain kernels have no tiles: the oldest GPU and the newest. Extend's take up to half a minute each: one
# GPU for each table and kind of matrix unit, but Hopper's, which the GPU tests compile for; the masks of
# pictures where shared memory is tightest.
WANTED = {
    80: "plain,products,smaller,largest",
    86: "products,pictures,few",
    89: "products",
    90: "products",
    100: "products,largest",
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
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("capability", list(WANTED))
def test_kernels_of_a_gpu(capability: int, rows: list[dict[str, Any]]):
    found = [row for row in rows if row["capability"] == capability]
    kinds = WANTED[capability].split(",")
    assert [row["case"] for row in found] == [
        case for kind in kinds for case in KINDS[kind](GPUS[capability])
    ]
    assert [row for row in found if "error" in row] == []
    wrong = []
    for row in found:
        assert row["kernels"], row
        for name, took in row["kernels"]:
            if took["shared"] > GPUS[capability].shared_memory or took["spilled"] > SPILLED:
                wrong.append((row["case"], name, took))
    assert wrong == []


def test_no_kernel_is_left_out(rows: list[dict[str, Any]]):
    """For the oldest GPU or the newest, at least."""
    launched = {
        name
        for path in (REPOSITORY / "gemma4_turbo").rglob("*.py")
        for name in re.findall(r"^\s*(_\w+_kernel)\[", path.read_text(), re.MULTILINE)
    }
    assert len(launched) > 15
    assert launched == {name for row in rows for name, _ in row["kernels"]}
