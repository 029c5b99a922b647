"""Two-dimensional rotary embedding of the vision encoder in one launch, with the bits of stock's eleven.

A head of ``D`` numbers has two halves, one for a patch's column and one for its row, and each half is
rotated by itself. With ``n = D / 4`` and ``r`` the place inside a half::

    other[d] = -x[d + n]  if r < n  else  x[d - n]
    y[d]     = round(round(x[d] * cos[d]) + round(other[d] * sin[d]))

``x [tokens, heads, D]``, ``cos`` and ``sin`` ``[tokens, 1, D]``, all of one type, bf16 or fp16 (in fp32
a compiler may fuse a product with the sum), contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.rounding import round_to, rounded

INTERPRETED = norms.INTERPRETED
DTYPES = (torch.bfloat16, torch.float16)
BLOCK = 1024
# LLVM makes bf16 operations of fp32 ones between roundings, and would join product and sum.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _vision_rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    total,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    quarter: tl.constexpr = D // 4
    d = at % D
    angle = at // (HEADS * D) * D + d
    first = d % (2 * quarter) < quarter
    partner = tl.where(first, at + quarter, at - quarter)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    turned = rounded(other * tl.where(first, -1.0, 1.0) * sin, dtype, PTX)  # -x would be 0 - x
    y = round_to(rounded(x * cos, dtype, PTX) + turned, dtype, PTX)
    tl.store(out_ptr + at, y, mask=inside)


def unfit(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why the kernel does not take these tensors, or None."""
    if not (INTERPRETED or (x.is_cuda and torch.version.hip is None)):
        return f"x must be on a CUDA device, got {x.device}"
    if x.dtype not in DTYPES or not x.dtype == cos.dtype == sin.dtype:
        return f"x, cos and sin must be bf16 or fp16, got {x.dtype}, {cos.dtype} and {sin.dtype}"
    if x.dim() != 3 or x.shape[-1] % 4 or x.numel() == 0:
        return f"x must be [tokens, heads, multiple of 4], got {tuple(x.shape)}"
    if not cos.shape == sin.shape == (x.shape[0], 1, x.shape[-1]):
        return f"cos and sin must be [tokens, 1, head_dim], got {tuple(cos.shape)}"
    if not (x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        return "x, cos and sin must be contiguous"
    if not x.device == cos.device == sin.device:
        return "x, cos and sin must be on one device"
    return None


def launch_vision_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The kernel on arguments that `unfit` accepts; a new tensor."""
    out = torch.empty_like(x)
    total = x.numel()
    _vision_rope_kernel[(triton.cdiv(total, BLOCK),)](
        x, cos, sin, out, total, x.shape[1], x.shape[2], BLOCK, PTX=not INTERPRETED, **OPTIONS
    )
    return out


def vision_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x`` rotated; ValueError if the kernel does not take the arguments."""
    reason = unfit(x, cos, sin)
    if reason is not None:
        raise ValueError(reason)
    return launch_vision_rope(x, cos, sin)


def reference_vision_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The equation in plain torch."""
    quarters = x.unflatten(-1, (2, 2, -1))
    other = torch.stack((-quarters[..., 1, :], quarters[..., 0, :]), dim=-2).flatten(-3)
    return x * cos + other * sin
