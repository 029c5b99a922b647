"""The attention patch on SGLang's real triton backend and KV pools, on the CPU.

Both stock's kernels and ours run in Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels.attention import extend as kernel
from gemma4_turbo.kernels.attention import window as window_indices
from gemma4_turbo.ports.v0_5_23.attention import extend_attention as patch
from gemma4_turbo.ports.v0_5_23.attention.triton_backend import MODULE
from gemma4_turbo.runtime import custom_ops
from tests.cpu import interpreted
from tests.cpu.conftest import patched_sglang
from tests.cpu.ports.v0_5_23.triton_world import FULL, HEADS, SLIDING, WINDOW, World
from tests.extend_inputs import relative_error

pytestmark = interpreted.MARKS
BOTH = pytest.mark.parametrize("layer", [SLIDING, FULL], ids=["sliding", "full"])


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's modules imported with the patch applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=("extend_attention",)):
        yield


@pytest.fixture(autouse=True)
def patched(applied: None) -> Iterator[Any]:
    """Each test starts with the patch on and nothing declined."""
    ENGINE.apply(only=("extend_attention",))
    assert run().state == states.ACTIVE, run().reason
    assert run().port.module == patch.__name__
    run()._decline_reason = ""
    yield run()
    ENGINE.revert()


@pytest.fixture
def world(applied: None) -> World:
    return World()


def run() -> Any:
    return ENGINE.runs["extend_attention"]


def ours() -> Any:
    return sys.modules[MODULE].TritonAttnBackend.forward_extend


def stock() -> Any:
    return ours().__wrapped__


def compare(world: World, layer: int, batch: Any, *inputs: Any, **options: Any) -> torch.Tensor:
    """Output as stock's up to rounding, the KV pools exactly; returns ours."""
    found, pools, expected, stock_pools = world.both(
        ours(), stock(), layer, batch, *inputs, **options
    )
    assert relative_error(found, expected) < 2e-3
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride()
    assert torch.equal(pools, stock_pools)
    assert run()._decline_reason == ""
    return found


def test_installed_and_put_back():
    """Also where another module has the function by its name."""
    module = sys.modules[MODULE]
    reader = importlib.import_module("sglang.srt.dllm.attention")
    assert stock().__module__ == MODULE
    assert module.update_sliding_window_buffer.__wrapped__.__module__ == MODULE
    assert reader.update_sliding_window_buffer is module.update_sliding_window_buffer
    ENGINE.revert()
    assert not hasattr(ours(), "__wrapped__")
    for holder in (module, reader):
        assert not hasattr(holder.update_sliding_window_buffer, "__wrapped__")


@BOTH
@pytest.mark.parametrize(("new", "old"), [([17, 1, 20], [0, 0, 0]), ([9, 0, 18], [40, 3, 0])])
def test_prefill(world, layer, new, old):
    before = run().counters.engaged
    batch = world.extend(new, old)
    compare(world, layer, batch, *world.inputs(layer, batch))
    assert run().counters.engaged == before + 1


@BOTH
def test_verification(world, layer):
    batch = world.verify([50, 3, 17])
    compare(world, layer, batch, *world.inputs(layer, batch))


@BOTH
def test_image_tokens_see_each_other(world, layer):
    """As Gemma 4's multimodal model sets the masks; as far as stock's own blocks let them."""
    new, old = [40, 12], [5, 0]
    batch = world.extend(new, old)
    masks = []
    for length, cached in zip(new, old, strict=True):
        mask = torch.ones(length, length + cached, dtype=torch.bool).tril(cached)
        mask[2:8, cached + 2 : cached + 8] = True
        if length > 34:
            mask[30:35, cached + 30 : cached + 35] = True  # across a block of 32
        masks.append(mask.flatten())
    metadata = world.backend.forward_metadata
    metadata.custom_mask = torch.cat(masks)
    sizes = torch.tensor([0, *(mask.numel() for mask in masks)])
    metadata.mask_indptr = sizes.cumsum(0)
    compare(world, layer, batch, *world.inputs(layer, batch))


@BOTH
def test_layers_that_share_kv(world, layer):
    """K and V None: the new tokens' rows come from the pool, where an earlier layer put them."""
    batch = world.extend([20, 6], [30, 0])
    q, _, _ = world.inputs(layer, batch)
    compare(world, layer, batch, q, None, None, save_kv_cache=False)


