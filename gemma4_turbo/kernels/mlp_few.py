"""A dense MLP of a few tokens in one launch, both products.

::

    d[t, m]      = round(gelu_tanh(round(sum_j x[t, j] g[m, j])) * round(sum_j x[t, j] g[m + M, j]))
    out[t, i]    = round(sum_m d[t, m] w[i, m])

Sums are in fp32, roundings are stock's; the order of the long sums is not cuBLAS's: `tolerance`. A token's
bits are the same at every run and whatever else is in the batch.

In two launches the second starts when the last program of the first has ended: memory is idle while one
drains and the other ramps up. Here the programs of the second product follow those of the first in one
launch, and have loaded their first weights when they wait (`gemma4_turbo.kernels.dataflow`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import dataflow, pdl, skinny_gemm
from gemma4_turbo.kernels.dataflow import APART, Product, count_one, dense_down, dense_gated
from gemma4_turbo.kernels.matvec import LANES, VECTOR

MAX_TOKENS = 4
COUNTS = 2 * APART
"""Numbers that are zero between launches: programs of gate and up that have ended, and of down."""


class Tiles(NamedTuple):
    """How the work is cut."""

    gate_up: Product
    down: Product


TILES = Tiles(Product(2, 1, 256), Product(4, 1, 256))
"""Of `gemma4_turbo.kernels.feed_forward_few`. One for every number of tokens: lines and blocks make the order of
addition, and a token's bits would depend on the number of tokens."""


@triton.jit(do_not_specialize=["tokens"])
def _mlp_few_kernel(
    x_ptr, gate_up_ptr, down_ptr, out_ptr,  # [T, H], [2 M, H], [H, M], [T, H]
    hidden_ptr,  # [T, M]
    counts_ptr, tokens, stride_x,
    H: tl.constexpr, M: tl.constexpr,
    BLOCK_T: tl.constexpr,  # power of two >= tokens
    ROWS: tl.constexpr, REPEAT: tl.constexpr, LINE: tl.constexpr,  # of gate and up
    DOWN_ROWS: tl.constexpr, DOWN_REPEAT: tl.constexpr, DOWN_LINE: tl.constexpr,
    LANES: tl.constexpr, APART: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter
):  # fmt: skip
    pdl.launch_dependents(PDL)
    SIDE: tl.constexpr = LANES * 8
    ACROSS: tl.constexpr = SIDE // LINE
    DOWN_ACROSS: tl.constexpr = SIDE // DOWN_LINE
    TILES: tl.constexpr = (M + ROWS * ACROSS - 1) // (ROWS * ACROSS)
    DOWN_TILES: tl.constexpr = (H + DOWN_ROWS * DOWN_ACROSS - 1) // (DOWN_ROWS * DOWN_ACROSS)
    number = tl.program_id(0)
    if number < TILES:
        dense_gated(
            x_ptr, stride_x, tokens, gate_up_ptr, hidden_ptr, number,
            M, H, BLOCK_T, ROWS, ACROSS, REPEAT, LINE, PDL, PTX,
        )  # fmt: skip
        count_one(counts_ptr, "release")
    else:
        dense_down(
            hidden_ptr, tokens, down_ptr, out_ptr, counts_ptr, TILES, number - TILES,
            H, M, BLOCK_T, DOWN_ROWS, DOWN_ACROSS, DOWN_REPEAT, DOWN_LINE, PDL, PTX,
        )  # fmt: skip
        if count_one(counts_ptr + APART, "relaxed") == DOWN_TILES - 1:
            # Nobody waits any more: zeros for the next launch.
            tl.store(counts_ptr + tl.arange(0, 2) * APART, tl.zeros([2], tl.int32))


INTERPRETED = not isinstance(_mlp_few_kernel, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def unfit(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Why `mlp_few` does not take these tensors, or None. Host checks only."""
    reason = dataflow.gate_up_unfit(gate_up)
    if reason is not None:
        return reason
    width, hidden = gate_up.shape[0] // 2, gate_up.shape[1]
    if down.shape != (hidden, width):
        return f"down must be {(hidden, width)}, got {tuple(down.shape)}"
    if not (INTERPRETED or gate_up.is_cuda):
        return f"gate_up must be on a CUDA device, got {gate_up.device}"
    if x.dim() != 2 or x.shape[1] != hidden or x.stride(1) != 1:
        return f"x must be [T, {hidden}] with contiguous rows, got {tuple(x.shape)}"
    if x.shape[0] > MAX_TOKENS:
        return f"x must have at most {MAX_TOKENS} rows, got {x.shape[0]}"
    if x.stride(0) % VECTOR:
        return f"x must have rows at multiples of 16 bytes, got a stride of {x.stride(0)}"
    for name, tensor in (("x", x), ("down", down)):
        if tensor.dtype != gate_up.dtype or tensor.device != gate_up.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, gate_up {gate_up.dtype} on {gate_up.device}"
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
    for name, tensor in (("x", x), ("gate_up", gate_up), ("down", down)):
        if tensor.data_ptr() % 16:
            return f"{name} must be aligned to 16 bytes"
    return None


def mlp_few(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """The equations of this module.

    Args:
        x: ``[T, H]``, bf16 or fp16, contiguous rows, T up to `MAX_TOKENS`, may be 0.
        gate_up: ``[2 M, H]`` in the same dtype, contiguous; H and M are multiples of 8.
        down: ``[H, M]``, likewise.
        counts: zeros, int32, `COUNTS` of them; left as zeros. No two launches that may run at the same time
            share them. None: made here.
        tiles: how the work is cut; None: `TILES`.

    Returns:
        ``[T, H]``.

    Raises:
        ValueError: naming the argument.
    """
    tiles = TILES if tiles is None else tiles
    reason = (
        unfit(x, gate_up, down)
        or dataflow.tiles_unfit(tiles)
        or dataflow.counts_unfit(counts, COUNTS, gate_up.device)
    )
    if reason is not None:
        raise ValueError(reason)
    if counts is None:
        counts = torch.zeros(COUNTS, dtype=torch.int32, device=gate_up.device)
    return launch_mlp_few(x, gate_up, down, counts, tiles)


def launch_mlp_few(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor,
    tiles: Tiles,
) -> torch.Tensor:
    """`mlp_few` without its checks."""
    (tokens, hidden), width = x.shape, down.shape[1]
    out = x.new_empty((tokens, hidden))
    if tokens == 0:
        return out
    first, second = tiles
    programs = dataflow.tiles(width, first, first.rows) + dataflow.tiles(
        hidden, second, second.rows
    )
    _mlp_few_kernel[(programs,)](
        x,
        gate_up,
        down,
        out,
        x.new_empty((tokens, width)),
        counts,
        tokens,
        x.stride(0),
        H=hidden,
        M=width,
        BLOCK_T=1 << (tokens - 1).bit_length(),
        ROWS=first.rows,
        REPEAT=first.repeat,
        LINE=first.line,
        DOWN_ROWS=second.rows,
        DOWN_REPEAT=second.repeat,
        DOWN_LINE=second.line,
        LANES=LANES,
        APART=APART,
        PTX=not INTERPRETED,
        num_warps=1,
        **pdl.options(x),
    )
    return out


def reference_mlp_few(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Stock's calls in plain torch, rounding where they round; with everything in fp64 nothing is rounded."""
    hidden = skinny_gemm.reference_skinny_gemm(x, gate_up, skinny_gemm.Epilogue.GELU_AND_MUL)
    return torch.nn.functional.linear(hidden, down)
