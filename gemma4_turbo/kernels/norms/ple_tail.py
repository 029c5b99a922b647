"""The end of a layer with per-layer embeddings, with the bits of stock's calls.

Around the two GEMMs that stay stock's, with ``m`` the MLP's output and ``p`` the per-layer input::

    h    = round(rmsnorm(m, post_feedforward_weight) + residual)         # norm_add
    gate = gate_proj(h)
    g    = round(round(gelu_tanh(gate)) * p)                             # gelu_mul
    c    = projection(g)
    out  = round(round(rmsnorm(c, post_ple_weight) + h) * layer_scalar)  # norm_add with scalar
    next = rmsnorm(out, next_weight)                                     # optional

Nine launches become five, ten with the next layer's input norm. The norms are those of
`gemma4_turbo.kernels.norms.rmsnorm`; eager's gelu computes ``0.5 x (1 + tanh(b (x + k x x x)))`` in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.gelu import gelu_tanh
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms.rmsnorm import rms_scale, scaled
from gemma4_turbo.kernels.rounding import round_to, rounded

INTERPRETED = norms.INTERPRETED


@triton.jit
def _norm_add_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    scalar_ptr,
    next_weight_ptr,
    out_ptr,
    next_ptr,
    stride_x,
    stride_residual,
    eps,
    next_eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    SCALAR: tl.constexpr,
    NEXT: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    x_ptr += row * stride_x
    out_ptr += row * N
    w = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pdl.wait(PDL)
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0)
    scale = rms_scale(x, x_ptr, eps, N, BLOCK, KIND, WARPS, PTX)
    x = rounded(scaled(x, scale, w, KIND, PTX), dtype, PTX)
    x = rounded(x + r.to(tl.float32), dtype, PTX)
    if SCALAR:
        x = rounded(x * tl.load(scalar_ptr).to(tl.float32), dtype, PTX)
    tl.store(out_ptr + column, round_to(x, dtype, PTX), mask=inside)
    if NEXT:
        if KIND == 1:
            tl.debug_barrier()  # what follows reads out
        w = tl.load(next_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        scale = rms_scale(x, out_ptr, next_eps, N, BLOCK, KIND, WARPS, PTX)
        x = round_to(scaled(x, scale, w, KIND, PTX), dtype, PTX)
        tl.store(next_ptr + row * N + column, x, mask=inside)


@triton.jit
def _gelu_mul_kernel(
    gate_ptr,
    per_layer_ptr,
    out_ptr,
    stride_gate,
    stride_per_layer,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    pdl.wait(PDL)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=inside, other=0.0)
    p = tl.load(per_layer_ptr + row * stride_per_layer + column, mask=inside, other=0.0)
    dtype: tl.constexpr = gate.dtype
    x = gate.to(tl.float32)
    x = rounded(gelu_tanh(x, PTX), dtype, PTX)
    out = round_to(x * p.to(tl.float32), dtype, PTX)
    tl.store(out_ptr + row * N + column, out, mask=inside)


def norm_add_unfit(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    scalar: torch.Tensor | None = None,
    next_weight: torch.Tensor | None = None,
) -> str | None:
    """Why `norm_add` does not take these arguments, or None. Host checks only."""
    reason = (
        norms.rows_unfit("x", x)
        or norms.weight_unfit("weight", weight, x)
        or norms.rows_unfit("residual", residual, x)
    )
    if reason is None and next_weight is not None:
        reason = norms.weight_unfit("next_weight", next_weight, x)
    if (
        reason is None
        and scalar is not None
        and (scalar.numel() != 1 or scalar.dtype != x.dtype or scalar.device != x.device)
    ):
        reason = (
            f"scalar must be one {x.dtype} on {x.device}, got {scalar.dtype} on {scalar.device}"
        )
    return reason


def norm_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    scalar: torch.Tensor | None = None,
    next_weight: torch.Tensor | None = None,
    next_eps: float = 0.0,
    *,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """First or last equations of this module.

    Args:
        x: ``[M, N]``, bf16 or fp16, contiguous rows, M may be 0.
        weight: ``[N]``, in ``x``'s dtype, as the other weights.
        eps: added to the mean square.
        residual: like ``x``; not changed.
        scalar: one element, or None.
        next_weight: the norm that reads the result, or None.
        next_eps: its eps.
        kind: a `norms.Kind`, stock's RMSNorm that is followed.

    Returns:
        ``out`` and ``next``, ``[M, N]``; the latter None without ``next_weight``.

    Raises:
        ValueError: naming the argument, for anything `norm_add_unfit` declines.
    """
    reason = norm_add_unfit(x, weight, residual, scalar, next_weight)
    if reason is not None:
        raise ValueError(reason)
    return launch_norm_add(x, weight, eps, residual, scalar, next_weight, next_eps, kind)


def launch_norm_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    scalar: torch.Tensor | None,
    next_weight: torch.Tensor | None,
    next_eps: float,
    kind: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`norm_add` without its checks."""
    rows, width = x.shape
    out = x.new_empty((rows, width))
    following = None if next_weight is None else x.new_empty((rows, width))
    if rows:
        _norm_add_kernel[(rows,)](
            x,
            weight,
            residual,
            x if scalar is None else scalar,
            x if next_weight is None else next_weight,
            out,
            out if following is None else following,
            x.stride(0),
            residual.stride(0),
            eps,
            next_eps,
            N=width,
            BLOCK=triton.next_power_of_2(width),
            KIND=int(kind),
            WARPS=norms.warps(width, kind),
            SCALAR=scalar is not None,
            NEXT=next_weight is not None,
            PTX=not INTERPRETED,
            num_warps=norms.warps(width, kind),
            **pdl.options(x),
        )
    return out, following


def gelu_mul_unfit(gate: torch.Tensor, per_layer_input: torch.Tensor) -> str | None:
    """Why `gelu_mul` does not take these arguments, or None. Host checks only."""
    return norms.rows_unfit("gate", gate) or norms.rows_unfit(
        "per_layer_input", per_layer_input, gate
    )


def gelu_mul(gate: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor:
    """``round(round(gelu_tanh(gate)) * per_layer_input)``; both ``[M, N]``, contiguous rows.

    Raises:
        ValueError: naming the argument, for anything `gelu_mul_unfit` declines.
    """
    reason = gelu_mul_unfit(gate, per_layer_input)
    if reason is not None:
        raise ValueError(reason)
    return launch_gelu_mul(gate, per_layer_input)


def launch_gelu_mul(gate: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor:
    """`gelu_mul` without its checks."""
    rows, width = gate.shape
    out = gate.new_empty((rows, width))
    if rows:
        _gelu_mul_kernel[(rows,)](
            gate,
            per_layer_input,
            out,
            gate.stride(0),
            per_layer_input.stride(0),
            N=width,
            BLOCK=triton.next_power_of_2(width),
            PTX=not INTERPRETED,
            num_warps=max(1, min(4, width // 256)),
            **pdl.options(gate),
        )
    return out


def reference_norm_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    scalar: torch.Tensor | None = None,
    next_weight: torch.Tensor | None = None,
    next_eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`norm_add` in plain torch, rounding where stock rounds."""
    out = norms.reference_rmsnorm(x, weight, eps) + residual
    if scalar is not None:
        out = out * scalar
    if next_weight is None:
        return out, None
    return out, norms.reference_rmsnorm(out, next_weight, next_eps)


def reference_gelu_mul(gate: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor:
    """`gelu_mul` in plain torch: on CUDA it is what stock runs."""
    return torch.nn.functional.gelu(gate, approximate="tanh") * per_layer_input
