"""`vision_syncs`: the length of a sequence is not read back from the GPU in every vision layer.

Gemma 4's vision attention passes no ``cu_seqlens``: all sequences of a batch are ``seq_len`` long, so
their maximum is known on the host. This line's backends take it as ``max_seqlen``; without it they
compute it on the GPU and wait for it. Everything else is stock's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TRITON = "sglang.srt.layers.attention.vision:VisionTritonAttention.forward"
FLASH3 = "sglang.srt.layers.attention.vision:VisionFlash3Attention.forward"
FLASH4 = "sglang.srt.layers.attention.vision:VisionFlash4Attention.forward"
INT32 = 2**31  # of the starts that stock makes


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The three backends' forwards, told the longest sequence where stock would compute it."""
    return {target: _told(run, stock[target]) for target in (TRITON, FLASH3, FLASH4)}


def _told(run: PatchRun, attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(
        self: object,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: object,
        bsz: int,
        seq_len: int,
        softmax_scale: float | None = None,
        forward_metadata: object = None,
        **kwargs: object,
    ) -> torch.Tensor:
        theirs = (self, q, k, v, cu_seqlens, bsz, seq_len, softmax_scale, forward_metadata)
        if torch.compiler.is_compiling():
            return attention(*theirs, **kwargs)
        reason = None
        if forward_metadata is not None or kwargs.get("max_seqlen") is not None:
            reason = "the longest sequence is known already"
        elif cu_seqlens is not None:
            reason = "sequences of different lengths"
        elif not _is_count(bsz) or not _is_count(seq_len) or (bsz + 1) * seq_len > INT32:
            reason = f"{bsz} sequences of {seq_len}"
        if reason is not None:
            run.declined(reason)
            return attention(*theirs, **kwargs)
        kwargs["max_seqlen"] = seq_len
        output = attention(*theirs, **kwargs)
        run.engaged(
            custom_ops.capturing()
        )  # behind the call: a mode that refuses it does not count
        return output

    return forward


def _is_count(number: object) -> bool:
    return type(number) is int and number > 0
