"""The traps around the TRT-LLM kernel, on SGLang's real backend, allocator and KV pools."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import processes, switches
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_12.attention import trtllm_debug as patch
from tests.cpu.conftest import turn_on

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")

NAME = "trtllm_debug"
SIZE, SIZE_SWA, PAGE = 64, 32, 4
SLIDING, FULL = 0, 1  # layers


@pytest.fixture(autouse=True)
def own_state(stock_first: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path))


def engaged() -> int:
    return ENGINE.runs[NAME].counters.engaged


def dump_of(error: pytest.ExceptionInfo[patch.TrapError]) -> dict[str, Any]:
    """The file that the message names, loaded without running anything that is in it."""
    found = re.search(r"torch\.load\('(.*)'\)", str(error.value))
    assert found is not None
    loaded: dict[str, Any] = torch.load(found[1], weights_only=True)
    assert loaded["message"] in str(error.value)
    return loaded


def allocator(page_size: int) -> Any:
    """A stock ``SWATokenToKVPoolAllocator`` over a stock ``SWAKVPool``."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool, SWATokenToKVPoolAllocator

    pool = SWAKVPool(
        size=SIZE,
        size_swa=SIZE_SWA,
        page_size=page_size,
        dtype=torch.bfloat16,
        head_num=1,
        head_dim=8,
        swa_attention_layer_ids=[SLIDING],
        full_attention_layer_ids=[FULL],
        enable_kvcache_transpose=False,
        device="cpu",
    )
    return SWATokenToKVPoolAllocator(
        SIZE, SIZE_SWA, page_size, torch.bfloat16, "cpu", pool, need_sort=False
    )


# -- the allocator -------------------------------------------------------------------------------------


def test_stock_hands_out_what_does_not_exist_and_the_trap_catches_it() -> None:
    """A free list with a slot beyond the pool: stock's mapping points there without a word."""
    stock = allocator(1)
    stock.swa_attn_allocator.free_pages[2] = 10**6
    given = stock.alloc(4)
    assert stock.full_to_swa_index_mapping[given].max() == 10**6
    turn_on(NAME)
    broken = allocator(1)
    broken.swa_attn_allocator.free_pages[2] = 10**6
    with pytest.raises(patch.TrapError, match=r"alloc: of 4 slots: 1 sliding-window") as error:
        broken.alloc(4)
    kept = dump_of(error)
    assert kept["sliding_window_slots"].tolist() == [1, 2, 10**6, 4]
    assert kept["full_slots"].tolist() == given.tolist()
    assert (kept["size_full"], kept["size_swa"], kept["page_size"]) == (SIZE, SIZE_SWA, 1)


def test_a_slot_that_is_given_twice() -> None:
    turn_on(NAME)
    broken = allocator(1)
    broken.swa_attn_allocator.free_pages[2] = 1
    with pytest.raises(patch.TrapError, match="1 sliding-window slots given twice"):
        broken.alloc(4)


def test_all_slots_of_a_whole_pool_pass() -> None:
    """The last slot of the smaller pool, and None when there is none left."""
    turn_on(NAME)
    before = engaged()
    sound = allocator(1)
    slots = sound.alloc(SIZE_SWA)
    assert int(sound.full_to_swa_index_mapping[slots].max()) == SIZE_SWA
    assert sound.alloc(1) is None
    assert engaged() == before + 1


def extend(made: Any) -> Any:
    lengths = torch.tensor([0]), torch.tensor([0]), torch.tensor([6]), torch.tensor([6])
    return made.alloc_extend(*lengths, torch.tensor([-1]), 6)


def decode(made: Any, last: Any) -> Any:
    return made.alloc_decode(torch.tensor([7]), torch.tensor([7]), last)


def test_paged_allocations() -> None:
    """Extend and decode with pages; a page beyond the pool is caught in either."""
    turn_on(NAME)
    before = engaged()
    sound = allocator(PAGE)
    slots = extend(sound)
    assert len(slots) == 6
    assert len(decode(sound, slots[-1:])) == 1
    assert engaged() == before + 2
    broken = allocator(PAGE)
    broken.swa_attn_allocator.free_pages[1] = 500
    with pytest.raises(patch.TrapError, match="alloc_extend: of 6 slots: 2 sliding-window"):
        extend(broken)
    full = allocator(PAGE)
    slots = extend(full)
    full.full_to_swa_index_mapping[slots[-1]] = 10**4
    with pytest.raises(patch.TrapError, match="alloc_decode: of 1 slots: 1 sliding-window"):
        decode(full, slots[-1:])