@BOTH
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_breakable_graphs_output_is_written(world, layer, shared):
    """Its batch has more slots of sliding layers than tokens; what it hands in is what comes back."""
    batch = world.extend([9, 4], [30, 0])
    metadata = world.backend.forward_metadata
    padding = torch.zeros(3, dtype=torch.int64)
    metadata.swa_out_cache_loc = torch.cat([metadata.swa_out_cache_loc, padding])
    q, k, v = world.inputs(layer, batch)
    given = (q, None, None) if shared else (q, k, v)
    handed = torch.full((q.shape[0] + 3, q.shape[1]), 7.0, dtype=q.dtype)
    batch._attn_output = handed[: q.shape[0]]
    found = ours()(
        world.backend, *given, world.layers[layer], batch, save_kv_cache=not shared
    ).clone()
    assert torch.equal(handed[: q.shape[0]], found)
    assert bool((handed[q.shape[0] :] == 7.0).all())
    assert run()._decline_reason == ""
    batch._attn_output = None
    expected = stock()(world.backend, *given, world.layers[layer], batch, save_kv_cache=not shared)
    assert relative_error(found, expected) < 2e-3


def test_an_output_of_another_kind_is_stocks(world):
    batch = world.extend([5], [0])
    inputs = world.inputs(FULL, batch)
    for handed in (inputs[0].float(), torch.empty(inputs[0].shape[::-1]).half().t()):
        run()._decline_reason = ""
        batch._attn_output = handed
        calls: list[Any] = []
        forward = patch._forward(run(), lambda *args, calls=calls: calls.append(args))
        forward(world.backend, *inputs, world.layers[FULL], batch)
        assert len(calls) == 1
        assert "the output is to be" in run().full_reason()


def test_the_kernel_is_what_runs(world, monkeypatch: pytest.MonkeyPatch):
    batch = world.extend([5], [0])
    monkeypatch.setattr(kernel, "launch_extend", lambda *args, out, **rest: out.fill_(7.0))
    out = ours()(world.backend, *world.inputs(FULL, batch), world.layers[FULL], batch)
    assert (out == 7.0).all()


# -- the window ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [WINDOW - 1, WINDOW, WINDOW + 1, 60])
def test_a_sliding_layer_sees_its_window_and_itself(world, cached: int):
    """By hand: a query sees the window's keys before it and its own, and nothing else."""
    new = 3
    batch = world.extend([new], [cached])
    q, k, v = world.inputs(SLIDING, batch)
    found = ours()(world.backend, q, k, v, world.layers[SLIDING], batch).view(new, HEADS, -1)
    slots = world.allocator.full_to_swa_index_mapping[world.table[0, : cached + new].long()]
    keys, values = (
        buffer[slots].double().repeat_interleave(HEADS // 2, 1)
        for buffer in world.pool.get_kv_buffer(SLIDING)
    )
    for m in range(new):
        last = cached + m + 1
        first = max(0, last - 1 - WINDOW)
        query = q[m].view(HEADS, -1).double()
        scores = torch.einsum("hd,nhd->hn", query, keys[first:last]) * 0.06
        expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), values[first:last])
        torch.testing.assert_close(found[m].double(), expected, rtol=2e-3, atol=2e-3)
    expected = stock()(world.backend, q, k, v, world.layers[SLIDING], batch)
    assert relative_error(found.flatten(1), expected) < 2e-3


class Launches:
    """Stands in for kernels where only the host's part is in question."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("lengths", [[WINDOW - 1, WINDOW, WINDOW + 1], [40, 3, 0]], ids=str)
def test_the_windows_slots_are_stocks(world, lengths):
    """Metadata as stock's, but for the length of the tensor."""
    new = [9, 4, 1]
    world.extend(new, lengths)
    mine = world.backend.forward_metadata
    ENGINE.revert()
    world.backend.window_kv_indptr = torch.zeros_like(world.backend.window_kv_indptr)
    world.extend(new, lengths)
    stocks = world.backend.forward_metadata
    assert torch.equal(mine.window_kv_indptr, stocks.window_kv_indptr)
    assert torch.equal(mine.window_kv_offsets, stocks.window_kv_offsets)
    assert mine.window_kv_offsets.dtype == stocks.window_kv_offsets.dtype
    entries = len(stocks.window_kv_indices)
    assert entries == sum(min(length, WINDOW) for length in lengths)
    assert torch.equal(mine.window_kv_indices[:entries], stocks.window_kv_indices)
    assert mine.window_kv_indices.shape == (3 * WINDOW,)


