"""What this line's ports read of SGLang's objects: a class for each of SGLang's, with nothing else in it.

For the type checker alone, which does not look into SGLang: import it under ``TYPE_CHECKING``. What is
the same in every line is in `gemma4_turbo.ports.any.model_protocols`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from gemma4_turbo.ports.any import model_protocols as protocols


class RMSNorm(protocols.RMSNorm, Protocol):
    """``sglang.srt.layers.layernorm.RMSNorm``."""

    _quant_linear: protocols.Module | None

    def _resolve_forward_method(self) -> Callable[..., Any]: ...


class GroupCoordinator(Protocol):
    """``sglang.srt.distributed.parallel_state.GroupCoordinator``."""

    world_size: int


class MultimodalModel(protocols.MultimodalModel, Protocol):
    """``sglang.srt.models.gemma4_mm.Gemma4ForConditionalGeneration``."""

    pp_group: GroupCoordinator
    lm_head_is_tied: bool
    lm_head: protocols.Module

    def get_per_layer_inputs(self, input_ids: torch.Tensor, /) -> torch.Tensor | None: ...
