"""RMSNorm with the bits of the kernel that stock runs: three kinds, three orders of addition.

For a row ``x`` of width N with weight ``w``::

    rmsnorm(x)          = round(x * rsqrt(mean(x * x) + eps) * (w + 0))
    fused_add_rmsnorm   : r = float(x) + float(residual); residual = round(r); x = rmsnorm(r)

SGLang's RMSNorm calls flashinfer, and that calls the first of these that is installed; traced by
``torch.compile`` it calls sgl_kernel. Which one runs is found by comparison
(`gemma4_turbo.fusions.norm_kinds`), never assumed.

`Kind.CUTE` (flashinfer's CuTe kernels, with nvidia-cutlass-dsl): T = 32 threads a row up to 3072
columns, 64 up to 6144. A thread owns 8 neighbours in every stretch of 8 T columns and adds all its
squares one after the other with fma; then a butterfly over neighbouring threads first (offsets 1 to
16), then the warps. IEEE division by N.

`Kind.FAST_MATH` (sgl_kernel on Hopper, flashinfer's CUDA kernels): 8 neighbours a thread; a butterfly
over the 32 lanes, distant ones first (offsets 16 to 1); one over the warps' sums, padded with zeros
to 32. Multiplication by 1/N fused with the addition of eps; subnormals count as zero.

`Kind.PRECISE` (sgl_kernel elsewhere): the order of FAST_MATH, IEEE division, subnormals kept.

All take the root with ``rsqrt.approx``. Sources: flashinfer's ``norm.cuh`` and ``norm/kernels``, and the
machine code of the wheels, own words. Rows of a multiple of 256 are one round of every scheme; other
widths are declined.
"""

from __future__ import annotations

import enum

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels.rounding import rounded


class Kind(enum.IntEnum):
    """Which of stock's RMSNorm kernels is followed."""

    FAST_MATH = 0
    CUTE = 1
    PRECISE = 2


MAX_WIDTH = 6144
"""Above, CuTe's kernels split a row over more threads."""

MIN_EPS = 1e-12
"""Above it no subnormal reaches the square root, so that flushing them in the sum changes nothing."""


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
def flushed(x):
    """Zero of the same sign for a subnormal."""
    return tl.where(tl.abs(x) < 1.1754943508222875e-38, x * 0.0, x)


@triton.jit
def mul(a, b, KIND: tl.constexpr, PTX: tl.constexpr):
    """Product as the kind's machine code forms it: FAST_MATH flushes subnormals."""
    if KIND == 0 and PTX:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    elif KIND == 0:
        return flushed(flushed(a) * flushed(b))
    else:
        return a * b


@triton.jit
def add(a, b, KIND: tl.constexpr, PTX: tl.constexpr):
    """Sum, likewise."""
    if KIND == 0 and PTX:
        return tl.inline_asm_elementwise(
            "add.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    elif KIND == 0:
        return flushed(flushed(a) + flushed(b))
    else:
        return a + b


@triton.jit
def scaled(x, scale, weight, KIND: tl.constexpr, PTX: tl.constexpr):
    """``x * scale * (weight + 0)``: stock adds a bias of zero, which turns -0 into +0."""
    return mul(mul(x, scale, KIND, PTX), add(weight, 0.0, KIND, PTX), KIND, PTX)


@triton.jit
def _eight(x, A: tl.constexpr, B: tl.constexpr):
    """``[A, B, 8]`` to eight ``[A, B]``."""
    even, odd = tl.split(tl.reshape(x, [A, B, 4, 2]))
    x04, x26 = tl.split(tl.reshape(even, [A, B, 2, 2]))
    x15, x37 = tl.split(tl.reshape(odd, [A, B, 2, 2]))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _add_squares(total, x, A: tl.constexpr, B: tl.constexpr):
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, A, B)
    total = tl.fma(x0, x0, total)
    total = tl.fma(x1, x1, total)
    total = tl.fma(x2, x2, total)
    total = tl.fma(x3, x3, total)
    total = tl.fma(x4, x4, total)
    total = tl.fma(x5, x5, total)
    total = tl.fma(x6, x6, total)
    return tl.fma(x7, x7, total)


# -- FAST_MATH and PRECISE: a row in registers ---------------------------------------------------------


@triton.jit
def sum_of_squares(x, BLOCK: tl.constexpr):
    """``x``: fp32 ``[BLOCK]``, padded with zeros to a power of two of at least 256."""
    WARPS: tl.constexpr = BLOCK // 256
    total = tl.zeros([WARPS, 32], tl.float32)
    total = _add_squares(total, tl.reshape(x, [WARPS, 32, 8]), WARPS, 32)
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


# -- CUTE: a row in memory -------------------------------------------------------------------------------
# The chain runs along the row, so a thread needs columns that other warps hold. Every warp reads them
# from memory again and adds the whole row.


