"""SGLang's own kernels, one function per stage, as its Gemma 4 calls them.

Whoever needs stock goes through here: what runs where a fusion declines, self-checks, ``verify``,
benchmarks and GPU tests. Each looks its kernel up at the call, where SGLang's model does, so that a
wrapper that somebody put there is called too.
"""

from __future__ import annotations

import sys

import torch

from gemma4_turbo.fusions.stock import Functions, follow
from gemma4_turbo.ports.any.stock import (
    dual_norm_residual,
    eager_norms,
    norm_residual,
    qkv_rmsnorm,
)

__all__ = (
    "dual_norm_residual",
    "eager_norms",
    "norm_residual",
    "qkv_rmsnorm",
    "rotate",
    "store_kv",
    "sum_experts",
    "traced_norms",
)


def traced_norms() -> Functions:
    """What it comes to when Dynamo traces it."""

    def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.sgl_kernel.rmsnorm.default(out, x, weight, eps, False)
        return out

    def fused_add(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        torch.ops.sgl_kernel.fused_add_rmsnorm.default(x, r, weight, eps, False)

    return Functions(rmsnorm, fused_add)


def rotate(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor
) -> None:
    """Rotary embedding of Q and K ``[rows, heads, head_dim]``, halves apart, in place."""
    from sglang.jit_kernel import rope

    rope.apply_rope_with_cos_sin_cache_inplace(
        positions=positions, q=q, k=k, cos_sin_cache=cos_sin_cache, is_neox=True
    )


def sum_experts(x: torch.Tensor, out: torch.Tensor) -> None:
    """``x [rows, topk, hidden]`` summed over a token's experts into ``out [rows, hidden]``."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    fused_moe.moe_sum_reduce_torch_compile(x, out, 1.0)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
    locations: torch.Tensor,
) -> None:
    """K and V ``[rows, heads, head_dim]`` into a layer's pool at ``locations``."""
    from sglang.srt.mem_cache import memory_pool

    memory_pool._set_kv_buffer_impl(
        k,
        v,
        *pool,
        locations,
        row_dim=k.shape[1] * k.shape[2],
        store_dtype=k.dtype,
        device_module=torch.cuda,
    )


follow(sys.modules[__name__])  # a process has one release line
