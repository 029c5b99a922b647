"""Products of matrices with a few vectors by tiles that one thread holds, for every kernel that makes them.

A tile has the rows (or tokens, or choices) and the blocks of K that one thread holds, all loaded before the
first is used; then ``across`` lines side by side, 16 bytes of them in each lane of all warps and no more:
with that, any Triton gives the weight and the vector the same layout. A line lies within one warp, so that
nothing goes through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_turbo.kernels.interpreted import to_float

LANES = 32
VECTOR = 8
"""Numbers in 16 bytes, what a lane loads at once."""


@triton.jit
def load(pointers, k, left, MASKED: tl.constexpr):
    """A tile of which ``left`` columns are there."""
    if MASKED:
        return tl.load(pointers, mask=k < left, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def inside(row, END: tl.constexpr, BLOCK: tl.constexpr):
    """A row past the end repeats the last one: cheaper than a mask on every load of the weight."""
    if END % BLOCK:
        return tl.minimum(row, END - 1)
    else:
        return row


@triton.jit
def products(w, x, HELD: tl.constexpr, REPEAT: tl.constexpr, SIDE: tl.constexpr, PTX: tl.constexpr):
    """Summed over what one thread holds only: the lanes' sums are added up once, at the end."""
    found = to_float(w, PTX) * to_float(x, PTX)
    found = tl.reshape(found, (HELD, REPEAT, SIDE // 8, 8))
    return tl.sum(tl.sum(found, axis=3), axis=1)


@triton.jit
def over_lanes(sums, HELD: tl.constexpr, ACROSS: tl.constexpr, LINE: tl.constexpr):
    """The lanes' sums of each line: ``[HELD, ACROSS]``."""
    return tl.sum(tl.reshape(sums, (HELD, ACROSS, LINE // 8)), axis=2)
