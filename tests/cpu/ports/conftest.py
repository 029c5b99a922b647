"""A release line's tests run where SGLang of that line is installed; kernels have little to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton

from gemma4_turbo.kernels import feed_forward_few, mlp_few, skinny_gemm
from gemma4_turbo.kernels.dataflow import Product
from tests import releases

QUICK = feed_forward_few.Tiles(
    *map(Product._make, ((1, 32, 8), (1, 32, 8), (1, 32, 8), (1, 8, 8), (8, 4, 8)))
)
"""Few programs, each of a whole row: in the interpreter a program takes 10 ms."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the other lines' folders out."""
    return collection_path in releases.other_lines() or None


@pytest.fixture(
    scope="module", autouse=True
)  # not longer: other folders' tests follow in one process
def large_tiles() -> Iterator[None]:
    """Products in few programs: an interpreted one takes as long for a large tile as for a small one.

    K stays split, in two. The cuts of a GPU are the matter of the kernel's own tests.
    """
    choose = skinny_gemm.choose

    def few_programs(shape: tuple[int, ...], *args: Any, **options: Any) -> skinny_gemm.Config:
        config = choose(shape, *args, **options)
        width = min(256, triton.next_power_of_2(shape[0]))
        return config._replace(block_n=width, split=min(2, config.split))

    def whole_rows(topk: int) -> feed_forward_few.Tiles:
        down = QUICK.chosen_down
        return QUICK._replace(chosen_down=down._replace(rows=min(down.rows, topk)))

    with pytest.MonkeyPatch.context() as patch:
        if skinny_gemm.INTERPRETED:
            patch.setattr(skinny_gemm, "choose", few_programs)
            patch.setattr(feed_forward_few, "choose", whole_rows)
            patch.setattr(mlp_few, "TILES", mlp_few.Tiles(Product(4, 4, 8), Product(8, 4, 8)))
        yield