@triton.jit
def _over_threads(total, COPIES: tl.constexpr, THREADS: tl.constexpr):
    """``[COPIES, THREADS]``, the same in every copy, to one number."""
    total = tl.sum(tl.reshape(total, [COPIES, THREADS // 2, 2]), axis=2)
    total = tl.sum(tl.reshape(total, [COPIES, THREADS // 4, 2]), axis=2)
    total = tl.sum(tl.reshape(total, [COPIES, THREADS // 8, 2]), axis=2)
    total = tl.sum(tl.reshape(total, [COPIES, THREADS // 16, 2]), axis=2)
    total = tl.sum(tl.reshape(total, [COPIES, THREADS // 32, 2]), axis=2)
    return tl.max(tl.sum(total, axis=1), axis=0)


@triton.jit
def sums_of_squares_in_memory(
    x_ptr, r_ptr, N: tl.constexpr, ADD: tl.constexpr, WARPS: tl.constexpr, PTX: tl.constexpr
):
    """Of the row at ``x_ptr``; with ADD of ``x + r``, unrounded and rounded.

    What other threads of this program wrote there must lie behind a barrier.
    """
    THREADS: tl.constexpr = 32 if N <= 3072 else 64
    COPIES: tl.constexpr = WARPS * 32 // THREADS if WARPS * 32 > THREADS else 1
    STRETCH: tl.constexpr = THREADS * 8
    thread = tl.arange(0, THREADS)[None, :, None] * 8
    column = thread + tl.arange(0, 8)[None, None, :] + tl.zeros([COPIES, 1, 1], tl.int32)
    total = tl.zeros([COPIES, THREADS], tl.float32)
    total_rounded = total
    for i in tl.static_range((N + STRETCH - 1) // STRETCH):
        at = column + i * STRETCH
        raw = tl.load(x_ptr + at, mask=at < N, other=0.0)
        x = raw.to(tl.float32)
        if ADD:
            x += tl.load(r_ptr + at, mask=at < N, other=0.0).to(tl.float32)
            total_rounded = _add_squares(total_rounded, rounded(x, raw.dtype, PTX), COPIES, THREADS)
        total = _add_squares(total, x, COPIES, THREADS)
    total = _over_threads(total, COPIES, THREADS)
    if ADD:
        return total, _over_threads(total_rounded, COPIES, THREADS)
    else:
        return total, total


# -- the scale ---------------------------------------------------------------------------------------------


@triton.jit
def scale_of(total, eps, N: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr):
    """``rsqrt(total / N + eps)``."""
    if KIND == 0:
        INVERSE: tl.constexpr = 1.0 / N
        return rsqrt_approx(tl.fma(total, INVERSE, eps), PTX)
    else:
        return rsqrt_approx(tl.div_rn(total, N * 1.0) + eps, PTX)


@triton.jit
def rms_scale(
    x,
    x_ptr,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PTX: tl.constexpr,
):
    """``rsqrt(mean(x*x) + eps)`` of a row that lies both in registers and in memory."""
    if KIND == 1:
        total, _ = sums_of_squares_in_memory(x_ptr, x_ptr, N, False, WARPS, PTX)
    else:
        total = sum_of_squares(x, BLOCK)
    return scale_of(total, eps, N, KIND, PTX)


INTERPRETED = not isinstance(rms_scale, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""

DTYPES = (torch.bfloat16, torch.float16)


def warps(width: int, kind: int) -> int:
    """Warps of a program that holds one row of this width."""
    # Every warp reads the whole row again for CuTe's sum: more than four cost more than they bring.
    most = 4 if kind == Kind.CUTE else 8
    return max(1, min(most, triton.next_power_of_2(width) // 512))


def width_unfit(width: int, argument: str) -> str | None:
    """Why rows of this width are declined, or None."""
    if width % 256 or not 256 <= width <= MAX_WIDTH:
        return (
            f"{argument} must have a multiple of 256 and at most {MAX_WIDTH} columns, got {width}"
        )
    return None


def rows_unfit(argument: str, tensor: torch.Tensor, like: torch.Tensor | None = None) -> str | None:
    """Why ``tensor`` is no ``[M, N]`` activation with contiguous rows (like ``like``), or None."""
    if tensor.dim() != 2 or tensor.stride(1) != 1:
        return f"{argument} must be [M, N] with contiguous rows, got {tuple(tensor.shape)}"
    if tensor.dtype not in DTYPES:
        return f"{argument} must be bf16 or fp16, got {tensor.dtype}"
    if not (INTERPRETED or (tensor.is_cuda and torch.version.hip is None)):
        return f"{argument} must be on a CUDA device, got {tensor.device}"
    if like is None:
        return width_unfit(tensor.shape[1], argument)
    if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device:
        return (
            f"{argument} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected "
            f"{tuple(like.shape)} {like.dtype} on {like.device}"
        )
    return None


def weight_unfit(argument: str, weight: torch.Tensor, like: torch.Tensor) -> str | None:
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
