"""Programs of one launch that need what others of it compute: they wait for a count in memory.

A program is a warp with a few rows of a matrix. It loads its weights, then waits; while it waits, other programs
of its multiprocessor read. No program waits for a later one. A GPU starts the programs of a launch in the
order of their numbers, so that whoever is waited for runs already, or has ended, whatever else the GPU does:
nothing here needs all programs to be there at once. CUB's scans rely on the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.gelu import gelu_tanh
from gemma4_turbo.kernels.matvec import LANES, VECTOR, gated, load, over_lanes, places, summed
from gemma4_turbo.kernels.rounding import round_to, rounded

DTYPES = (torch.bfloat16, torch.float16)
APART = 32
"""Numbers of a cache line. Each count has one of its own: programs ask for them thousands of times."""
# Acquired once it is there: each time the L1 cache is emptied.
POLL: tl.constexpr = tl.constexpr("""{
.reg .pred there;
.reg .b32 count;
ld.acquire.gpu.global.b32 count, [$1];
setp.ge.s32 there, count, $2;
@there bra done;
again:
nanosleep.u32 64;
ld.relaxed.gpu.global.b32 count, [$1];
setp.ge.s32 there, count, $2;
@!there bra again;
ld.acquire.gpu.global.b32 count, [$1];
done:
mov.b32 $0, count;
}""")


class Product(NamedTuple):
    """How a matrix is cut: a program has ``rows`` rows in each of its lines."""

    rows: int  # held by one thread; of gate and of up as many
    repeat: int  # blocks of K loaded at once
    line: int  # numbers of a row that lie side by side in the lanes


def tiles(rows: int, product: Product, held: int) -> int:
    """Programs for so many rows, of which each line holds ``held``."""
    block = held * (LANES * VECTOR // product.line)
    return (rows + block - 1) // block


def tiles_unfit(tiles: Iterable[Product]) -> str | None:
    """Why matrices cannot be cut so, or None."""
    tiles = tuple(tiles)
    numbers = [number for product in tiles for number in product]
    if any(number < 1 or number & (number - 1) for number in numbers):
        return f"tiles must be powers of two, got {tiles}"
    if not all(VECTOR <= product.line <= LANES * VECTOR for product in tiles):
        return f"tiles must have lines of {VECTOR} to {LANES * VECTOR}, got {tiles}"
    return None


def gate_up_unfit(gate_up: torch.Tensor) -> str | None:
    """Why `dense_gated` does not take this weight, ``[2 M, H]``, or None."""
    if gate_up.dim() != 2 or gate_up.dtype not in DTYPES or gate_up.shape[0] % (2 * VECTOR):
        return (
            f"gate_up must be [a multiple of {2 * VECTOR}, H] in bf16 or fp16, "
            f"got {tuple(gate_up.shape)} {gate_up.dtype}"
        )
    rows, hidden = gate_up.shape
    if not rows or not hidden or hidden % VECTOR:
        return f"gate_up must be [2 M, a multiple of {VECTOR}], got {tuple(gate_up.shape)}"
    return None


def counts_unfit(counts: torch.Tensor | None, numbers: int, device: torch.device) -> str | None:
    """Why these cannot be a launch's counts, of which it needs so many, or None. None as counts is none given."""
    if counts is None:
        return None
    if counts.dtype != torch.int32 or counts.numel() < numbers:
        return f"counts must be {numbers} int32, got {counts.numel()} {counts.dtype}"
    if counts.device != device:
        return f"counts are on {counts.device}, gate_up on {device}"
    if not counts.is_contiguous():
        return f"counts must be contiguous, got strides {counts.stride()}"
    return None


@triton.jit
def count_one(count_ptr, sem: tl.constexpr):
    """One more. With "release" and beyond, whoever acquires it can read what this program has stored.

    After all of its lanes: each waits for itself, and may still do so when the first one counts.
    """
    tl.debug_barrier()
    return tl.atomic_add(count_ptr, 1, sem=sem)


@triton.jit
def wait_for(count_ptr, target, PTX: tl.constexpr):
    """Until so many have counted. In Triton's interpreter, where programs run one by one: whether they have."""
    if PTX:
        least = tl.full([], target, tl.int32)
        count = tl.inline_asm_elementwise(
            POLL, "=r,l,r", [count_ptr.to(tl.int64), least], dtype=tl.int32, is_pure=False, pack=1
        )
        return count >= target
    else:
        return tl.load(count_ptr) == target


@triton.jit
def or_nan(x, there, PTX: tl.constexpr):
    if PTX:
        return x
    else:
        return tl.where(there, x, float("nan"))


@triton.jit
def product_of(
    x_ptr, stride_x, tokens, w_ptr, tile, counts_ptr, target,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr,
    ACROSS: tl.constexpr, LINE: tl.constexpr, WAITS: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sums ``[T * ROWS, ACROSS]`` of what others of this launch may compute: then a count says when."""
    SIDE: tl.constexpr = ACROSS * LINE
    STEP: tl.constexpr = REPEAT * LINE
    k, w_ptr, x_ptr = places(
        w_ptr, x_ptr, stride_x, tokens, tile, WIDTH, DEPTH, T, ROWS, REPEAT, ACROSS, LINE
    )  # fmt: skip
    w = load(w_ptr, k, DEPTH, DEPTH % STEP != 0)
    pdl.wait(PDL)
    there = True
    if WAITS:
        there = wait_for(counts_ptr, target, PTX)
    sums = summed(
        w, w_ptr, x_ptr, k, (DEPTH + STEP - 1) // STEP, DEPTH, T * ROWS, REPEAT, SIDE, STEP, PTX
    )
    if WAITS:
        sums = or_nan(sums, there, PTX)
    return over_lanes(sums, T * ROWS, ACROSS, LINE)


@triton.jit
def dense_gated(
    x_ptr, stride_x, tokens, w_ptr, d_ptr, tile,
    M: tl.constexpr, H: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
    REPEAT: tl.constexpr, LINE: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The dense MLP's activations, some columns of all tokens."""
    gate, up = gated(
        x_ptr, stride_x, tokens, w_ptr, tile, M, H, T, ROWS, REPEAT, ACROSS, LINE, PDL, PTX
    )
    dtype: tl.constexpr = d_ptr.dtype.element_ty
    d = gelu_tanh(rounded(gate, dtype, PTX), PTX) * rounded(up, dtype, PTX)
    held = tl.arange(0, T * ROWS)[:, None]
    token = held // ROWS
    m = tile * (ROWS * ACROSS) + (held % ROWS) * ACROSS + tl.arange(0, ACROSS)[None, :]
    tl.store(d_ptr + token * M + m, round_to(d, dtype, PTX), mask=(m < M) & (token < tokens))


@triton.jit
def dense_down(
    d_ptr, tokens, w_ptr, out_ptr, counts_ptr, target, tile,
    H: tl.constexpr, M: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
    REPEAT: tl.constexpr, LINE: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The dense MLP's output, some columns of all tokens."""
    sums = product_of(
        d_ptr, M, tokens, w_ptr, tile, counts_ptr, target, H, M, T, ROWS, REPEAT, ACROSS, LINE, True, PDL, PTX,
    )  # fmt: skip
    held = tl.arange(0, T * ROWS)[:, None]
    token = held // ROWS
    i = tile * (ROWS * ACROSS) + (held % ROWS) * ACROSS + tl.arange(0, ACROSS)[None, :]
    out = round_to(sums, out_ptr.dtype.element_ty, PTX)
    tl.store(out_ptr + token * H + i, out, mask=(i < H) & (token < tokens))
