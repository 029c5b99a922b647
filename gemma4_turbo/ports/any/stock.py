"""SGLang's own kernels that its Gemma 4 calls by the same names in every line: see a line's ``stock.py``."""

from __future__ import annotations

import torch

from gemma4_turbo.fusions.stock import Functions


def eager_norms() -> Functions:
    """What ``RMSNorm.forward_cuda`` calls."""
    from sglang.srt.layers import layernorm

    return Functions(layernorm.rmsnorm, layernorm.fused_add_rmsnorm)


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
