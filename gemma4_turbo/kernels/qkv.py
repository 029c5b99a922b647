"""Norm, rotation and KV store between the QKV projection and attention, with the bits of stock's calls.

One program per (token, head), with many tokens per (token, up to four heads). With ``x`` one head of one token, D = head_dim, h = D / 2, c and s the
rows of the cosine/sine cache at the token's position::

    n        = round(x * rsqrt(mean(x * x) + eps) * weight)          # V: without weight
    out[:h]  = round(n[:h] * c - n[h:] * s)                          # ROPE; Q and K only
    out[h:]  = round(n[:h] * s + n[h:] * c)
    k_cache[location] = out of K;  v_cache[location] = n of V        # STORE

Stock needs three launches (norm, rope, store), four on KV-shared layers. The sum follows stock's
Triton kernel (sglang/srt/layers/gemma4_fused_ops.py): a 1-D block of D over four warps. The
rotation follows sglang/jit_kernel/csrc/elementwise/rope.cuh as nvcc contracts it: the product with the
cosine is the fused one.

The three projection modes: a layer with its own K and V (`Mode.QKV`), one whose V is its K before the
norms (`Mode.QK`: one read of K gives both), one that shares another layer's KV (`Mode.Q`).
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.rounding import round_to, rounded

INTERPRETED = norms.INTERPRETED


class Mode(enum.IntEnum):
    """What a layer projects."""

    Q = 0
    QK = 1
    QKV = 2


@triton.jit
def _rotate(x, other, c, s, first, PTX: tl.constexpr):
    # In the first half other is the second half's element, and the other way round. Which product
    # is fused is nvcc's choice for stock's kernel: of the four ways, the one without a differing bit.
    if PTX:
        lower = tl.fma(x, c, (other * s) * -1.0)  # Triton's minus is 0 - x, which loses -0
        upper = tl.fma(x, c, other * s)
        return tl.where(first, lower, upper)
    else:
        return tl.where(first, x * c - other * s, other * s + x * c)


@triton.jit
def _heads(
    x_ptr,
    weight_ptr,
    out_ptr,
    cache_ptr,
    v_out_ptr,
    v_cache_ptr,
    positions_ptr,
    cos_sin_ptr,
    locations_ptr,
    stride,
    stride_out,
    stride_cache,
    stride_v_out,
    stride_v_cache,
    token,
    block,
    eps,
    D: tl.constexpr,
    PER: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROPE: tl.constexpr,
    STORE: tl.constexpr,
    SKIPPED: tl.constexpr,
    ALSO_V: tl.constexpr,
    PTX: tl.constexpr,
):
    """Heads ``block * PER`` to ``block * PER + PER - 1`` of a token."""
    column = tl.arange(0, D)
    HALF: tl.constexpr = D // 2
    partner = (column + HALF) % D
    # All loads first: with many tokens what counts is how much of them is in flight.
    row = x_ptr + token * stride + block * (PER * D)
    raws = ()
    others = ()
    for i in tl.static_range(PER):
        raws = raws + (tl.load(row + i * D + column),)
        if ROPE:
            others = others + (tl.load(row + i * D + partner),)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if WEIGHT:
        weight = tl.load(weight_ptr + column).to(tl.float32)
    if ROPE:
        partner_weight = tl.load(weight_ptr + partner).to(tl.float32)
        position = tl.load(positions_ptr + token).to(tl.int64)
        angle = column % HALF
        c = tl.load(cos_sin_ptr + position * D + angle)
        s = tl.load(cos_sin_ptr + position * D + HALF + angle)
        # Every lane has read a neighbour's element of what may be overwritten below.
        tl.debug_barrier()
    if STORE:
        location = tl.load(locations_ptr + token).to(tl.int64)
    for i in tl.static_range(PER):
        x = raws[i].to(tl.float32)
        rrms = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        n = x * rrms
        if WEIGHT:
            n = n * weight
        n = rounded(n, dtype, PTX)
        if ROPE:
            other = others[i].to(tl.float32)
            other = rounded(other * rrms * partner_weight, dtype, PTX)
            n = _rotate(n, other, c, s, column < HALF, PTX)
        y = round_to(n, dtype, PTX)
        at = (block * PER + i) * D + column
        if STORE and SKIPPED is None:
            tl.store(cache_ptr + location * stride_cache + at, y)
        elif STORE:
            tl.store(cache_ptr + location * stride_cache + at, y, mask=location != SKIPPED)
        else:
            tl.store(out_ptr + token * stride_out + at, y)
        if ALSO_V:
            v = round_to(x * rrms, dtype, PTX)
            if STORE and SKIPPED is None:
                tl.store(v_cache_ptr + location * stride_v_cache + at, v)
            elif STORE:
                tl.store(v_cache_ptr + location * stride_v_cache + at, v, mask=location != SKIPPED)
            else:
                tl.store(v_out_ptr + token * stride_v_out + at, v)


@triton.jit
def _qkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    positions_ptr,
    cos_sin_ptr,
    locations_ptr,
    k_cache_ptr,
    v_cache_ptr,
    v_out_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_v_out,
    stride_k_cache,
    stride_v_cache,
    eps,
    Q_BLOCKS: tl.constexpr,
    KV_BLOCKS: tl.constexpr,
    Q_PER: tl.constexpr,
    KV_PER: tl.constexpr,
    D: tl.constexpr,
    MODE: tl.constexpr,
    ROPE: tl.constexpr,
    STORE: tl.constexpr,
    SKIPPED: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,
):
    pdl.launch_dependents(PDL)
    pdl.wait(PDL)
    # Each branch forms its own addresses: a pointer chosen by a branch loses its alignment, and with
    # it the order in which Triton adds.
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if block < Q_BLOCKS:
        _heads(
            q_ptr, q_weight_ptr, q_ptr, q_ptr, q_ptr, q_ptr, positions_ptr, cos_sin_ptr,
            locations_ptr, stride_q, stride_q, 0, 0, 0, token, block, eps,
            D, Q_PER, True, ROPE, False, None, False, PTX,
        )  # fmt: skip
    elif block < Q_BLOCKS + KV_BLOCKS:
        _heads(
            k_ptr, k_weight_ptr, k_ptr, k_cache_ptr, v_out_ptr, v_cache_ptr, positions_ptr,
            cos_sin_ptr, locations_ptr, stride_k, stride_k, stride_k_cache, stride_v_out,
            stride_v_cache, token, block - Q_BLOCKS, eps,
            D, KV_PER, True, ROPE, STORE, SKIPPED, MODE == 1, PTX,
        )  # fmt: skip
    else:
        _heads(
            v_ptr, k_weight_ptr, v_ptr, v_cache_ptr, v_ptr, v_cache_ptr, positions_ptr,
            cos_sin_ptr, locations_ptr, stride_v, stride_v, stride_v_cache, 0, 0, token,
            block - Q_BLOCKS - KV_BLOCKS, eps,
            D, KV_PER, False, False, STORE, SKIPPED, False, PTX,
        )  # fmt: skip


MANY_PROGRAMS = 8192
"""Of one head each: from so many on, a program takes several."""


def heads_of_a_program(heads: int, several: bool) -> int:
    """1, 2 or 4 heads, a divisor of ``heads``."""
    return min(4, heads & -heads) if several and heads else 1


class Rope(NamedTuple):
    """Rotation of Q and K, neox style over the whole head."""

    positions: torch.Tensor  # [M], int32 or int64
    cos_sin_cache: torch.Tensor  # [P, D] fp32: cosines, then sines


class Store(NamedTuple):
    """Where K and V go."""

    locations: torch.Tensor  # [M], int32 or int64
    k_cache: torch.Tensor  # [slots, KV heads, D]
    v_cache: torch.Tensor
    skipped: int | None = None
    """A slot that nothing is written to: later releases keep the one of padding rows as it is."""


def unfit(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    head_dim: int,
    rope: Rope | None = None,
    store: Store | None = None,
) -> str | None:
    """Why `qkv` does not take these arguments, or None. Host checks only."""
    rows = q.shape[0]
    if head_dim not in (128, 256, 512):
        return f"head_dim must be 128, 256 or 512, got {head_dim}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is None:
            continue
        if tensor.dim() != 2 or tensor.stride(1) != 1 or tensor.shape[1] % head_dim:
            return f"{name} must be [M, heads * {head_dim}], got {tuple(tensor.shape)}"
        if tensor.dtype not in norms.DTYPES or tensor.dtype != q.dtype:
            return f"{name} must be bf16 or fp16 like q, got {tensor.dtype}"
        if not (INTERPRETED or (tensor.is_cuda and torch.version.hip is None)):
            return f"{name} must be on a CUDA device, got {tensor.device}"
        if tensor.shape[0] != rows or (name == "v" and k is not None and tensor.shape != k.shape):
            return f"{name} has the shape {tuple(tensor.shape)}, q {tuple(q.shape)}"
    if (v is not None and k is None) or (k is not None and k_weight is None):
        return "k and k_weight must be given with v"
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (
            weight.shape != (head_dim,)
            or not weight.is_contiguous()
            or weight.dtype != q.dtype
            or weight.device != q.device
        ):
            return f"{name} must be a contiguous [{head_dim}] {q.dtype}, got {tuple(weight.shape)} {weight.dtype}"
    if rope is not None:
        if rope.positions.shape != (rows,) or not rope.positions.is_contiguous():
            return f"positions must be a contiguous [{rows}], got {tuple(rope.positions.shape)}"
        cache = rope.cos_sin_cache
        if (
            cache.dim() != 2
            or cache.shape[1] != head_dim
            or cache.dtype != torch.float32
            or not cache.is_contiguous()
        ):
            return f"cos_sin_cache must be a contiguous [P, {head_dim}] fp32, got {tuple(cache.shape)} {cache.dtype}"
    if store is not None:
        if k is None:
            return "store needs k"
        if store.locations.shape != (rows,) or not store.locations.is_contiguous():
            return f"locations must be a contiguous [{rows}], got {tuple(store.locations.shape)}"
        for name, cache in (("k_cache", store.k_cache), ("v_cache", store.v_cache)):
            heads = k.shape[1] // head_dim
            if cache.dim() != 3 or tuple(cache.shape[1:]) != (heads, head_dim):
                return f"{name} must be [slots, {heads}, {head_dim}], got {tuple(cache.shape)}"
            if cache.dtype != q.dtype or not cache.is_contiguous():
                return f"{name} must be contiguous {q.dtype}, got {cache.dtype}"
    return None


def qkv(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    eps: float,
    head_dim: int,
    rope: Rope | None = None,
    store: Store | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The equations of this module. Inputs are overwritten where stock overwrites them.

    Args:
        q: ``[M, Q heads * D]``, bf16 or fp16, contiguous heads, M may be 0; overwritten.
        k: ``[M, KV heads * D]`` or None (`Mode.Q`); overwritten unless stored.
        v: like ``k``, overwritten unless stored; None with ``k``: V is K before the norms (`Mode.QK`).
        q_weight: ``[D]``, in ``q``'s dtype.
        k_weight: ``[D]``, or None without ``k``.
        eps: added to the mean square.
        head_dim: D, 128, 256 or 512.
        rope: None: no rotation.
        store: None: K and V are returned and not stored.

    Returns:
        ``q``, and ``k`` and ``v`` or None where they do not exist or went to the cache.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(q, k, v, q_weight, k_weight, head_dim, rope, store)
    if reason is not None:
        raise ValueError(reason)
    return launch_qkv(q, k, v, q_weight, k_weight, eps, head_dim, rope, store)


def launch_qkv(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    eps: float,
    head_dim: int,
    rope: Rope | None,
    store: Store | None,
    several: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`qkv` without its checks. ``several`` heads a program: None decides by how many there are."""
    mode = Mode.Q if k is None else Mode.QK if v is None else Mode.QKV
    rows = q.shape[0]
    q_heads = q.shape[1] // head_dim
    kv_heads = 0 if k is None else k.shape[1] // head_dim
    v_out = v
    if mode == Mode.QK and store is None and k is not None:
        v_out = k.new_empty(k.shape)
    if rows:
        some_k = q if k is None else k
        some_v = some_k if v is None else v
        some_v_out = some_v if v_out is None else v_out
        if several is None:
            several = rows * (q_heads + mode * kv_heads) >= MANY_PROGRAMS
        q_per, kv_per = heads_of_a_program(q_heads, several), heads_of_a_program(kv_heads, several)
        q_blocks, kv_blocks = q_heads // q_per, kv_heads // kv_per
        _qkv_kernel[(rows, q_blocks + mode * kv_blocks)](
            q,
            some_k,
            some_v,
            q_weight,
            q_weight if k_weight is None else k_weight,
            q if rope is None else rope.positions,
            q if rope is None else rope.cos_sin_cache,
            q if store is None else store.locations,
            q if store is None else store.k_cache,
            q if store is None else store.v_cache,
            some_v_out,
            q.stride(0),
            some_k.stride(0),
            some_v.stride(0),
            some_v_out.stride(0),
            0 if store is None else store.k_cache.stride(0),
            0 if store is None else store.v_cache.stride(0),
            eps,
            Q_BLOCKS=q_blocks,
            KV_BLOCKS=kv_blocks,
            Q_PER=q_per,
            KV_PER=kv_per,
            D=head_dim,
            MODE=int(mode),
            ROPE=rope is not None,
            STORE=store is not None,
            SKIPPED=None if store is None else store.skipped,
            PTX=not INTERPRETED,
            num_warps=4,
            **pdl.options(q),
        )
    if store is not None:
        return q, None, None
    return q, k, v_out


def reference_qkv(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    eps: float,
    head_dim: int,
    rope: Rope | None = None,
    store: Store | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The same in plain torch, rounding where stock rounds; returns new tensors."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1] // head_dim, head_dim)

    def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        y = heads(x).float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        return (y if weight is None else y * weight.float()).to(x.dtype)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        if rope is None:
            return x
        cos, sin = rope.cos_sin_cache[rope.positions.long()][:, None].chunk(2, dim=-1)
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    out_q = rotate(norm(q, q_weight)).flatten(1)
    if k is None:
        return out_q, None, None
    out_k = rotate(norm(k, k_weight))
    out_v = norm(k if v is None else v, None)
    if store is None:
        return out_q, out_k.flatten(1), out_v.flatten(1)
    places = store.locations.long()
    kept = torch.ones_like(places, dtype=torch.bool)
    if store.skipped is not None:
        kept = places != store.skipped
    store.k_cache[places[kept]], store.v_cache[places[kept]] = out_k[kept], out_v[kept]
    return out_q, None, None
