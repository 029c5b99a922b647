"""What the demo concludes without a GPU; test_commands.py runs it."""

from __future__ import annotations

import math

import pytest

from gemma4_turbo.cli import demo
from gemma4_turbo.engine.checks import Check

CHECK = Check("layer_norms", "x", "stock", 10, 0, "not one bit", True)
MODEL = demo.Compared("two layers", {"layer_norms": 2, "rope_store": 1}, 1e-3)


def concluded(*compared: demo.Compared, check: Check = CHECK) -> tuple[list[str], int]:
    listing, status = demo.outcome(compared, [check])
    return [text for text, _, _ in listing.lines], status


def test_the_patches_that_ran_are_named_with_their_calls() -> None:
    lines, status = concluded(MODEL, MODEL._replace(engaged={"ple_tail": 3}))
    assert status == 0
    assert "calls that ran a patch's code: layer_norms 2, rope_store 1" in "\n".join(lines)
    assert lines[-1] == ("demo: 1 comparison, all with the same bits; 3 patches ran in 2 models")


def test_a_model_in_which_no_patch_ran_proves_nothing() -> None:
    """No distance of stock from stock is shown, and the demo fails."""
    lines, status = concluded(MODEL, MODEL._replace(model="others", engaged={}, distance=0.0))
    assert status == 1
    assert "A step of others: NO PATCH RAN" in lines
    assert sum("distance" in line for line in lines) == 1
    assert lines[-1] == "demo: no patch ran in others"
    assert concluded() == (
        ["Stock against patched", *lines[1:3], "demo: no patch ran in any model"],
        1,
    )


@pytest.mark.parametrize("distance", [2 * demo.BOUND, math.nan])
def test_outputs_that_are_apart_fail(distance: float) -> None:
    lines, status = concluded(MODEL._replace(distance=distance))
    assert (lines[-1], status) == ("demo: stock and patched are DIFFERENT", 1)


def test_a_comparison_that_differs_fails() -> None:
    assert concluded(MODEL, check=CHECK._replace(passed=False))[1] == 1
