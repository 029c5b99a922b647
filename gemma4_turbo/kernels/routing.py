"""Gemma 4's routing of logits that lie in memory, within one program: for every kernel that makes them.

The order of logits is that of their bits: -0 below +0, a NaN above infinity, one with its sign bit set
below minus infinity; of equal ones the lower expert comes first. K rounds of a maximum need no sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4_turbo.kernels.interpreted import to_float


@triton.jit
def route(
    logits_ptr, scale_ptr, weights_ptr, ids_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, P: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """All tokens at once, a row of logits for each."""
    LOWEST: tl.constexpr = -2147483648
    token = tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, P)
    x = tl.load(
        logits_ptr + token[:, None] * E + expert[None, :],
        mask=(token[:, None] < tokens) & (expert[None, :] < E), other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    # Signed integers in the order of the logits, the expert below: all are different.
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    key = ((bits ^ ((bits >> 15) & 0x7FFF)) << 16) | (BLOCK_E - 1 - expert)[None, :]
    key = tl.where(expert[None, :] < E, key, LOWEST)
    best = tl.zeros([BLOCK_T, P], tl.int32)
    for k in tl.static_range(K):
        top = tl.max(key, axis=1)
        key = tl.where(key == top[:, None], LOWEST, key)
        best = tl.where(slot[None, :] == k, top[:, None], best)
    taken = slot[None, :] < K
    ids = BLOCK_E - 1 - (best & 0xFFFF)
    bits = best >> 16
    y = to_float((bits ^ ((bits >> 15) & 0x7FFF)).to(tl.int16).to(x.dtype, bitcast=True), PTX)
    highest = tl.max(tl.where(taken, y, float("-inf")), axis=1)
    exps = tl.where(taken, tl.exp(y - highest[:, None]), 0.0)
    # One by one: the order of a plain sum depends on how the tokens lie in the lanes.
    total = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(K):
        total += tl.sum(tl.where(slot[None, :] == k, exps, 0.0), axis=1)
    total = tl.where(total > 0.0, total, 1.0)  # as stock: a NaN divides nothing
    scale = to_float(tl.load(scale_ptr + ids, mask=taken, other=1.0), PTX)
    weights = exps / total[:, None] * scale
    out = token[:, None] * K + slot[None, :]
    inside = taken & (token[:, None] < tokens)
    tl.store(weights_ptr + out, weights, mask=inside)
    tl.store(ids_ptr + out, ids, mask=inside)
