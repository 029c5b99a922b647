"""Products of matrices with a few vectors by tiles that one thread holds, for every kernel that makes them.

A tile has the rows (or tokens, or choices) and the blocks of K that one thread holds, all loaded before the
first is used; then ``across`` lines side by side, 16 bytes of them in each lane of all warps and no more:
with that, any Triton gives the weight and the vector the same layout. A line lies within one warp, so that
nothing goes through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
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


@triton.jit
def summed(
    w, w_ptr, x_ptr, k, steps, DEPTH: tl.constexpr,
    HELD: tl.constexpr, REPEAT: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The lanes' sums of ``steps`` blocks of STEP columns each, of which ``w`` is the first at ``w_ptr``."""
    MASKED: tl.constexpr = DEPTH % STEP != 0
    sums = tl.zeros([HELD, SIDE // 8], tl.float32)
    left = DEPTH
    for _ in tl.range(1, steps, num_stages=1):
        w_ptr += STEP
        next_w = load(w_ptr, k, left - STEP, MASKED)  # on its way while this one is multiplied
        x = load(x_ptr, k, left, MASKED)
        sums += products(w, x, HELD, REPEAT, SIDE, PTX)
        w = next_w
        x_ptr += STEP
        left -= STEP
    x = load(x_ptr, k, left, MASKED)
    return sums + products(w, x, HELD, REPEAT, SIDE, PTX)


@triton.jit
def places(
    w_ptr, x_ptr, stride_x, tokens, tile,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr,
    ACROSS: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Columns of a program's first block, and where it lies in a weight ``[WIDTH, DEPTH]`` and in T vectors.

    A token past the last one repeats it.
    """
    side = tl.arange(0, ACROSS * LINE)[None, None, None, :]
    k = tl.arange(0, REPEAT)[None, None, :, None] * LINE + side % LINE
    row = tile * (ROWS * ACROSS) + tl.arange(0, ROWS)[None, :, None, None] * ACROSS + side // LINE
    token = tl.minimum(tl.arange(0, T)[:, None, None, None], tokens - 1).to(tl.int64)
    w_ptr = w_ptr + (inside(row, WIDTH, ROWS * ACROSS) * DEPTH + k)
    return k, w_ptr, x_ptr + token * stride_x + k


@triton.jit
def gated(
    x_ptr, stride_x, tokens, w_ptr, tile,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr,
    ACROSS: tl.constexpr, LINE: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sums of gate and of up, ``[T * ROWS, ACROSS]`` each: the gate's rows, WIDTH below them up's.

    PDL: wait for earlier kernels once the first weights are on their way.
    """
    SIDE: tl.constexpr = ACROSS * LINE
    STEP: tl.constexpr = REPEAT * LINE
    MASKED: tl.constexpr = DEPTH % STEP != 0
    k, gate_ptr, x_ptr = places(
        w_ptr, x_ptr, stride_x, tokens, tile, WIDTH, DEPTH, T, ROWS, REPEAT, ACROSS, LINE
    )  # fmt: skip
    left = DEPTH
    gate = load(gate_ptr, k, left, MASKED)
    up = load(gate_ptr + WIDTH * DEPTH, k, left, MASKED)
    pdl.wait(PDL)
    x = load(x_ptr, k, left, MASKED)
    gates = tl.zeros([T * ROWS, SIDE // 8], tl.float32)
    ups = gates
    for _ in tl.range(STEP, DEPTH, STEP, num_stages=1):
        left -= STEP
        gate_ptr += STEP
        x_ptr += STEP
        # On their way while these are multiplied.
        next_gate = load(gate_ptr, k, left, MASKED)
        next_up = load(gate_ptr + WIDTH * DEPTH, k, left, MASKED)
        next_x = load(x_ptr, k, left, MASKED)
        gates += products(gate, x, T * ROWS, REPEAT, SIDE, PTX)
        ups += products(up, x, T * ROWS, REPEAT, SIDE, PTX)
        gate, up, x = next_gate, next_up, next_x
    gates += products(gate, x, T * ROWS, REPEAT, SIDE, PTX)
    ups += products(up, x, T * ROWS, REPEAT, SIDE, PTX)
    return over_lanes(gates, T * ROWS, ACROSS, LINE), over_lanes(ups, T * ROWS, ACROSS, LINE)
