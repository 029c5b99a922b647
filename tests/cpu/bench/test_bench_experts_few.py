"""The benchmark of a few tokens' experts, as far as a machine without a GPU can run it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from bench import experts_few as bench
from gemma4_turbo.kernels import experts_few as kernel
from gemma4_turbo.kernels import moe_tables, pdl
from gemma4_turbo.kernels.experts_few import Down, Tiles, Up

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]


def test_every_cut_can_run_and_holds_enough_in_flight():
    """Of one token, over 132 multiprocessors: what 4.8 TB/s want in 700 ns, where a program's loads allow."""
    for up in bench.UPS:
        assert kernel.tiles_unfit(Tiles(up, bench.DOWNS[0]), bench.TOPK) is None
        programs = bench.TOPK * 704 / (up.rows * up.warps * 256 / up.line)
        in_flight = 2 * up.rows * up.repeat * 512 * up.warps
        assert programs * in_flight / 132 >= 26_000, up
    for down in bench.DOWNS:
        for fetched in bench.PREFETCHES:
            cut = Tiles(bench.UPS[0], down._replace(prefetch=fetched))
            assert kernel.tiles_unfit(cut, bench.TOPK) is None
    wanted = bench.jobs(704)
    assert len(set(wanted)) == len(wanted)
    default = kernel.choose(bench.TOPK)
    assert {(704, False, default.up), (704, True, default.up), (704, True, default.down)} <= set(
        wanted
    )


class Clock:
    """In the place of a timer: makes the call, and takes longer for each one made."""

    made = 0

    def __init__(self, call: Any, calls: int) -> None:
        call(calls - 1)
        Clock.made += 1
        self.us = float(Clock.made)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> bench.Bench:
    """Everything on the CPU and little of it."""
    changes = {
        "DEVICE": "cpu", "HIDDEN": 32, "EXPERTS": 2, "TOPK": 2, "LAYERS": 2, "CALLS": 2,
        "PREFETCHES": (0, 2),
        "UPS": (Up(4, 1, 64, 1), Up(2, 2, 32, 1)), "DOWNS": (Down(2, 1, 32, 1, 0), Down(1, 2, 16, 1, 0)),
        "Timer": Clock, "readings": lambda timers, _: [timer.us for timer in timers],
        "copy_gbps": lambda: 4300.0,
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(moe_tables, "load", lambda key: moe_tables.Pair({1: {}}, {1: {}}))
    reference = kernel.reference_experts_few
    stock: Any = bench.Stock.__new__(bench.Stock)
    stock.calls = SimpleNamespace(fused_experts=reference)
    stock.module = SimpleNamespace(moe_align_block_size=None)
    stock.tables = SimpleNamespace(get_moe_configs=None)
    return bench.Bench(bench.Layers(16), stock, 3, {"gpu": "none"})


def test_a_number_of_tokens(small):
    """Its rows: every kind, errors of stock's size, bytes of the chosen experts."""
    small.tokens(1)
    frame = pd.DataFrame(small.rows)
    kinds = ["stock", "stock, tables", "today", "up", "down", "both"]
    assert list(dict.fromkeys(frame.what)) == kinds
    assert (frame.tokens == 1).all()
    stock = frame[frame.what == "stock"].iloc[0]
    both = frame[frame.what == "both"]
    assert (both.error <= 1.1 * stock.error).all()
    assert 0 < stock.error < 0.01
    assert set(both.pdl) == {0, 1}
    assert not pdl.wanted
    # Both experts are chosen: three matrices of 16 x 32 in bf16 each, x, h twice, and out.
    assert stock.bytes == 2 * 3 * 2 * 16 * 32 + (2 * 32 * 2 + 2 * 2 * 2 * 16)
    assert {(both.cut == "4/1/64/1 2/1/32/1/0").sum(), (both.cut == "4/1/64/1 2/1/32/1/2").sum()} == {1, 2}  # fmt: skip
    assert small.stock.tables.get_moe_configs is None


def test_a_cut_that_cannot_run_is_left_out(small, monkeypatch, capsys):
    launch = kernel.launch_up

    def some(x: Any, w13: Any, ids: Any, tile: Up) -> Any:
        if tile.repeat == 2:
            raise RuntimeError("out of resource")
        return launch(x, w13, ids, tile)

    monkeypatch.setattr(kernel, "launch_up", some)
    small.layers.route(1)
    small.time("up", {bench.text(tile): small.layers.up(tile) for tile in bench.UPS}, 1e6)
    assert [row["cut"] for row in small.rows] == ["4/1/64/1"]
    assert "up 2/2/32/1: RuntimeError: out of resource" in capsys.readouterr().err


def test_the_summary_has_the_best_of_each_kind():
    rows = [
        {"width": 704, "tokens": 1, "what": what, "pdl": 0, "cut": cut, "us": us, "gb_per_s": 1,
         "of_copy": 1.0, "error": None}
        for what, cut, us in (("stock", "", 40.0), ("both", "a", 30.0), ("both", "b", 20.0))
    ]  # fmt: skip
    found = bench.summary(pd.DataFrame(rows))
    assert list(zip(found.what, found.cut, found.of_stock, strict=True)) == [
        ("stock", "", 1.0),
        ("both", "b", 0.5),
    ]
    without = bench.summary(pd.DataFrame(rows[1:]))
    assert without.of_stock.isna().all()
