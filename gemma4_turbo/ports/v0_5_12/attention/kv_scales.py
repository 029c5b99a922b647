"""`kv_scales`: attention that reads another layer's KV cache uses the scales it was written with.

See `gemma4_turbo.ports.any.attention.kv_scales`. Inside a piecewise graph (`optional_kv`) the Triton backend is
handed the owner itself, without K and V: they are multiplied then too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.attention import kv_scales
from gemma4_turbo.ports.v0_5_12.attention import extend_wraps
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.fallback import Fallback

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import (
        ForwardBatch,
        KVPool,
        ModelRunner,
        RadixAttention,
        TritonBackend,
    )

_fallback = Fallback("the multiplication of K and V")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The scales, and the extend step of the Triton backend."""
    return {
        **kv_scales.build(run, stock, _of_model, _of_pool),
        **extend_wraps.enable(
            run.patch.name, functools.partial(_extend, run), stock[extend_wraps.TARGET]
        ),
    }


def _of_model(runner: ModelRunner) -> bool:
    return kv_scales.eight_bit(runner.kv_cache_dtype)


def _of_pool(pool: KVPool) -> bool:
    return kv_scales.eight_bit(getattr(pool, "dtype", None))


def _extend(run: PatchRun, forward: extend_wraps.Forward) -> extend_wraps.Forward:
    @functools.wraps(forward)
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
        if k is None and v is None and _fallback.unfit() is None:
            try:
                if kv_scales.scaled(run, layer):
                    k, v = new_keys_and_values(layer, forward_batch, q.dtype)
                    save_kv_cache = False
                    run.engaged(custom_ops.capturing())
            except Exception as error:
                run.declined(_fallback.failed(run, None, error))
        return forward(self, q, k, v, layer, forward_batch, save_kv_cache, sinks)

    return forward_extend


def new_keys_and_values(
    layer: RadixAttention, forward_batch: ForwardBatch, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of an extend step's own tokens, whose ``out_cache_loc`` are slots of the full pool."""
    slots = extend_wraps.new_slots(layer, forward_batch)
    return kv_scales.keys_and_values(layer, forward_batch.token_to_kv_pool, slots, dtype)


def undo(run: PatchRun) -> None:
    """Give every live reader back what stock had left there."""
    extend_wraps.disable(run.patch.name)
    kv_scales.undo(run)
    _fallback.clear()
