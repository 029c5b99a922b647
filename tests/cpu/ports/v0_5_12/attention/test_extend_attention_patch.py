"""The attention patch on SGLang's real triton backend and KV pools, on the CPU.

Both stock's kernels and ours run in Triton's interpreter.
"""

from __future__ import annotations

import functools
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
from gemma4_turbo.ports.v0_5_12.attention import extend_attention as patch
from tests.cpu.conftest import patched_sglang
from tests.extend_inputs import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")

HEADS = 4
SLIDING, FULL = 0, 1  # layers: 2 KV heads of 128, 1 of 256
WINDOW = 16  # the layer's; the backend's is one less, as in Gemma 4
DRAFT = 4


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's modules imported with the patch applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=("extend_attention",)):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    """Each test starts with the patch on and nothing declined."""
    ENGINE.apply(only=("extend_attention",))
    ENGINE.runs["extend_attention"]._decline_reason = ""
    assert ENGINE.runs["extend_attention"].state == states.ACTIVE
    yield
    ENGINE.revert()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(sys.modules[patch.BACKEND], "get_attention_tp_size", lambda: 1)
    return World()


class World:
    """A backend, its pools with 3 requests of up to 100 tokens, and two layers."""

    def __init__(self) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool, SWATokenToKVPoolAllocator

        self.generator = torch.Generator().manual_seed(0)
        self.pool = SWAKVPool(
            size=400,
            size_swa=350,
            page_size=1,
            dtype=torch.float16,
            head_num=1,
            head_dim=256,
            swa_attention_layer_ids=[SLIDING],
            full_attention_layer_ids=[FULL],
            enable_kvcache_transpose=False,
            device="cpu",
            swa_head_num=2,
            swa_head_dim=128,
            swa_v_head_dim=128,
            v_head_dim=256,
        )
        for layer in (SLIDING, FULL):
            for buffer in self.pool.get_kv_buffer(layer):
                buffer.normal_(generator=self.generator)
        self.allocator = SWATokenToKVPoolAllocator(
            400, 350, 1, torch.float16, "cpu", self.pool, False
        )
        slots = torch.randperm(340, generator=self.generator)[:300] + 1
        self.allocator.full_to_swa_index_mapping[slots] = (
            torch.randperm(340, generator=self.generator)[:300] + 1
        )
        self.table = slots.view(3, 100).int()
        self.runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(size=8, req_to_token=self.table),
            sliding_window_size=WINDOW - 1,
            token_to_kv_pool_allocator=self.allocator,
            token_to_kv_pool=self.pool,
            device="cpu",
            gpu_id=0,
            server_args=SimpleNamespace(
                speculative_num_draft_tokens=DRAFT,
                speculative_num_steps=3,
                triton_attention_num_kv_splits=8,
                disable_cuda_graph=False,
                chunked_prefill_size=4096,
                enable_deterministic_inference=False,
                triton_attention_split_tile_size=None,
            ),
            model_config=SimpleNamespace(
                attention_arch=None,
                num_attention_heads=HEADS,
                get_num_kv_heads=lambda size: 1,
                v_head_dim=256,
                swa_v_head_dim=128,
                context_len=100,
                is_encoder_decoder=False,
            ),
            hybrid_gdn_config=None,
            kimi_linear_config=None,
            linear_attn_model_spec=None,
        )
        self.backend = sys.modules[patch.BACKEND].TritonAttnBackend(self.runner)
        self.layers = [
            RadixAttention(HEADS, 128, 1.0 / 11, 2, SLIDING, sliding_window_size=WINDOW),
            RadixAttention(HEADS, 256, 1.0 / 16, 1, FULL),
        ]

    def extend(self, new: list[int], old: list[int]) -> Any:
        """A prefill of ``new`` tokens on ``old`` cached ones, its metadata built."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        count = len(new)
        batch = self._batch(ForwardMode.EXTEND, new, old)
        batch.extend_prefix_lens = torch.tensor(old)
        batch.extend_prefix_lens_cpu = old
        batch.extend_seq_lens = torch.tensor(new)
        batch.extend_seq_lens_cpu = new
        batch.seq_lens = batch.extend_seq_lens + batch.extend_prefix_lens
        assert batch.batch_size == count
        self.backend.init_forward_metadata(batch)
        return batch

    def verify(self, old: list[int]) -> Any:
        """A verification of a draft tree after ``old`` tokens."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        batch = self._batch(ForwardMode.TARGET_VERIFY, [DRAFT] * len(old), old)
        batch.seq_lens = torch.tensor(old)
        parts = []
        for length in old:
            tree = torch.rand(DRAFT, length + DRAFT, generator=self.generator) < 0.5
            tree[:, length:] |= torch.eye(DRAFT, dtype=torch.bool)
            parts.append(tree.flatten())
        batch.spec_info = SimpleNamespace(custom_mask=torch.cat(parts), draft_token_num=DRAFT)
        self.backend.init_forward_metadata(batch)
        return batch

    def _batch(self, mode: Any, new: list[int], old: list[int]) -> Any:
        places = [self.table[i, o : o + n] for i, (n, o) in enumerate(zip(new, old, strict=True))]
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(new),
            req_pool_indices=torch.arange(len(new)),
            spec_info=None,
            token_to_kv_pool=self.pool,
            out_cache_loc=torch.cat(places).long(),
            tokens=sum(new),
        )

    def inputs(self, layer: int, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q contiguous, k and v slices of the projection's result."""
        attention = self.layers[layer]
        dim, kv_heads = attention.head_dim, attention.tp_k_head_num
        sizes = [HEADS * dim, kv_heads * dim, kv_heads * dim]
        qkv = torch.randn(batch.tokens, sum(sizes), generator=self.generator).half()
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in qkv.split(sizes, -1))
        return q.contiguous(), k, v

    def both(self, layer: int, batch: Any, *arguments: Any, **keywords: Any) -> list[torch.Tensor]:
        """Outputs of ours and of stock, the pools put back in between."""
        kept = [t.clone() for i in (SLIDING, FULL) for t in self.pool.get_kv_buffer(i)]
        outputs = []
        for call in (self.backend.forward_extend, stock_forward(self.backend)):
            buffers = [t for i in (SLIDING, FULL) for t in self.pool.get_kv_buffer(i)]
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
            outputs.append(call(*arguments, self.layers[layer], batch, **keywords))
            self.stored = [t.clone() for t in buffers]
            outputs.append(torch.cat([t.flatten() for t in self.stored]))
        return outputs


