"""`mtp_chain`: drafts of the MTP assistant with one candidate per step, without what a tree needs.

See `gemma4_turbo.ports.any.speculation.mtp_chain`. The seed step is the draft's first one here, so that every step
is one of these. The positions, which are the same in every step, are not set again: who calls the
draft has set them. Nothing is kept from one draft to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gemma4_turbo.ports.any import ranks
from gemma4_turbo.ports.any.speculation.mtp_chain import best, chain, unfit, verify
from gemma4_turbo.runtime.fallback import DeclinedError, Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import DraftBatch, DraftWorker

__all__ = ("build", "undo", "verify")

TARGET = "sglang.srt.speculative.frozen_kv_mtp_worker_v2:FrozenKVMTPDraftWorker.draft_forward"
Draft = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_fallback = Fallback("the draft")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The draft as it is captured in CUDA graphs, or runs without them."""
    stocks: Callable[[DraftWorker, DraftBatch], Draft] = stock[TARGET]

    @functools.wraps(stocks)
    def draft_forward(self: DraftWorker, forward_batch: DraftBatch) -> Draft:
        draft_input = forward_batch.spec_info
        given = forward_batch.input_ids, draft_input.hidden_states

        def ours() -> Draft:
            reason = _fallback.prepared(run, lambda: unfit(self))
            if reason is not None:
                raise DeclinedError(reason)
            _fallback.prepared(run, _tools)
            return _draft(self, forward_batch)

        def again() -> Draft:
            forward_batch.input_ids, draft_input.hidden_states = given
            return stocks(self, forward_batch)

        # Without memory stock, which needs more, does not do either.
        through = ranks.through() or torch.OutOfMemoryError
        return _fallback.call(run, ours, again, through=through)

    return {TARGET: draft_forward}


class _Tools(NamedTuple):
    """What a draft needs of SGLang's."""

    context: Callable[..., Any]
    entered: Callable[..., Any]
    detect_inf: Callable[..., None]
    detect_nan: Callable[..., None]
    detect_oob: Callable[..., None]


def _tools() -> _Tools:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
    from sglang.srt.utils.async_probe import (
        maybe_detect_inf,
        maybe_detect_nan,
        maybe_detect_oob,
    )

    return _Tools(
        ForwardContext, forward_context, maybe_detect_inf, maybe_detect_nan, maybe_detect_oob
    )


def _draft(worker: DraftWorker, forward_batch: DraftBatch) -> Draft:
    """Parents, places and tokens, as stock's ``draft_forward`` returns them."""
    tools = _tools()
    if forward_batch.needs_forward_metadata_init():
        worker._init_frozen_kv_metadata(forward_batch)
    draft_input, steps = forward_batch.spec_info, worker.speculative_num_steps
    token, hidden_states = draft_input.bonus_tokens, draft_input.hidden_states
    tokens = []
    for step in range(steps):
        forward_batch.input_ids = token.flatten()
        draft_input.hidden_states = hidden_states
        context = tools.context(attn_backend=worker.draft_attn_backend)
        with (
            worker._target_kv_pool_view(forward_batch),
            tools.entered(context, forward_batch=forward_batch),
        ):
            output = worker.draft_model_runner.forward(forward_batch).logits_output
        logits = output.next_token_logits
        tools.detect_nan(logits, f"mtp_chain step {step}")
        if step:
            tools.detect_inf(logits, f"mtp_chain step {step}")
        token, hidden_states = best(logits), output.hidden_states
        tools.detect_oob(token, 0, logits.shape[-1], "mtp_chain: token OOB")
        tokens.append(token)
    parents, places = chain(len(token), steps, token.device)
    # Of one step there is nothing that could be a parent.
    return parents[:, : steps if steps > 1 else 0], places, torch.cat(tokens, dim=1)


def undo(run: PatchRun) -> None:
    """What has failed is tried again; graphs that were captured stay as they are."""
    _fallback.clear()
