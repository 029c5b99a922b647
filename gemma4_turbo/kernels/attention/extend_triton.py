"""The Triton kernels of `gemma4_turbo.kernels.attention.extend`, which has equations and wrapper.

Keys of a query come in two segments, the cached prefix and the new tokens, and in each a query m of
its sequence sees the keys of one interval ``low[m] <= key < high[m]``. A tile of queries therefore
sees a union of intervals whose ends follow from its first and last query alone: the first block is
computed, blocks inside every interval run without a mask, and the others with one.

Rows of a tile are (token, query head) pairs: PACK neighbouring query heads of one KV head lie
beside each other, so that a tile of few tokens still fills the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sequence_of(tile, qo_indptr_ptr, batch, TOKENS: tl.constexpr):
    """The sequence that a tile of the flat list belongs to.

    Sequence i has the tiles from ``qo_indptr[i] // TOKENS + i`` on: enough of them for any
    alignment, at most one too many, and found by bisection, without a table.
    """
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(qo_indptr_ptr + middle).to(tl.int32) // TOKENS + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    return low


@triton.jit
def _sizes(sequence, qo_indptr_ptr, kv_indptr_ptr, PREFIX: tl.constexpr):
    """(first row of q, new tokens, first entry of kv_indices, cached tokens) of a sequence."""
    q_first = tl.load(qo_indptr_ptr + sequence).to(tl.int32)
    new = tl.load(qo_indptr_ptr + sequence + 1).to(tl.int32) - q_first
    kv_first = tl.zeros([], tl.int64)
    cached = 0
    if PREFIX:
        kv_first = tl.load(kv_indptr_ptr + sequence).to(tl.int64)
        cached = (tl.load(kv_indptr_ptr + sequence + 1).to(tl.int64) - kv_first).to(tl.int32)
    return q_first, new, kv_first, cached


@triton.jit
def _high(token, new, CAUSAL: tl.constexpr, CUSTOM: tl.constexpr, CUT: tl.constexpr):
    """One past the last new token that a query sees, its custom mask aside."""
    if CAUSAL and CUSTOM:
        high = new + tl.zeros_like(token)
        if CUT > 0:
            high = tl.minimum(high, (token // CUT + 1) * CUT)
    elif CAUSAL:
        high = tl.minimum(token + 1, new)
    else:
        high = new + tl.zeros_like(token)
    return high


@triton.jit
def _mask_rows(
    mask_ptr,
    mask_indptr_ptr,
    window_kv_offsets_ptr,
    sequence,
    keys,
    token_first,
    token_last,
    token,  # [rows], from the tile's first on
    WINDOW: tl.constexpr,
):
    """A custom mask's byte of key 0 for a tile's first query, and how far behind it each row's is."""
    offset = 0
    if WINDOW > 0:
        offset = tl.load(window_kv_offsets_ptr + sequence).to(tl.int32)
    width = keys + offset
    # Rows without a token read the last token's bytes: beyond them the mask may end.
    behind = tl.minimum(token, token_last - token_first) * width
    mask_ptr += tl.load(mask_indptr_ptr + sequence).to(tl.int64) + offset
    mask_ptr += token_first.to(tl.int64) * width
    return mask_ptr, behind


