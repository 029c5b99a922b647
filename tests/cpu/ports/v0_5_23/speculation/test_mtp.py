"""`mtp_sync` and `mtp_chain` on SGLang's real draft worker, graph runner and Triton backends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.v0_5_23.speculation import mtp_chain, mtp_sync
from tests.cpu import interpreted
from tests.cpu.conftest import only_patch, patched_sglang
from tests.cpu.ports.v0_5_23.mtp_world import (
    DRAFT_TOKENS,
    STEPS,
    Speculation,
    tree_kernel_on_the_cpu,
    waits,
)

pytestmark = interpreted.MARKS
PATCHES = ("mtp_sync", "mtp_chain")
LENGTHS = [30, 7, 55]  # three rows: a graph of four is padded
FIELDS = ("draft_token", "positions", "retrieve_index", "retrieve_next_token")
FIELDS = (*FIELDS, "retrieve_next_sibling", "spec_steps", "topk", "draft_token_num")


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang with both patches; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=PATCHES):
        from gemma4_turbo.cli.sglang_process import prepare_sglang

        prepare_sglang()
        assert {ENGINE.runs[name].state for name in PATCHES} == {states.ACTIVE}
        # A compiler is not what is tested.
        with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
            tree_kernel_on_the_cpu(patch)
            yield


@pytest.fixture(autouse=True)
def stock_first(imported: None) -> Iterator[None]:
    """A test starts with stock."""
    ENGINE.revert()
    yield
    ENGINE.revert()


@contextlib.contextmanager
def both() -> Iterator[None]:
    """Both patches in, none of their calls declined."""
    ENGINE.apply(only=PATCHES)
    for name in PATCHES:
        assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason
        ENGINE.runs[name]._decline_reason = ""
    yield
    assert [ENGINE.runs[name]._decline_reason for name in PATCHES] == ["", ""]
    ENGINE.revert()


def same(found: Any, stock: Any) -> None:
    """The verification's inputs but for the mask, whose bytes are compared where they are read."""
    for name in FIELDS:
        one, other = getattr(found, name), getattr(stock, name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name
        else:
            assert one == other, name
    assert type(found) is type(stock)
    assert found.capture_hidden_mode == stock.capture_hidden_mode
    assert found.num_tokens_per_req == stock.num_tokens_per_req == DRAFT_TOKENS


def step(made: Speculation, lengths: list[int], in_graph: bool = True, **how: Any) -> Any:
    """A draft: the batch, its verification's input, the mask as it is read, and the host's reads."""
    batch = made.batch(lengths, **how)
    with waits() as found:
        verification = made.worker.draft(batch)
    return batch, verification, made.read_mask(batch, verification, in_graph), len(found)


# With graphs the draft is replayed; on_host: as without the overlap schedule, or with a backend that
# wants lengths there; buffers: an eager target has no mask of its own.
@pytest.mark.parametrize(
    ("graphs", "on_host", "buffers"),
    [(True, False, True), (True, True, True), (False, False, True), (True, False, False)],
    ids=["usual", "lengths on the host", "eager draft", "eager target"],
)
def test_drafts_are_stocks(graphs: bool, on_host: bool, buffers: bool) -> None:
    """Tokens, tree and every byte of the mask that attention reads; and the host waits for none."""
    stock = step(Speculation(graphs, buffers), LENGTHS, buffers, on_host=on_host)
    with both():
        made = Speculation(graphs, buffers)
        found = step(made, LENGTHS, buffers, on_host=on_host)
    same(found[1], stock[1])
    assert torch.equal(found[2], stock[2])
    assert stock[2].unique().tolist() == [0, 1]
    assert (stock[0].seq_lens_sum, found[0].seq_lens_sum) == (
        sum(LENGTHS),
        sum(LENGTHS) + (0 if on_host else 8 * len(LENGTHS)),
    )
    # In the place of the GPU's lengths those of the host are summed up, if there are any; and an eager
    # draft's backend asks for two numbers as before.
    reads = 0 if graphs else 2
    assert (stock[3], found[3]) == (1 + reads, on_host + reads)
    assert made.assistant.runs == STEPS


def test_the_mask_is_written_where_it_is_read() -> None:
    """The backend's buffer, without a copy, and no byte behind what such lengths can fill."""
    with both():
        made = Speculation(True)
        batch, verification, _, _ = step(made, LENGTHS)
    buffer, mask = made.target._verify_mask.buffer, verification.custom_mask
    assert mask.data_ptr() == buffer.data_ptr()
    room = DRAFT_TOKENS * (batch.seq_lens_sum + DRAFT_TOKENS * len(LENGTHS))
    assert mask.numel() == room < buffer.numel()
    assert (buffer[room:] == 7).all()


def test_a_longer_step_and_a_shorter_one() -> None:
    """What one step wrote, another does not see: the buffer is one for all of them."""
    stock = [step(Speculation(True), lengths) for lengths in ([90, 60], [3, 8, 5], [60])]
    with both():
        made = Speculation(True)
        kept = dict(vars(made.worker))
        for expected, lengths in zip(stock, ([90, 60], [3, 8, 5], [60]), strict=True):
            found = step(made, lengths)
            same(found[1], expected[1])
            assert torch.equal(found[2], expected[2])
        assert vars(made.worker) == kept  # nothing is kept for the next step, which is prepared


def test_allocated_slots_are_no_fewer_than_tokens() -> None:
    """At the row's end the bound is longer than the buffer, which has room for every length."""
    lengths = [96, 96, 96]
    stock = step(Speculation(True, rows=3), lengths)
    with both():
        found = step(Speculation(True, rows=3), lengths, reserved=4)
    assert torch.equal(found[2], stock[2])


def test_more_requests_than_the_buffer_is_for() -> None:
    """As an eager verification: a new mask, of the room that the allocated slots may need."""
    stock = step(Speculation(True, rows=2), LENGTHS, in_graph=False)
    with both():
        made = Speculation(True, rows=2)
        found = step(made, LENGTHS, in_graph=False)
    assert found[1].custom_mask.dtype == torch.bool
    assert (made.target._verify_mask.buffer == 7).all()
    assert torch.equal(found[2], stock[2])


def test_what_mtp_sync_declines() -> None:
    """Backends that are not known, and batches whose rows are not requests'."""
    made = Speculation(False)
    worker, batch = made.worker, made.batch(LENGTHS)
    assert isinstance(mtp_sync.room_for(worker, batch), mtp_sync.Room)
    batch.reqs = batch.reqs[:2]
    assert mtp_sync.room_for(worker, batch) == "a row of the batch is no request's"
    other = SimpleNamespace()
    for holder, name in (
        (worker, "draft_attn_backend"),
        (worker.target_worker.model_runner, "attn_backend"),
    ):
        kept = getattr(holder, name)
        setattr(holder, name, other)
        assert "attention backend is a SimpleNamespace" in str(mtp_sync.room_for(worker, batch))
        setattr(holder, name, kept)
    worker.topk = 2
    assert mtp_sync.room_for(worker, batch) == "2 candidates per step"


def test_a_bound_that_cannot_be_had_is_stocks() -> None:
    """An exception of ours before anything ran: stock's draft, and the report says so."""
    stock = step(Speculation(True), LENGTHS)
    with only_patch("mtp_sync") as run:
        made = Speculation(True)
        batch = made.batch(LENGTHS)
        del batch.reqs[0].kv
        same(made.worker.draft(batch), stock[1])
        assert run.state == states.FAILED
        assert made.assistant.runs == STEPS
        ENGINE.runs["mtp_sync"]._decline_reason = ""


def test_an_input_that_wants_more_is_left_to_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that no release has: before a step, not in one."""
    import dataclasses

    from sglang.srt.speculative import frozen_kv_mtp_info

    kind = frozen_kv_mtp_info.FrozenKVMTPVerifyInput
    given: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as watched, only_patch("mtp_sync"):
        init = kind.__init__
        watched.setattr(
            kind, "__init__", lambda self, **fields: (given.append(fields), init(self, **fields))[1]
        )
        made = Speculation(True)
        made.worker.draft(made.batch(LENGTHS))
    assert [tuple(fields) for fields in given] == [mtp_sync.INPUT]
    wider = dataclasses.make_dataclass(kind.__name__, [("more", int)], bases=(kind,), kw_only=True)
    monkeypatch.setattr(frozen_kv_mtp_info, kind.__name__, wider)
    with pytest.raises(TypeError, match="'more'"):  # which the engine makes `failed` of
        mtp_sync.build(ENGINE.runs["mtp_sync"], {mtp_sync.TARGET: lambda: None})


def test_an_idle_batch_is_stocks() -> None:
    """Of data parallel attention."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.speculative import frozen_kv_mtp_worker_v2 as workers

    with only_patch("mtp_sync") as run, pytest.MonkeyPatch.context() as patch:
        before = run.counters.engaged
        patch.setattr(
            workers.FrozenKVMTPVerifyInput, "create_idle_input", lambda *given: ("idle", *given)
        )
        made = Speculation(False)
        batch = made.batch(LENGTHS)
        batch.forward_mode = ForwardMode.IDLE
        assert made.worker.draft(batch)[0] == "idle"
        assert run.counters.engaged == before


@pytest.mark.parametrize("steps", [1, STEPS])
def test_chains_are_stocks(steps: int) -> None:
    """Parents, places and tokens, with their types; one step has no parents."""
    how = {"speculative_num_steps": steps, "speculative_num_draft_tokens": steps + 1}
    drafts = []
    for patched in (False, True):
        with only_patch("mtp_chain") if patched else contextlib.nullcontext():
            made = Speculation(False, **how)
            batch, given = made.batch(LENGTHS), []

            def keep(self: Any, forward_batch: Any, given: Any = given) -> Any:
                given.append(type(self).draft_forward(self, forward_batch))
                return given[0]

            made.worker.draft_forward = keep.__get__(made.worker)
            made.worker.draft(batch)
            assert made.assistant.runs == steps
            drafts.append(given[0])
    for found, stock in zip(drafts[1], drafts[0], strict=True):
        assert (found.dtype, found.shape) == (stock.dtype, stock.shape)
        assert torch.equal(found, stock)


def test_what_a_captured_chain_leaves_out() -> None:
    """No softmax, no top-k and no sort are in the draft's graphs, and no position is set again."""
    counted: dict[str, int] = {}

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(func, "__name__", "")
            counted[name] = counted.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    left_out = ("softmax", "topk", "sort", "gather", "clamp")
    made = Speculation(True)
    with Calls():
        made.worker.cuda_graph_runner.backend.captured[key_of(made)][1]()
    assert counted["softmax"] == STEPS
    counted.clear()
    with only_patch("mtp_chain"):
        made = Speculation(True)
        with Calls():
            made.worker.cuda_graph_runner.backend.captured[key_of(made)][1]()
    assert not {name: counted[name] for name in left_out if name in counted}


def key_of(made: Speculation) -> Any:
    return made.worker.cuda_graph_runner._make_graph_key(2)


def test_what_mtp_chain_declines() -> None:
    """Trees; stock's draft runs on what it was given."""
    with only_patch("mtp_chain") as run:
        made = Speculation(False, speculative_num_draft_tokens=3)
        made.worker.draft(made.batch(LENGTHS))
        assert run._decline_reason == "3 of the draft's tokens are chosen by score"
    assert mtp_chain.unfit(SimpleNamespace(topk=2)) == "2 candidates per step"


def test_a_draft_that_raises_is_stocks() -> None:
    """On the tokens and states that the draft was given."""
    stock = step(Speculation(False), LENGTHS)
    with only_patch("mtp_chain") as run:
        made = Speculation(False)
        kept, calls = made.assistant.forward, []

        def fails_once(batch: Any) -> Any:
            calls.append(batch)
            if len(calls) == 2:
                raise RuntimeError("no such kernel")
            return kept(batch)

        made.worker._model_runner.forward = fails_once
        same(made.worker.draft(made.batch(LENGTHS)), stock[1])
        assert len(calls) == 2 + STEPS
        assert run.state == states.FAILED
        run._decline_reason = ""


def test_rows_that_this_release_does_not_need() -> None:
    """What is in it by itself, and which defects it does not have."""
    names = ["mtp_merge_batch", "mtp_seed_graph", "mtp_metadata", "mtp_launch", "mtp_moe_runner"]
    rows = {row.name: row for row in ENGINE.apply(only=names)}
    assert {name: rows[name].state for name in names} == dict.fromkeys(names, states.UPSTREAMED)
