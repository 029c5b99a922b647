"""`mtp_sync`: the MTP draft's worker reads no lengths from the GPU, and writes the tree's mask in place.

The worker runs ahead of the GPU: while a step is computed, the next one is launched. Stock's draft asks
the GPU for the sum of the lengths at every step and waits for all that was launched before. The sum
sizes the tree's mask, a byte for each draft token and each token it may see, which stock allocates,
fills and has the target's backend copy into a buffer of its own.

Here the sum is that of the host's lengths, or where the host has none, of the slots that are allocated
to the requests: no sequence is longer. The mask is written where the target's Triton backend reads it,
in the part that such lengths can fill, and the backend's copy is one onto itself. SGLang's EAGLE worker
does the same, but for filling the whole buffer, which has room for the longest context.

The mask's bytes are stock's. Behind them, and behind the slots that an eager verification lists, is
room that nobody reads. Nothing is kept on an object that another step looks at: the buffer is written by
the stream that reads it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_turbo.ports.v0_5_23.attention import triton_backend
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    import torch

    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import DraftWorker, ScheduleBatch, TritonBackend

TARGET = "sglang.srt.speculative.frozen_kv_mtp_worker_v2:FrozenKVMTPDraftWorker.draft"

INPUT = (
    *("draft_token", "custom_mask", "positions", "retrieve_index", "retrieve_next_token"),
    *("retrieve_next_sibling", "retrieve_cum_len", "spec_steps", "topk", "draft_token_num"),
    *("capture_hidden_mode", "seq_lens_sum", "seq_lens_cpu"),
)
"""What a verification's input is made with."""

_fallback = Fallback("the mask's place")


class Room(NamedTuple):
    """For how many tokens there has to be room, and the mask of the target's backend."""

    tokens: int  # the sum of the lengths, or more
    mask: torch.Tensor | None  # None: a new one


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The draft, without a wait; TypeError where SGLang's input of a verification wants more than it gets."""
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPVerifyInput

    inspect.signature(FrozenKVMTPVerifyInput).bind(**dict.fromkeys(INPUT))  # not in a step
    stocks: Callable[[DraftWorker, ScheduleBatch], object] = stock[TARGET]
    triton_backend.load()

    @functools.wraps(stocks)
    def draft(self: DraftWorker, batch: ScheduleBatch) -> object:
        if batch.forward_mode.is_idle():
            return stocks(self, batch)
        reason, room = _fallback.unfit(), None
        if reason is None:
            try:
                found = room_for(self, batch)
                if isinstance(found, Room):
                    room = found
                else:
                    reason = found
            except Exception as error:
                reason = _fallback.failed(run, None, error)
        if room is None:
            run.declined(str(reason))
            return stocks(self, batch)
        made = _draft(self, batch, room)
        run.engaged(False)
        return made

    return {TARGET: draft}


def room_for(worker: DraftWorker, batch: ScheduleBatch) -> Room | str:
    """The room that a draft of this batch needs, or why it is stock's."""
    if worker.topk != 1:
        return f"{worker.topk} candidates per step"  # whose frontier's lengths stock sums up again
    target = worker.target_worker.model_runner.attn_backend
    known = triton_backend.types().backend
    for whose, backend in (("target", target), ("draft", worker.draft_attn_backend)):
        if type(backend) is not known:  # it may read more of the sum than how much to allocate
            return f"the {whose}'s attention backend is a {type(backend).__name__}"
    tokens = lengths(batch)
    if tokens is None:
        return "a row of the batch is no request's"
    return Room(tokens, mask_of(target, len(batch.seq_lens), tokens, worker))


def lengths(batch: ScheduleBatch) -> int | None:
    """The sum of the lengths, or of what is allocated; None where no request stands for a row."""
    if batch.seq_lens_cpu is not None:
        return int(batch.seq_lens_cpu.sum())
    if len(batch.reqs) != len(batch.seq_lens):
        return None
    return sum(request.kv.kv_allocated_len for request in batch.reqs)


def mask_of(
    backend: TritonBackend, rows: int, tokens: int, worker: DraftWorker
) -> torch.Tensor | None:
    """The beginning of the backend's mask, as far as the tree's can reach; None: it has none as large."""
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    mask = backend.verify_mask
    if mask is None or mask.mode != TreeMaskMode.FULL_MASK or not mask.fits(rows):
        return None
    width = worker.speculative_num_draft_tokens
    return mask.buffer[: width * (tokens + width * rows)]


def _draft(worker: DraftWorker, batch: ScheduleBatch, room: Room) -> object:
    """A draft in stock's steps; its verification's input."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
    from sglang.srt.speculative import frozen_kv_mtp_worker_v2 as stock
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPVerifyInput

    draft_input = batch.spec_info
    draft_input.capture_hidden_mode = CaptureHiddenMode.LAST
    draft_input.num_tokens_per_req = draft_input.num_tokens_for_logprob_per_req = worker.topk
    draft_input.positions = worker._position_for_batch(batch)
    batch.seq_lens_sum = room.tokens
    batch.return_hidden_states = False
    forward_batch: Any = ForwardBatch.init_new(
        batch, worker.draft_model_runner, return_hidden_states_before_norm=False
    )
    if forward_batch.positions is not draft_input.positions:  # they are those that stock sets again
        worker._set_positions(forward_batch)
    forward_batch.out_cache_loc = None  # a draft writes no K and V

    runner = worker.cuda_graph_runner
    if runner and runner.can_run_graph(forward_batch):
        parents, places, tokens = runner.execute(forward_batch)
    else:
        forward_batch.can_run_decode_cuda_graph = False
        parents, places, tokens = worker.draft_forward(forward_batch)

    width, steps = worker.speculative_num_draft_tokens, worker.speculative_num_steps
    # Looked up where stock's draft looks it up.
    mask, positions, index, following, sibling, draft_tokens = stock.build_tree_kernel_efficient(
        draft_input.bonus_tokens,
        parents,
        places,
        tokens,
        batch.seq_lens,
        room.tokens,
        worker.topk,
        steps,
        width,
        tree_mask_buf=room.mask,
    )
    return FrozenKVMTPVerifyInput(
        draft_token=draft_tokens,
        custom_mask=mask,
        positions=positions,
        retrieve_index=index,
        retrieve_next_token=following,
        retrieve_next_sibling=sibling,
        retrieve_cum_len=None,
        spec_steps=steps,
        topk=worker.topk,
        draft_token_num=width,
        capture_hidden_mode=CaptureHiddenMode.FULL,
        seq_lens_sum=room.tokens,
        seq_lens_cpu=batch.seq_lens_cpu,
    )


def undo(run: PatchRun) -> None:
    """What has failed is tried again."""
    _fallback.clear()
