"""What 0.5.22 and 0.5.23 call by names of their own, or otherwise."""

from __future__ import annotations

from typing import Any

import torch

from gemma4_turbo.fusions.stock import Functions, follow
from gemma4_turbo.ports.any import stock


class Calls(stock.Calls):
    """See `gemma4_turbo.ports.any.stock`."""

    extend_kernel = "sglang.kernels.ops.attention.extend_attention"
    decode_kernel = "sglang.kernels.ops.attention.decode_attention"
    moe_kernel = "sglang.kernels.ops.moe.fused_moe_triton_kernels"

    def traced_norms(self) -> Functions:
        """The same: nothing traces the model in this line."""
        return self.eager_norms()

    def rope(self) -> Any:
        from sglang.srt.layers.rotary_embedding import base

        return base

    def sum_experts(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``x [rows, topk, hidden]`` summed over a token's experts into ``out [rows, hidden]``."""
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        if fused_moe.is_arch_support_pdl():
            fused_moe.moe_sum_reduce_triton(x, out, 1.0)
        else:
            fused_moe.moe_sum_reduce_torch_compile(x, out, 1.0)

    def store_options(self, pool: stock.Pair) -> dict[str, Any]:
        """Slot 0 is left alone, and so is what is no slot."""
        return {"size_limit": pool[0].shape[0]}

    def routing(self, logits: torch.Tensor, scale: torch.Tensor, topk: int) -> stock.Pair:
        """In one launch."""
        from sglang.srt.models import gemma4_causal

        return gemma4_causal.gemma4_fused_routing(  # type: ignore[no-any-return]
            logits, scale, topk
        )


STOCK = Calls()
follow(STOCK)  # a process has one release line