# -- the kernel ----------------------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """FlashInfer's kernels replaced: they need a GPU. Collects the page tables that they get."""
    from sglang.srt.layers.attention import trtllm_mha_backend

    calls: list[Any] = []

    def kernel(query: torch.Tensor, block_tables: torch.Tensor, **_: Any) -> torch.Tensor:
        calls.append(block_tables)
        return torch.zeros_like(query)

    monkeypatch.setattr(
        trtllm_mha_backend,
        "flashinfer",
        SimpleNamespace(
            decode=SimpleNamespace(trtllm_batch_decode_with_kv_cache=kernel),
            prefill=SimpleNamespace(trtllm_batch_context_with_kv_cache=kernel),
        ),
        raising=False,
    )
    return calls


def backend(pages: list[list[int]], sliding: list[list[int]], lengths: list[int]) -> Any:
    """A stock backend in the middle of a step over two requests."""
    from sglang.srt.layers.attention import trtllm_mha_backend as stock

    made = object.__new__(stock.TRTLLMHAAttnBackend)
    vars(made).update(
        page_size=PAGE,
        data_type=torch.bfloat16,
        q_data_type=torch.bfloat16,
        is_xqa_impl=False,
        use_sliding_window_kv_pool=True,
        _swa_kv_pool=allocator(PAGE).get_kvcache(),
        max_context_len=40,
        speculative_num_draft_tokens=4,
        workspace_buffer=None,
        forward_metadata=stock.TRTLLMMHAMetadata(
            cache_seqlens_int32=torch.tensor(lengths, dtype=torch.int32),
            cu_seqlens_q=torch.arange(len(lengths) + 1),
            page_table=torch.tensor(pages, dtype=torch.int32),
            swa_page_table=torch.tensor(sliding, dtype=torch.int32),
        ),
    )
    return made


def attend(made: Any, way: str, layer_id: int) -> Any:
    """One layer's attention through stock's ``forward_decode`` or ``forward_extend``."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    layer = SimpleNamespace(
        layer_id=layer_id,
        tp_q_head_num=1,
        tp_k_head_num=1,
        tp_v_head_num=1,
        head_dim=8,
        scaling=1.0,
        sliding_window_size=-1,
    )
    mode = ForwardMode.DECODE if way == "forward_decode" else ForwardMode.TARGET_VERIFY
    batch = SimpleNamespace(
        token_to_kv_pool=made._swa_kv_pool, out_cache_loc=None, forward_mode=mode
    )
    q = torch.zeros(2, 8).bfloat16()
    return getattr(made, way)(q, None, None, layer, batch, save_kv_cache=False)


WAYS = pytest.mark.parametrize("way", ["forward_decode", "forward_extend"])
LAST, LAST_SWA = SIZE // PAGE, SIZE_SWA // PAGE  # pages; page 0 is padding


@WAYS
@pytest.mark.parametrize(
    ("layer", "pages", "sliding", "lengths", "message"),
    [
        (FULL, [[1, LAST + 1]] * 2, [[1, 2]] * 2, [4, 5], "1 of 2 requests are wrong: 1 page"),
        (FULL, [[1, -1]] * 2, [[1, 2]] * 2, [8, 4], "1 of 2 requests are wrong: 1 page"),
        (SLIDING, [[1, 2]] * 2, [[LAST_SWA + 1, 2]] * 2, [8, 4], "2 of 2 .*: 2 page"),
        (FULL, [[1, 2]] * 2, [[1, 2]] * 2, [9, 4], "1 of 2 .* lengths 4..9"),
        (FULL, [[1] * 16] * 2, [[1] * 16] * 2, [45, 4], "lengths 4..45 of at most 44"),
        (FULL, [[1, 2]] * 2, [[1, 2]] * 2, [-1, 4], "lengths -1..4"),
    ],
    ids=["page too high", "negative page", "sliding", "too few pages", "too long", "negative"],
)
def test_stock_calls_the_kernel_and_the_trap_does_not(
    kernel_calls: list[Any],
    way: str,
    layer: int,
    pages: list[list[int]],
    sliding: list[list[int]],
    lengths: list[int],
    message: str,
) -> None:
    """What would be an illegal address is an exception, with tables and lengths in the file."""
    attend(backend(pages, sliding, lengths), way, layer)
    assert len(kernel_calls) == 1
    turn_on(NAME)
    with pytest.raises(patch.TrapError, match=message) as error:
        attend(backend(pages, sliding, lengths), way, layer)
    assert len(kernel_calls) == 1
    assert f"{way}, layer {layer}" in str(error.value)
    kept = dump_of(error)
    assert kept["page_table"].tolist() == (sliding if layer == SLIDING else pages)
    assert kept["lengths"].tolist() == lengths
    assert kept["pages"] == 1 + (LAST_SWA if layer == SLIDING else LAST)
    assert kept["wrong_requests"].any()


@WAYS
@pytest.mark.parametrize("layer", [SLIDING, FULL])
def test_sound_tables_reach_the_kernel_untouched(
    kernel_calls: list[Any], way: str, layer: int
) -> None:
    """The last page, a sequence of the full length; what lies behind a sequence is not looked at."""
    turn_on(NAME)
    before = engaged()
    made = backend([[1, LAST], [2, 999]], [[1, LAST_SWA], [2, -7]], [8, 4])
    output = attend(made, way, layer)
    assert output.shape == (2, 8)
    expected = made.forward_metadata.swa_page_table
    if layer == FULL:
        expected = made.forward_metadata.page_table
    assert kernel_calls[0] is expected  # not clamped, not copied
    assert engaged() == before + 1


def test_a_capture_is_not_looked_at(
    kernel_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_on(NAME)
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    before = engaged()
    attend(backend([[999]] * 2, [[999]] * 2, [4, 4]), "forward_decode", FULL)
    assert len(kernel_calls) == 1
    assert engaged() == before
    assert "capture forbids looking" in ENGINE.runs[NAME].full_reason()


def replay(first_slot: int) -> None:
    """Stock's metadata for the replay of a graph, for a request whose slots begin there."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    made = backend([[0, 0]], [[0, 0]], [1])
    metadata = made.forward_metadata
    metadata.cu_seqlens_k = torch.zeros(2, dtype=torch.int32)
    made.decode_cuda_graph_metadata = {1: metadata, "strided_indices": torch.arange(0, 40, PAGE)}
    made.req_to_token = torch.arange(first_slot, first_slot + 40)[None]
    lengths = torch.tensor([6])
    made.init_forward_metadata_replay_cuda_graph(
        1, torch.tensor([0]), lengths, 6, None, ForwardMode.DECODE, None, lengths
    )