def window_arguments(world: World, lengths: list[int], **others: Any) -> dict[str, Any]:
    return {
        "window_kv_indptr": torch.zeros(9, dtype=torch.int32),
        "translator": world.translator,
        "plan": None,
        "req_pool_indices": torch.arange(len(lengths)),
        "sliding_window_size": WINDOW,
        "seq_lens": torch.tensor(lengths),
        "bs": len(lengths),
        "device": "cpu",
        "token_to_kv_pool": world.pool,
        **others,
    }


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_window_in_a_graphs_buffers(world, dtype):
    """The buffer that a CUDA graph holds is written, as by stock; a slot of -1 stays -1."""
    function = sys.modules[MODULE].update_sliding_window_buffer
    world.table[0, 39] = -1
    results = []
    for call in (function, function.__wrapped__):
        indices = torch.full((200,), -5)
        lengths = torch.tensor([40, 1, 15], dtype=dtype)
        got = call(
            **window_arguments(world, [40, 1, 15], seq_lens=lengths, window_kv_indices=indices)
        )
        assert got[1] is indices
        assert int(indices[14]) == -1
        results.append(got)
    for mine, stocks in zip(*results, strict=True):
        assert torch.equal(mine, stocks)
        assert mine.dtype == stocks.dtype


def test_a_pool_without_a_sliding_part_has_plain_slots(world):
    """One pool for all layers: the rows hold its slots."""
    function = sys.modules[MODULE].update_sliding_window_buffer
    pool = world.pool.full_kv_pool
    mine = function(**window_arguments(world, [40], token_to_kv_pool=pool))
    assert mine[1].tolist() == world.table[0, 40 - WINDOW : 40].tolist()
    assert run()._decline_reason == ""


def test_window_without_host_reads(world, monkeypatch: pytest.MonkeyPatch):
    """From tensors that have no elements a host could read."""
    monkeypatch.setattr(window_indices, "_window_kernel", Launches())
    world.pool.full_to_swa_index_mapping = torch.empty(401, dtype=torch.int64, device="meta")
    world.translator.req_to_token = world.table.to("meta")

    @functools.wraps(sys.modules[MODULE].update_sliding_window_buffer)
    def never(*args: Any, **options: Any) -> None:
        pytest.fail("stock's function reads on the host")

    meta = {
        "window_kv_indptr": torch.zeros(9, dtype=torch.int32, device="meta"),
        "req_pool_indices": torch.ones(3, dtype=torch.int64, device="meta"),
        "seq_lens": torch.ones(3, dtype=torch.int64, device="meta"),
    }
    got: Any = patch.window(run(), never, patch._rows)(**window_arguments(world, [1, 1, 1], **meta))
    assert got[0].is_meta


@BOTH
@pytest.mark.parametrize("new", [[20, 3], [2, 2]])
def test_attention_without_host_reads(world, monkeypatch: pytest.MonkeyPatch, layer, new):
    """The launches of both ways take tensors without elements: nothing looks into them."""
    launches = Launches()
    for name in ("_dense_kernel", "_split_kernel", "_combine_kernel"):
        monkeypatch.setattr(kernel, name, launches)
    batch = world.extend(new, [40, 90])
    metadata = world.backend.forward_metadata
    for name, value in list(vars(metadata).items()):
        if isinstance(value, torch.Tensor):
            setattr(metadata, name, value.to("meta"))
    for part in (world.pool.full_kv_pool, world.pool.swa_kv_pool):
        part.k_buffer = [buffer.to("meta") for buffer in part.k_buffer]
        part.v_buffer = [buffer.to("meta") for buffer in part.v_buffer]
    tensors = [tensor.to("meta") for tensor in world.inputs(layer, batch)]
    out = ours()(world.backend, *tensors, world.layers[layer], batch, save_kv_cache=False)
    assert out.is_meta
    assert launches.count in (1, 2)
    assert run()._decline_reason == ""


UNKNOWN: dict[str, Any] = {
    "unified": lambda w: setattr(w.translator, "is_translating", True),
    "SWAKVPool": lambda w: setattr(w.pool, "__class__", type("SWAKVPool", (type(w.pool),), {})),
    "KVIndexTranslator": lambda w: setattr(w.translator, "__class__", type("KVIndexTranslator", (type(w.translator),), {})),
    "lengths for": lambda w: None,
}  # fmt: skip


