"""`shared_kv_pool`: no KV memory for layers that read another layer's.

Stock counts every layer when it sizes the KV pools, and allocates for each. Layers that share KV
(18 of 42 on E4B, 20 of 35 on E2B) hold the id of the layer whose KV they read, and their own buffers
are never touched. They are taken off the lists of the object that sizes and makes the pools; the model
runner keeps the whole ones. More tokens fit into the same memory.

Stock lets more tokens have more requests, each with a row of the table from tokens to slots, half a
megabyte at 131072 tokens of context, and counts that table nowhere: up to 1 GiB. What it grows by is
taken off the pools, down to stock's number of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.ports.any.memory import shared_kv
from gemma4_turbo.ports.any.memory.shared_kv import owners
from gemma4_turbo.runtime.attempts import attempt, one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import (
        KVCacheConfigurator,
        MemoryPoolConfig,
        ModelLayerInfo,
        PoolConfigurator,
    )

_CLASS = "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
TARGET = f"{_CLASS}.__post_init__"
SIZES = f"{_CLASS}.config_from_budget"

MEMORY = {
    "enable_unified_memory": "one buffer for all layers' KV is cut otherwise",
    "enable_page_major_kv_layout": "a page holds the KV of all layers",
    "enable_hierarchical_cache": shared_kv.HIERARCHICAL,
    "enable_lmcache": shared_kv.HIERARCHICAL,
    "enable_flexkv": shared_kv.HIERARCHICAL,
    "enable_unified_cache_external_linker": shared_kv.HIERARCHICAL,
    "enable_hisparse": shared_kv.SPARSE,
}
"""What a server may have its KV memory do, and what that means."""


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's pools, over the layers that have KV of their own."""
    init, from_budget = stock[TARGET], stock[SIZES]

    def __post_init__(self: KVCacheConfigurator) -> None:
        init(self)
        if self.is_draft_worker:  # the pools of a draft model are its own
            return
        reason, problem = attempt(run, "a look at the layers", lambda: unfit(self))
        reason = reason or problem
        if reason is not None:
            run.declined(reason)
            return
        whole = self.layer_info
        try:
            full, sliding = owners(self.model_config)
            self.layer_info = _with(whole, full, sliding)
            after = _bytes_of_a_token(self, self.layer_info)
            before = _bytes_of_a_token(self, whole)
            gain = before / after
        except Exception as error:  # stock's lists
            self.layer_info = whole
            run.set(states.FAILED, one_line(error))
            run.declined(one_line(error))
            return
        listed = whole.full_attention_layer_ids or (), whole.swa_attention_layer_ids or ()
        shared_kv.log_gain((full, sliding), listed, after, before, gain)
        run.engaged(False)

    def config_from_budget(
        self: KVCacheConfigurator, budget_bytes: int, *, cap_tokens: int | None = None
    ) -> MemoryPoolConfig:
        try:
            budget_bytes = for_pools(self, budget_bytes)
        except Exception as error:
            shared_kv.table_failed(error)
        made: MemoryPoolConfig = from_budget(self, budget_bytes, cap_tokens=cap_tokens)
        return made

    return {TARGET: __post_init__, SIZES: config_from_budget}


def for_pools(kvc: KVCacheConfigurator, budget_bytes: int) -> int:
    """What stock's table of requests leaves of the bytes, where the lists of layers are ours."""
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
    from sglang.srt.runtime_context import get_schedule

    config, own = kvc.model_config, kvc.layer_info
    every = config.full_attention_layer_ids, config.swa_attention_layer_ids
    if kvc.is_draft_worker or not kvc.is_hybrid_swa:
        return budget_bytes
    if (own.full_attention_layer_ids, own.swa_attention_layer_ids) == every:
        return budget_bytes
    if get_schedule().max_running_requests is not None:  # rows for as many as the user wants
        return budget_bytes
    return shared_kv.bytes_for_pools(
        kvc.resolve_max_num_reqs,
        (config.context_len + get_req_to_token_extra_context_len()) * 4,  # `ReqToTokenPool`: int32
        _bytes_of_a_token(kvc, _with(own, *every)),
        _bytes_of_a_token(kvc, own),
        budget_bytes,
    )


def unfit(kvc: KVCacheConfigurator) -> str | None:
    """Why the pools stay as stock makes them, or None."""
    from sglang.srt.runtime_context import get_disagg, get_memory, get_parallel

    from gemma4_turbo.runtime import graphs

    config, info = kvc.model_config, kvc.layer_info
    reason = shared_kv.model_unfit(config) or _layers_unfit(kvc)
    if reason is not None:
        return reason
    every = config.full_attention_layer_ids, config.swa_attention_layer_ids
    if not kvc.is_hybrid_swa or every != (
        info.full_attention_layer_ids,
        info.swa_attention_layer_ids,
    ):
        return "full and sliding layers have no pools of their own, or this process not all layers"
    reason = graphs.argument_unfit(get_memory(), MEMORY)
    if reason is not None:
        return reason
    if kvc.post_capture_kv_active:
        return "the pools are sized again after CUDA graphs were captured"
    if get_disagg().disaggregation_mode != "null":
        return shared_kv.DISAGGREGATED
    if not kvc.spec_algorithm.is_none():
        return shared_kv.DRAFT
    if kvc.pp_size != 1:
        return shared_kv.PIPELINE
    parallel = get_parallel()
    if parallel.attn_dcp_size > 1 or parallel.enable_kv_cache_sharding:
        return "a sequence's KV lies on several GPUs"
    return shared_kv.owners_unfit(config)


def _layers_unfit(kvc: KVCacheConfigurator) -> str | None:
    """Why the model's layers may not be SGLang's own, each on the KV that the configuration says; or None.

    A class of the same name may stand in SGLang's registry, with KV for every layer.
    """
    from sglang.srt.models import gemma4_causal

    model: Any = getattr(kvc.model, "language_model", None) or getattr(kvc.model, "model", None)
    if type(model) is not gemma4_causal.Gemma4TextModel:
        return f"the model's layers are a {type(model).__name__}'s"
    full, sliding = owners(kvc.model_config)
    own = {*full, *sliding}
    if any(layer.self_attn.attn.layer_id not in own for layer in model.layers):
        return "a layer reads KV that no layer of its kind owns"
    return None


def _with(info: Any, full: list[int], sliding: list[int]) -> ModelLayerInfo:
    """The same with other lists of layers."""
    import msgspec

    made: ModelLayerInfo = msgspec.structs.replace(
        info, full_attention_layer_ids=full, swa_attention_layer_ids=sliding
    )
    return made


def _bytes_of_a_token(kvc: KVCacheConfigurator, info: ModelLayerInfo) -> float:
    """In the pools of those layers, as stock counts them."""
    from sglang.srt.model_executor import pool_configurator

    ours, kvc.layer_info = kvc.layer_info, info
    try:
        made: PoolConfigurator = pool_configurator.create_memory_pool_configurator(kvc)
        size: float = made._cell_size
    finally:
        kvc.layer_info = ours
    return size