class Launches:
    """Stands in for kernels where only the host's part is in question."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        self.count += 1


def stock_forward(backend: Any) -> Any:
    """Stock's method, bound."""
    return type(backend).forward_extend.__wrapped__.__get__(backend)


def run() -> Any:
    return ENGINE.runs["extend_attention"]


def test_installed_and_put_back():
    module = sys.modules[patch.BACKEND]
    assert module.TritonAttnBackend.forward_extend.__wrapped__.__module__ == patch.BACKEND
    for name in ("update_sliding_window_buffer", "update_sliding_window_buffer_cuda_graph"):
        assert getattr(module, name).__wrapped__.__name__ == name
    ENGINE.revert()
    assert not hasattr(module.TritonAttnBackend.forward_extend, "__wrapped__")
    assert not hasattr(module.update_sliding_window_buffer, "__wrapped__")


@pytest.mark.parametrize("layer", [SLIDING, FULL])
@pytest.mark.parametrize(("new", "old"), [([37, 1, 20], [0, 0, 0]), ([9, 0, 30], [40, 3, 0])])
def test_prefill(world, layer, new, old):
    """Output as stock's up to rounding, KV pool exactly; counted as engaged."""
    batch = world.extend(new, old)
    before = run().counters.engaged
    ours, our_pool, stock, stock_pool = world.both(layer, batch, *world.inputs(layer, batch))
    assert relative_error(ours, stock) < 2e-3
    assert ours.shape == stock.shape
    assert ours.stride() == stock.stride()
    assert torch.equal(our_pool, stock_pool)
    assert run().counters.engaged == before + 1
    assert run()._decline_reason == ""


@pytest.mark.parametrize("layer", [SLIDING, FULL])
def test_verification(world, layer):
    batch = world.verify([50, 3, 17])
    ours, _, stock, _ = world.both(layer, batch, *world.inputs(layer, batch))
    assert relative_error(ours, stock) < 2e-3
    assert run()._decline_reason == ""


@pytest.mark.parametrize("layer", [SLIDING, FULL])
def test_image_tokens_see_each_other(world, layer):
    """As Gemma 4's multimodal model sets the masks; as far as stock's own blocks let them."""
    new, old = [70, 20], [5, 0]
    batch = world.extend(new, old)
    masks = []
    for length, cached in zip(new, old, strict=True):
        mask = torch.ones(length, length + cached, dtype=torch.bool).tril(cached)
        mask[8:18, cached + 8 : cached + 18] = True
        if length > 66:
            mask[60:67, cached + 60 : cached + 67] = True  # across a block of 32 and one of 64
        masks.append(mask.flatten())
    metadata = world.backend.forward_metadata
    metadata.custom_mask = torch.cat(masks)
    sizes = torch.tensor([0, *(mask.numel() for mask in masks)], dtype=torch.int32)
    metadata.mask_indptr = sizes.cumsum(0).int()
    ours, _, stock, _ = world.both(layer, batch, *world.inputs(layer, batch))
    assert relative_error(ours, stock) < 2e-3
    assert run()._decline_reason == ""