@pytest.mark.parametrize("part", ["full", "sliding"])
def test_the_replay_of_a_graph(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata is built outside of the graph: wrong pages are caught before the replay."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    offset = 0 if part == "full" else 10**3
    monkeypatch.setattr(
        SWAKVPool,
        "translate_loc_from_full_to_swa",
        lambda self, slots: slots % PAGE + PAGE + offset,
    )
    first = SIZE + 8 if part == "full" else PAGE
    replay(first)
    turn_on(NAME)
    with pytest.raises(patch.TrapError, match=f"CUDA graph of 1 requests, {part} layers"):
        replay(first)
    offset = 0
    before = engaged()
    replay(PAGE)
    assert engaged() == before + 2


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap springs all the same, and says that it could not keep the numbers."""
    turn_on(NAME)
    monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", "/proc/nowhere")
    broken = allocator(1)
    broken.swa_attn_allocator.free_pages[0] = -5
    with pytest.raises(patch.TrapError, match="not kept: "):
        broken.alloc(1)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_dump_follows_no_link(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder's place, or at the name that the dump would get."""
    turn_on(NAME)
    victim = tmp_path / "victim"
    if where == "folder":
        victim.mkdir()
        (tmp_path / "link").symlink_to(victim)
        monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path / "link"))
    else:
        victim.write_text("precious")
        monkeypatch.setattr(patch, "_dumps", itertools.count(1))
        (tmp_path / f"trtllm_debug-{processes.own()}-1.pt").symlink_to(victim)
    broken = allocator(1)
    broken.swa_attn_allocator.free_pages[0] = -5
    with pytest.raises(patch.TrapError, match="not kept: "):
        broken.alloc(1)
    assert list(victim.iterdir()) == [] if victim.is_dir() else victim.read_text() == "precious"


def test_a_dump_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: half of it is of no use."""
    turn_on(NAME)

    def full(values: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    broken = allocator(1)
    broken.swa_attn_allocator.free_pages[0] = -5
    with pytest.raises(patch.TrapError, match=r"not kept: .*No space left"):
        broken.alloc(1)
    assert list(tmp_path.glob("trtllm_debug-*")) == []


def test_switched_by_its_own_variable_and_by_the_alias() -> None:
    """Off by default; a value that is none is an error that names the variable."""
    assert not switches.read({}).decisions[NAME].on
    assert switches.read({"SGLANG_TRTLLM_MHA_DEBUG": "1"}).decisions[NAME].on
    assert switches.read({"GEMMA4_TURBO_TRTLLM_DEBUG": "1"}).decisions[NAME].on
    wrong = switches.read({"SGLANG_TRTLLM_MHA_DEBUG": "yes please"})
    assert not wrong.decisions[NAME].on
    assert "SGLANG_TRTLLM_MHA_DEBUG='yes please'" in wrong.problems[0]
