"""The experts of a few tokens, bound by reading the rows of the chosen experts: two launches.

With x the activations, e the experts ``topk_ids[t, k]`` and f the factors ``topk_weights[t, k]``::

    g, u        = round(sum_j x[t, j] w13[e, n, j]),  the same of row n + N        # first launch
    h[t, k, n]  = round(g (1 + erf(g / sqrt(2))) / 2 * u)
    y[t, k, i]  = round(f * sum_n h[t, k, n] w2[e, i, n])                          # second launch
    out[t, i]   = round(sum_k y[t, k, i])

Sums are in fp32 and roundings are stock's (sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe.py,
activation "gelu", no scaling of the sum): both products rounded, the factor multiplied in fp32 before the
second rounding, the sum over the choices from the first to the last. The order within the two long sums is
not that of stock's tensor cores: `tolerance`. It is the same at every run, and the same for a token
whatever else is in the batch. A choice with a negative id is none of this rank's experts and adds nothing.

Stock sorts the slots by expert, pads each expert to 16 rows for the tensor cores, and writes the gate and
up projections, the activations and each expert's result to memory: five launches. With a few tokens most
experts have one row, so that a program here is a product of a matrix with a vector, by tiles of
`gemma4_turbo.kernels.matvec`. Slots are the grid's fastest dimension: tokens that share an expert read the
same rows of it at the same time, once from memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import measured, pdl
from gemma4_turbo.kernels.gelu import gelu_erf
from gemma4_turbo.kernels.matvec import LANES, VECTOR, gated, inside, load, over_lanes, summed
from gemma4_turbo.kernels.rounding import round_to, rounded

MAX_TOKENS = 8
CHOICES = (1, 2, 4, 8)
DTYPES = (torch.bfloat16, torch.float16)


class Up(NamedTuple):
    """How the first launch is cut."""

    rows: int  # of gate and of up, held by one thread
    repeat: int  # blocks of K loaded at once
    line: int  # numbers of a row that lie side by side in the lanes
    warps: int


class Down(NamedTuple):
    """How the second launch is cut."""

    group: int  # choices loaded at once
    repeat: int
    line: int
    warps: int
    prefetch: int  # choices whose rows are fetched into the L2 cache while the first launch runs


class Tiles(NamedTuple):
    """How the work is cut."""

    up: Up
    down: Down


@triton.jit
def _up_kernel(
    x_ptr,
    w_ptr,  # [E, 2 N, K]
    ids_ptr,
    h_ptr,  # [T * CHOICES, N]
    stride_x,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    REPEAT: tl.constexpr,
    ACROSS: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter
):
    # Who comes next may read the ids, and fetch weights by them, as soon as this kernel has waited.
    pdl.wait(PDL)
    pdl.launch_dependents(PDL)
    slot = tl.program_id(0)
    tile = tl.program_id(1)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    if expert < 0:
        return
    x_ptr += (slot // CHOICES).to(tl.int64) * stride_x
    w_ptr += expert * (2 * N * K)
    gates, ups = gated(x_ptr, 0, 1, w_ptr, tile, N, K, 1, ROWS, REPEAT, ACROSS, LINE, False, PTX)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    h = round_to(gelu_erf(rounded(gates, dtype, PTX)) * rounded(ups, dtype, PTX), dtype, PTX)
    n = (
        tile * (ROWS * ACROSS)
        + tl.arange(0, ROWS)[:, None] * ACROSS
        + tl.arange(0, ACROSS)[None, :]
    )
    tl.store(h_ptr + slot * N + n, h, mask=n < N)


# Were the few steps known to the compiler, it would unroll them and put loads behind products.
@triton.jit(do_not_specialize=["experts", "steps"])
def _down_kernel(
    h_ptr,  # [T * CHOICES, N]
    w_ptr,  # [E, K, N]
    ids_ptr,
    factors_ptr,
    out_ptr,
    stride_out,
    experts,
    steps,  # of REPEAT * LINE columns
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUP: tl.constexpr,
    REPEAT: tl.constexpr,
    ACROSS: tl.constexpr,
    LINE: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINES: tl.constexpr,  # power of two >= cache lines of a row
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(PDL)
    token = tl.program_id(0)
    tile = tl.program_id(1)
    if PDL:
        if PREFETCH:
            # The first kernel has seen the ids written before it let this one start. Should another
            # kernel come before: whatever is read here, only what lies in the weight is fetched.
            choice = tl.arange(0, PREFETCH)[:, None, None]
            expert = tl.load(ids_ptr + token * CHOICES + choice, cache_modifier=".cg")
            expert = tl.minimum(tl.maximum(expert, 0), experts - 1).to(tl.int64)
            row = tl.minimum(tile * ACROSS + tl.arange(0, ACROSS)[None, :, None], K - 1)
            # 64 numbers are a cache line.
            line = tl.minimum(tl.arange(0, LINES)[None, None, :] * 64, N - 1)
            pdl.prefetch(w_ptr + expert * (K * N) + (row * N + line))
        pdl.wait(PDL)
    SIDE: tl.constexpr = ACROSS * LINE
    STEP: tl.constexpr = REPEAT * LINE
    side = tl.arange(0, SIDE)[None, None, :]
    n = tl.arange(0, REPEAT)[None, :, None] * LINE + side % LINE
    row = inside(tile * ACROSS + side // LINE, K, ACROSS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = tl.zeros([ACROSS], tl.float32)
    for first in tl.static_range(0, CHOICES, GROUP):
        slot = token * CHOICES + first + tl.arange(0, GROUP)[:, None, None]
        expert = tl.maximum(tl.load(ids_ptr + slot), 0).to(tl.int64)
        at = w_ptr + expert * (K * N) + (row * N + n)
        h_at = h_ptr + (slot * N + n)
        w = load(at, n, N, N % STEP != 0)
        sums = summed(w, at, h_at, n, steps, N, GROUP, REPEAT, SIDE, STEP, PTX)
        slot = token * CHOICES + first + tl.arange(0, GROUP)[:, None]
        factor = tl.load(factors_ptr + slot)
        y = rounded(over_lanes(sums, GROUP, ACROSS, LINE) * factor, dtype, PTX)
        y = tl.where(tl.load(ids_ptr + slot) >= 0, y, 0.0)
        choice = tl.arange(0, GROUP)[:, None]
        for i in tl.static_range(GROUP):
            total += tl.sum(tl.where(choice == i, y, 0.0), axis=0)
    i = tile * ACROSS + tl.arange(0, ACROSS)
    out = round_to(total, dtype, PTX)
    tl.store(out_ptr + token.to(tl.int64) * stride_out + i, out, mask=i < K)


INTERPRETED = not isinstance(_up_kernel, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def unfit(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor | None = None,
) -> str | None:
    """Why `experts_few` does not take these arguments, or None. Host checks only."""
    if w13.dim() != 3 or w13.dtype not in DTYPES or not w13.is_contiguous():
        return f"w13 must be a contiguous [E, 2 N, K] in bf16 or fp16, got {tuple(w13.shape)} {w13.dtype}"
    experts, double, depth = w13.shape
    if experts < 1 or double % (2 * VECTOR) or depth % VECTOR or not double or not depth:
        return f"w13 must be [E, 2 N, K] with N and K multiples of {VECTOR}, got {tuple(w13.shape)}"
    if w2.shape != (experts, depth, double // 2) or w2.dtype != w13.dtype or not w2.is_contiguous():
        return (
            f"w2 must be a contiguous {(experts, depth, double // 2)} {w13.dtype}, "
            f"got {tuple(w2.shape)} {w2.dtype}"
        )
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] != depth or x.dtype != w13.dtype:
        return f"x must be [T, {depth}] {w13.dtype} with contiguous rows, got {tuple(x.shape)} {x.dtype}"
    if x.shape[0] > MAX_TOKENS:
        return f"x must have at most {MAX_TOKENS} rows, got {x.shape[0]}"
    if (
        topk_ids.dim() != 2
        or topk_ids.shape[0] != x.shape[0]
        or topk_ids.shape[1] not in CHOICES
        or topk_ids.dtype != torch.int32
        or not topk_ids.is_contiguous()
    ):
        return (
            f"topk_ids must be a contiguous [{x.shape[0]}, 1, 2, 4 or 8] in int32, "
            f"got {tuple(topk_ids.shape)} {topk_ids.dtype}"
        )
    row = measured_row(topk_ids.shape[1], double // 2, depth, x.device)
    reason = None if INTERPRETED else measured.unfit("x", x.device, row)
    if reason is not None:
        return reason
    if (
        topk_weights.shape != topk_ids.shape
        or topk_weights.dtype != torch.float32
        or not topk_weights.is_contiguous()
    ):
        return (
            f"topk_weights must be a contiguous {tuple(topk_ids.shape)} in fp32, "
            f"got {tuple(topk_weights.shape)} {topk_weights.dtype}"
        )
    if out is not None and (out.shape != x.shape or out.stride(1) != 1 or out.dtype != x.dtype):
        return f"out must be {tuple(x.shape)} {x.dtype} with contiguous rows, got {tuple(out.shape)} {out.dtype}"
    others = {"w13": w13, "w2": w2, "topk_weights": topk_weights, "topk_ids": topk_ids}
    for name, tensor in (others if out is None else {**others, "out": out}).items():
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    if x.stride(0) % VECTOR:
        return f"x must have rows that are multiples of {VECTOR} apart, got strides {x.stride()}"
    for name, tensor in (("x", x), ("w13", w13), ("w2", w2)):
        if tensor.data_ptr() % 16:
            return f"{name} must be aligned to 16 bytes"
    return None


def tiles_unfit(tiles: Tiles, choices: int) -> str | None:
    """Why the kernels cannot be cut so, or None."""
    up, down = tiles
    if not all(_power_of_two(value) for value in (*up, *down[:4])):
        return f"tiles must be powers of two, got {tiles}"
    if not all(VECTOR <= part.line <= LANES * VECTOR for part in tiles):
        return f"tiles must have lines of {VECTOR} to {LANES * VECTOR}, got {tiles}"
    if choices % down.group:
        return f"tiles must have a group that divides {choices}, got {down.group}"
    if down.prefetch and not (_power_of_two(down.prefetch) and down.prefetch <= choices):
        return f"tiles must prefetch a power of two up to {choices}, got {down.prefetch}"
    return None


def _power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def choose(choices: int) -> Tiles:
    """A cut for so many choices of a token.

    What 4.8 TB/s hold in flight over 700 ns are 26 KB for each multiprocessor of an H200. Of one token of
    26B-A4B, each program has 4 KB on its way all the time, and a multiprocessor has eleven programs.
    """
    return Tiles(Up(2, 1, 256, 1), Down(min(8, choices), 1, 128, 1, min(2, choices)))


def tile_of(numbers: tuple[int, ...]) -> Tiles:
    """A cut from a profile's numbers; ValueError if it is none."""
    first = len(Up._fields)
    measured.require(len(numbers) == first + len(Down._fields), numbers)
    tiles = Tiles(Up(*numbers[:first]), Down(*numbers[first:]))
    measured.require(tiles_unfit(tiles, max(CHOICES)) is None and max(numbers) <= 256, numbers)
    return tiles


