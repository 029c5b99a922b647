"""GELU in both forms, as eager PyTorch and stock's kernels compute them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def gelu_tanh(x, PTX: tl.constexpr):
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x x x)))`` in fp32, unrounded."""
    BETA: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    inner = BETA * tl.fma(x * x * x, 0.044715, x)
    if PTX:
        t = libdevice.tanh(inner)
    else:
        t = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
    return 0.5 * x * (1.0 + t)


@triton.jit
def gelu_erf(x):
    """``x (1 + erf(x / sqrt(2))) / 2`` in fp32, unrounded."""
    return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865475)))