@triton.jit
def _load_rows(
    pointer,
    stride,
    indices_ptr,
    start,
    first,
    last,
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``[BLOCK_N, WIDTH]`` of K or V from key ``start`` on; keys outside first..last-1 are 0."""
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, WIDTH)
    if GATHER:
        if MASKED:
            inside = (start + row >= first) & (start + row < last)
            location = tl.load(indices_ptr + start + row, mask=inside, other=0)
        else:
            location = tl.load(indices_ptr + start + row)
        pointers = pointer + location.to(tl.int64)[:, None] * stride + column[None, :]
    else:
        pointers = pointer + tl.cast(start, tl.int64) * stride
        pointers = pointers + (row[:, None] * stride + column[None, :])
    if MASKED:
        valid = (start + row >= first) & (start + row < last)
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _dense_blocks(
    acc,
    row_max,
    row_sum,
    q,
    q_rest,
    start,
    blocks,
    gap_after,  # after so many blocks come `gap` keys that are left out
    gap,
    first,  # keys that any row may see: first..last-1
    last,
    low,  # [BLOCK_M], keys that each row may see: low..high-1
    high,
    k_ptr,
    v_ptr,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    indices_ptr,
    mask_ptr,  # the tile's first query's byte of key 0
    mask_row,  # [BLOCK_M], how far behind it each row's is
    scale,
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    CUSTOM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Blocks of keys from ``start`` on taken into the running softmax of a tile."""
    for block in tl.range(0, blocks, num_stages=STAGES):
        n = start + block * BLOCK_N
        if MASKED:
            n += tl.where(block < gap_after, 0, gap)
        k = _load_rows(
            k_ptr, k_stride, indices_ptr, n, first, last, GATHER, MASKED, BLOCK_N, D // CHUNKS
        )
        scores = tl.dot(q, tl.trans(k))
        if CHUNKS == 2:
            k = _load_rows(
                k_ptr + D // 2,
                k_stride,
                indices_ptr,
                n,
                first,
                last,
                GATHER,
                MASKED,
                BLOCK_N,
                D // 2,
            )
            scores = tl.dot(q_rest, tl.trans(k), scores)
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)
            visible = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            if CUSTOM:
                bytes_ = mask_ptr + (mask_row[:, None] + key[None, :])
                allowed = tl.load(bytes_, mask=visible, other=0)
                visible = visible & (allowed != 0)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        if MASKED:  # a row that has seen nothing yet: exp2(-inf - 0) is 0, not NaN
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            base = new_max
        p = tl.math.exp2(scores * scale - base[:, None])
        rescale = tl.math.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = _load_rows(v_ptr, v_stride, indices_ptr, n, first, last, GATHER, MASKED, BLOCK_N, DV)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["batch"])
