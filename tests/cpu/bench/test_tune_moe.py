"""The tuner of the fused experts' kernel, as far as a machine without a GPU can run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.tune_moe import summary
from gemma4_turbo.cli import lines
from gemma4_turbo.cli.tuning import moe as tune_moe
from gemma4_turbo.cli.tuning.moe import DOWN, UP, Tile, Times
from gemma4_turbo.kernels import moe_align as align
from gemma4_turbo.kernels import moe_tables

pytestmark = [
    pytest.mark.skipif(not align.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]


def test_variants_fit_and_are_what_tables_may_hold():
    for m in (16, 32, 64, 128, 256):
        found = tune_moe.tiles(m)
        assert len(set(found)) == len(found) >= 15
        for tile in found:
            assert tile.stages * (tile.m + tile.n) * tile.k * 2 <= tune_moe.SHARED_BYTES
            config = tile.config()
            moe_tables.check(moe_tables.Pair({1: config}, {1: config}))


def test_neighbours_share_rows():
    """What is not measured fully finds winners among its neighbours."""
    for tokens in tune_moe.TOKENS:
        below = max(t for t in tune_moe.COARSE if t <= tokens)
        above = min((t for t in tune_moe.COARSE if t >= tokens), default=below)
        near = {*tune_moe.rows_of_a_block(below), *tune_moe.rows_of_a_block(above)}
        assert near & set(tune_moe.rows_of_a_block(tokens))


def test_like_has_the_same_divisibility():
    """Triton compiles a kernel of its own for sizes that are multiples of 16."""

    def divisible(tokens: int, block: int) -> tuple[bool, bool]:
        slots = tokens * tune_moe.TOPK
        return slots % 16 == 0, align.padded_capacity(slots, block, tune_moe.EXPERTS) % 16 == 0

    for tokens in tune_moe.TOKENS:
        for block in (16, 32, 64, 128, 256):
            assert divisible(tokens, block) == divisible(tune_moe.like(tokens), block)


def test_routings_are_many_and_half_of_them_skewed(monkeypatch):
    monkeypatch.setattr(tune_moe, "DEVICE", "cpu")
    ids = tune_moe.routings(512, 4)
    assert len(ids) == 8
    busiest = [int(torch.bincount(each.flatten(), minlength=128).max()) for each in ids]
    assert max(busiest[0::2]) < 70 < min(busiest[1::2])  # 32 on average
    assert all((each.sort(-1).values.diff() > 0).all() for each in ids)


class Fake(Times):
    """Times from a formula."""

    def __init__(self, formula: Any) -> None:
        self.formula = formula
        self.us = {}

    def measure(self, tokens: int, wanted: Any) -> None:
        for projection, tile in wanted:
            self.us[tokens, projection, tile] = self.formula(projection, tile)


def test_the_sum_of_both_decides_over_the_rows(monkeypatch):
    """Up alone would take 64 rows, down alone 16: together 64, with columns of their own."""

    def formula(projection: str, tile: Tile) -> float:
        fast = {UP: (64, 128), DOWN: (16, 32)}[projection]
        cost = {UP: 50, DOWN: 10}[projection] * (tile.m != fast[0])
        return 100 + cost + (tile.n != fast[1])

    times = Fake(formula)
    times.measure(512, tune_moe.both(t for m in (16, 64) for t in tune_moe.tiles(m)))
    read_again(monkeypatch, times, formula)
    up, down = times.decide(512, next(t for t in tune_moe.tiles(16) if t.n != 32))
    assert (up.m, down.m) == (64, 64)
    assert up.n == 128


def read_again(monkeypatch: pytest.MonkeyPatch, times: Times, formula: Any) -> None:
    """The second, deciding readings."""

    class Experts:
        @staticmethod
        def timer(projection: str, tile: Tile) -> float:
            return formula(projection, tile)

    times.experts, times.replays, times.failed = Experts, 1, set()
    monkeypatch.setattr(tune_moe, "readings", lambda timers, replays: timers)


def test_a_table_is_no_slower_than_stock(monkeypatch):
    """Stock's tile, slow in its first reading, is read again with the best; the CSV has that reading."""
    stock = Tile(64, 128, 64, 8, 4, 3)
    times = Fake(lambda projection, tile: 1.0 + (tile == stock))
    times.measure(512, tune_moe.both([stock, *tune_moe.tiles(16), *tune_moe.tiles(64)]))
    read_again(monkeypatch, times, lambda projection, tile: 1.5 - 0.1 * (tile == stock))
    assert times.decide(512, stock) == (stock, stock)
    assert times.us[512, UP, stock] == times.us[512, DOWN, stock] == 1.4


