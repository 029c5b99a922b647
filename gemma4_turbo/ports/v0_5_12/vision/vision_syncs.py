"""`vision_syncs`: the length of a sequence is not read back from the GPU in every vision layer.

Gemma 4's vision attention passes no ``cu_seqlens``: all sequences of a batch are ``seq_len`` long, so
their maximum is known on the host. Stock computes it on the GPU and waits for it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.runtime.fallback import DeclinedError, Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TRITON = "sglang.srt.layers.attention.vision:VisionTritonAttention.forward"
FLASH3 = "sglang.srt.layers.attention.vision:VisionFlash3Attention.forward"

_fallback = Fallback("attention over lengths of the host")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Both backends; stock for any call with lengths of its own."""
    from sglang.srt.environ import envs
    from sglang.srt.layers.attention import vision

    def lengths_of(
        q: torch.Tensor,
        cu_seqlens: torch.Tensor | list[torch.Tensor] | None,
        bsz: int,
        seq_len: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if cu_seqlens is not None:
            raise DeclinedError("sequences of different lengths")
        if envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.get():
            raise DeclinedError("SGLANG_VIT_ENABLE_CUDA_GRAPH")
        if q.shape[0] != bsz * seq_len or seq_len == 0:
            raise DeclinedError(f"{q.shape[0]} rows are not {bsz} sequences of {seq_len}")
        return uniform(bsz, seq_len, q.device)

    def triton_forward(
        self: object,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | list[torch.Tensor] | None,
        bsz: int,
        seq_len: int,
        softmax_scale: float | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        def ours() -> torch.Tensor:
            starts, lengths = lengths_of(q, cu_seqlens, bsz, seq_len)
            output = torch.empty_like(q)
            vision.context_attention_fwd(
                q, k, v, output, starts, lengths, seq_len, is_causal=False, sm_scale=softmax_scale
            )
            return output

        def stocks() -> torch.Tensor:
            return stock[TRITON](  # type: ignore[no-any-return]
                self, q, k, v, cu_seqlens, bsz, seq_len, softmax_scale, **kwargs
            )

        if torch.compiler.is_compiling():
            return stocks()
        return _fallback.call(run, ours, stocks, TRITON)

    def flash3_forward(
        self: object,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | list[torch.Tensor] | None,
        bsz: int,
        seq_len: int,
        softmax_scale: float | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        def ours() -> torch.Tensor:
            starts, _ = lengths_of(q, cu_seqlens, bsz, seq_len)
            options = {
                "cu_seqlens_q": starts,
                "cu_seqlens_k": starts,
                "max_seqlen_q": seq_len,
                "max_seqlen_k": seq_len,
                "softmax_scale": softmax_scale,
                "window_size": kwargs.get("window_size", (-1, -1)),
            }
            if kwargs.get("s_aux") is not None:
                options["sinks"] = kwargs["s_aux"]
            return vision.flash_attn_varlen_func(q, k, v, **options)  # type: ignore[no-any-return]

        def stocks() -> torch.Tensor:
            return stock[FLASH3](  # type: ignore[no-any-return]
                self, q, k, v, cu_seqlens, bsz, seq_len, softmax_scale, **kwargs
            )

        if torch.compiler.is_compiling():
            return stocks()
        return _fallback.call(run, ours, stocks, FLASH3)

    return {TRITON: triton_forward, FLASH3: flash3_forward}


def undo(run: PatchRun) -> None:
    """Live objects were not changed."""
    _fallback.clear()


@functools.lru_cache(maxsize=128)
def uniform(bsz: int, seq_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts ``[bsz + 1]`` and lengths ``[bsz]`` of sequences of one length, int32."""
    starts = torch.arange(bsz + 1, dtype=torch.int32, device=device) * seq_len
    return starts, torch.full((bsz,), seq_len, dtype=torch.int32, device=device)
