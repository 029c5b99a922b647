"""Which model a server has, by the architectures that its configuration names."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ModelConfig


def unfit(config: ModelConfig, known: Container[str], alone: bool = False) -> str | None:
    """What the model is where none of its architectures is known, or None. ``alone``: it has but one."""
    named: list[str] = getattr(config.hf_config, "architectures", None) or []
    if any(name in known for name in named) and not (alone and len(named) > 1):
        return None
    return f"the model is {', '.join(named) or 'unknown'}"
