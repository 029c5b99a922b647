"""The merge of a batch whose requests have all finished, on SGLang's real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from tests.cpu import mtp_batches as made
from tests.cpu.conftest import run_scenario, turn_on

pytestmark = pytest.mark.usefixtures("stock_first")

NAME = "mtp_merge_batch"


def engaged() -> int:
    return ENGINE.runs[NAME].counters.engaged


def merge(left_over: str, side: str) -> Any:
    """A finished batch and a seeded one, merged from either side, then filtered as stock does."""
    running, fresh = made.batch("a", "b"), made.batch("c", first_slot=2)
    made.finish(running)
    if left_over == "verify":
        running.spec_info = made.verify_input(running)
    else:
        running.spec_info = made.draft_extend_input()
    fresh.spec_info = made.draft_input(1, value=5)
    target, other = (running, fresh) if side == "running" else (fresh, running)
    target.merge_batch(other)
    target.filter_batch(v1_spec_info_filtered=True)
    return target


@pytest.mark.parametrize("left_over", ["verify", "draft extend"])
@pytest.mark.parametrize("side", ["running", "fresh"])
def test_stock_fails_and_the_patch_merges(left_over: str, side: str) -> None:
    """The scheduler merges the prefill into the finished batch; mixed batches the other way."""
    with pytest.raises(AttributeError, match=r"merge_batch|topk_index"):
        merge(left_over, side)
    turn_on(NAME)
    before = engaged()
    merged = merge(left_over, side)
    assert engaged() == before + 1
    assert [r.rid for r in merged.reqs] == ["c"]
    assert merged.req_pool_indices.tolist() == [2]
    left = merged.spec_info
    assert type(left).__name__ == "FrozenKVMTPDraftInput"
    assert left.topk_index.tolist() == [[5]]
    assert left.bonus_tokens.tolist() == [5]
    assert torch.equal(left.hidden_states, torch.full((1, made.HIDDEN), 5.0))


def test_two_finished_batches() -> None:
    """Nothing seeded on either side: an empty draft input, which a later merge fills."""
    turn_on(NAME)
    first, second = made.batch("a"), made.batch("b", first_slot=1)
    for each in (first, second):
        made.finish(each)
        each.spec_info = made.verify_input(each)
    first.merge_batch(second)
    assert len(first.spec_info.topk_index) == 0
    third = made.batch("c", first_slot=2)
    third.spec_info = made.draft_input(1, value=4)
    first.merge_batch(third)
    first.filter_batch(v1_spec_info_filtered=True)
    assert first.spec_info.topk_index.tolist() == [[4]]


def test_a_batch_that_goes_on_is_left_to_stock() -> None:
    """A request that still decodes needs draft tokens; an empty input would drop it silently."""
    turn_on(NAME)
    before = engaged()
    running, fresh = made.batch("a", "b"), made.batch("c", first_slot=2)
    running.spec_info = made.verify_input(running)
    running.reqs[0].output_ids.append(made.EOS)
    running.reqs[0].check_finished()
    fresh.spec_info = made.draft_input(1)
    with pytest.raises(AttributeError, match="merge_batch"):
        running.merge_batch(fresh)
    assert engaged() == before


def test_ordinary_merges_are_stocks() -> None:
    """Seeded batches, and batches without speculation: the same result, nothing counted."""
    results = []
    for patched in (False, True):
        if patched:
            turn_on(NAME)
        before = ENGINE.runs[NAME].engaged_count()
        left, right = made.batch("a"), made.batch("b", first_slot=1)
        left.spec_info, right.spec_info = made.draft_input(1, 2), made.draft_input(1, 3)
        left.merge_batch(right)
        plain, other = made.batch("a"), made.batch("b", first_slot=1)
        plain.merge_batch(other)
        assert plain.spec_info is None
        results.append((left.spec_info.topk_index.tolist(), left.seq_lens.tolist()))
        assert ENGINE.runs[NAME].engaged_count() == before
    assert results[0] == results[1] == ([[2], [3]], [5, 5])


# -- the worker that leaves the input behind ---------------------------------------------------------


@pytest.fixture(scope="module")
def worker_runs(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What `mtp_worker_scenario` printed: steps of the real worker, stock and patched."""
    folder: Path = tmp_path_factory.mktemp("worker")
    module = "tests.cpu.mtp_worker_scenario"
    return run_scenario(module, environment, folder, 240)  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", ["plain", "data parallel"])
def test_the_real_worker_all_finished(worker_runs, attention: str) -> None:
    """Verify accepts only the end: stock's next merge raises, the patched one goes on."""
    stock, patched = worker_runs[f"stock, {attention}"], worker_runs[f"patched, {attention}"]
    expected = {
        "plain": "FrozenKVMTPVerifyInput",
        "data parallel": "FrozenKVMTPDraftExtendInput",
    }
    assert stock["left"] == patched["left"] == expected[attention]
    assert stock["correct drafts"] == [0, 0]  # zero accepts: the end token only
    assert stock["error"].startswith("AttributeError")
    assert "merge_batch" in stock["error"]
    assert patched["error"] == ""
    assert patched["running"] == ["c"]
    assert patched["seed rows"] == 1


def test_the_real_worker_some_finished(worker_runs) -> None:
    """One goes on: stock seeds it; with and without the patch the merge is the same."""
    stock, patched = worker_runs["stock, one goes on"], worker_runs["patched, one goes on"]
    assert stock == patched
    assert stock["left"] == "FrozenKVMTPDraftInput"
    assert stock["running"] == ["b", "c"]
    assert stock["seed rows"] == 2


def test_an_error_of_ours_leaves_stocks_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma4_turbo.engine import states
    from gemma4_turbo.ports.v0_5_12.speculation import mtp_merge_batch as patch

    turn_on(NAME)
    monkeypatch.setattr(patch, "idle_draft_input", lambda *given: 1 / 0)
    before = engaged()
    with pytest.raises(AttributeError, match=r"merge_batch|topk_index"):  # stock's own
        merge("verify", "running")
    assert engaged() == before
    assert ENGINE.runs[NAME].state == states.FAILED
