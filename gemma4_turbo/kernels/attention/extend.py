"""Attention of new tokens to a cached prefix and to each other, for head sizes 128, 256 and 512.

Sequence i has ``L = qo_indptr[i+1] - qo_indptr[i]`` new tokens, in rows ``qo_indptr[i] + m`` of q, k
and v, and ``P = kv_indptr[i+1] - kv_indptr[i]`` cached ones, key n of which is row
``kv_indices[kv_indptr[i] + n]`` of k_buffer and v_buffer. For query m of head h, which reads KV head
``h // (query heads / KV heads)``::

    out[m] = sum_j softmax_j(sm_scale * q[m] . key_j) value_j        j: the keys that m sees
    cached key n:   P + m <= n + W       without a window W: always
    new key n:      m <= n + W    and   n <= m   (causal), or always (not causal)

A custom mask takes the place of ``n <= m``: byte ``m * (off + P + L) + off + P + n`` from
``mask_indptr[i]`` on says whether m sees new key n, where off is ``window_kv_offsets[i]`` with a
window and 0 without. With ``skip_prefix_custom_mask=False`` byte ``... + off + n`` is asked for the
cached key n too. With a causal call and ``mask_query_block = C``, m sees no new key from
``(m // C + 1) * C`` on: SGLang's own kernel ends its loop there, C being its block of queries.

A query that sees no key gets zeros (SGLang's kernel: NaN). Window and mask semantics are those of
SGLang's ``extend_attention_fwd``, where W is ``sliding_window_size`` and at most 0 means none.

Numerics: fp32 accumulators and softmax, probabilities rounded to the dtype of v before they are
multiplied with it, as there; the order of the keys differs. Against fp64 the relative error
(Frobenius norm) is that of SGLang's kernel.

A custom mask whose rows are intervals that begin at the first key, as the causal mask with pictures
that see themselves both ways, is found out on the device and then costs what a causal one does.

Method: online softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2205.14135), split over
keys for few queries (flash-decoding), query heads of a KV head packed into one tile.
"""

from __future__ import annotations

import math

import torch
import triton

from gemma4_turbo.kernels import measured
from gemma4_turbo.kernels.attention import extend_tiles as config
from gemma4_turbo.kernels.attention.extend_triton import (
    _combine_kernel,
    _dense_kernel,
    _intervals_kernel,
    _split_kernel,
)
from gemma4_turbo.kernels.gpu import gpu

