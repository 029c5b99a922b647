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
from gemma4_turbo.ports.v0_5_23.attention import triton_backend
from gemma4_turbo.ports.v0_5_23.stock import STOCK
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import ForwardBatch, RadixAttention, TritonBackend

__all__ = ("build", "undo", "verify")

TARGET = f"{triton_backend.MODULE}:TritonAttnBackend.forward_decode"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernel where it fits and has passed its check, else stock."""
    triton_backend.load()
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
        score_mod: object = None,
        aux_tensors: object = None,
    ) -> torch.Tensor:
        def stocks(reason: str | None) -> torch.Tensor:
            if reason is not None:
                run.declined(reason)
            options = save_kv_cache, sinks, score_mod, aux_tensors
            return stock_forward(self, q, k, v, layer, forward_batch, *options)

        if torch.compiler.is_compiling():
            custom_ops.not_traced("decode_attention")
            return stocks(None)
        reason = triton_backend.unfit(self, layer, score_mod, aux_tensors)
        reason = reason or layer_unfit(self, layer, sinks)
        reason = reason or held_kernels.unfit(self, "decode_attention_fwd", STOCK.decode_kernel)
        if reason is None and save_kv_cache:
            reason = _slots_unfit(self, forward_batch)
        if reason is not None:
            return stocks(reason)
        call = Call(self, self.token_to_kv_pool, q, layer)
        if call.reason is not None:
            return stocks(call.reason)
        reason = check_unfit(run, call, custom_ops.capturing())
        if reason is not None:
            return stocks(reason)
        if save_kv_cache:
            triton_backend.store(self, layer, forward_batch, k, v)

        def stored() -> torch.Tensor:
            return stock_forward(
                self, q, k, v, layer, forward_batch, False, sinks, score_mod, aux_tensors
            )

        return fallback.call(run, call.launch, stored, call.key)

    return {TARGET: forward_decode}


def _slots_unfit(backend: TritonBackend, forward_batch: ForwardBatch) -> str | None:
    """Why stock would refuse to store a draft's step, or None: then it is asked to say so itself."""
    slots = backend.forward_metadata.swa_out_cache_loc
    if slots is None or not backend.is_draft_runner or forward_batch.spec_info is None:
        return None
    if slots.shape[0] != forward_batch.out_cache_loc.shape[0]:
        return "a draft's slots of sliding layers are not those of its step"
    return None
