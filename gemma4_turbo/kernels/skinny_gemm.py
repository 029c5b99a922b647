"""Linear layers for a few tokens: ``[M, K] x [N, K]^T`` with M <= 64, bound by reading the weight.

With x the activations and W the weight, all bf16 or fp16, sums in fp32::

    out[m, n] = round(sum_k x[m, k] W[n, k])                                  # Epilogue.NONE
    out[m, n] = round(gelu_tanh(round(g)) * round(u)),  g and u the sums of    # Epilogue.GELU_AND_MUL
                rows n and n + N / 2
    out[m, n] = round(round(gelu_tanh(round(sum))) * extra[m, n])             # Epilogue.GELU_TIMES

A program streams BLOCK_N rows of W through shared memory; the M tokens are the narrow side of the
matrix product. Where N alone gives too few programs, K is split: each program leaves its partial sums,
and the last one to arrive adds them in the order of K, so that the result does not depend on who that
was. Stock's order of addition is cuBLAS's, which is not known: `tolerance`, half an ulp of the result
and fp32's error of a sum of K terms, the same bound that cuBLAS keeps.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import measured, pdl
from gemma4_turbo.kernels.gelu import gelu_tanh
from gemma4_turbo.kernels.gpu import gpu
from gemma4_turbo.kernels.interpreted import dot
from gemma4_turbo.kernels.rounding import round_to, rounded


class Epilogue(enum.IntEnum):
    """What happens to the sums."""

    NONE = 0
    GELU_AND_MUL = 1
    GELU_TIMES = 2


class Config(NamedTuple):
    """How the work is cut."""

    block_n: int
    block_k: int
    split: int  # of K
    stages: int
    warps: int = 4


ROWS = (16, 32, 64)
"""What a compiled kernel has room for: x with fewer rows takes the first that suffices."""
MAX_ROWS = ROWS[-1]
PREFETCH_BLOCKS = 4
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _finish(
    sums, others, extra_ptr, out_ptr, m, n, inside, stride_extra, stride_out,
    EPILOGUE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if EPILOGUE == 1:
        y = gelu_tanh(rounded(sums, dtype, PTX), PTX) * rounded(others, dtype, PTX)
    elif EPILOGUE == 2:
        extra = tl.load(extra_ptr + m * stride_extra + n, mask=inside, other=0.0)
        y = rounded(gelu_tanh(rounded(sums, dtype, PTX), PTX), dtype, PTX) * extra.to(tl.float32)
    else:
        y = sums
    tl.store(out_ptr + m * stride_out + n, round_to(y, dtype, PTX), mask=inside)


# Every batch size would otherwise compile anew at the start of a server.
@triton.jit(do_not_specialize=["M", "K_BLOCKS", "split", "ahead"])
def _skinny_gemm_kernel(
    x_ptr,
    weight_ptr,
    extra_ptr,
    out_ptr,
    partial_ptr,
    arrived_ptr,
    M,
    N,  # of the result
    K_BLOCKS,
    stride_x,
    stride_weight,
    stride_extra,
    stride_out,
    split,
    ahead,  # blocks of W to fetch into the L2 cache while waiting
    EPILOGUE: tl.constexpr,
    SPLIT: tl.constexpr,  # split > 1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter
):
    pdl.launch_dependents(PDL)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    first = part * K_BLOCKS // split
    last = (part + 1) * K_BLOCKS // split
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # A row past the end repeats the last one: cheaper than a mask on every load of the weight.
    row = tl.minimum(n, N - 1).to(tl.int64)
    w_ptr = weight_ptr + row[:, None] * stride_weight + first * BLOCK_K + k[None, :]
    x_ptr = x_ptr + m[None, :] * stride_x + first * BLOCK_K + k[:, None]
    if PDL:
        # One address per cache line of 64 numbers.
        line = tl.arange(0, BLOCK_K // 64) * 64
        lines = weight_ptr + row[:, None] * stride_weight + first * BLOCK_K + line[None, :]
        for _ in range(0, tl.minimum(ahead, last - first)):
            pdl.prefetch(lines)
            if EPILOGUE == 1:
                pdl.prefetch(lines + N.to(tl.int64) * stride_weight)
            lines += BLOCK_K
        pdl.wait(PDL)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    others = sums
    for _ in range(first, last):
        x = tl.load(x_ptr, mask=m[None, :] < M, other=0.0)
        w = tl.load(w_ptr)
        sums = dot(w, x, sums, PTX)
        if EPILOGUE == 1:
            w = tl.load(w_ptr + N.to(tl.int64) * stride_weight)
            others = dot(w, x, others, PTX)
        w_ptr += BLOCK_K
        x_ptr += BLOCK_K

    inside = (n[:, None] < N) & (m[None, :] < M)
    if SPLIT:
        AREA: tl.constexpr = BLOCK_N * BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        HALVES: tl.constexpr = 2 if EPILOGUE == 1 else 1
        mine = partial_ptr + (tile * split + part) * HALVES * AREA
        tl.store(mine + at, sums)
        if EPILOGUE == 1:
            tl.store(mine + AREA + at, others)
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if before == split - 1:
            tl.store(arrived_ptr + tile, 0)  # for the next launch
            mine = partial_ptr + tile * split * HALVES * AREA
            sums = tl.load(mine + at, cache_modifier=".cg")
            if EPILOGUE == 1:
                others = tl.load(mine + AREA + at, cache_modifier=".cg")
            for i in range(1, split):
                other = mine + i * HALVES * AREA
                sums += tl.load(other + at, cache_modifier=".cg")
                if EPILOGUE == 1:
                    others += tl.load(other + AREA + at, cache_modifier=".cg")
            _finish(
                sums, others, extra_ptr, out_ptr, m[None, :], n[:, None], inside, stride_extra,
                stride_out, EPILOGUE, PTX,
            )  # fmt: skip
    else:
        _finish(
            sums, others, extra_ptr, out_ptr, m[None, :], n[:, None], inside, stride_extra,
            stride_out, EPILOGUE, PTX,
        )  # fmt: skip


INTERPRETED = not isinstance(_skinny_gemm_kernel, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def unfit(
    x: torch.Tensor, weight: torch.Tensor, epilogue: Epilogue, extra: torch.Tensor | None = None
) -> str | None:
    """Why `skinny_gemm` does not take these arguments, or None. Host checks only."""
    if weight.dim() != 2 or weight.stride(1) != 1 or weight.dtype not in DTYPES:
        return f"weight must be [N, K] bf16 or fp16 with contiguous rows, got {tuple(weight.shape)} {weight.dtype}"
    if weight.shape[1] % 64 or weight.shape[0] % 16:
        return f"weight must be [multiple of 16, multiple of 64], got {tuple(weight.shape)}"
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] != weight.shape[1]:
        return f"x must be [M, {weight.shape[1]}] with contiguous rows, got {tuple(x.shape)}"
    if x.dtype != weight.dtype or x.device != weight.device:
        return f"x is {x.dtype} on {x.device}, the weight {weight.dtype} on {weight.device}"
    if x.shape[0] > MAX_ROWS:
        return f"x must have at most {MAX_ROWS} rows, got {x.shape[0]}"
    reason = unfit_here(weight, epilogue, x.shape[0])
    if reason is not None:
        return reason
    if x.stride(0) % 8 or weight.stride(0) % 8 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return "x and weight must be aligned to 16 bytes"
    if (extra is None) != (epilogue != Epilogue.GELU_TIMES):
        return "extra must be given with Epilogue.GELU_TIMES and only then"
    if extra is not None and (
        extra.shape != (x.shape[0], weight.shape[0])
        or extra.stride(1) != 1
        or extra.dtype != x.dtype
        or extra.device != x.device
    ):
        return f"extra must be [{x.shape[0]}, {weight.shape[0]}] {x.dtype}, got {tuple(extra.shape)} {extra.dtype}"
    return None


def tiles(weight: torch.Tensor, epilogue: Epilogue, config: Config) -> int:
    """Programs along N: the length of ``arrived``."""
    width = weight.shape[0] // (2 if epilogue == Epilogue.GELU_AND_MUL else 1)
    return (width + config.block_n - 1) // config.block_n  # `triton.cdiv` takes ten times as long


FEW_ROWS = ROWS[0]
"""`choose` distinguishes up to so many rows from more."""


def choose(
    shape: tuple[int, ...],
    epilogue: Epilogue,
    processors: int,
    rows: int = FEW_ROWS,
    shared_memory: int = 227 * 1024,
) -> Config:
    """A cut for a weight of this shape ``(N, K)``: what was best over the models' layers, as a rule.

    Args:
        shape: of the weight.
        epilogue: what happens to the sums.
        processors: of the GPU.
        rows: M. The number of `tiles` does not depend on it.
        shared_memory: bytes that a CTA may have; what is not there are stages.
    """
    width = shape[0] // (2 if epilogue == Epilogue.GELU_AND_MUL else 1)
    depth = shape[1]
    block_k = 128 if depth % 128 == 0 else 64
    block_n = 16 if width < 1024 else 32 if depth <= 256 else 64
    split = round(0.8 * processors / triton.cdiv(width, block_n))
    stages = 6
    if epilogue == Epilogue.GELU_AND_MUL:
        stages = 3
        if rows > FEW_ROWS:  # more rows of x need shared memory, of which the weight has two tiles
            block_k, stages = 64, 4
    halves = 2 if epilogue == Epilogue.GELU_AND_MUL else 1
    tile = FEW_ROWS if rows <= FEW_ROWS else MAX_ROWS
    stage = 2 * block_k * (halves * block_n + tile)  # of the weight and of x, two bytes each
    stages = max(2, min(stages, shared_memory // stage))
    return Config(block_n, block_k, max(1, min(split, depth // block_k)), stages)


def tile_of(numbers: tuple[int, ...]) -> Config:
    """A cut from a profile's numbers; ValueError if it is none."""
    measured.require(len(numbers) == len(Config._fields), numbers)
    config = Config(*numbers)
    fits = measured.power(config.block_n, 16, 256) and measured.power(config.block_k, 64, 256)
    counts = 1 <= config.split <= 64 and 1 <= config.stages <= 8
    measured.require(fits and counts and measured.power(config.warps, 1, 16), numbers)
    return config


