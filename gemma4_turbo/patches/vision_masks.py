"""`vision_masks`: no attention mask is built where the vision attention does not read it.

Stock builds ``[batch, 1, patches, patches]`` in every layer of the vision encoder. Its Triton and
FlashAttention kernels take no mask; only attention through torch does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo import custom_ops
from gemma4_turbo.checks import Check

if TYPE_CHECKING:
    from gemma4_turbo.patching import PatchRun

TARGET = "sglang.srt.models.gemma4_vision:Gemma4VisionAttention.forward"
READ_NO_MASK = ("VisionTritonAttention", "VisionFlash3Attention", "VisionFlash4Attention")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's forward, without the mask where nobody reads it."""
    attention = stock[TARGET]

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        backend = type(self.qkv_backend).__name__
        if backend in READ_NO_MASK:
            attention_mask = None
            if not torch.compiler.is_compiling():
                run.engaged(custom_ops.capturing())
        elif not torch.compiler.is_compiling():
            run.declined(f"{backend} may read the mask")
        return attention(self, hidden_states, cos, sin, attention_mask)  # type: ignore[no-any-return]

    return {TARGET: forward}


def undo(run: PatchRun) -> None:
    """Live objects were not changed."""


def verify(run: PatchRun, device: str) -> list[Check]:
    """Nothing: no arithmetic."""
    return []
