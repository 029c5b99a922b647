"""RMSNorm with the bits of ``sgl_kernel.rmsnorm`` and ``sgl_kernel.fused_add_rmsnorm``.

For a row ``x`` of width N with weight ``w``::

    rmsnorm(x)          = round(x * rsqrt(mean(x * x) + eps) * w)
    fused_add_rmsnorm   : r = float(x) + float(residual); residual = round(r); x = rmsnorm(r)

The order of every addition is that of the CUDA kernels, whose scheme (FlashInfer's norm.cuh, own
words) is: 8 neighbours a thread, added one after the other with fma; a butterfly over the 32 lanes
(offsets 16 to 1); a butterfly over the warps' sums, padded with zeros to 32. The sm90 library is
built with fast math, so the division is a multiplication by 1/N fused with the addition of eps, and
the root is ``rsqrt.approx.ftz``. Rows of up to 8192 elements and a multiple of 256 are one round of
that scheme; other widths are declined.

The device functions here take one row as a 1-D block, padded with zeros to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_WIDTH = 8192


@triton.jit
def rsqrt_approx(x, PTX: tl.constexpr):
    """``rsqrt.approx.ftz.f32``."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.rsqrt(x)


@triton.jit
def sum_of_squares(x, BLOCK: tl.constexpr):
    """Sum of x*x over a row in FlashInfer's order. ``x``: fp32 ``[BLOCK]``, BLOCK >= 256."""
    x = tl.reshape(x, [BLOCK // 8, 2, 2, 2])
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    total = x0 * x0
    total = tl.fma(x1, x1, total)
    total = tl.fma(x2, x2, total)
    total = tl.fma(x3, x3, total)
    total = tl.fma(x4, x4, total)
    total = tl.fma(x5, x5, total)
    total = tl.fma(x6, x6, total)
    total = tl.fma(x7, x7, total)
    WARPS: tl.constexpr = BLOCK // 256
    total = tl.sum(tl.reshape(total, [WARPS, 2, 16]), axis=1)
    total = tl.sum(tl.reshape(total, [WARPS, 2, 8]), axis=1)
    total = tl.sum(tl.reshape(total, [WARPS, 2, 4]), axis=1)
    total = tl.sum(tl.reshape(total, [WARPS, 2, 2]), axis=1)
    total = tl.sum(total, axis=1)
    if WARPS >= 32:
        total = tl.sum(tl.reshape(total, [2, 16]), axis=0)
    if WARPS >= 16:
        total = tl.sum(tl.reshape(total, [2, 8]), axis=0)
    if WARPS >= 8:
        total = tl.sum(tl.reshape(total, [2, 4]), axis=0)
    if WARPS >= 4:
        total = tl.sum(tl.reshape(total, [2, 2]), axis=0)
    return tl.sum(total, axis=0)


@triton.jit
def rms_scale(x, eps, INVERSE_N: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """``rsqrt(mean(x*x) + eps)`` of one row."""
    return rsqrt_approx(tl.fma(sum_of_squares(x, BLOCK), INVERSE_N, eps), PTX)


INTERPRETED = not isinstance(rms_scale, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""

DTYPES = (torch.bfloat16, torch.float16)


def warps(width: int) -> int:
    """Warps of a program that holds one row of this width."""
    return max(1, min(8, triton.next_power_of_2(width) // 512))


def width_reason(width: int, argument: str) -> str | None:
    """Why rows of this width are declined, or None."""
    if width % 256 or not 256 <= width <= MAX_WIDTH:
        return (
            f"{argument} must have a multiple of 256 and at most {MAX_WIDTH} columns, got {width}"
        )
    return None


def rows_reason(
    argument: str, tensor: torch.Tensor, like: torch.Tensor | None = None
) -> str | None:
    """Why ``tensor`` is no ``[M, N]`` activation with contiguous rows (like ``like``), or None."""
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        return f"{argument} must be [M, N] with contiguous rows, got {tuple(tensor.shape)}"
    if tensor.dtype not in DTYPES:
        return f"{argument} must be bf16 or fp16, got {tensor.dtype}"
    if not (INTERPRETED or (tensor.is_cuda and torch.version.hip is None)):
        return f"{argument} must be on a CUDA device, got {tensor.device}"
    if like is None:
        return width_reason(tensor.shape[1], argument)
    if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device:
        return (
            f"{argument} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected "
            f"{tuple(like.shape)} {like.dtype} on {like.device}"
        )
    return None


def weight_reason(argument: str, weight: torch.Tensor, like: torch.Tensor) -> str | None:
    """Why ``weight`` is no contiguous ``[N]`` in the activation's dtype, or None."""
    if weight.shape != like.shape[-1:] or not weight.is_contiguous():
        return f"{argument} must be a contiguous [{like.shape[-1]}], got {tuple(weight.shape)}"
    if weight.dtype != like.dtype or weight.device != like.device:
        return f"{argument} is {weight.dtype} on {weight.device}, activations {like.dtype} on {like.device}"
    return None


def reference_rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in fp32, rounded once. Near stock's, not equal to it: the order of the sum differs."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight.float()).to(x.dtype)