def room(rows: int) -> int:
    """The one of `ROWS` for a number of rows, up to `MAX_ROWS`."""
    few, more, most = ROWS
    return few if rows <= few else more if rows <= more else most


def place(shape: tuple[int, ...], epilogue: Epilogue, rows: int) -> tuple[int, ...]:
    """How a profile spells a weight ``(N, K)`` and a number of rows: one of `ROWS`."""
    return *shape, int(epilogue), room(rows)


def measured_row(
    shape: tuple[int, ...], epilogue: Epilogue, rows: int, device: torch.device
) -> measured.Row[Config] | None:
    """What was measured of a weight on this GPU; None if nothing was."""
    where = place(shape, epilogue, rows)
    row = measured.look("skinny_gemm", device, where, tile_of)
    if row is not None and row.tile is not None:
        blocks, left = divmod(shape[1], row.tile.block_k)
        if left or row.tile.split > blocks:
            measured.refused("skinny_gemm", where, f"K cannot be cut so: {list(row.tile)}")
            return None
    return row


def unfit_here(weight: torch.Tensor, epilogue: Epilogue, rows: int) -> str | None:
    """Why the kernel does not run for a weight and so many rows on the weight's GPU, or None."""
    if INTERPRETED:
        return None
    device = weight.device
    return measured.unfit("x", device, measured_row(weight.shape, epilogue, rows, device))


