"""``Gemma4Attention.forward`` of 0.5.11 and 0.5.12: where a decode step's K and V are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.any.decode_step import attention
from gemma4_turbo.ports.v0_5_12 import classes
from gemma4_turbo.ports.v0_5_12.stock import STOCK as STOCK  # the fusions follow it

if TYPE_CHECKING:
    import torch

    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step
    from gemma4_turbo.kernels.qkv import Store
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement."""
    classes.load()
    return attention.enable(fusions, run, stock, slots)


def slots(layer: RadixAttention, forward_batch: ForwardBatch, k: torch.Tensor) -> Store | None:
    """Of the batch's pool, or None."""
    if not sglang_types.is_triton_backend(forward_batch.attn_backend):
        return None
    locations: torch.Tensor | None
    pool, locations, index = (
        forward_batch.token_to_kv_pool,
        forward_batch.out_cache_loc,
        layer.layer_id,
    )
    if "set_kv_buffer" in vars(pool):  # somebody's own
        return None
    if type(pool) is sglang_types.types().swa_pool:
        index, sliding = pool.layers_mapping[index]
        if sliding:
            locations = pool.swa_loc
        pool = pool.swa_kv_pool if sliding else pool.full_kv_pool
    return attention.pool_slots(pool, index, locations, k)