@pytest.mark.parametrize("layer", [SLIDING, FULL])
def test_layers_that_share_kv(world, layer):
    """K and V None: the new tokens' rows come from the pool, where an earlier layer put them."""
    batch = world.extend([20, 6], [30, 0])
    q, _, _ = world.inputs(layer, batch)
    ours, _, stock, _ = world.both(layer, batch, q, None, None, save_kv_cache=False)
    assert relative_error(ours, stock) < 2e-3


def test_the_kernel_is_what_runs(world, monkeypatch: pytest.MonkeyPatch):
    batch = world.extend([5], [0])
    monkeypatch.setattr(kernel, "launch_extend", lambda *args, out, **rest: out.fill_(7.0))
    out = world.backend.forward_extend(*world.inputs(FULL, batch), world.layers[FULL], batch)
    assert (out == 7.0).all()


def test_window_without_host_reads(world, monkeypatch: pytest.MonkeyPatch):
    """Metadata as stock's, from tensors that have no elements a host could read."""
    ours = world.extend([9, 4, 1], [40, 3, 0])
    mine = world.backend.forward_metadata
    ENGINE.revert()
    world.backend.window_kv_indptr = torch.zeros_like(world.backend.window_kv_indptr)
    world.extend([9, 4, 1], [40, 3, 0])
    stock = world.backend.forward_metadata
    assert torch.equal(mine.window_kv_indptr, stock.window_kv_indptr)
    assert torch.equal(mine.window_kv_offsets, stock.window_kv_offsets)
    entries = len(stock.window_kv_indices)
    assert entries == 18
    assert torch.equal(mine.window_kv_indices[:entries], stock.window_kv_indices)
    assert mine.window_kv_indices.shape == (3 * (WINDOW - 1),)
    assert ours.batch_size == 3

    monkeypatch.setattr(window_indices, "_window_kernel", Launches())
    world.allocator._kvcache.full_to_swa_index_mapping = torch.empty(401, dtype=torch.int64)

    @functools.wraps(sys.modules[patch.BACKEND].update_sliding_window_buffer)
    def never(*args: Any) -> None:
        pytest.fail("stock's function reads on the host")

    got = patch.window(run(), never, patch._rows)(
        torch.zeros(9, dtype=torch.int32, device="meta"),
        world.table.to("meta"),
        WINDOW - 1,
        torch.ones(3, dtype=torch.int64, device="meta"),
        torch.ones(3, dtype=torch.int64, device="meta"),
        3,
        "meta",
        world.allocator,
    )
    assert got[0].is_meta


@pytest.mark.parametrize("layer", [SLIDING, FULL])
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
    pool = SimpleNamespace(
        get_key_buffer=lambda i: world.pool.get_key_buffer(i).to("meta"),
        get_value_buffer=lambda i: world.pool.get_value_buffer(i).to("meta"),
    )
    batch.token_to_kv_pool = pool
    tensors = [tensor.to("meta") for tensor in world.inputs(layer, batch)]
    out = world.backend.forward_extend(*tensors, world.layers[layer], batch, save_kv_cache=False)
    assert out.is_meta
    assert launches.count in (1, 2)


def test_window_in_a_graphs_buffers(world):
    """The buffer that a CUDA graph holds is written, as by stock."""
    ours = sys.modules[patch.BACKEND].update_sliding_window_buffer_cuda_graph
    results = []
    for function in (ours, ours.__wrapped__):
        indices = torch.full((200,), -5)
        got = function(
            torch.zeros(9, dtype=torch.int32),
            indices,
            world.table,
            WINDOW - 1,
            torch.tensor([40, 1, 15]),
            torch.arange(3),
            3,
            world.allocator,
        )
        assert got[1] is indices
        results.append(got)
    for mine, stock in zip(*results, strict=True):
        assert torch.equal(mine, stock)
        assert mine.dtype == stock.dtype


def test_an_unknown_allocator_keeps_stock(world):
    """One that translates slots in a way of its own."""
    other = SimpleNamespace(translate_loc_from_full_to_swa=lambda x: (x + 1).int())
    function = sys.modules[patch.BACKEND].update_sliding_window_buffer
    indptr = torch.zeros(9, dtype=torch.int32)
    arguments = (world.table, WINDOW - 1, torch.tensor([20]), torch.arange(1), 1, "cpu", other)
    got = function(indptr, *arguments)
    assert got[1].tolist() == (world.table[0, 5:20] + 1).tolist()
    assert "SimpleNamespace" in run().full_reason()


