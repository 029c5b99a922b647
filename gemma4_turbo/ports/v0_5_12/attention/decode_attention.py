"""`decode_attention`: decode steps of the triton backend run `gemma4_turbo.kernels.attention.decode`.

A trace of torch.compile sees stock's function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.attention import held_kernels
from gemma4_turbo.ports.any.attention.decode_attention import (
    Call,
    check_unfit,
    fallback,
    layer_unfit,
    undo,
    verify,
)
from gemma4_turbo.ports.v0_5_12.stock import STOCK
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention, TritonBackend

__all__ = ("build", "undo", "verify")

TARGET = "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernel where it fits and has passed its check, else stock."""
    stock_forward: Callable[..., torch.Tensor] = stock[TARGET]

    @functools.wraps(stock_forward)
    def forward_decode(
        self: TritonBackend,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            custom_ops.not_traced("decode_attention")
            return stock_forward(self, q, k, v, layer, forward_batch, save_kv_cache, sinks)
        call = None
        reason = layer_unfit(self, layer, sinks)
        reason = reason or held_kernels.unfit(self, "decode_attention_fwd", STOCK.decode_kernel)
        if reason is None:
            call = Call(self, forward_batch.token_to_kv_pool, q, layer)
            reason = call.reason
        if reason is not None or call is None:
            run.declined(str(reason))
            return stock_forward(self, q, k, v, layer, forward_batch, save_kv_cache, sinks)
        reason = check_unfit(run, call, custom_ops.capturing())
        if reason is not None:
            run.declined(reason)
            return stock_forward(self, q, k, v, layer, forward_batch, save_kv_cache, sinks)
        if save_kv_cache:
            forward_batch.token_to_kv_pool.set_kv_buffer(
                layer, forward_batch.out_cache_loc, k, v, layer.k_scale, layer.v_scale
            )

        def stored() -> torch.Tensor:
            return stock_forward(self, q, k, v, layer, forward_batch, False, sinks)

        return fallback.call(run, call.launch, stored, call.key)

    return {TARGET: forward_decode}
