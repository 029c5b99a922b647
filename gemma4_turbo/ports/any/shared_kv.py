"""Which layers own KV in a model whose last layers share it, and what the memory they free may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ModelConfig


def layers(config: ModelConfig) -> int:
    """How many of the last layers read another layer's KV."""
    return int(getattr(config.hf_text_config, "num_kv_shared_layers", 0) or 0)


def owners(config: ModelConfig) -> tuple[list[int], list[int]]:
    """Full and sliding layers that write KV."""
    first = config.hf_text_config.num_hidden_layers - layers(config)
    full = [layer for layer in config.full_attention_layer_ids if layer < first]
    sliding = [layer for layer in config.swa_attention_layer_ids if layer < first]
    return full, sliding


def bytes_for_pools(
    requests: Callable[[int], int], row: int, before: float, after: float, available_bytes: int
) -> int:
    """What the table of requests leaves of the bytes, which stock counts nowhere.

    Args:
        requests: how many rows the table has for so many tokens.
        row: bytes of a row.
        before: bytes of a token in the pools, as stock counts its layers.
        after: and without those that share.
        available_bytes: for the pools and what the table grows by.
    """
    stock, ours = int(available_bytes // before), int(available_bytes // after)
    growth = max(requests(ours) - requests(stock), 0) * row
    fewest = min(available_bytes, int((stock + 1) * after))  # room for as many tokens as stock's
    return max(available_bytes - growth, fewest)
