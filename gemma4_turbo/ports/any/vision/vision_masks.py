"""`vision_masks`: no attention mask is built where the vision attention does not read it.

Stock builds ``[batch, 1, patches, patches]`` in every layer of the vision encoder. Its Triton and
FlashAttention kernels take no mask; only attention through torch does. Backends are known by their
class, and one whose ``forward`` somebody has set may be shown the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.runtime import custom_ops, hooks

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import VisionAttention

TARGET = "sglang.srt.models.gemma4_vision:Gemma4VisionAttention.forward"
READ_NO_MASK = ("VisionTritonAttention", "VisionFlash3Attention", "VisionFlash4Attention")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's forward, without the mask where nobody reads it."""
    from sglang.srt.layers.attention import vision

    attention: Callable[..., torch.Tensor] = stock[TARGET]
    read_none = tuple(getattr(vision, name) for name in READ_NO_MASK if hasattr(vision, name))

    def forward(
        self: VisionAttention,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return attention(self, hidden_states, cos, sin, attention_mask)
        backend = self.qkv_backend
        if type(backend) not in read_none:
            run.declined(f"{type(backend).__name__} may read the mask")
        elif hooks.hooked(backend):
            run.declined(hooks.HOOKED.format(type(backend).__name__))
        else:
            attention_mask = None
            run.engaged(custom_ops.capturing())
        return attention(self, hidden_states, cos, sin, attention_mask)

    return {TARGET: forward}
