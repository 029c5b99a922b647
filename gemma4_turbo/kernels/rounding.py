"""Rounding of fp32 to the activations' dtype, for every kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """fp32 to ``dtype``, to nearest even (Triton's interpreter truncates to bf16)."""
    if PTX or dtype != tl.bfloat16:
        return x.to(dtype)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x != x, 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """An fp32 value after a trip through ``dtype``, as eager leaves it between two operations."""
    return round_to(x, dtype, PTX).to(tl.float32)
