"""``TritonAttnBackend.forward_extend``: stock's, in what patches wrap around it.

Several patches may wrap it and one of them may leave while another stays, so the function that is
set in stock's place is always the same, and what it calls is put together here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.v0_5_12 import classes

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, RadixAttention, TritonBackend

TARGET = "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend"

Forward = Callable[..., torch.Tensor]
Wrap = Callable[[Forward], Forward]

# From the inside out: a kernel has to see K and V as `kv_scales` reads them from the cache.
ORDER = ("extend_attention", "kv_scales")

_wraps: dict[str, Wrap] = {}
_functions: dict[str, Forward] = {}  # "stock", and "whole": stock in its wraps


def enable(patch: str, wrap: Wrap, stock: Forward) -> dict[str, Any]:
    """Wrap ``stock`` for a patch, in its place among the others; returns the replacement."""
    classes.load()
    _wraps[patch] = wrap
    _functions["stock"] = stock
    _compose()
    return {TARGET: functools.update_wrapper(forward_extend, stock)}


def disable(patch: str) -> None:
    """Take a patch's wrap away; without one, nothing."""
    if _wraps.pop(patch, None) is not None:
        _compose()


def new_slots(layer: RadixAttention, forward_batch: ForwardBatch) -> torch.Tensor:
    """Where the step's own tokens lie in the buffers of this ``RadixAttention``'s pool."""
    pool, slots = forward_batch.token_to_kv_pool, forward_batch.out_cache_loc
    # As stock's backend has it.
    if isinstance(pool, sglang_types.types().swa_pool) and pool.layers_mapping[layer.layer_id][1]:
        own: torch.Tensor = pool.translate_loc_from_full_to_swa(slots)
        return own  # a sliding layer has a pool of its own
    return slots


def _compose() -> None:
    whole = _functions["stock"]
    for name in sorted(_wraps, key=ORDER.index):
        whole = _wraps[name](whole)
    _functions["whole"] = whole


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
    """Stock's arguments and result."""
    return _functions["whole"](self, q, k, v, layer, forward_batch, save_kv_cache, sinks)
