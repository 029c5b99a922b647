"""`swa_ratio`: the ratio, and the models and servers that it is for, in every line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ModelConfig

FIELD = "swa_full_tokens_ratio"
RATIO = 0.15


class Arguments(Protocol):
    """What a line calls the server's arguments, while they are decided upon."""

    enable_hierarchical_cache: bool
    disaggregation_mode: str


def given(value: float) -> str:
    """The reason where the user has given a ratio."""
    return f"--{FIELD.replace('_', '-')} {value} was given"


def unfit(arguments: Arguments, config: ModelConfig) -> str | None:
    """Why a Gemma 4 keeps stock's default, or None."""
    if not (getattr(config.hf_text_config, "num_experts", 0) or 0) > 0:
        return "the model is dense"
    if arguments.enable_hierarchical_cache:
        return "hierarchical cache"
    if arguments.disaggregation_mode != "null":
        return "disaggregation"
    return None
