"""Attention of one new token per sequence over its cached keys and values.

For sequence b with L[b] tokens in the cache at slots s = kv_indices[kv_indptr[b] : kv_indptr[b + 1]],
query head h and its KV head j = h // group::

    out[b, h] = sum_t p[t] V[s[t], j],   p = softmax_t(sm_scale * Q[b, h] . K[s[t], j])

Q ``[B, Hq, D]``, K and V ``[slots, Hkv, D]``, bf16 or fp16; D is 256 or 512, the group Hq / Hkv is 1, 2,
4, 8 or 16. Logits, sums and the combination of the splits are fp32, p is rounded to V's dtype for the
second product. A sequence of length 0 gives zeros. A sliding window is what kv_indptr says it is.

The work is cut on the device, from the lengths: every sequence gets so many splits of whole blocks that
about ``target`` programs have equal work, so one captured grid serves any lengths. Sum over the
sequences of ceil(L / chunk) is at most total / chunk + B, which bounds the grid; programs past the last
split leave at once. The scheme of splitting over keys and combining by log-sum-exp is Flash-Decoding's
(Dao, Haziza, Massa, Sizov, 2023). A split that is alone writes the result itself. Of the others, either
the last one to arrive combines (in the order of the splits, so the bits do not depend on who that is),
or a second launch does, where there is too much of it for one program.

Bound: relative error (2-norm) against fp64 no more than stock's and a tenth; stock rounds in the same
places. Which splits there are depends on the whole batch, as it does in stock.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import measured, pdl
from gemma4_turbo.kernels.gpu import gpu
from gemma4_turbo.kernels.interpreted import dot
from gemma4_turbo.kernels.rounding import round_to


class Config(NamedTuple):
    """How the work is cut."""

    block_n: int  # keys a step
    warps: int
    stages: int
    target: int  # programs that shall have work, in tenths of the GPU's multiprocessors
    min_chunk: int  # keys below which a sequence is not split, a multiple of block_n
    keys_first: bool  # keys, not heads, are the rows of the products: 64 keys fill a warp group
    fused: bool  # the last split to arrive combines; else a second launch


HEAD_DIMS = (256, 512)
GROUPS = (1, 2, 4, 8, 16)
DTYPES = (torch.bfloat16, torch.float16)
MAX_BATCH = 1024
LOG2_E = 1.4426950408889634
BLOCK_H = 16  # the narrow side of a tensor core's product
PROCESSORS = 132  # of the GPU that cuts were measured on
TOGETHER = 3 * PROCESSORS  # programs with heads of 256 that run at once there
COMBINE_WIDTH = 128  # elements of a head in one program of the second launch
COMBINE_SPLITS = 32  # splits that such a program loads at once


@triton.jit
def _splits(indptr_ptr, batch, kv_heads, target, min_chunk, BLOCK_B: tl.constexpr):
    """Splits of every sequence, 0 past the last, and how many there are up to and with each."""
    i = tl.arange(0, BLOCK_B)
    begin = tl.load(indptr_ptr + i, mask=i < batch, other=0)
    end = tl.load(indptr_ptr + i + 1, mask=i < batch, other=0)
    total = tl.load(indptr_ptr + batch) - tl.load(indptr_ptr)
    chunk = tl.maximum(tl.cdiv(total * kv_heads, target), min_chunk)
    splits = tl.where(i < batch, tl.maximum(tl.cdiv(end - begin, chunk), 1), 0)
    return i, splits, tl.cumsum(splits, 0)


@triton.jit
def _combine(
    partial_ptr, lse_ptr, count, STRIDE: tl.constexpr, LSE_STRIDE: tl.constexpr, ROWS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Results ``[ROWS, WIDTH]`` of ``count`` splits, the loads of SPLITS of them issued together."""
    s = tl.arange(0, SPLITS)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, count, SPLITS):
        split = first + s
        there = split < count
        lse = tl.load(
            lse_ptr + split[:, None] * LSE_STRIDE + row[None, :],
            mask=there[:, None], other=float("-inf"), cache_modifier=".cg",
        )  # fmt: skip
        x = tl.load(
            partial_ptr + split[:, None, None] * STRIDE + row[None, :, None] * ROW_STRIDE + d[None, None, :],
            mask=there[:, None, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(lse, 0))
        old = tl.exp2(top - higher)
        weight = tl.exp2(lse - higher[None, :])
        acc = acc * old[:, None] + tl.sum(x * weight[:, :, None], 0)
        weight_sum = weight_sum * old + tl.sum(weight, 0)
        top = higher
    return acc / weight_sum[:, None]


@triton.jit(do_not_specialize=["batch", "target", "min_chunk"])
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    indptr_ptr,
    indices_ptr,
    partial_ptr,  # [Hkv, slots, GROUP, DIM] fp32
    lse_ptr,  # [Hkv, slots, GROUP] fp32, base 2
    arrived_ptr,  # [B * Hkv] int32, zeros
    batch,
    target,
    min_chunk,
    logit_scale,  # sm_scale * log2(e)
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_out,
    stride_out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    FUSED: tl.constexpr,
    SPLITS: tl.constexpr,  # that a fused combination loads at once
    PDL: tl.constexpr,
    TRIGGER: tl.constexpr,  # let the next launch, ours or the second one's, start early
    PTX: tl.constexpr,  # False in Triton's interpreter
):
    pdl.launch_dependents(TRIGGER)
    kv_head = tl.program_id(0)
    slot = tl.program_id(1)
    kv_heads = tl.num_programs(0)
    slots = tl.num_programs(1)
    # The lengths and slots come from before the step: reading them needs no wait.
    i, splits, upto = _splits(indptr_ptr, batch, kv_heads, target, min_chunk, BLOCK_B)
    before = (upto <= slot) & (i < batch)
    seq = tl.sum(before.to(tl.int32), 0)
    if seq >= batch:
        return
    first = tl.max(tl.where(before, upto, 0), 0)
    count = tl.sum(tl.where(i == seq, splits, 0), 0)
    begin = tl.load(indptr_ptr + seq)
    length = tl.load(indptr_ptr + seq + 1) - begin
    blocks = tl.cdiv(length, BLOCK_N)
    part = slot - first
    start = part * blocks // count * BLOCK_N
    end = (part + 1) * blocks // count * BLOCK_N

    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, DIM)
    h = tl.arange(0, BLOCK_H)
    # A key past the end repeats the last one: cheaper than a mask on every load.
    indices_ptr += begin
    k_ptr += kv_head * stride_k_head
    v_ptr += kv_head * stride_v_head
    at = tl.load(indices_ptr + tl.minimum(start + n, length - 1), mask=length > 0, other=0)
    if PDL:
        line = tl.arange(0, DIM // 64) * 64
        pdl.prefetch(k_ptr + at[:, None].to(tl.int64) * stride_k + line[None, :])
        pdl.prefetch(v_ptr + at[:, None].to(tl.int64) * stride_v + line[None, :])
        pdl.wait(PDL)
    q = tl.load(
        q_ptr + seq * stride_q + (kv_head * GROUP + h[:, None]) * stride_q_head + d[None, :],
        mask=h[:, None] < GROUP,
        other=0.0,
    )
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_H], tl.float32)
    if KEYS_FIRST:
        acc = tl.zeros([DIM, BLOCK_H], tl.float32)
        q = tl.trans(q)
    else:
        acc = tl.zeros([BLOCK_H, DIM], tl.float32)
    for position in range(start, end, BLOCK_N):
        row = at[:, None].to(tl.int64)
        k = tl.load(k_ptr + row * stride_k + d[None, :])
        v = tl.load(v_ptr + row * stride_v + d[None, :])
        # The next block's slots, a block ahead of the loads that need them.
        at = tl.load(indices_ptr + tl.minimum(position + BLOCK_N + n, length - 1))
        there = position + n < length
        if KEYS_FIRST:
            logits = dot(k, q, tl.zeros([BLOCK_N, BLOCK_H], tl.float32), PTX) * logit_scale
            logits = tl.where(there[:, None], logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 0))
            old = tl.exp2(top - higher)
            p = tl.exp2(logits - higher[None, :])
            weight_sum = weight_sum * old + tl.sum(p, 0)
            acc = dot(tl.trans(v), round_to(p, dtype, PTX), acc * old[None, :], PTX)
        else:
            logits = dot(q, tl.trans(k), tl.zeros([BLOCK_H, BLOCK_N], tl.float32), PTX)
            logits = tl.where(there[None, :], logits * logit_scale, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            old = tl.exp2(top - higher)
            p = tl.exp2(logits - higher[:, None])
            weight_sum = weight_sum * old + tl.sum(p, 1)
            acc = dot(round_to(p, dtype, PTX), v, acc * old[:, None], PTX)
        top = higher

    share = tl.where(length > 0, 1.0 / weight_sum, 0.0)
    out_ptr += seq * stride_out + kv_head * GROUP * stride_out_head
    if KEYS_FIRST:
        acc *= share[None, :]
        place, inside = h[None, :] * DIM + d[:, None], h[None, :] < GROUP
        target_ptr = out_ptr + h[None, :] * stride_out_head + d[:, None]
    else:
        acc *= share[:, None]
        place, inside = h[:, None] * DIM + d[None, :], h[:, None] < GROUP
        target_ptr = out_ptr + h[:, None] * stride_out_head + d[None, :]
    if count == 1:
        tl.store(target_ptr, round_to(acc, out_ptr.dtype.element_ty, PTX), mask=inside)
        return
    item = kv_head * slots + slot
    partial = partial_ptr + item.to(tl.int64) * (GROUP * DIM)
    tl.store(partial + place, acc, mask=inside)
    tl.store(lse_ptr + item * GROUP + h, top + tl.log2(weight_sum), mask=h < GROUP)
    if FUSED:
        tl.debug_barrier()
        arrived_ptr += seq * kv_heads + kv_head
        others = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
        if others == count - 1:
            tl.store(arrived_ptr, 0)  # for the next launch
            item -= part
            result = _combine(
                partial_ptr + item.to(tl.int64) * (GROUP * DIM), lse_ptr + item * GROUP, count,
                GROUP * DIM, GROUP, GROUP, DIM, DIM, SPLITS,
            )  # fmt: skip
            g = tl.arange(0, GROUP)
            tl.store(
                out_ptr + g[:, None] * stride_out_head + d[None, :],
                round_to(result, out_ptr.dtype.element_ty, PTX),
            )


@triton.jit(do_not_specialize=["batch", "target", "min_chunk", "slots"])
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    indptr_ptr,
    batch,
    target,
    min_chunk,
    slots,
    stride_out,
    stride_out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
    TRIGGER: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(TRIGGER)
    head = tl.program_id(0)
    seq = tl.program_id(1)
    column = tl.program_id(2) * WIDTH
    kv_heads = tl.num_programs(0) // GROUP
    i, splits, upto = _splits(indptr_ptr, batch, kv_heads, target, min_chunk, BLOCK_B)
    count = tl.sum(tl.where(i == seq, splits, 0), 0)
    # Also where there is nothing to do: this launch must not end before the first one has.
    pdl.wait(PDL)
    if count > 1:
        first = tl.sum(tl.where(i == seq, upto - splits, 0), 0)
        item = head // GROUP * slots + first
        row = item.to(tl.int64) * GROUP + head % GROUP
        result = _combine(
            partial_ptr + row * DIM + column, lse_ptr + row, count,
            GROUP * DIM, GROUP, 1, DIM, WIDTH, SPLITS,
        )  # fmt: skip
        d = column + tl.arange(0, WIDTH)
        out_ptr += seq * stride_out + head * stride_out_head
        tl.store(out_ptr + d[None, :], round_to(result, out_ptr.dtype.element_ty, PTX))


INTERPRETED = not isinstance(_decode_attention_kernel, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def unfit(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
) -> str | None:
    """Why `decode_attention` does not take these arguments, or None. Host checks only."""
    if q.dim() != 3 or q.stride(2) != 1 or q.dtype not in DTYPES:
        return f"q must be [B, Hq, D] bf16 or fp16 with contiguous heads, got {tuple(q.shape)} {q.dtype}"
    batch, heads, dim = q.shape
    if dim not in HEAD_DIMS:
        return f"q must have heads of 256 or 512, got {dim}"
    if batch > MAX_BATCH:
        return f"q must have at most {MAX_BATCH} rows, got {batch}"
    for name, buffer in (("k_buffer", k_buffer), ("v_buffer", v_buffer)):
        if buffer.dim() != 3 or buffer.shape[2] != dim or buffer.stride(2) != 1:
            return f"{name} must be [slots, Hkv, {dim}] with contiguous heads, got {tuple(buffer.shape)}"
        if buffer.dtype != q.dtype or buffer.device != q.device:
            return f"{name} is {buffer.dtype} on {buffer.device}, q {q.dtype} on {q.device}"
        if buffer.stride(0) % 8 or buffer.stride(1) % 8 or buffer.data_ptr() % 16:
            return f"{name} must be aligned to 16 bytes"
    kv_heads = k_buffer.shape[1]
    if v_buffer.shape[1] != kv_heads or heads % kv_heads or heads // kv_heads not in GROUPS:
        return f"k_buffer must have Hkv of v_buffer, Hq / Hkv in {GROUPS}, got {heads} and {kv_heads}, {v_buffer.shape[1]}"
    row = measured_row(batch, kv_heads, heads // kv_heads, dim, q.device)
    reason = None if INTERPRETED else measured.unfit("q", q.device, row)
    if reason is not None:
        return reason
    if q.stride(0) % 8 or q.stride(1) % 8 or q.data_ptr() % 16:
        return "q must be aligned to 16 bytes"
    for name, vector, dtypes in (
        ("kv_indptr", kv_indptr, (torch.int32,)),
        ("kv_indices", kv_indices, (torch.int64, torch.int32)),
    ):
        if vector.dim() != 1 or vector.dtype not in dtypes or not vector.is_contiguous():
            return f"{name} must be a contiguous vector of {dtypes}, got {tuple(vector.shape)} {vector.dtype}"
        if vector.device != q.device:
            return f"{name} is on {vector.device}, q on {q.device}"
    if kv_indptr.shape[0] < batch + 1:
        return f"kv_indptr must have at least {batch + 1} elements, got {kv_indptr.shape[0]}"
    return None


def choose(batch: int, kv_heads: int, group: int, head_dim: int) -> Config:
    """A cut for a batch: so many programs that all of them are on the GPU at once.

    Three fit on a multiprocessor with heads of 256, two with heads of 512; the splits of a sequence are
    rounded up, so there are more than ``target``, up to one for each pair of a sequence and a KV head.
    The last split combines while what it has to add is small; with few sequences of few KV heads each
    has many splits, and a second launch shares the work.
    """
    pairs = max(1, batch * kv_heads)
    if head_dim == 256:
        # A sequence and a KV head a program, once these fill the GPU: splits would leave a tail.
        target = 10 if pairs >= 128 else 20
        parts = rounds_least(pairs) if pairs > TOGETHER else 1
        # Not a second round for the few that did not fit. Where nothing is split the target stays low:
        # the grid has a program for each that is wanted beyond the pairs, which would cost a round.
        if parts > 1:
            target = triton.cdiv(10 * pairs * parts, PROCESSORS)
        config = Config(32, 4, 3, target, 64 if pairs < 32 else 128, False, True)
    elif pairs < 32:
        # Few sequences of few KV heads: short splits, so that a short sequence gets enough of them.
        config = Config(16, 4, 3, 30, 64, False, True)
    else:
        config = Config(32, 4, 2, 30, 128, False, True)
    splits = max(1, config.target * PROCESSORS // (10 * pairs))
    # 32 thousand numbers: 128 KiB, which one program adds in about 2 microseconds.
    return config._replace(fused=splits * group * head_dim <= 32768)


def tile_of(numbers: tuple[int, ...]) -> Config:
    """A cut from a profile's numbers; ValueError if it is none."""
    measured.require(len(numbers) == len(Config._fields), numbers)
    block_n, warps, stages, target, min_chunk, keys_first, fused = numbers
    measured.require(
        measured.power(block_n, 16, 128)
        and measured.power(warps, 1, 16)
        and 1 <= stages <= 8
        and 1 <= target <= 500  # partial sums take memory
        and block_n <= min_chunk <= 1 << 16
        and min_chunk % block_n == 0
        and {keys_first, fused} <= {0, 1},
        numbers,
    )
    return Config(block_n, warps, stages, target, min_chunk, bool(keys_first), bool(fused))


def measured_row(
    batch: int, kv_heads: int, group: int, head_dim: int, device: torch.device
) -> measured.Row[Config] | None:
    """What was measured on this GPU with the closest number of pairs; None if nothing was."""
    pairs = batch * kv_heads
    return measured.nearest("decode_attention", device, (head_dim, group), pairs, tile_of)


def runs_here(batch: int, kv_heads: int, group: int, head_dim: int, device: str) -> bool:
    """Whether the kernel runs such a batch on a device."""
    place = torch.empty(0, device=device).device
    row = measured_row(batch, kv_heads, group, head_dim, place)
    return INTERPRETED or measured.unfit("q", place, row) is None


def cut(batch: int, kv_heads: int, group: int, head_dim: int, device: torch.device) -> Config:
    """The cut for a batch on a GPU: the measured one, or what `choose` has for it."""
    row = measured_row(batch, kv_heads, group, head_dim, device)
    if row is not None and row.tile is not None:
        return row.tile
    return choose(batch, kv_heads, group, head_dim)


def rounds_least(pairs: int) -> int:
    """Splits of each pair, up to three, with which the rounds of programs take the least time.

    A round of programs takes 1 / splits of what one with whole pairs takes, and a tenth more for each
    further split, which has to be added. That tenth is an assumption.
    """

    def time(splits: int) -> float:
        return triton.cdiv(pairs * splits, TOGETHER) / splits * (1 + (splits - 1) / 10)

    return min((1, 2, 3), key=time)


def slots(
    batch: int, kv_heads: int, config: Config, device: torch.device, longest: int | None
) -> int:
    """Programs per KV head: no lengths need more. See the module's docstring."""
    wanted = batch + triton.cdiv(target_programs(config, device), kv_heads)
    if longest is None:
        return wanted
    return min(wanted, batch * max(1, triton.cdiv(longest, config.min_chunk)))


def target_programs(config: Config, device: torch.device) -> int:
    """Programs that shall have work."""
    return max(1, config.target * gpu(device).processors // 10)


def decode_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    config: Config | None = None,
    longest: int | None = None,
    arrived: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation of this module.

    Args:
        q: ``[B, Hq, D]``, B up to `MAX_BATCH`, may be 0.
        k_buffer: ``[slots, Hkv, D]``, any strides over slots and heads that keep 16 bytes aligned.
        v_buffer: as ``k_buffer``.
        kv_indptr: ``[B + 1]`` or longer, int32, not decreasing, starting at 0.
        kv_indices: int64 or int32, at least ``kv_indptr[B]`` long, slots in any order.
        sm_scale: factor of the logits.
        config: how the work is cut; None: `choose`.
        longest: no sequence has more tokens, now or at any replay of a graph; None: unknown.
        arrived: zeros, int32, at least ``B * Hkv`` long; left as zeros. No two launches that may run at
            the same time share one. None: made here.
        out: written to; None: made here.

    Returns:
        ``[B, Hq, D]`` in q's dtype.

    Raises:
        ValueError: naming the argument.
    """
    reason = unfit(q, k_buffer, v_buffer, kv_indptr, kv_indices)
    if reason is not None:
        raise ValueError(reason)
    batch, heads, dim = q.shape
    kv_heads = k_buffer.shape[1]
    if config is None:
        config = cut(batch, kv_heads, heads // kv_heads, dim, q.device)
    if config.block_n not in (16, 32, 64, 128):
        raise ValueError(f"config.block_n must be 16, 32, 64 or 128, got {config.block_n}")
    if config.min_chunk < config.block_n or config.min_chunk % config.block_n:
        raise ValueError(
            f"config.min_chunk must be a multiple of {config.block_n}, got {config.min_chunk}"
        )
    if longest is not None and longest < 0:
        raise ValueError(f"longest must not be negative, got {longest}")
    if arrived is not None and (arrived.dtype != torch.int32 or arrived.numel() < batch * kv_heads):
        raise ValueError(
            f"arrived must be int32 with at least {batch * kv_heads} elements, got {arrived.numel()} {arrived.dtype}"
        )
    if out is not None and (
        out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1 or out.device != q.device
    ):
        raise ValueError(f"out must be {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)}")
    if arrived is None:
        arrived = torch.zeros(batch * kv_heads, dtype=torch.int32, device=q.device)
    if out is None:
        out = torch.empty_like(q)
    launch_decode_attention(
        q, k_buffer, v_buffer, kv_indptr, kv_indices, sm_scale, config, longest, arrived, out
    )
    return out


def launch_decode_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
    config: Config,
    longest: int | None,
    arrived: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`decode_attention` without its checks."""
    batch, heads, dim = q.shape
    kv_heads = k_buffer.shape[1]
    group = heads // kv_heads
    if batch == 0:
        return
    per_head = slots(batch, kv_heads, config, q.device, longest)
    target = target_programs(config, q.device)
    split = per_head > batch
    second = split and not config.fused
    partial = lse = out
    if split:
        items = kv_heads * per_head * group
        partial = torch.empty(items * dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(items, dtype=torch.float32, device=q.device)
    block_b = max(32, triton.next_power_of_2(batch))  # few variants to compile
    options = pdl.options(q)
    early = second and pdl.supported(q.device)
    _decode_attention_kernel[(kv_heads, per_head)](
        q,
        k_buffer,
        v_buffer,
        out,
        kv_indptr,
        kv_indices,
        partial,
        lse,
        arrived,
        batch,
        target,
        config.min_chunk,
        sm_scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        k_buffer.stride(0),
        k_buffer.stride(1),
        v_buffer.stride(0),
        v_buffer.stride(1),
        out.stride(0),
        out.stride(1),
        GROUP=group,
        DIM=dim,
        BLOCK_N=config.block_n,
        BLOCK_H=BLOCK_H,
        BLOCK_B=block_b,
        KEYS_FIRST=config.keys_first,
        FUSED=config.fused,
        SPLITS=max(1, min(16, 8192 // (group * dim))),
        TRIGGER=early or options["PDL"],
        PTX=not INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
        **options,
    )
    if second:
        _combine_kernel[(heads, batch, dim // COMBINE_WIDTH)](
            partial,
            lse,
            out,
            kv_indptr,
            batch,
            target,
            config.min_chunk,
            per_head,
            out.stride(0),
            out.stride(1),
            GROUP=group,
            DIM=dim,
            WIDTH=COMBINE_WIDTH,
            BLOCK_B=block_b,
            SPLITS=COMBINE_SPLITS,
            TRIGGER=options["PDL"],
            PTX=not INTERPRETED,
            PDL=early,
            num_warps=4,
            **({"launch_pdl": True} if early else {}),
        )


def reference_decode_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """The equation in plain torch, in the arguments' dtype but for bf16 and fp16: fp32, rounded once."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k_buffer.shape[1]
    out = torch.zeros_like(q)
    bounds = kv_indptr.tolist()
    for row in range(q.shape[0]):
        at = kv_indices[bounds[row] : bounds[row + 1]].long()
        if at.numel() == 0:
            continue
        k = k_buffer[at].to(wide).repeat_interleave(group, 1)
        v = v_buffer[at].to(wide).repeat_interleave(group, 1)
        logits = torch.einsum("hd,thd->ht", q[row].to(wide), k) * sm_scale
        out[row] = torch.einsum("ht,thd->hd", logits.softmax(-1), v).to(q.dtype)
    return out