def _intervals_kernel(
    mask_ptr,
    mask_indptr_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    window_kv_offsets_ptr,
    high_ptr,  # int32, a row of q each
    others_ptr,  # int32, 0 before: becomes 1 if a row of the mask is no interval
    batch,
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a custom mask as intervals: new keys 0..high-1 of each query, if they are one."""
    tile = tl.program_id(0)
    sequence = _sequence_of(tile, qo_indptr_ptr, batch, 1)
    q_first, new, _, cached = _sizes(sequence, qo_indptr_ptr, kv_indptr_ptr, PREFIX)
    token = tile - (q_first + sequence)
    if token >= new:
        return
    offset = 0
    if WINDOW > 0:
        offset = tl.load(window_kv_offsets_ptr + sequence).to(tl.int32)
    width = (offset + cached + new).to(tl.int64)
    mask_ptr += tl.load(mask_indptr_ptr + sequence).to(tl.int64) + token * width + offset + cached
    high = 0
    count = 0
    for start in range(0, new, BLOCK):
        key = start + tl.arange(0, BLOCK)
        seen = tl.load(mask_ptr + key, mask=key < new, other=0) != 0
        high = tl.maximum(high, tl.max(tl.where(seen, key + 1, 0), 0))
        count += tl.sum(seen.to(tl.int32), 0)
    tl.store(high_ptr + q_first + token, high)
    if count != high:
        tl.store(others_ptr, 1)


@triton.jit(do_not_specialize=["batch", "tiles", "scale"])
def _dense_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    k_buffer_ptr,
    v_buffer_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    mask_ptr,
    mask_indptr_ptr,
    window_kv_offsets_ptr,
    high_ptr,  # of `_intervals_kernel`, as the next one
    others_ptr,
    batch,
    tiles,
    scale,  # of the softmax, times log2(e)
    q_stride: tl.constexpr,
    q_head_stride: tl.constexpr,
    k_stride: tl.constexpr,
    k_head_stride: tl.constexpr,
    v_stride: tl.constexpr,
    v_head_stride: tl.constexpr,
    o_stride: tl.constexpr,
    o_head_stride: tl.constexpr,
    k_buffer_stride: tl.constexpr,
    k_buffer_head_stride: tl.constexpr,
    v_buffer_stride: tl.constexpr,
    v_buffer_head_stride: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    WINDOW: tl.constexpr,  # 0: none
    CAUSAL: tl.constexpr,
    CUSTOM: tl.constexpr,
    CUSTOM_PREFIX: tl.constexpr,
    CUT: tl.constexpr,
    PREFIX: tl.constexpr,
    INTERVALS: tl.constexpr,  # 1: only if the custom mask's rows are, 2: only if not, 0: not asked
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,  # programs that share the value dimension
    CHUNKS: tl.constexpr,
    Q_IN_REGISTERS: tl.constexpr,  # the second of two chunks
    STAGES: tl.constexpr,
    PREFIX_STAGES: tl.constexpr,
):
    """One program per tile of queries, block of PACK heads and block of the value dimension."""
    if INTERVALS > 0:  # noqa: SIM102  # the compiler decides this one, the device the next
        if tl.load(others_ptr) != INTERVALS - 1:
            return
    TOKENS: tl.constexpr = BLOCK_M // PACK
    DV: tl.constexpr = D // VALUE_BLOCKS
    INNER: tl.constexpr = HEADS // PACK * VALUE_BLOCKS
    program = tl.program_id(0)
    # The last queries of a sequence see most: they start first, so that no SM ends with one.
    tile = tiles - 1 - program // INNER
    value_first = program % VALUE_BLOCKS * DV
    head_first = (program % INNER) // VALUE_BLOCKS * PACK
    kv_head = (head_first // GROUP).to(tl.int64)

    sequence = _sequence_of(tile, qo_indptr_ptr, batch, TOKENS)
    q_first, new, kv_first, cached = _sizes(sequence, qo_indptr_ptr, kv_indptr_ptr, PREFIX)
    token_first = (tile - (q_first // TOKENS + sequence)) * TOKENS
    if token_first >= new:
        return
    token_last = tl.minimum(token_first + TOKENS, new) - 1

    row = tl.arange(0, BLOCK_M)
    token = token_first + row // PACK
    used = token < new
    q_row = (q_first + token).to(tl.int64)
    head = head_first + row % PACK
    column = tl.arange(0, D // CHUNKS)
    q_pointers = q_ptr + (q_row * q_stride + head * q_head_stride)[:, None] + column[None, :]
    q = tl.load(q_pointers, mask=used[:, None], other=0.0)
    if CHUNKS == 2:
        q_rest = tl.load(q_pointers + D // 2, mask=used[:, None], other=0.0)
        if Q_IN_REGISTERS:
            # A left operand comes from registers if it has the layout of a product. Adding one that
            # is zero gives it that, and frees the shared memory of half a tile of Q.
            some = q_ptr + (q_row * q_stride + head * q_head_stride)[:, None]
            some = tl.load(some + tl.arange(0, 16)[None, :], mask=used[:, None], other=0.0)
            q_zero = tl.dot(some, tl.zeros([16, D // 2], q.dtype))
            q_rest = (q_rest.to(tl.float32) + q_zero).to(q.dtype)
    else:
        q_rest = q

    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    mask_row = token
    if CUSTOM:
        mask_ptr, mask_row = _mask_rows(
            mask_ptr,
            mask_indptr_ptr,
            window_kv_offsets_ptr,
            sequence,
            cached + new,
            token_first,
            token_last,
            row // PACK,
            WINDOW,
        )

    # The new tokens: blocks begin at the first key that the tile sees.
    k_rows = k_ptr + q_first.to(tl.int64) * k_stride + kv_head * k_head_stride
    v_rows = v_ptr + q_first.to(tl.int64) * v_stride + kv_head * v_head_stride + value_first
    if INTERVALS == 1:
        high = tl.load(high_ptr + q_row, mask=used, other=0)
        if CUT > 0:
            high = tl.minimum(high, (token // CUT + 1) * CUT)
        end = tl.max(high, 0)
    else:
        high = _high(token, new, CAUSAL, CUSTOM, CUT)
        end = _high(token_last, new, CAUSAL, CUSTOM, CUT)
    start = 0
    seen_by_all = 0
    low = tl.zeros([BLOCK_M], tl.int32)
    if WINDOW > 0:
        start = tl.maximum(token_first - WINDOW, 0)
        seen_by_all = tl.maximum(token_last - WINDOW, 0)
        low = tl.maximum(token - WINDOW, 0)
    # Blocks that every row sees in full: unmasked of them, after the first masked_before.
    blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)
    if CUSTOM:
        masked_before = blocks
        unmasked = 0
    else:
        if INTERVALS == 1:
            blocks = tl.maximum(blocks, 1)  # a tile may see no new key
            all_end = tl.min(tl.where(used, high, end), 0)
        else:
            all_end = _high(token_first, new, CAUSAL, CUSTOM, CUT)
        masked_before = tl.minimum(tl.cdiv(seen_by_all - start, BLOCK_N), blocks)
        unmasked = tl.maximum(all_end - start, 0) // BLOCK_N - masked_before
        # At least one block is left to the masked loop, which the compiler may then enter unasked.
        unmasked = tl.maximum(tl.minimum(unmasked, blocks - 1), 0)
    # The masked ones first: every row then has a maximum when the many others come.
    tl.assume(blocks - unmasked > 0)
    acc, row_max, row_sum = _dense_blocks(
        acc,
        row_max,
        row_sum,
        q,
        q_rest,
        start,
        blocks - unmasked,
        masked_before,
        unmasked * BLOCK_N,
        start,
        end,
        low,
        high,
        k_rows,
        v_rows,
        k_stride,
        v_stride,
        kv_indices_ptr,
        mask_ptr + cached,
        mask_row,
        scale,
        GATHER=False,
        MASKED=True,
        CUSTOM=CUSTOM,
        BLOCK_N=BLOCK_N,
        D=D,
        DV=DV,
        CHUNKS=CHUNKS,
        STAGES=STAGES,
    )
    if not CUSTOM:
        acc, row_max, row_sum = _dense_blocks(
            acc,
            row_max,
            row_sum,
            q,
            q_rest,
            start + masked_before * BLOCK_N,
            unmasked,
            0,
            0,
            0,
            0,
            low,
            high,
            k_rows,
            v_rows,
            k_stride,
            v_stride,
            kv_indices_ptr,
            mask_ptr,
            mask_row,
            scale,
            GATHER=False,
            MASKED=False,
            CUSTOM=False,
            BLOCK_N=BLOCK_N,
            D=D,
            DV=DV,
            CHUNKS=CHUNKS,
            STAGES=STAGES,
        )

    if PREFIX:
        # Blocks end at the last cached key, so that only the first ones need a mask.
        seen_first = 0
        low = tl.zeros([BLOCK_M], tl.int32)
        seen_by_all = 0
        if WINDOW > 0:
            seen_first = tl.maximum(cached + token_first - WINDOW, 0)
            seen_by_all = tl.maximum(cached + token_last - WINDOW, 0)
            low = tl.maximum(cached + token - WINDOW, 0)
        blocks = tl.cdiv(tl.maximum(cached - seen_first, 0), BLOCK_N)
        start = cached - blocks * BLOCK_N
        if CUSTOM_PREFIX:
            masked = blocks
        else:
            masked = tl.minimum(tl.cdiv(tl.maximum(seen_by_all - start, 0), BLOCK_N), blocks)
        acc, row_max, row_sum = _dense_blocks(
            acc,
            row_max,
            row_sum,
            q,
            q_rest,
            start,
            masked,
            masked,
            0,
            seen_first,
            cached,
            low,
            cached + tl.zeros_like(low),
            k_buffer_ptr + kv_head * k_buffer_head_stride,
            v_buffer_ptr + kv_head * v_buffer_head_stride + value_first,
            k_buffer_stride,
            v_buffer_stride,
            kv_indices_ptr + kv_first,
            mask_ptr,
            mask_row,
            scale,
            GATHER=True,
            MASKED=True,
            CUSTOM=CUSTOM_PREFIX,
            BLOCK_N=BLOCK_N,
            D=D,
            DV=DV,
            CHUNKS=CHUNKS,
            STAGES=PREFIX_STAGES,
        )
        if not CUSTOM_PREFIX:
            acc, row_max, row_sum = _dense_blocks(
                acc,
                row_max,
                row_sum,
                q,
                q_rest,
                start + masked * BLOCK_N,
                blocks - masked,
                0,
                0,
                0,
                0,
                low,
                low,
                k_buffer_ptr + kv_head * k_buffer_head_stride,
                v_buffer_ptr + kv_head * v_buffer_head_stride + value_first,
                k_buffer_stride,
                v_buffer_stride,
                kv_indices_ptr + kv_first,
                mask_ptr,
                mask_row,
                scale,
                GATHER=True,
                MASKED=False,
                CUSTOM=False,
                BLOCK_N=BLOCK_N,
                D=D,
                DV=DV,
                CHUNKS=CHUNKS,
                STAGES=PREFIX_STAGES,
            )

    inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    # Read again, so that rows and pointers are computed anew instead of kept in registers all along.
    q_first = tl.load(qo_indptr_ptr + sequence, volatile=True).to(tl.int32)
    q_row = q_first + token_first + row // PACK
    used = q_row < q_first + new
    rows = o_ptr + q_row.to(tl.int64) * o_stride + (head_first + row % PACK) * o_head_stride
    value = value_first + tl.arange(0, DV)
    out = (acc * inverse[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(rows[:, None] + value[None, :], out, mask=used[:, None])


@triton.jit
def _split_blocks(
    acc,  # [D, ROWS]
    row_max,
    row_sum,
    q,  # [D, ROWS]
    start,
    end,
    first,
    last,
    low,
    high,
    k_ptr,
    v_ptr,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    indices_ptr,
    mask_ptr,
    mask_row,
    scale,
    GATHER: tl.constexpr,
    MASKED: tl.constexpr,
    CUSTOM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_dense_blocks`, with keys and values as the left operands.

    A tensor core instruction takes 64 rows on the left and as few as 8 columns on the right: few
    queries go to the right, where they are not padded.
    """
    for n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        k = _load_rows(k_ptr, k_stride, indices_ptr, n, first, last, GATHER, MASKED, BLOCK_N, D)
        scores = tl.dot(k, q)
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)
            visible = (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
            if CUSTOM:
                bytes_ = mask_ptr + (mask_row[None, :] + key[:, None])
                allowed = tl.load(bytes_, mask=visible, other=0)
                visible = visible & (allowed != 0)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0) * scale)
        if MASKED:
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            base = new_max
        p = tl.math.exp2(scores * scale - base[None, :])
        rescale = tl.math.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        v = _load_rows(v_ptr, v_stride, indices_ptr, n, first, last, GATHER, MASKED, BLOCK_N, D)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * rescale[None, :])
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["tiles", "splits", "rows_in_all", "scale"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,  # [T, HEADS, D], or with PARTIAL fp32 [splits, T, HEADS, D]
    lse_ptr,  # with PARTIAL fp32 [splits, T, HEADS], in base 2
    k_buffer_ptr,
    v_buffer_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    mask_ptr,
    mask_indptr_ptr,
    window_kv_offsets_ptr,
    tiles,  # per sequence
    splits,
    rows_in_all,  # T
    scale,
    q_stride: tl.constexpr,
    q_head_stride: tl.constexpr,
    k_stride: tl.constexpr,
    k_head_stride: tl.constexpr,
    v_stride: tl.constexpr,
    v_head_stride: tl.constexpr,
    o_stride: tl.constexpr,
    o_head_stride: tl.constexpr,
    k_buffer_stride: tl.constexpr,
    k_buffer_head_stride: tl.constexpr,
    v_buffer_stride: tl.constexpr,
    v_buffer_head_stride: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    CUSTOM: tl.constexpr,
    CUSTOM_PREFIX: tl.constexpr,
    CUT: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTEND_N: tl.constexpr,
    PACK: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per split of the prefix, block of heads, tile of a sequence, and sequence."""
    TOKENS: tl.constexpr = ROWS // PACK
    INNER: tl.constexpr = HEADS // PACK
    split = tl.program_id(0) % splits
    head_first = (tl.program_id(0) // splits) % INNER * PACK
    tile = tl.program_id(0) // (splits * INNER)
    sequence = tile // tiles
    kv_head = (head_first // GROUP).to(tl.int64)

    q_first, new, kv_first, cached = _sizes(sequence, qo_indptr_ptr, kv_indptr_ptr, True)
    token_first = tile % tiles * TOKENS
    if token_first >= new:
        return
    token_last = tl.minimum(token_first + TOKENS, new) - 1

    row = tl.arange(0, ROWS)
    token = token_first + row // PACK
    used = token < new
    q_row = (q_first + token).to(tl.int64)
    head = head_first + row % PACK
    value = tl.arange(0, D)

    seen_first = 0
    seen_by_all = 0
    low = tl.zeros([ROWS], tl.int32)
    if WINDOW > 0:
        seen_first = tl.maximum(cached + token_first - WINDOW, 0)
        seen_by_all = tl.maximum(cached + token_last - WINDOW, 0)
        low = tl.maximum(cached + token - WINDOW, 0)
    blocks = tl.cdiv(tl.maximum(cached - seen_first, 0), BLOCK_N)
    share = tl.maximum(tl.cdiv(blocks, splits), MIN_BLOCKS)
    last_split = tl.maximum(tl.cdiv(blocks, share), 1) - 1
    partial_row = (split.to(tl.int64) * rows_in_all + q_row) * HEADS + head
    if PARTIAL and split > last_split:
        nothing = tl.full([ROWS], float("-inf"), tl.float32)
        tl.store(lse_ptr + partial_row, nothing, mask=used)
        return

    q_pointers = q_ptr + (q_row * q_stride + head * q_head_stride)[None, :] + value[:, None]
    q = tl.load(q_pointers, mask=used[None, :], other=0.0)
    acc = tl.zeros([D, ROWS], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)

    mask_row = token
    if CUSTOM:
        mask_ptr, mask_row = _mask_rows(
            mask_ptr,
            mask_indptr_ptr,
            window_kv_offsets_ptr,
            sequence,
            cached + new,
            token_first,
            token_last,
            row // PACK,
            WINDOW,
        )

    # This split's share of the prefix blocks, which end at the last cached key.
    origin = cached - blocks * BLOCK_N
    if CUSTOM_PREFIX:
        masked = blocks
    else:
        masked = tl.minimum(tl.cdiv(tl.maximum(seen_by_all - origin, 0), BLOCK_N), blocks)
    block_first = split * share
    block_end = tl.minimum(block_first + share, blocks)
    masked_end = tl.maximum(tl.minimum(masked, block_end), block_first)
    acc, row_max, row_sum = _split_blocks(
        acc,
        row_max,
        row_sum,
        q,
        origin + block_first * BLOCK_N,
        origin + masked_end * BLOCK_N,
        seen_first,
        cached,
        low,
        cached + tl.zeros_like(low),
        k_buffer_ptr + kv_head * k_buffer_head_stride,
        v_buffer_ptr + kv_head * v_buffer_head_stride,
        k_buffer_stride,
        v_buffer_stride,
        kv_indices_ptr + kv_first,
        mask_ptr,
        mask_row,
        scale,
        GATHER=True,
        MASKED=True,
        CUSTOM=CUSTOM_PREFIX,
        BLOCK_N=BLOCK_N,
        D=D,
        STAGES=STAGES,
    )
    if not CUSTOM_PREFIX:
        acc, row_max, row_sum = _split_blocks(
            acc,
            row_max,
            row_sum,
            q,
            origin + masked_end * BLOCK_N,
            origin + block_end * BLOCK_N,
            0,
            cached,
            low,
            low,
            k_buffer_ptr + kv_head * k_buffer_head_stride,
            v_buffer_ptr + kv_head * v_buffer_head_stride,
            k_buffer_stride,
            v_buffer_stride,
            kv_indices_ptr + kv_first,
            mask_ptr,
            mask_row,
            scale,
            GATHER=True,
            MASKED=False,
            CUSTOM=False,
            BLOCK_N=BLOCK_N,
            D=D,
            STAGES=STAGES,
        )

    # The new tokens, few, belong to the last split.
    end = _high(token_last, new, CAUSAL, CUSTOM, CUT)
    end = tl.where(split == last_split, end, 0)
    start = 0
    low = tl.zeros([ROWS], tl.int32)
    if WINDOW > 0:
        start = tl.maximum(token_first - WINDOW, 0)
        low = tl.maximum(token - WINDOW, 0)
    acc, row_max, row_sum = _split_blocks(
        acc,
        row_max,
        row_sum,
        q,
        start,
        end,
        start,
        end,
        low,
        _high(token, new, CAUSAL, CUSTOM, CUT),
        k_ptr + q_first.to(tl.int64) * k_stride + kv_head * k_head_stride,
        v_ptr + q_first.to(tl.int64) * v_stride + kv_head * v_head_stride,
        k_stride,
        v_stride,
        kv_indices_ptr,
        mask_ptr + cached,
        mask_row,
        scale,
        GATHER=False,
        MASKED=True,
        CUSTOM=CUSTOM,
        BLOCK_N=EXTEND_N,
        D=D,
        STAGES=1,
    )

    inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    result = acc * inverse[None, :]
    if PARTIAL:
        lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.math.log2(row_sum))
        tl.store(lse_ptr + partial_row, lse, mask=used)
        tl.store(o_ptr + (partial_row * D)[None, :] + value[:, None], result, mask=used[None, :])
    else:
        o_pointers = o_ptr + (q_row * o_stride + head * o_head_stride)[None, :] + value[:, None]
        tl.store(o_pointers, result.to(o_ptr.dtype.element_ty), mask=used[None, :])


@triton.jit(do_not_specialize=["rows_in_all", "batch"])
def _combine_kernel(
    partial_ptr,  # fp32 [SPLITS, T, HEADS, D], each normalised by its own sum
    lse_ptr,  # fp32 [SPLITS, T, HEADS]
    o_ptr,
    rows_in_all,
    batch,
    qo_indptr_ptr,
    o_stride: tl.constexpr,
    o_head_stride: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The splits' results, weighted by their sums. Splits without a key of the row are not read."""
    q_row = tl.program_id(0).to(tl.int64)
    if q_row >= tl.load(qo_indptr_ptr + batch).to(tl.int64):
        return  # padding beyond the last sequence
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    value = tl.arange(0, D)
    step = rows_in_all.to(tl.int64) * HEADS
    first = q_row * HEADS + head
    lse = tl.load(lse_ptr + split * step + first)
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.math.exp2(lse - top), 0)
    last = tl.max(tl.where(lse > float("-inf"), split + 1, 0), 0)
    acc = tl.zeros([D], tl.float32)
    for s in tl.range(0, last, num_stages=3):
        weight = tl.math.exp2(tl.load(lse_ptr + s * step + first) - top)
        part = tl.load(partial_ptr + (s * step + first) * D + value)
        acc += tl.where(weight > 0.0, weight * part, 0.0)
    result = acc / tl.where(total == 0.0, 1.0, total)
    o_pointers = o_ptr + q_row * o_stride + head * o_head_stride + value
    tl.store(o_pointers, result.to(o_ptr.dtype.element_ty))
