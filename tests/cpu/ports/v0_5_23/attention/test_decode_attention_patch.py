"""The decode attention patch on SGLang's real TritonAttnBackend and KV pools, without a GPU.

Stock's kernels and ours run in Triton's interpreter, which multiplies fp16 right and bf16 not.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels.attention import decode as kernel
from gemma4_turbo.ports.any.attention import decode_attention as common
from gemma4_turbo.ports.v0_5_23.attention import decode_attention as patch
from tests.cpu import interpreted
from tests.cpu.conftest import patched_sglang
from tests.cpu.ports.v0_5_23.triton_world import (
    FULL,
    HEADS,
    LONGEST,
    SLIDING,
    WINDOW,
    World,
)

pytestmark = interpreted.MARKS


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's backend imported with the patch applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=("decode_attention",)):
        yield


@pytest.fixture(autouse=True)
def patched(applied: None) -> Iterator[Any]:
    """Each test starts with the patch on, nothing proven or declined."""
    ENGINE.apply(only=("decode_attention",))
    run = ENGINE.runs["decode_attention"]
    assert run.state == states.ACTIVE, run.reason
    assert run.port is not None
    assert run.port.module == patch.__name__
    run._decline_reason = ""
    yield run
    ENGINE.revert()


@pytest.fixture
def world(applied: None) -> World:
    return World()


def ours() -> Any:
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    return TritonAttnBackend.forward_decode


def stock_function() -> Any:
    return ENGINE.runs["decode_attention"].swaps[0].function


def call(world: World, layer: int, batch: Any, **options: Any) -> torch.Tensor:
    q, k, v = world.inputs(layer, batch)
    return ours()(world.backend, q, k, v, world.layers[layer], batch, **options)


@pytest.fixture
def stock_calls(world: World, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches of stock's kernel; nothing is launched."""
    from sglang.kernels.ops.attention import decode_attention

    calls: list[Any] = []

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args)

    counted.__module__ = decode_attention.__name__  # it stands for SGLang's
    for holder in (decode_attention, world.backend):
        monkeypatch.setattr(holder, "decode_attention_fwd", counted)
    return calls


