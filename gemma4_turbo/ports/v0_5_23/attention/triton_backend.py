"""What the ports of the triton backend know by type, and what they share of its two forwards.

A batch has neither backend nor pool any more: the pool is the backend's, which a draft exchanges for a
step. The slots of sliding layers are in the backend's metadata.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from gemma4_turbo.ports.v0_5_23.protocols import (
        ForwardBatch,
        KVIndexTranslator,
        KVPool,
        KVWriteLoc,
        RadixAttention,
        SWAKVPool,
        TritonBackend,
    )

MODULE = "sglang.srt.layers.attention.triton_backend"
NO_SLOTS = "the backend has no slots for sliding layers"


class Types(NamedTuple):
    """SGLang's classes that the kernels' arguments are read from."""

    backend: type[TritonBackend]
    translator: type[KVIndexTranslator]
    pool: type[KVPool]
    any_swa_pool: type
    swa_pool: type[SWAKVPool]
    write_loc: type[KVWriteLoc]
    decoder: object  # the kind of attention


_types: list[Types] = []


def load() -> None:
    """Look the classes up; their modules are imported. Once a process."""
    if _types:
        return
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    _types.append(
        Types(
            TritonAttnBackend,
            KVIndexTranslator,
            MHATokenToKVPool,
            BaseSWAKVPool,
            SWAKVPool,
            KVWriteLoc,
            AttentionType.DECODER,
        )
    )


def types() -> Types:
    """The classes; IndexError before `load`."""
    return _types[0]


def unfit(
    backend: TritonBackend, layer: RadixAttention, score_mod: object, aux_tensors: object
) -> str | None:
    """Why this attention is not a plain one over the slots of a plain pool, or None."""
    known = _types[0]
    if type(backend) is not known.backend:
        return f"the attention backend is a {type(backend).__name__}"
    if score_mod is not None or aux_tensors is not None:
        return "the scores are modified by score_mod"
    if backend.dcp_size > 1:
        return "the KV cache is spread over several GPUs (DCP)"
    if backend.dllm_attention is not None:
        return "the attention of a diffusion language model"
    if layer.attn_type is not known.decoder:
        return f"the kind of attention is {layer.attn_type}"
    if layer.logit_capping_method != "tanh":
        return f"the logit cap's method is {layer.logit_capping_method}"
    return translator_unfit(backend.kv_index_translator) or pool_unfit(backend.token_to_kv_pool)


def translator_unfit(translator: KVIndexTranslator) -> str | None:
    """Why what a request's row holds are not the slots of a pool, or None."""
    if type(translator) is not _types[0].translator:
        return f"slots are translated by a {type(translator).__name__}"
    if translator.is_translating:
        return "the memory of KV caches is unified: slots are virtual"
    return None


def pool_unfit(pool: Any) -> str | None:
    """Why a layer's buffers are not a row a slot in the pool's dtype, or None.

    They are read before K and V are stored, so that no pool may make them anew for each reader.
    """
    known = _types[0]
    parts = (pool.full_kv_pool, pool.swa_kv_pool) if type(pool) is known.swa_pool else (pool,)
    for part in parts:
        if type(part) is not known.pool:
            return f"the KV pool is a {type(part).__name__}"
        if part.kv_cache_layout != "nhd":
            return f"the KV pool's layout is {part.kv_cache_layout}"
        if part.is_quantized_kv_cache:
            return "the KV pool is quantised"
    return None


def new_slots(
    backend: TritonBackend, layer: RadixAttention, forward_batch: ForwardBatch, q: torch.Tensor
) -> torch.Tensor | None:
    """Where the tokens of ``q`` lie in the buffers of this layer, None if the backend cannot tell.

    Slots of sliding layers are as many as a graph's batch has rows, q may hold its tokens alone.
    """
    pool: Any = backend.token_to_kv_pool
    slots: torch.Tensor | None = forward_batch.out_cache_loc
    if type(pool) is _types[0].swa_pool and pool.layers_mapping[layer.layer_id][1]:
        slots = backend.forward_metadata.swa_out_cache_loc  # a sliding layer has a pool of its own
    return None if slots is None else slots[: q.shape[0]]


def store(
    backend: TritonBackend,
    layer: RadixAttention,
    forward_batch: ForwardBatch,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """As stock stores K and V without scales."""
    swa_loc = backend.forward_metadata.swa_out_cache_loc
    slots = _types[0].write_loc.for_batch(forward_batch, swa_loc=swa_loc)
    backend._set_kv_buffer(forward_batch, layer, slots, k, v)
