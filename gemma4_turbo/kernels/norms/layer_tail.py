"""The end of a layer without per-layer embeddings, with the bits of stock's calls.

With ``m`` the dense MLP's output, ``e`` the experts' output per token and choice, ``r`` the residual::

    s    = round(sum_k e[:, k])                                            # SUM: else given
    out  = round((norm(norm(m, w1) + norm(s, w2), w3) + r) * layer_scalar)   # with experts
    out  = round((norm(m, w3) + r) * layer_scalar)                           # without
    next = rmsnorm(out, next_weight)                                       # NEXT: optional

``norm`` is that of stock's own Triton kernels (sglang/srt/layers/gemma4_fused_ops.py): not rounded
in between, its sum in the order that Triton gives a 1-D block of four warps. So this kernel keeps
their block, their warps and their expressions. ``rmsnorm`` is `gemma4_turbo.kernels.norms.rmsnorm`'. The sum
over the choices goes from the first to the last, in fp32, as both of stock's reductions do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms.rmsnorm import rms_scale, scaled
from gemma4_turbo.kernels.rounding import round_to, rounded

INTERPRETED = norms.INTERPRETED


@triton.jit
def _layer_tail_kernel(
    mlp_ptr,
    mlp_weight_ptr,
    experts_ptr,
    experts_weight_ptr,
    weight_ptr,
    residual_ptr,
    scalar_ptr,
    next_weight_ptr,
    out_ptr,
    next_ptr,
    stride_mlp,
    stride_experts,
    stride_choice,
    stride_residual,
    stride_out,
    N,
    mlp_eps,
    experts_eps,
    eps,
    next_eps,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # N, known to the compiler: only the next norm may use it
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,  # 0: the experts' output is already summed
    FROM_ZERO: tl.constexpr,
    NEXT: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    m = tl.load(mlp_ptr + row * stride_mlp + column, mask=inside, other=0.0)
    dtype: tl.constexpr = m.dtype
    x1 = m.to(tl.float32)
    w3 = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0).to(
        tl.float32
    )
    if EXPERTS:
        w1 = tl.load(mlp_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        w2 = tl.load(experts_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        at = experts_ptr + row * stride_experts + column
        x2 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if CHOICES > 0:
            if FROM_ZERO:
                x2 = x2 + 0.0
            for k in tl.static_range(1, CHOICES):
                x2 += tl.load(at + k * stride_choice, mask=inside, other=0.0).to(tl.float32)
            x2 = rounded(x2, dtype, PTX)
        var1 = tl.sum(x1 * x1, axis=0) / N
        norm1 = x1 * tl.rsqrt(var1 + mlp_eps) * w1
        var2 = tl.sum(x2 * x2, axis=0) / N
        norm2 = x2 * tl.rsqrt(var2 + experts_eps) * w2
        combined = norm1 + norm2
        var3 = tl.sum(combined * combined, axis=0) / N
        norm3 = combined * tl.rsqrt(var3 + eps) * w3
        scalar = tl.load(scalar_ptr).to(tl.float32)
        out = (norm3 + r) * scalar
    else:
        var = tl.sum(x1 * x1, axis=0) / N
        rrms = tl.rsqrt(var + eps)
        out = x1 * rrms * w3 + r
        scalar = tl.load(scalar_ptr).to(tl.float32)
        out = out * scalar
    out = round_to(out, dtype, PTX)
    tl.store(out_ptr + row * stride_out + column, out, mask=inside)
    if NEXT:
        if KIND == 1:
            tl.debug_barrier()  # what follows reads out
        x = out.to(tl.float32)
        w = tl.load(next_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        at = out_ptr + row * stride_out
        scale = rms_scale(x, at, next_eps, WIDTH, BLOCK, KIND, WARPS, PTX)
        x = round_to(scaled(x, scale, w, KIND, PTX), dtype, PTX)
        tl.store(next_ptr + row * stride_out + column, x, mask=inside)


class Experts(NamedTuple):
    """The experts' branch."""

    output: torch.Tensor  # [M, N], or [M, K, N] to be summed over K
    weight: torch.Tensor
    eps: float
    mlp_weight: torch.Tensor  # of the dense branch's own norm
    mlp_eps: float
    from_zero: bool = False  # whether stock's sum over few rows starts at zero too


class NextNorm(NamedTuple):
    """The RMSNorm that reads the result."""

    weight: torch.Tensor
    eps: float
    kind: int  # a norms.Kind


