"""`swa_ratio`: a default of ``swa_full_tokens_ratio`` that fits Gemma 4's MoE models.

Stock's 0.8 gives sliding layers KV memory for 0.8 tokens per token of the full layers, though they
never need more than their window. With 0.15 the full layers, which long prompts exhaust first, get
more. Dense models keep stock's default. A value that the user gives is never touched, also when it
equals the default: SGLang keeps None for "not given" until it knows the model, and takes the defaults
that a model wants from a list, to which ours is added.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any.memory import swa_ratio
from gemma4_turbo.ports.any.memory.swa_ratio import FIELD, RATIO
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ModelConfig
    from gemma4_turbo.ports.v0_5_23.protocols import ResolvingArguments

logger = logging.getLogger("gemma4_turbo")

TARGET = "sglang.srt.arg_groups.overrides:collect_model_override_declarations"
ARCHITECTURES = (
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
)

Declarations = list[tuple[str, dict[str, Any]]]


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's list of what the model wants, and the ratio."""
    collect = stock[TARGET]

    def collect_model_override_declarations(
        architecture: str, server_args: object, hf_config: object
    ) -> Declarations:
        found: Declarations = collect(architecture, server_args, hf_config)
        try:
            reason = unfit(architecture, server_args, found)
        except Exception as error:  # stock's default is always there
            reason = one_line(error)
        if reason is not None:
            run.declined(reason)
            return found
        logger.info("gemma4_turbo: %s is %s instead of stock's default", FIELD, RATIO)
        run.engaged(False)
        return [*found, (f"{__name__}.{FIELD}", {FIELD: RATIO})]

    return {TARGET: collect_model_override_declarations}


def unfit(architecture: str, server_args: object, found: Declarations) -> str | None:
    """Why stock's default stays, or None."""
    from sglang.srt.arg_groups import overrides

    if architecture not in ARCHITECTURES:
        return f"the model is {architecture}"
    arguments: ResolvingArguments = overrides.resolving_view(server_args)
    given = arguments.swa_full_tokens_ratio
    if given is not None:
        return swa_ratio.given(given)
    if any(FIELD in fields for _, fields in found):
        return "SGLang has a ratio for the model"
    config = overrides.model_config_of(server_args)
    return swa_ratio.unfit(arguments, config) or _room_unfit(arguments, config)


def _room_unfit(arguments: ResolvingArguments, config: ModelConfig) -> str | None:
    """Why a prompt could wait for ever for sliding layers' memory, or SGLang refuse the pool; or None."""
    chunk = arguments.chunked_prefill_size
    if chunk is not None and chunk <= 0:
        return (
            "prompts are not cut into chunks: all of one is to fit into the sliding layers' memory"
        )
    if arguments.disable_radix_cache:
        return "without a prefix cache SGLang makes no chunk smaller than what is free"
    window = int(getattr(config.hf_text_config, "sliding_window", 0) or 0)
    tokens = arguments.max_total_tokens
    if tokens is not None and tokens * RATIO <= window + (chunk or 0):
        return f"of --max-total-tokens {tokens} too little would be left for a window and a chunk"
    return None