def cut(weight: torch.Tensor, epilogue: Epilogue, rows: int = FEW_ROWS) -> Config:
    """The cut for a weight on its GPU: the measured one, or what `choose` has for it."""
    row = measured_row(weight.shape, epilogue, rows, weight.device)
    if row is not None and row.tile is not None:
        return row.tile
    here = gpu(weight.device)
    return choose(weight.shape, epilogue, here.processors, rows, here.shared_memory)


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    config: Config,
    epilogue: Epilogue = Epilogue.NONE,
    extra: torch.Tensor | None = None,
    arrived: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equations of this module.

    Args:
        x: ``[M, K]``, bf16 or fp16, contiguous rows, M up to `MAX_ROWS`, may be 0.
        weight: ``[N, K]`` in the same dtype.
        config: how the work is cut; ``block_k`` divides K.
        epilogue: what happens to the sums.
        extra: ``[M, N]`` for `Epilogue.GELU_TIMES`.
        arrived: zeros, int32, at least `tiles` long; left as zeros. No two launches that may run at the
            same time share one. None: made here.

    Returns:
        ``[M, N]``, ``[M, N / 2]`` for `Epilogue.GELU_AND_MUL`.

    Raises:
        ValueError: naming the argument.
    """
    reason = unfit(x, weight, epilogue, extra)
    if reason is None and weight.shape[1] % config.block_k:
        reason = f"config.block_k must divide {weight.shape[1]}, got {config.block_k}"
    if reason is None and not 1 <= config.split <= weight.shape[1] // config.block_k:
        reason = f"config.split must be between 1 and the blocks of K, got {config.split}"
    count = tiles(weight, epilogue, config)
    if reason is None and arrived is not None and arrived.numel() < count:
        reason = f"arrived must have at least {count} elements, got {arrived.numel()}"
    if reason is not None:
        raise ValueError(reason)
    if arrived is None:
        arrived = torch.zeros(count, dtype=torch.int32, device=x.device)
    return launch_skinny_gemm(x, weight, config, epilogue, extra, arrived)


def launch_skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    config: Config,
    epilogue: Epilogue,
    extra: torch.Tensor | None,
    arrived: torch.Tensor,
) -> torch.Tensor:
    """`skinny_gemm` without its checks."""
    rows, depth = x.shape
    halves = 2 if epilogue == Epilogue.GELU_AND_MUL else 1
    width = weight.shape[0] // halves
    out = x.new_empty((rows, width))
    if rows == 0:
        return out
    block_m = room(rows)
    count = (width + config.block_n - 1) // config.block_n
    partial = out
    if config.split > 1:
        elements = count * config.split * halves * config.block_n * block_m
        partial = torch.empty(elements, dtype=torch.float32, device=x.device)
    _skinny_gemm_kernel[(count, config.split)](
        x,
        weight,
        out if extra is None else extra,
        out,
        partial,
        arrived,
        rows,
        width,
        depth // config.block_k,
        x.stride(0),
        weight.stride(0),
        0 if extra is None else extra.stride(0),
        width,
        config.split,
        PREFETCH_BLOCKS,
        EPILOGUE=int(epilogue),
        SPLIT=config.split > 1,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PTX=not INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        **pdl.options(x),
    )
    return out


def reference_skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    epilogue: Epilogue = Epilogue.NONE,
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stock's calls in plain torch, rounding where they round."""
    y = torch.nn.functional.linear(x, weight)
    if epilogue == Epilogue.GELU_AND_MUL:
        wide = y if y.dtype == torch.float64 else y.float()
        gate, up = wide.chunk(2, dim=-1)
        return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(x.dtype)
    if epilogue == Epilogue.GELU_TIMES:
        assert extra is not None
        return torch.nn.functional.gelu(y, approximate="tanh") * extra
    return y
