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
from gemma4_turbo.ports.any.attention import decode_attention as patch
from tests.cpu import interpreted
from tests.cpu.conftest import patched_sglang

pytestmark = interpreted.MARKS

WINDOW, ROWS, WIDTH, SLOTS = 40, 4, 128, 512
HEADS, KV_HEADS, DIM = 4, 2, 256


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's backend imported with the patch applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=("decode_attention",)):
        yield


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Each test starts with the patch on, nothing proven or declined."""
    ENGINE.apply(only=("decode_attention",))
    run = ENGINE.runs["decode_attention"]
    assert run.state == states.ACTIVE, run.reason
    run._decline_reason = ""
    yield run
    ENGINE.revert()


class World:
    """A backend over a pool of one full layer (0) and one sliding layer (1), and a batch."""

    def __init__(
        self, lengths: list[int], window: int | None = WINDOW, dtype: Any = torch.float16
    ) -> None:
        from sglang.srt.layers.attention import triton_backend
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        generator = torch.Generator().manual_seed(sum(lengths))

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(torch.float16)

        self.pool = MHATokenToKVPool(SLOTS, 1, dtype, KV_HEADS, DIM, 2, "cpu", False)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(randn(*buffer.shape))
        table = torch.randperm(SLOTS, generator=generator)[: ROWS * WIDTH]
        table = table.reshape(ROWS, WIDTH).int() + 1
        self.lengths = torch.tensor(lengths)
        rows = torch.arange(len(lengths)).flip(0)
        self.runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(size=ROWS, req_to_token=table),
            sliding_window_size=window,
            token_to_kv_pool_allocator=SimpleNamespace(),
            token_to_kv_pool=self.pool,
            device="cpu",
            gpu_id=0,
            hybrid_gdn_config=None,
            kimi_linear_config=None,
            linear_attn_model_spec=None,
            model_config=SimpleNamespace(
                attention_arch=None,
                num_attention_heads=HEADS,
                get_num_kv_heads=lambda size: KV_HEADS,
                v_head_dim=DIM,
                swa_v_head_dim=DIM,
                context_len=WIDTH,
                is_encoder_decoder=False,
            ),
            server_args=SimpleNamespace(
                speculative_num_draft_tokens=None,
                speculative_num_steps=None,
                triton_attention_num_kv_splits=4,
                triton_attention_split_tile_size=None,
                disable_cuda_graph=True,
                chunked_prefill_size=-1,
                enable_deterministic_inference=False,
            ),
        )
        self.backend = triton_backend.TritonAttnBackend(self.runner)
        self.layers = [
            RadixAttention(HEADS, DIM, 0.06, KV_HEADS, layer_id=0),
            RadixAttention(HEADS, DIM, 0.06, KV_HEADS, layer_id=1, sliding_window_size=WINDOW),
        ]
        self.batch = SimpleNamespace(
            batch_size=len(lengths),
            forward_mode=ForwardMode.DECODE,
            spec_info=None,
            seq_lens=self.lengths,
            seq_lens_sum=sum(lengths),
            req_pool_indices=rows,
            token_to_kv_pool=self.pool,
            out_cache_loc=table[rows, self.lengths - 1].long(),
        )
        self.q = randn(len(lengths), HEADS * DIM)
        self.k = randn(len(lengths), KV_HEADS, DIM)
        self.v = randn(len(lengths), KV_HEADS, DIM)
        self.backend.init_forward_metadata(self.batch)

    def run(self, layer: int, **options: Any) -> torch.Tensor:
        """The backend's own entry."""
        return self.backend.forward_decode(
            self.q, self.k, self.v, self.layers[layer], self.batch, **options
        )


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No group of processes exists here."""
    from sglang.srt.layers.attention import triton_backend

    monkeypatch.setattr(triton_backend, "get_attention_tp_size", lambda: 1)


def stock_function() -> Any:
    return ENGINE.runs["decode_attention"].swaps[0].function


@pytest.fixture
def stock_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches of stock's kernels by backends made from now on; nothing is launched."""
    from sglang.srt.layers.attention.triton_ops import decode_attention

    calls: list[Any] = []

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args)

    counted.__module__ = decode_attention.__name__  # it stands for SGLang's
    monkeypatch.setattr(decode_attention, "decode_attention_fwd", counted)
    return calls