HEAD_DIMS = (128, 256, 512)
INTERPRETED = not isinstance(_dense_kernel, triton.JITFunction)
"""True when this module was imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def device_unfit(device: torch.device) -> str | None:
    """Why the kernels do not run on this device, or None."""
    if INTERPRETED:
        return None
    reason = measured.impossible("q", device)
    if reason is not None or measured.has(config.NAME, device):
        return reason
    if gpu(device).capability[0] not in measured.KNOWN:
        found = ".".join(map(str, gpu(device).capability))
        return f"q must be on a Hopper GPU (compute capability 9.x), got {found}"
    return None


def unfit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    *,
    sm_scale: float = 1.0,
    sliding_window_size: int = -1,
    custom_mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    window_kv_offsets: torch.Tensor | None = None,
    skip_prefix_custom_mask: bool = True,
    few: bool = False,
) -> str | None:
    """Why `extend_attention` does not take these arguments, or None. Host checks only.

    ``few``: see `few_queries`.
    """
    reason = device_unfit(q.device)
    if reason is not None:
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q must be bfloat16 or float16, got {q.dtype}"
    if INTERPRETED and q.dtype != torch.float16:
        return f"q must be float16 in Triton's interpreter, whose dot knows no {q.dtype}"
    if q.dim() != 3 or q.shape[2] not in HEAD_DIMS:
        return f"q must be [tokens, heads, {' | '.join(map(str, HEAD_DIMS))}], got {tuple(q.shape)}"
    heads, head_dim = q.shape[1:]
    named = {"k": k, "v": v, "k_buffer": k_buffer, "v_buffer": v_buffer}
    for name, tensor in named.items():
        if tensor.dtype != q.dtype:
            return f"{name} must be {q.dtype} as q is, got {tensor.dtype}"
        if tensor.dim() != 3 or tensor.shape[1:] != (k.shape[1], head_dim):
            return f"{name} must be [rows, KV heads, {head_dim}], got {tuple(tensor.shape)}"
    for name, tensor in {"q": q, **named}.items():
        if tensor.stride(2) != 1:
            return f"{name} must be contiguous in its last dimension, got {tensor.stride()}"
    if k.shape[1] == 0 or heads % k.shape[1]:
        return f"k must have a divisor of q's {heads} heads, got {k.shape[1]}"
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        return f"k and v must have q's {q.shape[0]} rows, got {k.shape[0]} and {v.shape[0]}"
    if not sm_scale > 0.0:
        return f"sm_scale must be positive, got {sm_scale}"
    if custom_mask is not None:
        if custom_mask.dtype not in (torch.bool, torch.uint8) or not custom_mask.is_contiguous():
            return f"custom_mask must be contiguous bool or uint8, got {custom_mask.dtype}"
        if mask_indptr is None:
            return "mask_indptr must be given with custom_mask"
        if sliding_window_size > 0 and window_kv_offsets is None:
            return "window_kv_offsets must be given with custom_mask and sliding_window_size"
    if INTERPRETED:
        return None
    kinds = _kinds(custom_mask is not None, skip_prefix_custom_mask, few)
    return _tiles_unfit(head_dim, heads // k.shape[1], kinds, q.device)


def few_queries(kv_indices: torch.Tensor, max_extend_len: int) -> bool:
    """Whether a call's few new tokens are split over the keys that they see."""
    return kv_indices.shape[0] > 0 and max_extend_len <= config.SPLIT_TOKENS


def _kinds(custom: bool, skip_prefix_custom_mask: bool, few: bool) -> tuple[str, ...]:
    """Of the tiles that `launch_extend` takes."""
    if few:
        return (config.SPLIT_KIND,)
    if not custom:
        return (config.DENSE_KIND,)
    # With a mask of intervals the one, with any other mask the other launch has nothing to do.
    return (config.DENSE_KIND, config.MASKED) if skip_prefix_custom_mask else (config.MASKED,)