def measured_row(
    choices: int, width: int, hidden: int, device: torch.device
) -> measured.Row[Tiles] | None:
    """What was measured on this GPU of experts ``width x hidden``; None if nothing was."""
    row = measured.look("experts_few", device, (choices, width, hidden), tile_of)
    wrong = row is not None and row.tile is not None and tiles_unfit(row.tile, choices)
    return None if wrong else row


def cut(choices: int, width: int, hidden: int, device: torch.device) -> Tiles:
    """The cut on a GPU: the measured one, or what `choose` has."""
    row = measured_row(choices, width, hidden, device)
    return choose(choices) if row is None or row.tile is None else row.tile


def experts_few(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """The equations of this module.

    Args:
        x: ``[T, K]``, bf16 or fp16, contiguous rows, T up to `MAX_TOKENS`, may be 0.
        w13: ``[E, 2 N, K]`` in the same dtype, contiguous: an expert's gate above its up projection. N and K
            are multiples of 8.
        w2: ``[E, K, N]``, likewise.
        topk_weights: ``[T, C]`` fp32, contiguous; C is 1, 2, 4 or 8.
        topk_ids: ``[T, C]`` int32, contiguous; each below E, which is not checked. Negative: left out.
        out: where to write, ``[T, K]`` with contiguous rows; may be ``x``. None: made here.
        tiles: how the work is cut; None: `choose`.

    Returns:
        ``[T, K]`` in the dtype of x: ``out`` if given.

    Raises:
        ValueError: naming the argument, for anything `unfit` and `tiles_unfit` decline.
    """
    reason = unfit(x, w13, w2, topk_weights, topk_ids, out)
    if reason is None:
        if tiles is None:
            tiles = cut(topk_ids.shape[1], w2.shape[2], w2.shape[1], x.device)
        reason = tiles_unfit(tiles, topk_ids.shape[1])
    if reason is not None:
        raise ValueError(reason)
    assert tiles is not None
    return launch_experts_few(x, w13, w2, topk_weights, topk_ids, out, tiles)


def launch_experts_few(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor | None,
    tiles: Tiles,
) -> torch.Tensor:
    """`experts_few` without its checks."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        h = launch_up(x, w13, topk_ids, tiles.up)
        launch_down(h, w2, topk_weights, topk_ids, out, tiles.down)
    return out


def launch_up(x: torch.Tensor, w13: torch.Tensor, topk_ids: torch.Tensor, tile: Up) -> torch.Tensor:
    """The first launch: ``h [T * C, N]``, uninitialised for choices that are left out."""
    width, slots = w13.shape[1] // 2, topk_ids.numel()
    across = tile.warps * (LANES * VECTOR) // tile.line
    columns = tile.rows * across
    h = torch.empty((slots, width), dtype=x.dtype, device=x.device)
    _up_kernel[(slots, (width + columns - 1) // columns)](
        x,
        w13,
        topk_ids,
        h,
        x.stride(0),
        N=width,
        K=w13.shape[2],
        CHOICES=topk_ids.shape[1],
        ROWS=tile.rows,
        REPEAT=tile.repeat,
        ACROSS=across,
        LINE=tile.line,
        PTX=not INTERPRETED,
        num_warps=tile.warps,
        **pdl.options(x),
    )
    return h


def launch_down(
    h: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    tile: Down,
) -> None:
    """The second launch, into ``out [T, K]``."""
    experts, depth, width = w2.shape
    tokens, choices = topk_ids.shape
    across = tile.warps * (LANES * VECTOR) // tile.line
    step = tile.repeat * tile.line
    _down_kernel[(tokens, (depth + across - 1) // across)](
        h,
        w2,
        topk_ids,
        topk_weights,
        out,
        out.stride(0),
        experts,
        (width + step - 1) // step,
        N=width,
        K=depth,
        CHOICES=choices,
        GROUP=tile.group,
        REPEAT=tile.repeat,
        ACROSS=across,
        LINE=tile.line,
        PREFETCH=tile.prefetch,
        LINES=triton.next_power_of_2((width + 63) // 64),
        PTX=not INTERPRETED,
        num_warps=tile.warps,
        **pdl.options(out),
    )


def reference_experts_few(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """The same in plain torch, rounding where stock rounds; with everything in fp64 nothing is rounded."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def rounded_to_x(y: torch.Tensor) -> torch.Tensor:
        return y.to(x.dtype).to(wide)

    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for token, chosen in enumerate(topk_ids.tolist()):
        for choice, expert in enumerate(chosen):
            if expert < 0:
                continue
            gate, up = rounded_to_x(w13[expert].to(wide) @ x[token].to(wide)).chunk(2)
            # Not `gelu`: vectorised on some CPUs, it makes NaN of infinity.
            h = rounded_to_x(gate * 0.5 * (1 + torch.erf(gate * 0.5**0.5)) * up)
            factor = topk_weights[token, choice].to(wide)
            out[token] += rounded_to_x(w2[expert].to(wide) @ h * factor)
    return out.to(x.dtype)