@pytest.mark.parametrize("layer", [0, 1], ids=["full", "sliding"])
@pytest.mark.parametrize("lengths", [[1], [100, 3, 41, 40]], ids=str)
def test_results_and_cache_are_those_of_stock(lengths: list[int], layer: int, patched):
    """Same numbers but for the order of addition; K and V stored in the same slots."""
    ours, stock = World(lengths), World(lengths)
    before = patched.counters.engaged
    found = ours.run(layer)
    assert patched.counters.engaged == before + 1
    expected = stock_function()(
        stock.backend, stock.q, stock.k, stock.v, stock.layers[layer], stock.batch
    )
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    for name in ("k_buffer", "v_buffer"):
        for mine, theirs in zip(getattr(ours.pool, name), getattr(stock.pool, name), strict=True):
            assert torch.equal(mine, theirs)
    stored = ours.pool.k_buffer[layer][ours.batch.out_cache_loc]
    assert torch.equal(stored, ours.k)


def test_a_sliding_layer_sees_its_window_only(patched):
    """What lies before the window may be NaN."""
    world = World([100])
    before = world.runner.req_to_token_pool.req_to_token[0, : 100 - WINDOW].long()
    world.pool.k_buffer[1][before] = torch.nan
    world.pool.v_buffer[1][before] = torch.nan
    assert bool(world.run(1).isfinite().all())


def test_the_grid_is_bounded_by_the_window_or_by_the_row_of_the_table(monkeypatch):
    seen = []
    launch = kernel.launch_decode_attention
    monkeypatch.setattr(
        kernel, "launch_decode_attention", lambda *args: (seen.append(args[7]), launch(*args))
    )
    world = World([100, 3])
    world.run(0)
    world.run(1)
    assert seen == [WIDTH, WINDOW]


def test_layers_that_share_kv_store_nothing():
    world = World([30, 20])
    before = world.pool.k_buffer[1].clone()
    world.run(1, save_kv_cache=False)
    assert torch.equal(world.pool.k_buffer[1], before)


def test_stock_comes_back():
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    stock = stock_function()
    assert vars(TritonAttnBackend)["forward_decode"].__wrapped__ is stock
    ENGINE.revert()
    assert vars(TritonAttnBackend)["forward_decode"] is stock


DECLINED: dict[str, Any] = {
    "deterministic": lambda w: setattr(w.backend, "enable_deterministic", True),
    "MLA": lambda w: setattr(w.backend, "use_mla", True),
    "logit cap": lambda w: setattr(w.layers[0], "logit_cap", 30.0),
    "xai": lambda w: setattr(w.layers[0], "xai_temperature_len", 100),
    "scale": lambda w: (setattr(w.layers[0], "k_scale", 1.0), setattr(w.layers[0], "k_scale_float", 1.0)),
    "heads of": lambda w: setattr(w.layers[0], "v_head_dim", 128),
    "KV indices": lambda w: setattr(w.backend.forward_metadata, "kv_indices", None),
    "k_buffer is": lambda w: w.pool.k_buffer.__setitem__(0, w.pool.k_buffer[0].to(torch.bfloat16)),
}  # fmt: skip


@pytest.mark.parametrize("named", DECLINED)
def test_declined_layers_reach_stock(named: str, stock_calls, patched):
    """Once, uncounted as engaged, the reason in the report; other layers go on with ours."""
    world = World([9, 5])
    DECLINED[named](world)
    before = patched.counters.engaged
    world.run(0, save_kv_cache=False)
    assert len(stock_calls) == 1
    assert patched.counters.engaged == before
    assert named in patched.full_reason()


def test_another_kernel_on_the_backend_is_called(patched):
    """Not gone round, whenever it was put there."""
    world = World([9, 5])
    calls: list[Any] = []
    world.run(0, save_kv_cache=False)
    before = patched.counters.engaged
    world.backend.decode_attention_fwd = lambda *args, **options: calls.append(args)
    world.run(0, save_kv_cache=False)
    assert len(calls) == 1
    assert patched.counters.engaged == before
    assert "decode_attention_fwd is not SGLang's" in patched.full_reason()