@pytest.mark.parametrize("named", UNKNOWN)
def test_slots_that_are_not_known_are_stocks_to_find(world, named: str):
    UNKNOWN[named](world)
    calls: list[Any] = []

    @functools.wraps(sys.modules[MODULE].update_sliding_window_buffer)
    def stocks(**options: Any) -> None:
        calls.append(options)

    count = {"bs": 1} if named == "lengths for" else {}
    patch.window(run(), stocks, patch._rows)(**window_arguments(world, [20, 5], **count))
    assert len(calls) == 1
    assert named in run().full_reason()


# -- what is decided before anything is done -------------------------------------------------------------


def bidirectional() -> Any:
    from sglang.srt.layers.radix_attention import AttentionType

    return AttentionType.DECODER_BIDIRECTIONAL


@pytest.mark.parametrize(
    ("where", "name", "value", "told"),
    [
        ("layer", "logit_cap", 30.0, "logit cap"),
        ("layer", "logit_capping_method", "none", "logit cap's method"),
        ("layer", "xai_temperature_len", 8, "xai temperature"),
        ("layer", "k_scale", torch.ones(1), "scales of the KV cache"),
        ("layer", "is_cross_attention", True, "cross attention"),
        ("layer", "attn_type", bidirectional, "BIDIRECTIONAL"),
        ("layer", "v_head_dim", 64, "head sizes 512 and 64"),
        ("layer", "scaling", -1.0, "sm_scale"),
        ("backend", "enable_deterministic", True, "deterministic"),
        ("backend", "use_mla", True, "latent"),
        ("backend", "dcp_size", 2, "DCP"),
        ("backend", "dllm_attention", object(), "diffusion"),
        ("backend", "use_verify_splitkv", True, "verification"),
        ("backend", "use_verify_shared_kv", True, "verification"),
        ("backend", "extend_attention_fwd", print, "extend_attention_fwd is not SGLang's"),
        ("backend", "kv_index_translator", SimpleNamespace(), "SimpleNamespace"),
        ("backend", "token_to_kv_pool", SimpleNamespace(), "SimpleNamespace"),
        ("translator", "is_translating", True, "unified"),
        ("full", "kv_cache_layout", "hnd", "layout is hnd"),
        ("full", "quant_method", None, "quantised"),
    ],
)
def test_declined_calls_reach_stock(world, monkeypatch, where, name, value, told):
    """With the very arguments, before anything is stored; the report says why."""
    batch = world.extend([5], [0])
    calls: list[Any] = []
    forward = patch._forward(run(), lambda *arguments: calls.append(arguments))
    thing = {
        "layer": world.layers[FULL],
        "backend": world.backend,
        "translator": world.translator,
        "full": world.pool.full_kv_pool,
    }[where]
    monkeypatch.setattr(thing, name, value() if value is bidirectional else value)
    inputs = world.inputs(FULL, batch)
    before = [buffer.clone() for buffer in world.buffers()]
    forward(world.backend, *inputs, world.layers[FULL], batch)
    ((backend, *tensors, layer, passed, save, sinks, score_mod, aux),) = calls
    assert backend is world.backend
    assert all(a is b for a, b in zip(tensors, inputs, strict=True))
    assert (layer, passed, save) == (world.layers[FULL], batch, True)
    assert (sinks, score_mod, aux) == (None, None, None)
    assert told in run().full_reason()
    for buffer, kept in zip(world.buffers(), before, strict=True):
        assert torch.equal(buffer, kept)


@pytest.mark.parametrize(
    ("place", "name", "told"),
    [(-3, "sinks", "sinks"), (-2, "score_mod", "score_mod"), (-1, "aux_tensors", "score_mod")],
)
def test_options_reach_stock(world, place, name, told):
    calls: list[Any] = []
    forward = patch._forward(run(), lambda *arguments: calls.append(arguments))
    batch, given = world.extend([5], [0]), object()
    inputs = world.inputs(FULL, batch)
    forward(world.backend, *inputs, world.layers[FULL], batch, **{name: given})
    assert calls[0][place] is given
    assert told in run().full_reason()


def test_other_caches_reach_stock(world):
    calls: list[Any] = []
    forward = patch._forward(run(), lambda *arguments: calls.append(arguments))
    batch = world.extend([5], [0])
    at = world.pool.full_kv_pool
    at.k_buffer[0] = at.k_buffer[0].to(torch.float8_e5m2)
    forward(world.backend, *world.inputs(FULL, batch), world.layers[FULL], batch)
    assert len(calls) == 1
    assert "float8_e5m2" in run().full_reason()