def _tiles_unfit(
    head_dim: int, group: int, kinds: tuple[str, ...], device: torch.device
) -> str | None:
    """Why the kernels with these tiles do not run on this device, or None."""
    for kind in kinds:
        row: measured.Row[config.Split] | measured.Row[config.Dense] | None
        if kind == config.SPLIT_KIND:
            row = config.found_split(head_dim, group, device)
        else:
            row = config.found_dense(head_dim, group, kind == config.MASKED, device)
        reason = measured.unfit("q", device, row)
        if reason is not None:
            return reason
    return None


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    max_extend_len: int,
    *,
    sm_scale: float = 1.0,
    is_causal: bool = True,
    sliding_window_size: int = -1,
    custom_mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    skip_prefix_custom_mask: bool = True,
    window_kv_offsets: torch.Tensor | None = None,
    mask_query_block: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every new token. See the module for equations.

    Args:
        q: ``[T, query heads, D]``, bf16 or fp16, D 128, 256 or 512; any strides but the last.
        k: new keys ``[T, KV heads, D]``, as q.
        v: new values, as k.
        k_buffer: the cache ``[slots, KV heads, D]``, as q.
        v_buffer: as k_buffer.
        qo_indptr: ``[B + 1]`` int32 or int64, starting at 0. Lengths may be 0. Rows of q beyond the
            last entry are left alone.
        kv_indptr: ``[>= B + 1]`` int32 or int64.
        kv_indices: int32 or int64, in any order, read between the first and last kv_indptr only.
            Without an element there is no prefix, and kv_indptr is not read.
        max_extend_len: no less than the longest extend.
        sm_scale: positive.
        is_causal: see the module.
        sliding_window_size: W; at most 0: no window.
        custom_mask: flat bool or uint8; with it mask_indptr ``[>= B]`` int32 or int64 and, with a
            window, window_kv_offsets ``[>= B]`` int32 or int64.
        mask_indptr: see custom_mask.
        skip_prefix_custom_mask: see the module.
        window_kv_offsets: see custom_mask.
        mask_query_block: C, or 0 for none.
        out: like q, contiguous in its last dimension; allocated if None.

    Returns:
        ``out``. No value is read on the host and nothing but device work is queued, so the call can
        be captured into a CUDA graph, in which lengths may change between replays.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(
        q,
        k,
        v,
        k_buffer,
        v_buffer,
        sm_scale=sm_scale,
        sliding_window_size=sliding_window_size,
        custom_mask=custom_mask,
        mask_indptr=mask_indptr,
        window_kv_offsets=window_kv_offsets,
        skip_prefix_custom_mask=skip_prefix_custom_mask,
        few=few_queries(kv_indices, max_extend_len),
    )
    if reason is None and max_extend_len < 0:
        reason = f"max_extend_len must not be negative, got {max_extend_len}"
    if reason is None and out is not None and (out.shape != q.shape or out.stride(2) != 1):
        reason = f"out must be {tuple(q.shape)}, contiguous at its end, got {tuple(out.shape)}"
    if reason is not None:
        raise ValueError(reason)
    return launch_extend(
        q,
        k,
        v,
        k_buffer,
        v_buffer,
        qo_indptr,
        kv_indptr,
        kv_indices,
        max_extend_len,
        sm_scale=sm_scale,
        is_causal=is_causal,
        sliding_window_size=sliding_window_size,
        custom_mask=custom_mask,
        mask_indptr=mask_indptr,
        skip_prefix_custom_mask=skip_prefix_custom_mask,
        window_kv_offsets=window_kv_offsets,
        mask_query_block=mask_query_block,
        out=torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out,
    )


