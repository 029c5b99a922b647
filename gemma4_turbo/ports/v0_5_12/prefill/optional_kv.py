"""`optional_kv`: layers that share another layer's KV run under piecewise CUDA graphs.

Such a layer calls its attention without key and value. In a piecewise graph stock sends every call
through one operator that cuts both to the real tokens, and fails on None: E2B and E4B as text-only
models do not start. Calls without key and value go through an operator of their own here; with key
and value stock's runs. Other attention arguments than Gemma 4's are stock's affair as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.v0_5_12.prefill import split_ops
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention
    from gemma4_turbo.ports.v0_5_12.protocols import ForwardContext

TARGET = "sglang.srt.layers.radix_attention:RadixAttention.forward"
SCHEMA = (
    "shared_kv_attention(Tensor query, Tensor(a!) output, bool save_kv_cache, int layer_id) -> ()"
)
SPLIT_NAMES = custom_ops.cut_names(SCHEMA)


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The forward, and the operator at which a piecewise graph is cut."""
    from sglang.srt.compilation.piecewise_context_manager import get_forward_context
    from sglang.srt.model_executor.breakable_cuda_graph.breakable_cuda_graph import eager_on_graph
    from sglang.srt.model_executor.breakable_cuda_graph.context import is_in_breakable_cuda_graph

    attention: Callable[..., torch.Tensor] = stock[TARGET]
    attend = custom_ops.register(run.patch.name, SCHEMA, shared_attention, lambda *args: None)
    attend_between_graphs = eager_on_graph(True)(attend)
    split_ops.cut_graphs_at(SPLIT_NAMES)

    def forward(
        self: RadixAttention,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: object,
    ) -> torch.Tensor:
        if (
            k is not None
            or v is not None
            or kwargs
            or not forward_batch.forward_mode.is_extend()
            or get_forward_context() is None
        ):
            return attention(self, q, k, v, forward_batch, save_kv_cache, **kwargs)
        if self.qk_head_dim != self.v_head_dim:
            output = q.new_empty((q.shape[0], self.tp_q_head_num * self.v_head_dim))
        else:
            output = torch.empty_like(q)
        if is_in_breakable_cuda_graph():
            attend_between_graphs(q, output, save_kv_cache, self.layer_id)
        else:
            attend(q, output, save_kv_cache, self.layer_id)
        return output

    return {TARGET: forward}


def undo(run: PatchRun) -> None:
    """Graphs are cut at stock's operators only."""
    split_ops.cut_graphs_no_more_at(SPLIT_NAMES)


def shared_attention(
    query: torch.Tensor, output: torch.Tensor, save_kv_cache: bool, layer_id: int
) -> None:
    """Attention of the real tokens over KV that is in the cache, as stock's operator with a key.

    The rows of padding are left as they are, as in stock. The batch is put back also when the
    backend fails.
    """
    from sglang.srt.compilation.piecewise_context_manager import get_forward_context

    context: ForwardContext = get_forward_context()
    batch = context.forward_batch
    layer = context.attention_layers[layer_id]
    tokens = batch.num_token_non_padded_cpu
    whole, whole_swa = batch.out_cache_loc, batch.out_cache_loc_swa
    pool: Any = batch.token_to_kv_pool  # not every kind has slots of sliding layers
    pool_loc = getattr(pool, "swa_loc", None)
    follows = whole_swa is not None and hasattr(pool, "set_swa_loc")
    batch.out_cache_loc = whole[:tokens]
    try:
        if whole_swa is not None:
            batch.out_cache_loc_swa = whole_swa[:tokens]
        if follows:
            pool.set_swa_loc(batch.out_cache_loc_swa)
        batch._attn_output = output[:tokens]  # a backend may write there directly
        found = batch.attn_backend.forward(query[:tokens], None, None, layer, batch, save_kv_cache)
    finally:
        batch.out_cache_loc, batch.out_cache_loc_swa = whole, whole_swa
        if follows:
            pool.set_swa_loc(pool_loc)
    if found.data_ptr() != output.data_ptr():
        output[:tokens].view(found.shape).copy_(found)
