"""`mtp_merge_batch`: a batch whose requests have all finished can be merged with a new one.

A verify step leaves its own input on the batch until the draft's seed step replaces it. If every
request finishes in that step there is nothing to seed, so the verify input stays; with DP
attention, the input of the draft's extension does. The scheduler then merges the next prefill
into that batch, which neither of the two knows how to do. Before such a merge they are replaced
by the empty draft input, as the seed step would have left it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import DraftInput, ScheduleBatch

TARGET = "sglang.srt.managers.schedule_batch:ScheduleBatch.merge_batch"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's merge, after an input that outlived its step is replaced."""
    merge = stock[TARGET]
    from sglang.srt.speculative.frozen_kv_mtp_info import (
        FrozenKVMTPDraftExtendInput,
        FrozenKVMTPDraftInput,
        FrozenKVMTPVerifyInput,
    )

    outlived = (FrozenKVMTPVerifyInput, FrozenKVMTPDraftExtendInput)

    @functools.wraps(merge)
    def merge_batch(self: ScheduleBatch, other: ScheduleBatch) -> None:
        for batch, partner in ((self, other), (other, self)):
            # A batch that still has something to decode needs real draft tokens: not ours to mend.
            try:
                if isinstance(batch.spec_info, outlived) and all(r.finished() for r in batch.reqs):
                    batch.spec_info = idle_draft_input(FrozenKVMTPDraftInput, batch, partner)
                    run.engaged(False)
            except Exception as error:  # stock's merge, as without us
                run.set(states.FAILED, one_line(error))
                run.declined(one_line(error))
        merge(self, other)

    return {TARGET: merge_batch}


def idle_draft_input(
    draft_input: type[DraftInput], batch: ScheduleBatch, partner: ScheduleBatch
) -> DraftInput:
    """A draft input for no request, shaped like that of ``partner`` where it has one.

    Args:
        draft_input: stock's ``FrozenKVMTPDraftInput``.
        batch: the ``ScheduleBatch`` that it is for.
        partner: the ``ScheduleBatch`` that is merged with it.
    """
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

    seeded = partner.spec_info if isinstance(partner.spec_info, draft_input) else None
    hidden_states = getattr(seeded, "hidden_states", None)
    topk_index = getattr(seeded, "topk_index", None)
    return draft_input.create_idle_input(
        device=batch.device,
        hidden_size=None if hidden_states is None else hidden_states.shape[-1],
        dtype=None if hidden_states is None else hidden_states.dtype,
        topk=1 if topk_index is None else topk_index.shape[-1],
        capture_hidden_mode=CaptureHiddenMode.LAST,
    )