def launch_extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    max_extend_len: int,
    *,
    sm_scale: float,
    is_causal: bool,
    sliding_window_size: int,
    custom_mask: torch.Tensor | None,
    mask_indptr: torch.Tensor | None,
    skip_prefix_custom_mask: bool,
    window_kv_offsets: torch.Tensor | None,
    mask_query_block: int,
    out: torch.Tensor,
    dense: config.Dense | None = None,
    split: config.Split | None = None,
) -> torch.Tensor:
    """`extend_attention` without its checks, for callers that have asked `unfit`.

    ``dense`` and ``split`` take the place of the tables' tile sizes.
    """
    tokens, heads, head_dim = q.shape
    batch = qo_indptr.shape[0] - 1
    if tokens == 0 or batch == 0 or max_extend_len == 0:
        return out
    group = heads // k.shape[1]
    window = max(sliding_window_size, 0)
    custom = custom_mask is not None
    if custom_mask is not None and custom_mask.dtype == torch.bool:
        custom_mask = custom_mask.view(torch.uint8)
    pointers = (
        k_buffer,
        v_buffer,
        qo_indptr,
        kv_indptr,
        kv_indices,
        custom_mask if custom_mask is not None else q,  # not read, but every pointer needs a tensor
        mask_indptr if mask_indptr is not None else qo_indptr,
        window_kv_offsets if window_kv_offsets is not None else qo_indptr,
    )
    shared = {
        "scale": sm_scale * math.log2(math.e),
        "q_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "k_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "o_stride": out.stride(0),
        "o_head_stride": out.stride(1),
        "k_buffer_stride": k_buffer.stride(0),
        "k_buffer_head_stride": k_buffer.stride(1),
        "v_buffer_stride": v_buffer.stride(0),
        "v_buffer_head_stride": v_buffer.stride(1),
        "D": head_dim,
        "HEADS": heads,
        "GROUP": group,
        "WINDOW": window,
        "CAUSAL": is_causal,
        "CUSTOM": custom,
        "CUSTOM_PREFIX": custom and not skip_prefix_custom_mask,
        "CUT": mask_query_block if custom and is_causal else 0,
    }
    prefix = kv_indices.shape[0] > 0
    if split is not None or (few_queries(kv_indices, max_extend_len) and dense is None):
        split = split or config.split(head_dim, group, q.device)
        _launch_split(split, q, k, v, out, pointers, shared, batch, max_extend_len)
        return out
    unused = qo_indptr, qo_indptr
    if not custom or shared["CUSTOM_PREFIX"]:
        tile = dense or config.dense(head_dim, group, custom, q.device)
        _launch_dense(tile, q, k, v, out, (*pointers, *unused), shared, batch, prefix, 0)
        return out
    # Each query of a prompt with pictures sees the keys up to itself or to its picture's end. Whether
    # the mask is of this kind is known on the device only: one of two launches has nothing to do.
    found = torch.zeros(tokens + 1, dtype=torch.int32, device=q.device)
    high, others = found[:tokens], found[tokens:]
    _intervals_kernel[(tokens + batch,)](
        pointers[5],
        pointers[6],
        qo_indptr,
        kv_indptr,
        pointers[7],
        high,
        others,
        batch,
        WINDOW=window,
        PREFIX=prefix,
        BLOCK=1024,
        num_warps=4,
    )
    pointers = *pointers, high, others
    intervals = shared | {"CUSTOM": False}
    tile = dense or config.dense(head_dim, group, False, q.device)
    _launch_dense(tile, q, k, v, out, pointers, intervals, batch, prefix, 1)
    tile = dense or config.dense(head_dim, group, True, q.device)
    _launch_dense(tile, q, k, v, out, pointers, shared, batch, prefix, 2)
    return out