def test_another_kernel_in_sglangs_place_is_called(monkeypatch, patched):
    """Put there before the backend was made, which then holds it."""
    from sglang.srt.layers.attention.triton_ops import decode_attention

    calls: list[Any] = []
    monkeypatch.setattr(
        decode_attention, "decode_attention_fwd", lambda *args, **options: calls.append(args)
    )
    before = patched.counters.engaged
    World([9, 5]).run(0, save_kv_cache=False)
    assert len(calls) == 1
    assert patched.counters.engaged == before
    assert "decode_attention_fwd is not SGLang's" in patched.full_reason()


def test_sinks_and_fp8_caches_reach_stock(stock_calls, patched):
    world = World([9, 5])
    world.run(0, save_kv_cache=False, sinks=torch.zeros(HEADS))
    assert "sinks" in patched.full_reason()
    patched._decline_reason = ""
    World([9, 5], dtype=torch.float8_e4m3fn).run(0, save_kv_cache=False)
    assert "float8" in patched.full_reason()
    assert len(stock_calls) == 2


def test_what_was_not_run_before_a_capture_runs_stock(monkeypatch, stock_calls, patched):
    """Neither the counters' zeros nor the comparison may be made while a graph is captured."""
    world = World([9, 5])
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    world.run(0)
    assert len(stock_calls) == 1
    assert "before the capture" in patched.full_reason()
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: False)
    world.run(0)
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    world.run(0)
    assert len(stock_calls) == 1
    patch._verdicts.clear()
    world.run(0)
    assert len(stock_calls) == 2


def test_a_failed_check_keeps_stock(monkeypatch, stock_calls, patched):
    world = World([9, 5])
    world.run(0)
    for key in list(patch._verdicts):
        patch._verdicts[key] = "self-check: relative error 1"
    world.run(0)
    assert len(stock_calls) == 1
    assert "self-check" in patched.full_reason()


def test_the_comparison_sees_a_wrong_kernel(monkeypatch):
    config = kernel.choose(2, 1, 2, 256)
    key = (torch.device("cpu"), torch.bfloat16, 2, 1, 256, torch.int64, config)
    assert patch._compare(key) is None
    assert all(check.passed for check in patch.verify(None, "cpu"))  # type: ignore[arg-type]
    right = kernel.launch_decode_attention

    def wrong(*args: Any) -> None:
        right(*args)
        args[-1][1, 0] *= 1.05

    monkeypatch.setattr(kernel, "launch_decode_attention", wrong)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert "self-check" in str(patch._compare(key))
    assert not any(check.passed for check in patch.verify(None, "cpu"))  # type: ignore[arg-type]


def test_traced_code_sees_stock(stock_calls, patched):
    world = World([9, 5])
    before = patched.counters.engaged
    torch._dynamo.reset()
    torch.compile(lambda: world.run(0, save_kv_cache=False), backend="eager")()
    assert len(stock_calls) == 1
    assert patched.counters.engaged == before


def test_a_launch_that_fails_is_stocks(patched, monkeypatch):
    """It is not tried again at that batch, and K and V are stored."""
    launched = []

    def launch(*args: Any) -> None:
        launched.append(args)
        raise torch.cuda.OutOfMemoryError("no memory for the partial sums")

    monkeypatch.setattr(kernel, "launch_decode_attention", launch)
    world, stock = World([3, 40]), World([3, 40])
    before = patched.counters.engaged
    expected = stock_function()(
        stock.backend, stock.q, stock.k, stock.v, stock.layers[0], stock.batch
    )
    for _ in range(2):
        assert torch.equal(world.run(0), expected)
    assert torch.equal(world.pool.k_buffer[0], stock.pool.k_buffer[0])
    assert len(launched) == 1
    assert patched.state == states.FAILED
    assert "no memory for the partial sums" in patched.reason
    assert patched.counters.engaged == before
    assert patched._decline_reason == patched.reason
