"""The benchmark of decode attention, as far as a machine without a GPU can run it: all but the times."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import decode_attention as bench
from gemma4_turbo.cli.tuning import decode
from gemma4_turbo.cli.tuning.decode import Arena, Point, Shape
from gemma4_turbo.kernels.attention import decode as kernel
from tests.cpu import interpreted

pytestmark = interpreted.MARKS

SMALL = Shape("small", 4, 2, 256, 40)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is timed; each call runs once, and takes as long as its number says."""
    made: list[Any] = []

    def timer(call: Any, calls: int) -> int:
        if len(made) < 3:
            call(calls - 1)
        made.append(call)
        return 100 - len(made)

    monkeypatch.setattr(decode, "L2_BYTES", 2**20)
    monkeypatch.setattr(bench, "Arena", lambda point: Arena(point, "cpu"))
    monkeypatch.setattr(bench, "Timer", timer)
    monkeypatch.setattr(bench, "readings", lambda timers, replays: [float(t) for t in timers])
    return made


def test_the_models_shapes():
    found = bench.shapes()
    assert found["26b-a4b/sliding"] == ("26b-a4b/sliding", 16, 8, 256, 1024)
    assert found["26b-a4b/full"] == ("26b-a4b/full", 16, 2, 512, None)
    groups = {shape.heads // shape.kv_heads for shape in found.values()}
    assert groups == {2, 4, 8, 16}


@pytest.mark.parametrize("dim", kernel.HEAD_DIMS)
def test_variants_fit_and_the_chosen_ones_are_among_them(dim: int):
    found = [tile[:3] for tile in bench.tiles(dim)]
    assert kernel.choose(8, 8, 2, dim)[:3] in found
    for tile in bench.tiles(dim):
        assert bench.shared_bytes(dim, tile) <= bench.SHARED_BYTES
        assert tile.min_chunk % tile.block_n == 0


def test_a_window_is_seen_and_ragged_batches_keep_their_mean():
    assert Point(SMALL, 3, 100, False).seen() == [40, 40, 40]
    lengths = Point(SMALL._replace(window=None), 200, 100, True).seen()
    assert 80 < sum(lengths) / 200 < 120
    assert min(lengths) >= 1


def test_copies_do_not_share_slots(calls):
    arena = Arena(Point(SMALL, 2, 100, False), "cpu")
    at = torch.cat(arena.indices)
    assert arena.copies == 7  # of 80 tokens of 2 heads of 256, K and V
    assert at.unique().numel() == at.numel() == arena.k.shape[0]


def test_comparison(calls):
    """Both calls run; stock's numbers are those of bf16 in the interpreter, which are none."""
    row = bench.compare(Point(SMALL, 2, 100, False), 1)
    assert len(calls) == 2
    assert (row["us"], row["stock_us"]) == (99.0, 98.0)
    assert row["error"] < 0.005


def test_tuning_keeps_the_best_and_the_chosen(calls, monkeypatch):
    monkeypatch.setattr(
        bench, "measured", lambda point, arena, config, us, stock: {"us": us, "c": config}
    )
    rows = bench.tune(Point(SMALL, 2, 100, False), 1)
    assert len(calls) > 60
    times = [row["us"] for row in rows[:20]]
    assert times == sorted(times)
    assert sum(row["chosen"] for row in rows) == 1