@pytest.mark.parametrize("layer", [SLIDING, FULL], ids=["sliding", "full"])
@pytest.mark.parametrize("lengths", [[1], [100, WINDOW + 1, WINDOW]], ids=str)
def test_results_and_cache_are_those_of_stock(world, lengths: list[int], layer: int, patched):
    """Same numbers but for the order of addition; K and V stored in the same slots."""
    batch = world.decode(lengths)
    before = patched.counters.engaged
    inputs = world.inputs(layer, batch)
    found, pools, expected, stock_pools = world.both(
        ours(), stock_function(), layer, batch, *inputs
    )
    assert patched.counters.engaged == before + 1
    assert patched._decline_reason == ""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(pools, stock_pools)
    slots = world.backend.forward_metadata.swa_out_cache_loc
    if layer == FULL:
        slots = batch.out_cache_loc
    assert torch.equal(world.pool.get_key_buffer(layer)[slots], inputs[1])


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 60])
def test_a_sliding_layer_sees_the_keys_that_stock_gathers(world, length: int):
    """Neither one more nor one less: plain attention over the request's last keys, the rest is NaN."""
    batch = world.decode([length])
    seen = min(length, WINDOW)
    slots = world.allocator.full_to_swa_index_mapping[world.table[0].long()]
    assert world.backend.forward_metadata.window_kv_indices.tolist() == (
        slots[length - seen : length].tolist()
    )
    k_buffer, v_buffer = world.pool.get_kv_buffer(SLIDING)
    for buffer in (k_buffer, v_buffer):
        buffer[slots[: length - seen]] = torch.nan
        buffer[slots[length:]] = torch.nan
    q, k, v = world.inputs(SLIDING, batch)
    found = ours()(world.backend, q, k, v, world.layers[SLIDING], batch)
    keys, values = (
        buffer[slots[length - seen : length]].double().repeat_interleave(HEADS // 2, 1)
        for buffer in (k_buffer, v_buffer)
    )
    scores = torch.einsum("hd,nhd->hn", q.view(HEADS, -1).double(), keys) * 0.06
    expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
    torch.testing.assert_close(found.view(HEADS, -1).double(), expected, rtol=2e-3, atol=2e-3)


def test_the_grid_is_bounded_by_the_window_or_by_the_row_of_the_table(world, monkeypatch):
    seen = []
    launch = kernel.launch_decode_attention
    monkeypatch.setattr(
        kernel, "launch_decode_attention", lambda *args: (seen.append(args[7]), launch(*args))
    )
    batch = world.decode([100, 3])
    call(world, FULL, batch)
    call(world, SLIDING, batch)
    assert seen == [LONGEST, WINDOW]


def test_layers_that_share_kv_store_nothing(world):
    batch = world.decode([30, 20])
    before = [buffer.clone() for buffer in world.buffers()]
    q, _, _ = world.inputs(SLIDING, batch)
    ours()(world.backend, q, None, None, world.layers[SLIDING], batch, save_kv_cache=False)
    for buffer, kept in zip(world.buffers(), before, strict=True):
        assert torch.equal(buffer, kept)


def test_a_pool_that_a_draft_has_put_in_is_read(world):
    """For its step the backend has the target's pool."""
    batch = world.decode([20])
    other = World().pool
    inputs = world.inputs(FULL, batch)
    other.get_key_buffer(FULL).zero_()
    world.backend.token_to_kv_pool = other
    found = ours()(world.backend, *inputs, world.layers[FULL], batch, save_kv_cache=False)
    rows = world.table[0, :20].long()
    mean = other.get_value_buffer(FULL)[rows].float().mean(0)
    torch.testing.assert_close(
        found.view(HEADS, -1).float(), mean.expand(HEADS, -1), rtol=2e-3, atol=2e-3
    )


def test_stock_comes_back():
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    stock = stock_function()
    assert vars(TritonAttnBackend)["forward_decode"].__wrapped__ is stock
    ENGINE.revert()
    assert vars(TritonAttnBackend)["forward_decode"] is stock


def bidirectional() -> Any:
    from sglang.srt.layers.radix_attention import AttentionType

    return AttentionType.DECODER_BIDIRECTIONAL


DECLINED: dict[str, Any] = {
    "deterministic": lambda w: setattr(w.backend, "enable_deterministic", True),
    "MLA": lambda w: setattr(w.backend, "use_mla", True),
    "diffusion": lambda w: setattr(w.backend, "dllm_attention", object()),
    "a logit cap of": lambda w: setattr(w.layers[FULL], "logit_cap", 30.0),
    "xai": lambda w: setattr(w.layers[FULL], "xai_temperature_len", 100),
    "BIDIRECTIONAL": lambda w: setattr(w.layers[FULL], "attn_type", bidirectional()),
    "have a scale": lambda w: (setattr(w.layers[FULL], "k_scale", 1.0), setattr(w.layers[FULL], "k_scale_float", 1.0)),
    "heads of": lambda w: setattr(w.layers[FULL], "v_head_dim", 128),
    "KV indices": lambda w: setattr(w.backend.forward_metadata, "kv_indices", None),
    "k_buffer is": lambda w: w.pool.full_kv_pool.k_buffer.__setitem__(0, w.pool.full_kv_pool.k_buffer[0].to(torch.bfloat16)),
    "unified": lambda w: setattr(w.translator, "is_translating", True),
    "SimpleNamespace": lambda w: setattr(w.backend, "kv_index_translator", SimpleNamespace()),
    "layout is hnd": lambda w: setattr(w.pool.swa_kv_pool, "kv_cache_layout", "hnd"),
    "quantised": lambda w: setattr(w.pool.full_kv_pool, "quant_method", SimpleNamespace(needs_plain_kv_dequant_read=lambda: False)),
}  # fmt: skip


@pytest.mark.parametrize("named", DECLINED)
def test_declined_layers_reach_stock(world, named: str, stock_calls, patched):
    """Once, uncounted as engaged, the reason in the report."""
    batch = world.decode([9, 5])
    DECLINED[named](world)
    before = patched.counters.engaged
    call(world, FULL, batch, save_kv_cache=False)
    assert len(stock_calls) == 1
    assert patched.counters.engaged == before
    assert named in patched.full_reason()


def test_another_kernel_on_the_backend_is_called(world, patched):
    """Not gone round, whenever it was put there."""
    calls: list[Any] = []
    batch = world.decode([9, 5])
    call(world, FULL, batch, save_kv_cache=False)
    before = patched.counters.engaged
    world.backend.decode_attention_fwd = lambda *args, **options: calls.append(args)
    call(world, FULL, batch, save_kv_cache=False)
    assert len(calls) == 1
    assert patched.counters.engaged == before
    assert "decode_attention_fwd is not SGLang's" in patched.full_reason()


def test_a_cache_over_several_gpus_reaches_stock(world, monkeypatch, patched):
    """Which asks for the group of processes at once: there is none here."""
    batch = world.decode([9, 5])
    monkeypatch.setattr(world.backend, "dcp_size", 2)
    with pytest.raises(Exception, match=r"."):
        call(world, FULL, batch, save_kv_cache=False)
    assert "DCP" in patched.full_reason()


@pytest.mark.parametrize("name", ["score_mod", "aux_tensors", "sinks"])
def test_options_reach_stock(world, name: str, patched, monkeypatch):
    """With the very object."""
    seen: list[Any] = []
    monkeypatch.setattr(
        world.backend, "decode_attention_fwd", lambda *args, **options: seen.append(options[name])
    )
    batch, given = world.decode([9, 5]), object()
    call(world, FULL, batch, save_kv_cache=False, **{name: given})
    assert seen[0] is given
    assert name.removesuffix("_tensors").replace("aux", "score_mod") in patched.full_reason()


def test_fp8_caches_reach_stock(stock_calls, patched):
    world = World(dtype=torch.float8_e4m3fn)
    call(world, FULL, world.decode([9, 5]), save_kv_cache=False)
    assert "float8" in patched.full_reason()
    assert len(stock_calls) == 1


@pytest.mark.parametrize("what", ["backend", "pool", "full_kv_pool", "translator"])
def test_a_class_of_the_same_name_is_not_known(world, what: str, stock_calls, patched):
    batch = world.decode([9, 5])
    thing = world.pool.full_kv_pool if what == "full_kv_pool" else getattr(world, what)
    name = type(thing).__name__
    thing.__class__ = type(name, (type(thing),), {})
    call(world, FULL, batch, save_kv_cache=False)
    assert len(stock_calls) == 1
    assert name in patched.full_reason()


def test_a_drafts_slots_that_are_not_its_steps_are_stocks_to_refuse(world, patched):
    batch = world.decode([9, 5])
    batch.spec_info = object()
    world.backend.is_draft_runner = True
    call(world, SLIDING, batch)
    assert patched._decline_reason == ""
    metadata = world.backend.forward_metadata
    metadata.swa_out_cache_loc = metadata.swa_out_cache_loc.repeat(2)
    with pytest.raises(AssertionError, match="draft step swa_out_cache_loc"):
        call(world, SLIDING, batch)
    assert "draft" in patched.full_reason()


def test_what_was_not_run_before_a_capture_runs_stock(world, monkeypatch, stock_calls, patched):
    """Neither the counters' zeros nor the comparison may be made while a graph is captured."""
    common._verdicts.clear()
    batch = world.decode([9, 5])
    monkeypatch.setattr(common.custom_ops, "capturing", lambda: True)
    call(world, FULL, batch)
    assert len(stock_calls) == 1
    assert "before the capture" in patched.full_reason()
    monkeypatch.setattr(common.custom_ops, "capturing", lambda: False)
    call(world, FULL, batch)
    monkeypatch.setattr(common.custom_ops, "capturing", lambda: True)
    call(world, FULL, batch)
    assert len(stock_calls) == 1
    common._verdicts.clear()
    call(world, FULL, batch)
    assert len(stock_calls) == 2


def test_a_failed_check_keeps_stock(world, stock_calls, patched):
    batch = world.decode([9, 5])
    call(world, FULL, batch)
    for key in list(common._verdicts):
        common._verdicts[key] = "self-check: relative error 1"
    call(world, FULL, batch)
    assert len(stock_calls) == 1
    assert "self-check" in patched.full_reason()


def test_traced_code_sees_stock(world, stock_calls, patched):
    batch = world.decode([9, 5])
    inputs = world.inputs(FULL, batch)
    before = patched.counters.engaged
    torch._dynamo.reset()

    def traced() -> Any:
        return ours()(world.backend, *inputs, world.layers[FULL], batch, save_kv_cache=False)

    torch.compile(traced, backend="eager")()
    assert len(stock_calls) == 1
    assert patched.counters.engaged == before


def test_a_launch_that_fails_is_stocks(world, patched, monkeypatch):
    """It is not tried again at that batch; what was stored stays stored once."""
    launched = []

    def launch(*args: Any) -> None:
        launched.append(args)
        raise torch.cuda.OutOfMemoryError("no memory for the partial sums")

    monkeypatch.setattr(kernel, "launch_decode_attention", launch)
    batch = world.decode([3, 40])
    inputs = world.inputs(FULL, batch)
    before = patched.counters.engaged
    found, pools, expected, stock_pools = world.both(ours(), stock_function(), FULL, batch, *inputs)
    assert torch.equal(found, expected)
    assert torch.equal(pools, stock_pools)
    assert patched.state == states.FAILED
    assert "no memory for the partial sums" in patched.reason
    world.both(ours(), stock_function(), FULL, batch, *inputs)
    assert len(launched) == 1
    assert patched.counters.engaged == before
    assert patched._decline_reason == patched.reason
