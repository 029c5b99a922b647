"""`mtp_chain`: drafts of the MTP assistant with one candidate per step, without what a tree needs.

See `gemma4_turbo.ports.any.speculation.mtp_chain`. The positions, which are the same in every step, are not set
again: who calls the draft has set them.

Nothing reads the probabilities: they order the candidates of a tree with more of them than draft
tokens, and the verification looks at tokens only. They are 1 where stock keeps them.

Only a worker whose draft runs in CUDA graphs is changed: the one that captures them shows it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import ranks
from gemma4_turbo.ports.any.speculation import mtp_chain
from gemma4_turbo.ports.any.speculation.mtp_chain import best, chain, verify
from gemma4_turbo.runtime.attempts import attempt
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import DraftInput, LogitsProcessorOutput
    from gemma4_turbo.ports.v0_5_12.protocols import DraftBatch, DraftGraphRunner, DraftWorker

__all__ = ("build", "undo", "verify")

CONSTRUCT = (
    "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner:FrozenKVMTPCudaGraphRunner.__init__"
)
METHODS = ("draft_forward", "_capture_for_decode")  # of the worker

_fallback = Fallback("the draft")
_workers: weakref.WeakSet[DraftWorker] = weakref.WeakSet()  # those that have our methods


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The constructor that captures the draft's graphs, after the worker got its methods."""
    construct = stock[CONSTRUCT]

    @functools.wraps(construct)
    def __init__(self: DraftGraphRunner, frozen_kv_mtp_worker: DraftWorker) -> None:
        reason, problem = attempt(run, "a look at the worker", lambda: unfit(frozen_kv_mtp_worker))
        reason = reason or problem
        if reason is None:
            vars(frozen_kv_mtp_worker).update(
                draft_forward=functools.partial(draft_forward, run, frozen_kv_mtp_worker),
                _capture_for_decode=functools.partial(
                    capture_for_decode, run, frozen_kv_mtp_worker
                ),
            )
            _workers.add(frozen_kv_mtp_worker)
        else:
            run.declined(reason)
        construct(self, frozen_kv_mtp_worker)

    return {CONSTRUCT: __init__}


def unfit(worker: DraftWorker) -> str | None:
    """Why a ``FrozenKVMTPWorker`` keeps stock's methods, or None."""
    reason = mtp_chain.unfit(worker)
    if reason is None and any(name in vars(worker) for name in METHODS):
        return "the worker has methods of its own"
    return reason


def capture_for_decode(
    run: PatchRun,
    worker: DraftWorker,
    logits_output: LogitsProcessorOutput,
    draft_input: DraftInput,
) -> None:
    """What the seed step leaves in ``draft_input`` for the draft."""

    def ours() -> None:
        draft_input.topk_index = best(logits_output.next_token_logits)
        draft_input.topk_p = torch.ones_like(draft_input.topk_index, dtype=torch.float32)
        draft_input.hidden_states = logits_output.hidden_states

    def stocks() -> None:
        type(worker)._capture_for_decode(worker, logits_output, draft_input)

    _fallback.call(run, ours, stocks, through=ranks.through())


def draft_forward(
    run: PatchRun,
    worker: DraftWorker,
    forward_batch: DraftBatch,
    skip_attn_backend_init: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parents, places and tokens of the draft, as stock's ``draft_forward`` returns them."""
    draft_input = forward_batch.spec_info
    given = forward_batch.input_ids, draft_input.hidden_states

    def stocks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        forward_batch.input_ids, draft_input.hidden_states = given
        return type(worker).draft_forward(worker, forward_batch, skip_attn_backend_init)

    def ours() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _fallback.prepared(run, _detectors)
        return _draft(worker, forward_batch, skip_attn_backend_init)

    # Without memory stock, which needs more, does not do either.
    through = ranks.through() or torch.OutOfMemoryError
    return _fallback.call(run, ours, stocks, through=through)


def _detectors() -> tuple[Callable[..., None], Callable[..., None]]:
    """SGLang's probes for numbers that are none, and for tokens that are none."""
    from sglang.srt.speculative.spec_utils import maybe_detect_nan, maybe_detect_oob

    return maybe_detect_nan, maybe_detect_oob


def _draft(
    worker: DraftWorker, forward_batch: DraftBatch, skip_attn_backend_init: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maybe_detect_nan, maybe_detect_oob = _detectors()
    draft_input = forward_batch.spec_info
    token, hidden_states = draft_input.topk_index, draft_input.hidden_states
    tokens = [token]
    steps = worker.speculative_num_steps
    if not skip_attn_backend_init:
        worker._init_frozen_kv_metadata(forward_batch)
    for step in range(steps - 1):
        forward_batch.input_ids = token.flatten()
        draft_input.hidden_states = hidden_states
        with worker._target_kv_pool_view(forward_batch):
            output = worker.draft_model_runner.forward(
                forward_batch, skip_attn_backend_init=True
            ).logits_output
        logits = output.next_token_logits
        maybe_detect_nan(logits, f"mtp_chain step {step}")
        token, hidden_states = best(logits), output.hidden_states
        maybe_detect_oob(token, 0, logits.shape[-1], "mtp_chain: token OOB")
        tokens.append(token)
    return (*chain(len(token), steps, token.device), torch.cat(tokens, dim=1))


def undo(run: PatchRun) -> None:
    """Give live workers stock's methods back; graphs that were captured stay as they are."""
    for worker in list(_workers):
        for name in METHODS:
            vars(worker).pop(name, None)
    _workers.clear()
    _fallback.clear()
