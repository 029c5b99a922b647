"""What Triton's interpreter gets wrong with bf16, done right there; as usual where code is compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, sums, PTX: tl.constexpr):
    """``sums + a @ b`` in fp32."""
    if PTX:
        return tl.dot(a, b, sums)
    else:  # the interpreter takes the bits of bf16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)


@triton.jit
def to_float(x, PTX: tl.constexpr):
    """``x`` in fp32."""
    if PTX or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:  # the interpreter widens subnormal bf16 numbers wrongly: shift the bits
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