@pytest.mark.parametrize(
    ("where", "name", "value", "told"),
    [
        ("layer", "logit_cap", 30.0, "logit cap"),
        ("layer", "xai_temperature_len", 8, "xai temperature"),
        ("layer", "k_scale", torch.ones(1), "scales of the KV cache"),
        ("layer", "is_cross_attention", True, "cross attention"),
        ("layer", "v_head_dim", 64, "head sizes 256 and 64"),
        ("backend", "enable_deterministic", True, "deterministic"),
        ("backend", "use_mla", True, "latent"),
        ("backend", "extend_attention_fwd", print, "extend_attention_fwd is not SGLang's"),
        ("layer", "scaling", -1.0, "sm_scale"),
    ],
)
def test_declined_calls_reach_stock(world, monkeypatch, where, name, value, told):
    """With the very arguments, before anything is stored; the report says why."""
    batch = world.extend([5], [0])
    calls: list[Any] = []
    forward = patch._forward(run(), lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(world.layers[FULL] if where == "layer" else world.backend, name, value)
    q, k, v = world.inputs(FULL, batch)
    before = [t.clone() for t in world.pool.get_kv_buffer(FULL)]
    forward(world.backend, q, k, v, world.layers[FULL], batch)
    ((backend, *tensors, layer, passed, save, sinks),) = calls
    assert backend is world.backend
    assert all(a is b for a, b in zip(tensors, (q, k, v), strict=True))
    assert (layer, passed, save, sinks) == (world.layers[FULL], batch, True, None)
    assert told in run().full_reason()
    for buffer, kept in zip(world.pool.get_kv_buffer(FULL), before, strict=True):
        assert torch.equal(buffer, kept)


def test_sinks_and_other_caches_reach_stock(world):
    calls: list[Any] = []
    forward = patch._forward(run(), lambda *arguments: calls.append(arguments))
    batch = world.extend([5], [0])
    sinks = torch.zeros(HEADS)
    tensors = world.inputs(FULL, batch)
    forward(world.backend, *tensors, world.layers[FULL], batch, sinks=sinks)
    assert calls[0][-1] is sinks
    assert "sinks" in run().full_reason()
    run()._decline_reason = ""
    at = world.pool.full_kv_pool
    at.k_buffer[0] = at.k_buffer[0].to(torch.float8_e5m2)
    forward(world.backend, *tensors, world.layers[FULL], batch)
    assert len(calls) == 2
    assert "float8_e5m2" in run().full_reason()


def test_a_layer_without_indices_reaches_stock(world):
    """A draft extend builds none for sliding layers: what comes of it is stock's to say."""
    calls: list[Any] = []
    forward = patch._forward(run(), lambda *arguments: calls.append(arguments))
    batch = world.extend([5], [7])
    world.backend.forward_metadata.window_kv_indices = None
    forward(world.backend, *world.inputs(SLIDING, batch), world.layers[SLIDING], batch)
    assert len(calls) == 1
    assert "no KV indices" in run().full_reason()


@pytest.mark.parametrize("new", [[1, 1], [20, 3]], ids=["split", "dense"])
def test_lengths_on_the_host_may_be_tensors(world, new):
    """So SGLang hands them over where it turns a decode step into an extend of one token each."""
    old = [20, 33]
    batch = world.extend(new, old)
    batch.extend_seq_lens_cpu = torch.tensor(new)
    batch.extend_prefix_lens_cpu = torch.tensor(old)
    world.backend.init_forward_metadata(batch)
    assert isinstance(world.backend.forward_metadata.max_extend_len, torch.Tensor)
    mine, stored, stock, stocks = world.both(FULL, batch, *world.inputs(FULL, batch))
    assert relative_error(mine, stock) < 2e-3
    assert torch.equal(stored, stocks)


def test_stocks_query_block():
    """Read from stock's own table: on this machine the one of GPUs without a row."""
    assert patch.STOCK.query_block(128) == 64
    assert patch.STOCK.query_block(512) == 32


def test_verify_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    checks = patch.verify(run(), "cpu")
    assert checks
    assert all(check.passed for check in checks)
    right = kernel.launch_extend

    def wrong(*arguments: Any, sliding_window_size: int, **rest: Any) -> torch.Tensor:
        return right(*arguments, sliding_window_size=sliding_window_size - 1, **rest)

    monkeypatch.setattr(kernel, "launch_extend", wrong)
    assert not all(check.passed for check in patch.verify(run(), "cpu"))


# -- what is decided before anything is done -------------------------------------------------------------


class Gathers(TorchDispatchMode):
    """Counts look-ups of rows by their slots."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.index.Tensor
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [SLIDING, FULL])
def test_nothing_is_gathered_twice(world, layer, monkeypatch: pytest.MonkeyPatch):
    """A KV-shared layer, on a device that the kernel does not take: what stock gathers."""
    batch = world.extend([20, 6], [30, 0])
    q, _, _ = world.inputs(layer, batch)
    arguments = q, None, None, world.layers[layer], batch, False
    stock = stock_forward(world.backend)
    with Gathers() as theirs:
        expected = stock(*arguments)
    with Gathers() as taken:
        world.backend.forward_extend(*arguments)
    assert taken.count == theirs.count > 0
    monkeypatch.setattr(kernel, "device_unfit", lambda device: "not a Hopper GPU")
    with Gathers() as declined:
        found = world.backend.forward_extend(*arguments)
    assert declined.count == theirs.count
    assert torch.equal(found, expected)
    assert "Hopper" in run().full_reason()


# -- what raises -----------------------------------------------------------------------------------------


def failing(tries: list[Any], message: str = "out of resource: shared memory") -> Any:
    def fails(*given: Any, **named: Any) -> Any:
        tries.append(given)
        raise RuntimeError(message)

    return fails


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("where", ["launch_extend", "unfit"])
def test_a_launch_that_raises_is_stocks(world, where, shared, monkeypatch: pytest.MonkeyPatch):
    """Once per configuration; K and V are in the pools as stock stores them."""
    tries: list[Any] = []
    monkeypatch.setattr(kernel, where, failing(tries))
    batch = world.extend([9, 0, 30], [40, 3, 0])
    q, k, v = world.inputs(FULL, batch)
    given = (q, None, None) if shared else (q, k, v)
    before = run().counters.engaged
    for _ in range(2):
        ours, our_pool, stock, stock_pool = world.both(FULL, batch, *given)
        assert torch.equal(ours, stock)
        assert torch.equal(our_pool, stock_pool)
    assert len(tries) == 1
    assert run().counters.engaged == before
    assert run().state == states.FAILED
    assert "shared memory" in run().reason
    world.backend.forward_extend(*world.inputs(SLIDING, batch), world.layers[SLIDING], batch)
    assert len(tries) == 2


def test_a_symbol_that_is_missing_is_no_end(world, monkeypatch: pytest.MonkeyPatch):
    """Stock's block of queries, which a mask needs, is asked of SGLang by name."""
    monkeypatch.setattr(patch.STOCK, "extend_kernel", "sglang.srt.no_such_module")
    batch = world.verify([50, 3, 17])
    ours, _, stock, _ = world.both(SLIDING, batch, *world.inputs(SLIDING, batch))
    assert torch.equal(ours, stock)
    assert run().state == states.FAILED
    assert "no_such_module" in run().reason


def test_a_gathering_that_raises_is_stocks(world, monkeypatch: pytest.MonkeyPatch):
    tries: list[Any] = []
    with monkeypatch.context() as context:
        context.setattr(window_indices, "launch_window", failing(tries))
        for _ in range(2):
            world.extend([9, 4, 1], [40, 3, 0])
    ours = world.backend.forward_metadata
    assert len(tries) == 1
    assert run().state == states.FAILED
    ENGINE.revert()
    world.extend([9, 4, 1], [40, 3, 0])
    assert torch.equal(ours.window_kv_indices, world.backend.forward_metadata.window_kv_indices)


# -- what is known by its class --------------------------------------------------------------------------


def renamed(thing: Any) -> type:
    """A class of the same name that is not SGLang's."""
    return type(type(thing).__name__, (type(thing),), {})


def test_a_backend_of_the_same_name_is_not_known(world, monkeypatch: pytest.MonkeyPatch):
    batch = world.extend([20], [5])
    monkeypatch.setattr(world.backend, "__class__", renamed(world.backend))
    before = run().counters.engaged
    world.backend.forward_extend(*world.inputs(FULL, batch), world.layers[FULL], batch)
    assert run().counters.engaged == before
    assert "TritonAttnBackend" in run().full_reason()


@pytest.mark.parametrize("what", ["allocator", "pool"])
def test_slots_are_translated_by_sglangs_own_classes(world, what, monkeypatch: pytest.MonkeyPatch):
    thing = getattr(world, what)
    monkeypatch.setattr(thing, "__class__", renamed(thing))
    world.extend([9, 4, 1], [40, 3, 0])
    assert "slots are translated by" in run().full_reason()
