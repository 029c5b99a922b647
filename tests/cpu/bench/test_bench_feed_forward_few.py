"""The benchmark of a layer's feed-forward for a few tokens, as far as a machine without a GPU can run it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from bench import feed_forward_few as bench
from gemma4_turbo.kernels import feed_forward_few as kernel
from gemma4_turbo.kernels.dataflow import Product
from gemma4_turbo.kernels.feed_forward_few import Tiles
from tests.cpu.bench import graph_clock

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]
SMALL = Tiles(*(Product(rows, 1, 64) for rows in (1, 2, 2, 2, 2)))
OTHER = SMALL._replace(dense=Product(4, 1, 64))


def test_every_cut_can_run():
    assert len(set(bench.CUTS)) == len(bench.CUTS)
    assert bench.CUTS[0] == kernel.choose(bench.TOPK)
    for tiles in bench.CUTS:
        assert kernel.tiles_unfit(tiles, bench.TOPK) is None


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> bench.Layers:
    changes = {
        "DEVICE": "cpu", "HIDDEN": 256, "WIDTH": 64, "NARROW": 16, "EXPERTS": 4, "TOPK": 2, "LAYERS": 2,
        "CALLS": 2, "CUTS": (SMALL, OTHER),
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)
    graph_clock.set_in(monkeypatch)
    return bench.Layers(2, 4)


def test_all_ways_compute_the_same(layers: bench.Layers):
    layers.draw(1)
    residual = layers.residual[0].clone()
    found = []
    for call in (layers.two_streams, layers.one_stream, layers.at_once(SMALL)):
        layers.residual[0] = residual.clone()  # overwritten, as in a layer
        found.append(call(0).float())
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=2**-6, atol=2**-6)


def test_rows(layers: bench.Layers, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def broken(i: int) -> torch.Tensor:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(layers, "one_stream", broken)
    frame = pd.DataFrame(bench.measured(layers, 1, 3, {"gpu": "none"}))
    assert list(frame.what) == ["two streams", "at once", "at once"]
    assert list(frame.ratio) == [1.0, 2.0, 3.0]
    assert list(frame.cut[1:]) == [
        "1/1/64 2/1/64 2/1/64 2/1/64 2/1/64",
        "1/1/64 4/1/64 2/1/64 2/1/64 2/1/64",
    ]
    # Gate, up and down of the dense MLP, the router, and those of two experts, in bf16.
    assert frame.gb_per_s[0] == round(2 * 256 * (3 * 64 + 4 + 2 * 3 * 16) / 10 / 1e3)
    assert "one stream" in capsys.readouterr().err


def test_there_is_no_ratio_to_what_did_not_run(
    layers: bench.Layers, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def broken(i: int) -> torch.Tensor:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(layers, "two_streams", broken)
    frame = pd.DataFrame(bench.measured(layers, 1, 3, {"gpu": "none"}))
    assert list(frame.what) == ["one stream", "at once", "at once"]
    assert list(frame.us) == [10.0, 20.0, 30.0]
    assert frame.ratio.isna().all()
    assert "two streams" in capsys.readouterr().err
