"""The sliding-window state of the draft's backend, on SGLang's real views, backend and KV pools."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.run import PatchRun
from gemma4_turbo.engine.swap import Swap
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_12.mtp import frozen_kv_views as patch
from tests.cpu.conftest import patched_sglang
from tests.runs import unpublished

NAME = "frozen_kv_views"
TARGETS = ENGINE.runs[NAME].targets
SLIDING, FULL = 0, 1  # layers


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang imported with the patch applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture
def pool() -> Any:
    """A stock ``SWAKVPool`` of one sliding and one full layer; slot n of full is 100 + n there."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    made = SWAKVPool(
        size=64,
        size_swa=256,
        page_size=1,
        dtype=torch.bfloat16,
        head_num=1,
        head_dim=8,
        swa_attention_layer_ids=[SLIDING],
        full_attention_layer_ids=[FULL],
        enable_kvcache_transpose=False,
        device="cpu",
    )
    made.register_mapping(torch.arange(100, 165))
    return made


def backend(pool: Any) -> Any:
    """A stock TRT-LLM backend with what its metadata needs; ``pool`` None: the draft's own pool."""
    from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend

    made = object.__new__(TRTLLMHAAttnBackend)
    made.page_size, made.device, made.speculative_step_id = 1, "cpu", 0
    made.use_sliding_window_kv_pool, made._swa_kv_pool = pool is not None, pool
    return made


def batch(draft_backend: Any) -> Any:
    """What a view and the backend's metadata read of a stock ``ForwardBatch``."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        spec_info="draft input",
        token_to_kv_pool="the draft's pool",
        attn_backend=draft_backend,
        forward_mode=ForwardMode.DECODE,
        batch_size=1,
        seq_lens=torch.tensor([3]),
        seq_lens_cpu=torch.tensor([3]),
        req_pool_indices=torch.tensor([0]),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.tensor([[5, 6, 7, 0]])),
    )


def context(pool: Any) -> Any:
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPContext

    return FrozenKVMTPContext(pool, {0: SLIDING})


def run_of() -> PatchRun:
    run = unpublished(NAME)
    run._counters = ENGINE.runs[NAME].counters.__class__([0] * 400, 0)
    return run


def stock() -> dict[str, Any]:
    return {target: Swap(target).function for target in TARGETS}


def table_of(draft_backend: Any) -> Any:
    """The page numbers that a sliding layer of the draft would read with."""
    layer = SimpleNamespace(layer_id=SLIDING)
    return draft_backend._get_layer_page_table(layer, None).tolist()


VIEW = pytest.mark.parametrize("target", TARGETS[:2], ids=lambda t: t.partition(":")[2])


def test_this_release_is_not_stale_and_stays_untouched() -> None:
    """Said with the reason; each target is stock's very object, so nothing is paid."""
    run = ENGINE.runs[NAME]
    assert run.state == states.UPSTREAMED
    assert "does not have the defect" in run.reason
    assert "token_to_kv_pool_allocator" in run.reason
    assert run.swaps == []
    for target in TARGETS:
        assert "gemma4_turbo" not in Swap(target).function.__code__.co_filename
        inner = getattr(Swap(target).function, "__wrapped__", Swap(target).function)
        assert inner.__module__ == target.partition(":")[0]


def test_a_tree_whose_backend_asks_its_own_pool_is_taken() -> None:
    """The same sources but for where the backend takes its pool from: no release number decides."""

    def source(module: str) -> str | None:
        text = fingerprints.installed_source(module)
        return text and text.replace("token_to_kv_pool_allocator", "token_to_kv_pool")

    ports = ENGINE.runs[NAME].ports
    there, absent = fingerprints.Definitions(source), fingerprints.Definitions(lambda module: None)
    assert fingerprints.judge(ports, "0.5.13.dev1", there).state == states.ACTIVE
    assert fingerprints.judge(ports, None, absent).state == states.UNSUPPORTED


@VIEW
def test_stock_reads_the_wrong_slots_and_the_patch_the_right_ones(pool: Any, target: str) -> None:
    """A stale backend: full-pool page numbers for a sliding layer, translated ones when patched."""
    tables = []
    run = run_of()
    for view in (stock()[target], patch.build(run, stock())[target]):
        draft = backend(None)
        forward_batch = batch(draft)
        with view(forward_batch, context(pool)):
            assert forward_batch.token_to_kv_pool is pool
            if target == TARGETS[1]:
                forward_batch.spec_info = None  # metadata is built in the other view only
            draft.init_forward_metadata(forward_batch)
            tables.append(table_of(draft))
        assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)
        assert forward_batch.token_to_kv_pool == "the draft's pool"
    assert tables == [[[5, 6, 7]], [[105, 106, 107]]]
    assert run.counters.engaged == 1


