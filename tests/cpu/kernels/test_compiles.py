"""Every kernel compiles for the GPUs that there are, fits their shared memory and spills little.

And what only a compiler shows: for which arguments it compiles anew, and which products it fuses.
"""

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
# pictures where shared memory is tightest. 8.9 has the matrix units and the shared memory of 8.6.
WANTED = {
    80: "plain,products,smaller",
    86: "products,pictures,few",
    90: "products",
    100: "products,largest",
    120: "plain,whole,products",
}
SPILLED = 16  # bytes of a thread


COUNTS = {"M", "rows", "batch", "tokens", "slots", "split", "splits", "tiles", "K_BLOCKS"}


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """One process for all: Triton compiles there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.kernels.compile_scenario",
         *(f"{capability}:{kinds}" for capability, kinds in WANTED.items())],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def rows(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and GPU."""
    return told[1:]


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


def test_counts_are_not_specialised(told: list[dict[str, Any]]):
    """No kernel compiles anew for another number of tokens: a server captures graphs for dozens."""
    found = told[0]["specialised"]
    assert len(found) > 10
    assert {name: sorted(COUNTS & set(names)) for name, names in found.items()} == {
        name: [] for name in found
    }


def test_products_of_the_rotation_are_rounded_before_the_sum(rows: list[dict[str, Any]]):
    """What the interpreter cannot see: a compiler that fuses them changes one number in four.

    On the newest GPU: 8.0 makes products of bf16 by fused instructions that add zero.
    """
    newest = [row for row in rows if row["capability"] == max(WANTED)]
    found = [took for row in newest if "vision_rope" in row["case"] for _, took in row["kernels"]]
    assert len(found) == 2  # types
    assert all(took["products"] and not took["fused"] for took in found)
