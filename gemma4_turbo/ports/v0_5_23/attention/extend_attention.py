"""`extend_attention`: the triton backend's extend path with `gemma4_turbo.kernels.attention.extend`.

Two functions of SGLang's triton backend are replaced. ``forward_extend`` keeps what surrounds the kernel
(output, KV store, choice of the layer's metadata), but makes no contiguous copies of K and V. The one
that gathers the sliding window's slots, with or without a buffer of a CUDA graph, reads no length on
the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.attention import held_kernels
from gemma4_turbo.ports.any.attention.extend_attention import (
    Call,
    Rows,
    compared,
    fallback,
    forget,
    layer_unfit,
    window,
)
from gemma4_turbo.ports.v0_5_23.attention import triton_backend
from gemma4_turbo.ports.v0_5_23.stock import STOCK
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.checks import Check
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import ForwardBatch, RadixAttention, TritonBackend

HELD = "extend_attention_fwd", STOCK.extend_kernel
TARGET = f"{triton_backend.MODULE}:TritonAttnBackend.forward_extend"
WINDOW = f"{triton_backend.MODULE}:update_sliding_window_buffer"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernels where they fit, else stock."""
    triton_backend.load()
    return {TARGET: _forward(run, stock[TARGET]), WINDOW: window(run, stock[WINDOW], _rows)}


def undo(run: PatchRun) -> None:
    """What has failed is tried again."""
    forget()


# -- the attention ------------------------------------------------------------------------------


def _forward(run: PatchRun, stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(stock)
    def forward_extend(
        self: TritonBackend,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        score_mod: object = None,
        aux_tensors: object = None,
    ) -> torch.Tensor:
        def stocks() -> torch.Tensor:
            options = save_kv_cache, sinks, score_mod, aux_tensors
            return stock(self, q, k, v, layer, forward_batch, *options)

        if torch.compiler.is_compiling():
            custom_ops.not_traced("extend_attention")
            return stocks()
        key = q.device, q.dtype, layer.tp_q_head_num, layer.qk_head_dim, layer.sliding_window_size
        reason = fallback.unfit(key) or triton_backend.unfit(self, layer, score_mod, aux_tensors)
        reason = reason or layer_unfit(self, layer, k, v, sinks) or _verify_unfit(self)
        reason = reason or held_kernels.unfit(self, *HELD)
        if reason is None:
            try:
                found = _attend(self, q, k, v, layer, forward_batch, save_kv_cache)
            except Exception as error:
                failure = error.with_traceback(None)  # whose frames hold the call's tensors
                # K and V are stored again: the same, at the same place.
                result = stocks()
                run.declined(fallback.failed(run, key, failure))
                return result
            if isinstance(found, torch.Tensor):
                run.engaged(custom_ops.capturing())
                return found
            reason = found
        run.declined(reason)
        return stocks()

    return forward_extend


def _verify_unfit(backend: TritonBackend) -> str | None:
    if backend.use_verify_shared_kv or backend.use_verify_splitkv:
        return "verification has a kernel of its own"
    return None


def _attend(
    backend: TritonBackend,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    layer: RadixAttention,
    forward_batch: ForwardBatch,
    save_kv_cache: bool,
) -> torch.Tensor | str:
    """The attention's result, K and V stored before, or why the kernel does not take it."""
    slots = triton_backend.new_slots(backend, layer, forward_batch, q)
    if slots is None:
        return triton_backend.NO_SLOTS
    call = Call(backend, backend.token_to_kv_pool, q, k, v, layer, slots)
    out = getattr(forward_batch, "_attn_output", None)
    reason = call.unfit() or _output_unfit(out, q)
    if reason is not None:
        return reason
    if k is None or v is None:
        call.k, call.v = call.k_buffer[slots], call.v_buffer[slots]
    elif save_kv_cache:
        triton_backend.store(backend, layer, forward_batch, k, v)
    return call.attend(torch.empty_like(q) if out is None else out, STOCK.query_block)


def _output_unfit(out: torch.Tensor | None, q: torch.Tensor) -> str | None:
    """Why the kernel does not write to what a breakable graph hands in, or None."""
    if out is None:
        return None
    if out.dtype != q.dtype or out.device != q.device or out.numel() != q.numel():
        return (
            f"the output is to be {tuple(out.shape)} {out.dtype}, q is {tuple(q.shape)} {q.dtype}"
        )
    return None if out.is_contiguous() else "the output is to be in rows that are not contiguous"


# -- the window's slots -------------------------------------------------------------------------


def _rows(given: dict[str, Any]) -> tuple[Rows | None, str]:
    """Of a pool that is no sliding one the row holds the slots; else they are mapped.

    Stock lets a slot of -1 stay; the mapping's last entry, which the kernel reads for it, is -1 too.
    """
    known, translator = triton_backend.types(), given["translator"]
    pool = given.get("token_to_kv_pool")
    reason = triton_backend.translator_unfit(translator)
    if reason is not None:
        return None, reason
    if not isinstance(pool, known.any_swa_pool):
        return Rows(translator.req_to_token, None), ""
    if type(pool) is not known.swa_pool or pool.full_to_swa_index_mapping is None:
        return None, f"slots are translated by a {type(pool).__name__}"
    return Rows(translator.req_to_token, pool.full_to_swa_index_mapping), ""


def verify(run: PatchRun, device: str) -> list[Check]:
    """Against fp64, and on a GPU against stock."""
    return compared(device, STOCK.extend_attention)
