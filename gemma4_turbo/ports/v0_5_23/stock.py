"""SGLang's own kernels, one function per stage, as its Gemma 4 of this line calls them.

Whoever needs stock goes through here. Each looks its kernel up at the call, where SGLang's model does,
so that a wrapper that somebody put there is called too.
"""

from __future__ import annotations

import sys

import torch

from gemma4_turbo.fusions.stock import Functions, follow


def eager_norms() -> Functions:
    """What ``RMSNorm.forward_cuda`` calls."""
    from sglang.srt.layers import layernorm

    return Functions(layernorm.rmsnorm, layernorm.fused_add_rmsnorm)


def traced_norms() -> Functions:
    """What it comes to when Dynamo traces it."""

    def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.sgl_kernel.rmsnorm.default(out, x, weight, eps, False)
        return out

    def fused_add(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        torch.ops.sgl_kernel.fused_add_rmsnorm.default(x, r, weight, eps, False)

    return Functions(rmsnorm, fused_add)


follow(sys.modules[__name__])  # a process has one release line
