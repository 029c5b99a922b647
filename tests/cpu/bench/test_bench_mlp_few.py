"""The benchmark of a dense MLP of a few tokens, as far as a machine without a GPU can run it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from bench import mlp_few as bench
from gemma4_turbo.kernels import dataflow
from gemma4_turbo.kernels import mlp_few as kernel
from gemma4_turbo.kernels.dataflow import Product
from gemma4_turbo.kernels.mlp_few import Tiles
from tests.cpu.bench import graph_clock

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]
SMALL = Tiles(Product(2, 1, 64), Product(2, 1, 64))
OTHER = SMALL._replace(down=Product(4, 1, 64))


def test_every_cut_can_run():
    assert len(set(bench.CUTS)) == len(bench.CUTS)
    assert bench.CUTS[0] == kernel.TILES
    assert [dataflow.tiles_unfit(tiles) for tiles in bench.CUTS] == [None] * len(bench.CUTS)


def test_widths_are_the_models():
    assert bench.widths("e2b") == [(1536, 6144), (1536, 12288)]
    assert bench.widths("e4b") == [(2560, 10240)]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> bench.Layers:
    changes = {
        "DEVICE": "cpu", "CALLS": 2, "CUTS": (SMALL, OTHER), "L2_BYTES": 1,
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)
    graph_clock.set_in(monkeypatch)
    return bench.Layers(256, 64)


def test_both_ways_compute_the_same(layers: bench.Layers):
    assert len(layers.weights) == 2
    layers.draw(1)
    residual = layers.residual[0].clone()
    found = []
    for call in (layers.two_launches, layers.at_once(SMALL)):
        layers.residual[0] = residual.clone()  # overwritten, as in a layer
        found.append(call(0).float())
    torch.testing.assert_close(found[1], found[0], rtol=2**-6, atol=2**-6)


def test_rows(
    layers: bench.Layers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole = layers.at_once

    def broken(tiles: Tiles) -> Any:
        def run(i: int) -> torch.Tensor:
            raise RuntimeError("out of resource")

        return run if tiles == SMALL else whole(tiles)

    monkeypatch.setattr(layers, "at_once", broken)
    frame = pd.DataFrame(bench.measured(layers, 1, 3, {"gpu": "none"}))
    assert list(frame.what) == ["two launches", "at once"]
    assert list(frame.ratio) == [1.0, 2.0]
    assert list(frame.cut) == ["", "2/1/64 4/1/64"]
    assert frame.gb_per_s[0] == round(6 * 256 * 64 / 10 / 1e3)
    assert "out of resource" in capsys.readouterr().err


def test_there_is_no_ratio_to_what_did_not_run(
    layers: bench.Layers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(i: int) -> torch.Tensor:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(layers, "two_launches", broken)
    frame = pd.DataFrame(bench.measured(layers, 1, 3, {"gpu": "none"}))
    assert list(frame.what) == ["at once", "at once"]
    assert list(frame.us) == [10.0, 20.0]
    assert frame.ratio.isna().all()
    assert "two launches" in capsys.readouterr().err
