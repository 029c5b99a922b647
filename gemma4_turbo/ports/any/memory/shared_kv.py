"""`shared_kv_pool`: which layers own KV where the last ones share it, and what the memory they free may hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gemma4_turbo.ports.any import architectures

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ModelConfig

logger = logging.getLogger("gemma4_turbo")

ARCHITECTURES = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")

# Why the pools stay as stock makes them.
HIERARCHICAL = "a hierarchical cache goes through all layers"
SPARSE = "hierarchical sparse attention goes through all layers"
DISAGGREGATED = "disaggregation sends the KV of all layers"
DRAFT = "a draft model may read the target's pools"
PIPELINE = "pipeline stages have their own layers"


def model_unfit(config: ModelConfig) -> str | None:
    """Why a model's pools have no layers to leave out, or None."""
    reason = architectures.unfit(config, ARCHITECTURES)
    if reason is None and not layers(config):
        return "the model has no KV-shared layers"
    return reason


def owners_unfit(config: ModelConfig) -> str | None:
    """Why there would be no pools of both kinds, or None."""
    return None if all(owners(config)) else "no layer of one kind has KV of its own"


def layers(config: ModelConfig) -> int:
    """How many of the last layers read another layer's KV."""
    return int(getattr(config.hf_text_config, "num_kv_shared_layers", 0) or 0)


def owners(config: ModelConfig) -> tuple[list[int], list[int]]:
    """Full and sliding layers that write KV."""
    first = config.hf_text_config.num_hidden_layers - layers(config)
    full = [layer for layer in config.full_attention_layer_ids if layer < first]
    sliding = [layer for layer in config.swa_attention_layer_ids if layer < first]
    return full, sliding


def log_gain(
    own: tuple[Sequence[int], Sequence[int]],
    whole: tuple[Sequence[int], Sequence[int]],
    after: float,
    before: float,
    gain: float,
) -> None:
    """The log's line: full and sliding layers of ours and of stock's pools, bytes of a token in them."""
    logger.info(
        "gemma4_turbo: shared_kv_pool: KV memory for %d full and %d sliding layers instead of "
        "%d and %d; %.0f bytes a token instead of %.0f: up to %.2f times the tokens",
        *map(len, own),
        *map(len, whole),
        after,
        before,
        gain,
    )


def table_failed(error: Exception) -> None:
    """The log's line where the table of requests then takes from what is to stay free."""
    logger.warning("gemma4_turbo: shared_kv_pool: the table of requests: %r", error)


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
