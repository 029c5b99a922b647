"""The vision attention's lengths stay on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from tests.cpu import vision
from tests.cpu.conftest import only_patch, patched_sglang

NAME = "vision_syncs"


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


def test_triton_backend_in_the_whole_encoder():
    """Stock's bits; a read-back a layer fewer, though nobody asked for another shape before."""
    tower = vision.model("triton_attn").vision_tower
    feature, places = vision.pixels(12, 8)  # more than one block of the kernel
    feature, places = feature.bfloat16().expand(2, -1, -1), places.expand(2, -1, -1)
    before = ENGINE.runs[NAME].counters.engaged
    with vision.ReadBacks() as ours:
        found, _ = tower(feature, places)
    assert ENGINE.runs[NAME].counters.engaged - before == 2
    ENGINE.revert()
    with vision.ReadBacks() as stock:
        expected, _ = tower(feature, places)
    assert stock.count - ours.count == 2
    assert torch.equal(found, expected)


def flash(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """Stock's class; its kernel needs a GPU and hands over its arguments here."""
    from sglang.srt.layers.attention import vision as stock

    received: list[Any] = []
    monkeypatch.setattr(
        stock,
        "flash_attn_varlen_func",
        lambda q, k, v, **rest: received.append((q, k, v, rest)) or q,
        raising=False,
    )
    return stock.VisionFlash3Attention.__new__(stock.VisionFlash3Attention), received


@pytest.mark.parametrize("options", [{}, {"window_size": (3, 0), "s_aux": torch.ones(2)}])
def test_flash_attention_receives_what_stock_gives_it(options: Any, monkeypatch):
    attention, received = flash(monkeypatch)
    q = torch.zeros(12, 2, 8)
    call = {"cu_seqlens": None, "bsz": 3, "seq_len": 4, "softmax_scale": 1.0, **options}
    with vision.ReadBacks() as ours:
        attention.forward(q, q, q, attention_mask=None, **call)
    assert ours.count == 0
    ENGINE.revert()
    attention.forward(q, q, q, attention_mask=None, **call)
    (_, _, _, found), (_, _, _, expected) = received
    assert set(found) == set(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
            assert found[name].dtype == value.dtype
        else:
            assert found[name] == value, name


def test_lengths_of_ones_own_take_stocks_path(monkeypatch: pytest.MonkeyPatch):
    """Other models' images of several sizes in one call."""
    attention, received = flash(monkeypatch)
    q = torch.zeros(12, 2, 8)
    starts = torch.tensor([0, 3, 12], dtype=torch.int32)
    attention.forward(q, q, q, starts, 1, 12)
    assert received[0][3]["max_seqlen_q"] == 9
    assert "different lengths" in ENGINE.runs[NAME].full_reason()


def test_a_vision_graph_takes_stocks_path(monkeypatch: pytest.MonkeyPatch):
    """Its lengths are lists of buffers, and stock says so if they are not."""
    monkeypatch.setenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", "1")
    tower = vision.model("triton_attn").vision_tower
    feature, places = vision.pixels(4, 4)
    with pytest.raises(RuntimeError, match="output_ws"):
        tower(feature.bfloat16()[None], places[None])
    assert "SGLANG_VIT_ENABLE_CUDA_GRAPH" in ENGINE.runs[NAME].full_reason()


def test_a_call_that_raises_is_stocks(monkeypatch: pytest.MonkeyPatch):
    from gemma4_turbo.engine import states
    from gemma4_turbo.ports.v0_5_12.vision import vision_syncs as patch

    attention, received = flash(monkeypatch)
    q, tries = torch.zeros(12, 2, 8), []

    def fails(*given: Any) -> Any:
        tries.append(given)
        raise RuntimeError("no memory")

    monkeypatch.setattr(patch, "uniform", fails)
    run = ENGINE.runs[NAME]
    before = run.counters.engaged
    for _ in range(2):
        assert attention.forward(q, q, q, None, 3, 4) is q
    assert len(received) == 2
    assert len(tries) == 1
    assert run.counters.engaged == before
    assert run.state == states.FAILED
