"""A decode step's K and V into SGLang's real pools, on the CPU through Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from tests.cpu import forward_batch
from tests.cpu.ports.v0_5_23 import models

SLOTS, TOKENS = 24, 4
POISON = 7.0


@pytest.fixture(autouse=True)
def stock(tmp_path: Any) -> Iterator[None]:
    """Stock at first; reverted at the end, after a test's own `monkeypatch` has put back."""
    importlib.import_module("sglang.srt.layers.attention.triton_backend")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path))
        for run in ENGINE.runs.values():
            patch.setattr(run, "_decline_reason", "")
        yield
        ENGINE.revert()


def pool(kind: str) -> Any:
    """Of two layers, the first sliding: one pool for both, or one for each kind."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    shared: Any = {"page_size": 1, "dtype": torch.bfloat16, "device": "cpu"}
    if kind == "one":
        made: Any = MHATokenToKVPool(
            size=SLOTS, head_num=1, head_dim=128, layer_num=2, enable_memory_saver=False, **shared
        )
        parts = [made]
    else:
        made = SWAKVPool(
            size=SLOTS,
            size_swa=SLOTS,
            head_num=1,
            head_dim=128,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
            **shared,
        )
        parts = [made.full_kv_pool, made.swa_kv_pool]
    for part in parts:
        for buffer in (*part.k_buffer, *part.v_buffer):
            buffer.fill_(POISON)
    return made


def buffers(made: Any) -> list[torch.Tensor]:
    parts = [made] if not hasattr(made, "swa_kv_pool") else [made.full_kv_pool, made.swa_kv_pool]
    return [buffer for part in parts for buffer in (*part.k_buffer, *part.v_buffer)]


def backend(made: Any) -> Any:
    """SGLang's, with what a store reads."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    found: Any = TritonAttnBackend.__new__(TritonAttnBackend)
    found.token_to_kv_pool, found.dcp_size = made, 1
    swa = torch.tensor([9, 0, 4, 2])
    found.forward_metadata = SimpleNamespace(swa_out_cache_loc=swa)
    return found


def decode(model: Any, given: Any, stored: list[bool]) -> torch.Tensor:
    """A step whose attention stores what it is told to, as stock's, and returns its queries."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    def forward(
        self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save: bool = True, **_: Any
    ) -> torch.Tensor:
        stored.append(save)
        if save:
            places = KVWriteLoc.for_batch(batch, swa_loc=self.forward_metadata.swa_out_cache_loc)
            self._set_kv_buffer(batch, layer, places, k, v)
        return q.reshape(q.shape[0], -1)

    batch = forward_batch.prefill(out_cache_loc=torch.tensor([3, 0, 7, 1]))
    batch.forward_mode = ForwardMode.DECODE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonAttnBackend, "forward", forward)
        with forward_context(ForwardContext(attn_backend=given)):
            return model(torch.arange(TOKENS) % 64, torch.arange(TOKENS), batch)  # type: ignore[no-any-return]


def model_with_attention() -> Any:
    return models.build("dense", uniform=False)


@pytest.mark.parametrize("kind", ["one", "sliding and full"])
def test_k_and_v_go_where_stock_puts_them(kind: str):
    """All slots but that of padding rows, which stock's kernel on a GPU skips and ours too."""
    model = model_with_attention()
    theirs, ours = backend(pool(kind)), backend(pool(kind))
    stored: list[bool] = []
    expected = decode(model, theirs, stored)
    ENGINE.apply(only=["rope_store", "qkv_norm"])
    run = ENGINE.runs["rope_store"]
    before, kept = run.counters.engaged, []
    found = decode(model, ours, kept)
    assert run.counters.engaged == before + 2
    assert stored == [True, True]
    assert kept == [False, False]
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    for mine, other in zip(
        buffers(ours.token_to_kv_pool), buffers(theirs.token_to_kv_pool), strict=True
    ):
        assert bool((mine[0] == POISON).all())
        torch.testing.assert_close(mine[1:].float(), other[1:].float(), rtol=0.02, atol=0.02)
        assert int((mine != POISON).flatten(1).any(1).sum()) == TOKENS - 1


def quantised(given: Any) -> None:
    given.token_to_kv_pool.quant_method = SimpleNamespace(name="fp4")


def of_somebodys(given: Any) -> None:
    given.token_to_kv_pool.set_kv_buffer = given.token_to_kv_pool.set_kv_buffer


def laid_out(given: Any) -> None:
    given.token_to_kv_pool.kv_cache_layout = "hnd"


def split_over_gpus(given: Any) -> None:
    given.dcp_size = 2


def numbered_otherwise(given: Any) -> None:
    given.token_to_kv_pool.requires_physical_write_loc = True


def scaled(given: Any) -> None:
    given.token_to_kv_pool.dtype = torch.float8_e4m3fn


def called_by_somebodys(given: Any) -> None:
    given.forward_decode = given.forward_decode


CHANGES = [quantised, of_somebodys, called_by_somebodys, laid_out]


@pytest.mark.parametrize("change", [*CHANGES, split_over_gpus, numbered_otherwise, scaled])
def test_what_is_not_known_is_stored_by_stock(change: Callable[[Any], None]):
    from gemma4_turbo.ports.v0_5_23.decode_step import attention

    model = model_with_attention()
    ENGINE.apply(only=["rope_store", "qkv_norm"])
    layer, k = model.layers[0].self_attn.attn, torch.zeros(TOKENS, 128).bfloat16()
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    given, batch = backend(pool("one")), forward_batch.prefill(out_cache_loc=torch.arange(TOKENS))
    with forward_context(ForwardContext(attn_backend=given)):
        assert attention.slots(layer, batch, k) is not None
        change(given)
        assert attention.slots(layer, batch, k) is None
    assert attention.slots(layer, batch, k) is None  # outside a forward


def test_a_prefill_stores_nothing_by_itself():
    """There K and V may lie in a graph's padding, and attention reads them as they are."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from gemma4_turbo.ports.any.decode_step import attention

    model = model_with_attention()
    ENGINE.apply(only=["rope_store", "qkv_norm"])
    batch = forward_batch.prefill()
    assert batch.forward_mode == ForwardMode.EXTEND
    k = torch.zeros(TOKENS, 128).bfloat16()
    assert attention._store(model.layers[0].self_attn, batch, k, k) is None
