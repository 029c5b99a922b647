"""`extend_attention`: the triton backend's extend path with `gemma4_turbo.kernels.attention.extend`.

Three functions of SGLang's triton backend are replaced. ``forward_extend`` keeps what surrounds the
kernel (output, KV store, choice of the layer's metadata), but makes no contiguous copies of K and V.
The two that gather the sliding window's slots read no lengths on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import sglang_types
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
from gemma4_turbo.ports.v0_5_12.attention import extend_wraps
from gemma4_turbo.ports.v0_5_12.stock import STOCK
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.checks import Check
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention, TritonBackend

BACKEND = "sglang.srt.layers.attention.triton_backend"
HELD = "extend_attention_fwd", STOCK.extend_kernel
WINDOW = f"{BACKEND}:update_sliding_window_buffer"
WINDOW_GRAPH = f"{BACKEND}:update_sliding_window_buffer_cuda_graph"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernels where they fit, else stock."""
    return {
        **extend_wraps.enable(
            run.patch.name, functools.partial(_forward, run), stock[extend_wraps.TARGET]
        ),
        WINDOW: window(run, stock[WINDOW], _rows),
        WINDOW_GRAPH: window(run, stock[WINDOW_GRAPH], _rows),
    }


def undo(run: PatchRun) -> None:
    """Leave the extend path, where another patch may stay."""
    extend_wraps.disable(run.patch.name)
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
    ) -> torch.Tensor:
        def stocks() -> torch.Tensor:
            return stock(self, q, k, v, layer, forward_batch, save_kv_cache, sinks)

        if torch.compiler.is_compiling():
            custom_ops.not_traced("extend_attention")
            return stocks()
        key = q.device, q.dtype, layer.tp_q_head_num, layer.qk_head_dim, layer.sliding_window_size
        reason = fallback.unfit(key)
        if reason is None and not sglang_types.is_triton_backend(self):
            reason = f"the attention backend is {type(self).__name__}"
        if reason is None:
            reason = layer_unfit(self, layer, k, v, sinks)
            reason = reason or held_kernels.unfit(self, *HELD)
        if reason is None:
            try:
                pool, slots = forward_batch.token_to_kv_pool, forward_batch.out_cache_loc
                call = Call(self, pool, q, k, v, layer, slots)
                reason = call.unfit()
                found = None
                if reason is None:
                    if k is None or v is None:
                        slots = extend_wraps.new_slots(layer, forward_batch)
                        call.k, call.v = call.k_buffer[slots], call.v_buffer[slots]
                    elif save_kv_cache:
                        pool.set_kv_buffer(layer, slots, k, v)
                    found = call.attend(torch.empty_like(q), STOCK.query_block)
            except Exception as error:
                failure = error.with_traceback(None)  # whose frames hold the call's tensors
                # K and V are stored again: the same, at the same place.
                found = stocks()
                run.declined(fallback.failed(run, key, failure))
                return found
            if found is not None:
                run.engaged(custom_ops.capturing())
                return found
        run.declined(str(reason))
        return stocks()

    return forward_extend


def _rows(given: dict[str, Any]) -> tuple[Rows | None, str]:
    """A sliding pool's slots are those of the full one through its mapping."""
    allocator = given.get("token_to_kv_pool_allocator")
    if not hasattr(allocator, "translate_loc_from_full_to_swa"):
        return Rows(given["req_to_token"], None), ""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool, SWATokenToKVPoolAllocator

    cache = getattr(allocator, "_kvcache", None)
    if type(allocator) is not SWATokenToKVPoolAllocator or type(cache) is not SWAKVPool:
        names = type(allocator).__name__, type(cache).__name__
        return None, f"slots are translated by {names[0]} over {names[1]}"
    return Rows(given["req_to_token"], cache.full_to_swa_index_mapping), ""  # type: ignore[union-attr]


def verify(run: PatchRun, device: str) -> list[Check]:
    """Against fp64, and on a GPU against stock."""
    return compared(device, STOCK.extend_attention)
