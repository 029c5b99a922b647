"""``Gemma4Attention.forward`` of 0.5.22 and 0.5.23: where a decode step's K and V are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.any.decode_step import attention
from gemma4_turbo.ports.v0_5_23 import classes
from gemma4_turbo.ports.v0_5_23.stock import STOCK as STOCK  # the fusions follow it

if TYPE_CHECKING:
    import torch

    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step
    from gemma4_turbo.kernels.qkv import Store
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention

_STORES = frozenset(("forward", "forward_decode", "_set_kv_buffer"))
"""Each stores K and V, or calls what does."""
PADDING = 0
"""The slot of padding rows, which stock's store leaves as it is."""


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement."""
    classes.load()
    return attention.enable(fusions, run, stock, slots)


def slots(layer: RadixAttention, forward_batch: ForwardBatch, k: torch.Tensor) -> Store | None:
    """Of the pool of this forward's attention backend, or None."""
    from sglang.srt.model_executor.forward_context import get_attn_backend, has_forward_context

    if not has_forward_context():
        return None
    backend: Any = get_attn_backend()
    if not sglang_types.is_triton_backend(backend) or backend.dcp_size > 1:
        return None
    if not vars(backend).keys().isdisjoint(_STORES):  # somebody's own
        return None
    pool, locations, index = backend.token_to_kv_pool, forward_batch.out_cache_loc, layer.layer_id
    if "set_kv_buffer" in vars(pool):
        return None
    known = sglang_types.types()
    if type(pool) is known.swa_pool:
        index, sliding = pool.layers_mapping[index]
        if sliding:
            locations = backend.forward_metadata.swa_out_cache_loc
        pool = pool.swa_kv_pool if sliding else pool.full_kv_pool
    if type(pool) is not known.pool or _laid_out_otherwise(pool):
        return None
    found = attention.pool_slots(pool, index, locations, k)
    return None if found is None else found._replace(skipped=PADDING)


def _laid_out_otherwise(pool: Any) -> bool:
    """Whether a slot is not a row of its layer's buffers, or not what a batch calls by that number."""
    return (
        pool.kv_cache_layout != "nhd"
        or pool.is_quantized_kv_cache
        or pool.requires_physical_write_loc
        or "_store_kv_layer" in vars(pool)
    )