def _launch_dense(
    tile: config.Dense,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    pointers: tuple[torch.Tensor, ...],
    shared: dict[str, float],
    batch: int,
    prefix: bool,
    intervals: int,
) -> None:
    tokens, heads = q.shape[:2]
    pack = _pack(heads // k.shape[1], min(tile.pack, tile.block_m))
    tiles = tokens // (tile.block_m // pack) + batch
    _dense_kernel[(tiles * (heads // pack) * tile.value_blocks,)](
        q,
        k,
        v,
        out,
        *pointers,
        batch,
        tiles,
        **shared,
        PREFIX=prefix,
        INTERVALS=intervals,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        PACK=pack,
        VALUE_BLOCKS=tile.value_blocks,
        CHUNKS=tile.chunks,
        Q_IN_REGISTERS=tile.q_in_registers,
        STAGES=tile.stages,
        PREFIX_STAGES=tile.prefix_stages,
        num_warps=tile.num_warps,
    )


def _launch_split(
    tile: config.Split,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    pointers: tuple[torch.Tensor, ...],
    shared: dict[str, float],
    batch: int,
    max_extend_len: int,
) -> None:
    tokens, heads, head_dim = q.shape
    pack = _pack(heads // k.shape[1], tile.rows)
    rows = min(tile.rows, max(16, triton.next_power_of_2(max_extend_len * pack)))
    tiles = (max_extend_len + rows // pack - 1) // (rows // pack)
    programs = batch * tiles * (heads // pack)
    splits = split_count(
        tile, programs, int(shared["WINDOW"]), pointers[4].shape[0], gpu(q.device).processors
    )
    if splits == 1:
        result, lse = out, out
    else:
        result = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        lse = torch.empty(result.shape[:-1], dtype=torch.float32, device=q.device)
    _split_kernel[(programs * splits,)](
        q,
        k,
        v,
        result,
        lse,
        *pointers,
        tiles,
        splits,
        tokens,
        **shared,
        PARTIAL=splits > 1,
        ROWS=rows,
        BLOCK_N=tile.block_n,
        EXTEND_N=tile.extend_n,
        PACK=pack,
        MIN_BLOCKS=tile.min_blocks,
        STAGES=tile.stages,
        num_warps=tile.num_warps,
    )
    if splits > 1:
        _combine_kernel[(tokens, heads)](
            result,
            lse,
            out,
            tokens,
            batch,
            pointers[2],
            o_stride=out.stride(0),
            o_head_stride=out.stride(1),
            HEADS=heads,
            D=head_dim,
            SPLITS=splits,
            num_warps=head_dim // 128,
        )


def split_count(tile: config.Split, programs: int, window: int, keys: int, processors: int) -> int:
    """Splits of a sequence, a power of two: enough programs for the GPU, none of them too short.

    Args:
        tile: the tile sizes.
        programs: there without a split.
        window: W, 0 if none.
        keys: no fewer than the cached keys of all sequences; in a CUDA graph a mere bound.
        processors: of the GPU.
    """
    wanted = (tile.programs_per_sm * processors + programs - 1) // programs
    longest = min(window, keys) if window > 0 else keys
    possible = triton.cdiv(longest, tile.block_n * tile.min_blocks)
    wanted = triton.next_power_of_2(max(1, min(wanted, possible)))
    return int(min(wanted, config.MAX_SPLITS))


def _pack(group: int, most: int) -> int:
    """Heads that share a tile: the largest power of two that divides the group, at most ``most``."""
    return min(group & -group, most)


def reference_extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    sm_scale: float = 1.0,
    is_causal: bool = True,
    sliding_window_size: int = -1,
    custom_mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    skip_prefix_custom_mask: bool = True,
    window_kv_offsets: torch.Tensor | None = None,
    mask_query_block: int = 0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The module's equations in plain torch, a sequence at a time, rounded nowhere but to ``dtype``.

    Rows of q that belong to no sequence are NaN.
    """
    out = torch.full(q.shape, math.nan, dtype=dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    for i in range(qo_indptr.shape[0] - 1):
        rows = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
        cached = kv_indices[:0].long()
        if kv_indices.shape[0]:
            cached = kv_indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])].long()
        new, old = rows.stop - rows.start, cached.shape[0]
        if new == 0:
            continue
        keys = torch.cat([k_buffer[cached], k[rows]]).to(dtype)
        values = torch.cat([v_buffer[cached], v[rows]]).to(dtype)
        m = torch.arange(new, device=q.device)[:, None]
        n = torch.arange(-old, new, device=q.device)[None, :]  # cached keys are negative
        visible = torch.ones(new, old + new, dtype=torch.bool, device=q.device)
        if custom_mask is not None and mask_indptr is not None:
            offset = 0
            if sliding_window_size > 0 and window_kv_offsets is not None:
                offset = int(window_kv_offsets[i])
            width = offset + old + new
            first = int(mask_indptr[i])
            mask = custom_mask[first : first + new * width].view(new, width)[:, offset:].bool()
            visible &= mask if not skip_prefix_custom_mask else mask | (n < 0)
            if is_causal and mask_query_block:
                visible &= n < (m // mask_query_block + 1) * mask_query_block
        elif is_causal:
            visible &= n <= m
        if sliding_window_size > 0:
            visible &= m <= n + sliding_window_size
        expanded = keys.repeat_interleave(group, 1)
        scores = torch.einsum("mhd,nhd->hmn", q[rows].to(dtype), expanded) * sm_scale
        scores = scores.masked_fill(~visible, -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)  # rows that see nothing
        out[rows] = torch.einsum("hmn,nhd->mhd", weights, values.repeat_interleave(group, 1))
    return out