def unfit(
    mlp_output: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    scalar: torch.Tensor,
    experts: Experts | None = None,
    following: NextNorm | None = None,
) -> str | None:
    """Why `layer_tail` does not take these arguments, or None. Host checks only."""
    x = mlp_output
    reason = (
        norms.rows_unfit("mlp_output", x)
        or norms.weight_unfit("weight", weight, x)
        or norms.rows_unfit("residual", residual, x)
    )
    if reason is None and scalar.numel() != 1:
        reason = f"scalar must be one element, got {scalar.numel()}"
    if reason is None and following is not None:
        reason = norms.weight_unfit("following.weight", following.weight, x)
    if reason is None and experts is not None:
        reason = norms.weight_unfit("experts.weight", experts.weight, x) or norms.weight_unfit(
            "experts.mlp_weight", experts.mlp_weight, x
        )
        e = experts.output
        if reason is None and e.dim() == 2:
            reason = norms.rows_unfit("experts.output", e, x)
        elif reason is None and (
            e.dim() != 3
            or not e.is_contiguous()
            or e.dtype != x.dtype
            or e.device != x.device
            or (e.shape[0], e.shape[2]) != tuple(x.shape)
        ):
            reason = f"experts.output must be a contiguous [M, K, N], got {tuple(e.shape)}"
    return reason


def layer_tail(
    mlp_output: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    scalar: torch.Tensor,
    experts: Experts | None = None,
    following: NextNorm | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The equations of this module.

    Args:
        mlp_output: ``[M, N]``, bf16 or fp16, contiguous rows, M may be 0.
        weight: ``[N]`` of the last norm, in the activations' dtype, as all weights.
        eps: added to its mean square.
        residual: like ``mlp_output``; not changed.
        scalar: one element.
        experts: None for layers without.
        following: None for no ``next``.

    Returns:
        ``out`` and ``next``, ``[M, N]``; the latter None without ``following``.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(mlp_output, weight, residual, scalar, experts, following)
    if reason is not None:
        raise ValueError(reason)
    return launch_layer_tail(mlp_output, weight, eps, residual, scalar, experts, following)


def launch_layer_tail(
    mlp_output: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    scalar: torch.Tensor,
    experts: Experts | None,
    following: NextNorm | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`layer_tail` without its checks."""
    rows, width = mlp_output.shape
    out = mlp_output.new_empty((rows, width))
    after = None if following is None else mlp_output.new_empty((rows, width))
    if rows:
        summed = experts is not None and experts.output.dim() == 3
        e = experts.output if experts is not None else mlp_output
        _layer_tail_kernel[(rows,)](
            mlp_output,
            experts.mlp_weight if experts is not None else weight,
            e,
            experts.weight if experts is not None else weight,
            weight,
            residual,
            scalar,
            weight if following is None else following.weight,
            out,
            out if after is None else after,
            mlp_output.stride(0),
            e.stride(0),
            e.stride(1) if summed else 0,
            residual.stride(0),
            out.stride(0),
            width,
            experts.mlp_eps if experts is not None else 0.0,
            experts.eps if experts is not None else 0.0,
            eps,
            0.0 if following is None else following.eps,
            BLOCK=triton.next_power_of_2(width),
            WIDTH=width,
            KIND=0 if following is None else int(following.kind),
            WARPS=4,
            EXPERTS=experts is not None,
            CHOICES=e.shape[1] if summed else 0,
            FROM_ZERO=rows > COMPILED_SUM_ROWS or (experts is not None and experts.from_zero),
            NEXT=following is not None,
            PTX=not INTERPRETED,
            num_warps=4,
            **pdl.options(mlp_output),
        )
    return out, after


COMPILED_SUM_ROWS = 32
"""Up to here 0.5.12 sums with a compiled kernel that starts at the first choice, then from zero."""


def reference_layer_tail(
    mlp_output: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    scalar: torch.Tensor,
    experts: Experts | None = None,
    following: NextNorm | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same in plain torch, rounding where stock rounds."""

    def norm(x: torch.Tensor, w: torch.Tensor, e: float) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * w.float()

    x = mlp_output.float()
    if experts is not None:
        s = experts.output.float()
        if s.dim() == 3:
            s = s.sum(1).to(mlp_output.dtype).float()
        x = norm(x, experts.mlp_weight, experts.mlp_eps) + norm(s, experts.weight, experts.eps)
    out = ((norm(x, weight, eps) + residual.float()) * scalar.float()).to(mlp_output.dtype)
    if following is None:
        return out, None
    return out, norms.reference_rmsnorm(out, following.weight, following.eps)