@pytest.mark.parametrize(
    ("name", "shared", "told"),
    [
        ("window_kv_indices", False, "no KV indices"),
        ("swa_out_cache_loc", True, "no slots for sliding layers"),
    ],
)
def test_a_layer_without_metadata_reaches_stock(world, name, shared, told):
    """What comes of it is stock's to say."""
    batch = world.extend([5], [7])
    setattr(world.backend.forward_metadata, name, None)
    q, k, v = world.inputs(SLIDING, batch)
    given = (q, None, None) if shared else (q, k, v)
    with pytest.raises(AssertionError):
        ours()(world.backend, *given, world.layers[SLIDING], batch, save_kv_cache=False)
    assert told in run().full_reason()


def test_a_backend_of_the_same_name_is_not_known(world):
    batch = world.extend([20], [5])
    world.backend.__class__ = type("TritonAttnBackend", (type(world.backend),), {})
    before = run().counters.engaged
    ours()(world.backend, *world.inputs(FULL, batch), world.layers[FULL], batch)
    assert run().counters.engaged == before
    assert "TritonAttnBackend" in run().full_reason()


class Gathers(TorchDispatchMode):
    """Counts look-ups of rows by their slots."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.index.Tensor
        return function(*args, **(kwargs or {}))


@BOTH
def test_nothing_is_gathered_twice(world, layer, monkeypatch: pytest.MonkeyPatch):
    """A KV-shared layer, on a device that the kernel does not take: what stock gathers."""
    batch = world.extend([20, 6], [30, 0])
    q, _, _ = world.inputs(layer, batch)
    arguments = world.backend, q, None, None, world.layers[layer], batch, False
    with Gathers() as theirs:
        expected = stock()(*arguments)
    with Gathers() as taken:
        ours()(*arguments)
    assert taken.count == theirs.count > 0
    monkeypatch.setattr(kernel, "device_unfit", lambda device: "not a Hopper GPU")
    with Gathers() as declined:
        found = ours()(*arguments)
    assert declined.count == theirs.count
    assert torch.equal(found, expected)
    assert "Hopper" in run().full_reason()


def test_stocks_query_block():
    """Read from stock's own table: on this machine the one of GPUs without a row."""
    assert patch.STOCK.query_block(128) == 64
    assert patch.STOCK.query_block(512) == 32


def test_verify_passes():
    checks = patch.verify(run(), "cpu")
    assert checks
    assert all(check.passed for check in checks)


# -- what raises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("where", ["launch_extend", "unfit"])
def test_a_launch_that_raises_is_stocks(world, where, shared, monkeypatch: pytest.MonkeyPatch):
    """Once per configuration; K and V are in the pools as stock stores them."""
    tries: list[Any] = []

    def failing(*given: Any, **named: Any) -> Any:
        tries.append(given)
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernel, where, failing)
    batch = world.extend([9, 0, 12], [40, 3, 0])
    q, k, v = world.inputs(FULL, batch)
    given = (q, None, None) if shared else (q, k, v)
    before = run().counters.engaged
    for _ in range(2):
        found, pools, expected, stock_pools = world.both(ours(), stock(), FULL, batch, *given)
        assert torch.equal(found, expected)
        assert torch.equal(pools, stock_pools)
    assert len(tries) == 1
    assert run().counters.engaged == before
    assert run().state == states.FAILED
    assert "shared memory" in run().reason


def test_a_gathering_that_raises_is_stocks(world, monkeypatch: pytest.MonkeyPatch):
    tries: list[Any] = []

    def failing(*given: Any) -> Any:
        tries.append(given)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(window_indices, "launch_window", failing)
    for _ in range(2):
        world.extend([9, 4, 1], [40, 3, 0])
    assert len(world.backend.forward_metadata.window_kv_indices) == WINDOW + 3
    assert len(tries) == 1
    assert run().state == states.FAILED


def test_traced_code_sees_stock(world):
    batch = world.extend([5], [0])
    inputs = world.inputs(FULL, batch)
    calls: list[Any] = []
    forward = patch._forward(run(), lambda *arguments: calls.append(arguments) or arguments[1])
    before = run().counters.engaged
    torch._dynamo.reset()
    torch.compile(
        lambda: forward(world.backend, *inputs, world.layers[FULL], batch), backend="eager"
    )()
    assert len(calls) == 1
    assert run().counters.engaged == before
    assert run()._decline_reason == custom_ops.TRACED
    run().declined("of a call that is not traced")
    assert run()._decline_reason == "of a call that is not traced"
    run().declined("a later one")
    assert run()._decline_reason == "of a call that is not traced"