@VIEW
def test_restored_after_an_exception(pool: Any, target: str) -> None:
    view = patch.build(run_of(), stock())[target]
    draft = backend(None)
    forward_batch = batch(draft)
    seen = []

    def fails() -> None:
        with view(forward_batch, context(pool)):
            seen.append(draft._swa_kv_pool)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [pool]
    assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)
    assert forward_batch.token_to_kv_pool == "the draft's pool"
    assert forward_batch.spec_info == "draft input"


@VIEW
def test_an_unbound_model_fails_as_in_stock(target: str) -> None:
    draft = backend(None)
    with (
        pytest.raises(RuntimeError, match="before the model was bound"),
        patch.build(run_of(), stock())[target](batch(draft), None),
    ):
        pass
    assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)


def test_a_plain_target_pool_clears_a_sliding_state(pool: Any) -> None:
    """The other way round: the draft has a window pool, the target has none."""
    draft = backend(pool)
    view = patch.build(run_of(), stock())[TARGETS[0]]
    with view(batch(draft), context(SimpleNamespace())):
        assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (False, None)
    assert (draft.use_sliding_window_kv_pool, draft._swa_kv_pool) == (True, pool)


@contextlib.contextmanager
def later_view(forward_batch: Any, kv_context: Any, draft_attn_backend: Any) -> Iterator[None]:
    """With the signature of later sources, which swap the backend's pool instead of the batch's."""
    kept = draft_attn_backend.token_to_kv_pool
    draft_attn_backend.token_to_kv_pool = kv_context.target_token_to_kv_pool
    try:
        yield
    finally:
        draft_attn_backend.token_to_kv_pool = kept


@pytest.mark.parametrize("by_name", [False, True], ids=["by place", "by name"])
def test_the_signature_with_the_backend(pool: Any, by_name: bool) -> None:
    """The backend that is passed counts, not the one that the batch carries."""
    run = run_of()
    view = patch.build(run, dict.fromkeys(TARGETS, later_view))[TARGETS[0]]
    draft, other = backend(None), backend(None)
    draft.token_to_kv_pool = "own"
    passed = {"draft_attn_backend": draft} if by_name else {}
    with view(batch(other), context(pool), *(() if by_name else (draft,)), **passed):
        assert draft.token_to_kv_pool is pool
        assert draft._swa_kv_pool is pool
        assert other._swa_kv_pool is None
    assert (draft.token_to_kv_pool, draft._swa_kv_pool) == ("own", None)
    assert run.counters.engaged == 1


def test_views_inside_views_restore_each_its_own(pool: Any) -> None:
    """The inner one finds all in step; that is no reason to stand aside."""
    run = run_of()
    built = patch.build(run, stock())
    draft = backend(None)
    forward_batch = batch(draft)
    with built[TARGETS[0]](forward_batch, context(pool)):
        with built[TARGETS[1]](forward_batch, context(pool)):
            assert draft._swa_kv_pool is pool
        assert draft._swa_kv_pool is pool
    assert draft._swa_kv_pool is None
    assert run.counters.engaged == 1
    assert run.state != states.UPSTREAMED


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", [patch.CONSTRUCT, patch.CAPTURE])
def test_capture_of_the_drafts_graphs(pool: Any, what: str, fails: bool) -> None:
    """Page tables are allocated and graphs captured in step; put back when capture fails, too."""
    seen = []
    draft = backend(None)
    worker = SimpleNamespace(draft_attn_backend=draft, kv_context=context(pool))
    runner = SimpleNamespace(frozen_kv_mtp_worker=worker)

    def captures(self: Any, *args: Any) -> str:
        assert args == ((worker,) if what == patch.CONSTRUCT else (4, "forward"))
        seen.append(draft._alloc_swa_page_table(2, 3))
        if fails:
            raise ZeroDivisionError
        return "graph"

    replacement = patch.build(run_of(), {**stock(), what: captures})[what]
    arguments = (worker,) if what == patch.CONSTRUCT else (4, "forward")
    expectation = pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext()
    with expectation:
        assert replacement(runner, *arguments) == (None if what == patch.CONSTRUCT else "graph")
    assert seen[0].shape == (2, 3)  # stock returns None for a stale backend
    assert draft._alloc_swa_page_table(2, 3) is None


@pytest.mark.parametrize("kind", ["in step", "stateless"])
def test_stands_aside_when_the_first_backend_is_not_stale(
    pool: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tree that had to be taken on suspicion: stock is back after the first look."""
    monkeypatch.setattr(fingerprints.Definitions, "uses", lambda *args: False)
    ENGINE.revert()
    untouched = stock()
    ENGINE.apply(only=[NAME])
    run = ENGINE.runs[NAME]
    assert run.state == states.ACTIVE
    from sglang.srt.speculative import frozen_kv_mtp_utils

    draft = backend(pool) if kind == "in step" else SimpleNamespace()
    with frozen_kv_mtp_utils.frozen_kv_target_view(batch(draft), context(pool)):
        assert run.state == states.UPSTREAMED
        assert "nothing is stale" in run.reason
        assert type(draft).__name__ in run.reason
    assert {target: Swap(target).function for target in TARGETS} == untouched
    assert run.counters.engaged == 0
