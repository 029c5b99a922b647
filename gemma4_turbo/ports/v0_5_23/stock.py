"""SGLang's own kernels, one function per stage, as its Gemma 4 calls them.

Whoever needs stock goes through here: what runs where a fusion declines, self-checks, ``verify``,
benchmarks and GPU tests. Each looks its kernel up at the call, where SGLang's model does, so that a
wrapper that somebody put there is called too.
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
    """The same: nothing traces the model in this line."""
    return eager_norms()


def qkv_rmsnorm(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    """Norms of Q, K and V over each head, in place; V's has no weight."""
    from sglang.srt.models import gemma4_causal

    gemma4_causal.gemma_qkv_rmsnorm(
        q,
        k,
        v,
        q_weight,
        k_weight,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=eps,
    )


def rotate(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor
) -> None:
    """Rotary embedding of Q and K ``[rows, heads, head_dim]``, halves apart, in place."""
    from sglang.srt.layers.rotary_embedding import base

    base.apply_rope_with_cos_sin_cache_inplace(
        positions=positions, q=q, k=k, cos_sin_cache=cos_sin_cache, is_neox=True
    )


def norm_residual(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, scalar: torch.Tensor, eps: float
) -> torch.Tensor:
    """``(norm(x) + residual) * scalar``."""
    from sglang.srt.models import gemma4_causal

    return gemma4_causal.gemma_rmsnorm_residual_scalar(  # type: ignore[no-any-return]
        x, weight, residual, scalar, eps
    )


def dual_norm_residual(
    mlp: torch.Tensor,
    mlp_weight: torch.Tensor,
    experts: torch.Tensor,
    experts_weight: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    scalar: torch.Tensor,
    eps: tuple[float, float, float],
) -> torch.Tensor:
    """``(norm(norm_1(mlp) + norm_2(experts)) + residual) * scalar``; ``eps`` of 1, 2 and the last."""
    from sglang.srt.models import gemma4_causal

    return gemma4_causal.gemma_dual_rmsnorm_residual_scalar(  # type: ignore[no-any-return]
        mlp, mlp_weight, experts, experts_weight, weight, residual, scalar, *eps
    )


def sum_experts(x: torch.Tensor, out: torch.Tensor) -> None:
    """``x [rows, topk, hidden]`` summed over a token's experts into ``out [rows, hidden]``."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    if fused_moe.is_arch_support_pdl():
        fused_moe.moe_sum_reduce_triton(x, out, 1.0)
    else:
        fused_moe.moe_sum_reduce_torch_compile(x, out, 1.0)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
    locations: torch.Tensor,
) -> None:
    """K and V ``[rows, heads, head_dim]`` into a layer's pool at ``locations``; slot 0 is left alone."""
    from sglang.srt.mem_cache import memory_pool

    memory_pool._set_kv_buffer_impl(
        k,
        v,
        *pool,
        locations,
        row_dim=k.shape[1] * k.shape[2],
        store_dtype=k.dtype,
        device_module=torch.cuda,
        size_limit=pool[0].shape[0],
    )


follow(sys.modules[__name__])  # a process has one release line
