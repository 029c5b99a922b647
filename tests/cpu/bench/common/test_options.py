"""bench/common/options.py: what texts on command lines stand for."""

from __future__ import annotations

import pytest
import typer

from bench.common.options import named, patches_of
from gemma4_turbo.catalogue import BITWISE, PATCHES

EXACT = [patch.name for patch in PATCHES if patch.numerics == BITWISE and patch.default]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("exact", EXACT),
        ("exact,optional_kv", [*EXACT, "optional_kv"]),
        ("optional_kv, exact", ["optional_kv", *EXACT]),
        (f"exact,{EXACT[0]},yoco,yoco", [*EXACT, "yoco"]),
    ],
    ids=["none", "exact", "and more", "blanks", "once"],
)
def test_names_of_a_comma_list(text: str, names: list[str]):
    assert patches_of(text) == names


def test_a_name_that_no_patch_has():
    """An engine with it would run without patches, and be found equal to stock."""
    with pytest.raises(typer.BadParameter, match="--patches: no patch is named 'exakt'"):
        patches_of("yoco,exakt")
    with pytest.raises(typer.BadParameter, match="--also: no patch"):
        patches_of("exakt", "--also")


def test_patches_come_with_those_that_they_stand_on():
    """Alone they would be off, and stock compared with stock."""
    assert patches_of("router_few,skinny_gemm") == ["layer_norms", "router_few", "skinny_gemm"]
    assert named("router_few") == ["router_few"]
