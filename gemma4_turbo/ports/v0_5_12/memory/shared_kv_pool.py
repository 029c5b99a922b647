"""`shared_kv_pool`: no KV memory for layers that read another layer's.

Stock counts every layer when it sizes the KV pools, and allocates for each. Layers that share KV
(18 of 42 on E4B, 20 of 35 on E2B) hold the id of the layer whose KV they read, and their own buffers
are never touched. They are taken off the two lists of layers before the pools are sized; the same
lists make the pools later. More tokens fit into the same memory.

Stock lets more tokens have more requests, each with a row of the table from tokens to slots, half a
megabyte at 131072 tokens of context, and counts that table nowhere: up to 1 GiB. What it grows by is
taken off the pools, down to stock's number of tokens.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.ports.any.memory import shared_kv
from gemma4_turbo.ports.any.memory.shared_kv import owners
from gemma4_turbo.runtime.attempts import attempt, one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ModelRunner
    from gemma4_turbo.ports.v0_5_12.protocols import PoolConfigurator

CONFIGURATOR = "sglang.srt.model_executor.pool_configurator:HybridSWAPoolConfigurator"
TARGET = f"{CONFIGURATOR}.__init__"
SIZES = f"{CONFIGURATOR}.calculate_pool_sizes"
FOR_POOLS = "_gemma4_turbo_bytes_for_pools"  # on a configurator


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's configurator, over the layers that have KV of their own."""
    init, calculate = stock[TARGET], stock[SIZES]

    def __init__(self: PoolConfigurator, mr: ModelRunner) -> None:
        reason, problem = attempt(run, "a look at the layers", lambda: unfit(mr))
        reason = reason or problem
        if reason is not None:
            run.declined(reason)
            init(self, mr)
            return
        config = mr.model_config
        whole = config.full_attention_layer_ids, config.swa_attention_layer_ids
        init(self, mr)
        try:
            before = self._cell_size
            full, sliding = owners(config)
            config.full_attention_layer_ids, config.swa_attention_layer_ids = full, sliding
            init(self, mr)
            after = self._cell_size
            gain = before / after
        except Exception as error:  # stock's lists, and what stock makes of them
            config.full_attention_layer_ids, config.swa_attention_layer_ids = whole
            run.set(states.FAILED, one_line(error))
            run.declined(one_line(error))
            init(self, mr)
            return
        shared_kv.log_gain((full, sliding), whole, after, before, gain)
        setattr(self, FOR_POOLS, functools.partial(bytes_for_pools, mr, before, after))
        run.engaged(False)

    def calculate_pool_sizes(
        self: PoolConfigurator, available_bytes: int, page_size: int
    ) -> object:
        for_pools = getattr(self, FOR_POOLS, None)
        if for_pools is not None:
            try:
                available_bytes = for_pools(available_bytes)
            except Exception as error:
                shared_kv.table_failed(error)
        return calculate(self, available_bytes, page_size)

    return {TARGET: __init__, SIZES: calculate_pool_sizes}


def bytes_for_pools(mr: ModelRunner, before: float, after: float, available_bytes: int) -> int:
    """What stock's table of requests leaves of the bytes, at ``before`` and ``after`` bytes a token."""
    # `ReqToTokenPool`, without speculation: int32, four more than the context.
    row = (mr.model_config.context_len + 4) * 4
    return shared_kv.bytes_for_pools(mr._resolve_max_num_reqs, row, before, after, available_bytes)


def unfit(mr: ModelRunner) -> str | None:
    """Why the pools stay as stock makes them, or None."""
    arguments, config = mr.server_args, mr.model_config
    reason = shared_kv.model_unfit(config)
    if reason is not None:
        return reason
    if arguments.enable_hierarchical_cache or getattr(arguments, "enable_lmcache", False):
        return shared_kv.HIERARCHICAL
    if arguments.disaggregation_mode != "null":
        return shared_kv.DISAGGREGATED
    if getattr(mr, "enable_hisparse", False):
        return shared_kv.SPARSE
    if arguments.speculative_algorithm is not None:
        return shared_kv.DRAFT
    if arguments.pp_size != 1:
        return shared_kv.PIPELINE
    return shared_kv.owners_unfit(config)