def test_a_tile_of_stocks_that_does_not_fit_is_left_out(monkeypatch):
    stock = Tile(64, 256, 128, 8, 4, 5)
    times = Fake(lambda projection, tile: float(tile.n))
    times.measure(512, tune_moe.both(tune_moe.tiles(64)))
    read_again(monkeypatch, times, lambda projection, tile: float(tile.n))
    times.failed = {(UP, stock), (DOWN, stock)}
    up, down = times.decide(512, stock)
    assert up.n == down.n == 64


def test_winners_are_those_of_the_neighbours():
    times = Fake(lambda projection, tile: tile.n + tile.k + (projection == UP) * tile.warps)
    for tokens in (32, 128):
        times.measure(tokens, tune_moe.both(tune_moe.tiles(16)))
    found = tune_moe.winners(64, [32, 128], times)
    assert {projection for projection, _ in found} == {UP, DOWN}
    assert {tile.group for _, tile in found} == {1, 16}
    best = times.best(32, UP, 16, 1)[0]
    assert (UP, best) in found
    assert len(found) < 30


def test_the_launches_are_stocks(monkeypatch):
    """The real kernel in Triton's interpreter computes the product for every slot.

    In fp32, as the interpreter does not multiply bf16; the alignment is plain torch.
    """
    stock = lines.stock()
    fused_moe_triton_kernels = stock.experts_kernel()
    monkeypatch.setattr(tune_moe, "DEVICE", "cpu")
    monkeypatch.setattr(tune_moe, "HIDDEN", 64)
    monkeypatch.setattr(tune_moe, "EXPERTS", 8)
    monkeypatch.setattr(stock.experts_module(), "moe_align_block_size", align.reference_align)
    launch = fused_moe_triton_kernels.invoke_fused_moe_kernel
    monkeypatch.setattr(
        fused_moe_triton_kernels,
        "invoke_fused_moe_kernel",
        lambda *args, **options: launch(
            *args, **(options | {"compute_type": fused_moe_triton_kernels.tl.float32})
        ),
    )
    experts = tune_moe.Experts(32)
    experts.weights = {name: weight.float() for name, weight in experts.weights.items()}
    experts.route(3, 1)
    experts.inputs = {name: x.float() for name, x in experts.inputs.items()}
    experts.outputs = {name: x.float().fill_(torch.nan) for name, x in experts.outputs.items()}
    for projection in (UP, DOWN):
        experts.launch(projection, Tile(16, 32, 32, 1, 4, 2), 1)
        x, weight = experts.inputs[projection], experts.weights[projection]
        rows = x.repeat_interleave(8, 0) if projection == UP else x / 8
        chosen = weight[experts.ids[1].flatten().long()]
        expected = torch.einsum("sk,snk->sn", rows, chosen)
        found = experts.outputs[projection].reshape(expected.shape)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_summary_compares_with_stock():
    tile = {"m": 16, "n": 64, "k": 64, "group": 1, "warps": 4, "stages": 3}
    rows = [
        {"width": 704, "tokens": 8, "projection": p, **tile, "us": us, "chosen": c, "stock": 1 - c}
        for p, us, c in ((UP, 10.0, 1), (DOWN, 5.0, 1), (UP, 12.0, 0), (DOWN, 8.0, 0))
    ]
    (row,) = summary(rows).to_dict("records")
    assert (row["us"], row["stock_us"], row["ratio"]) == (15.0, 20.0, 0.75)
    assert row[UP] == "16/64/64/1/4/3"
