"""Gemma 4's expert routing in one launch, with the bits of the eager path.

For each token, with ``x`` its router logits and ``s`` the per-expert scale::

    ids     = topk(x, K)                                  # CUDA's order, ties included
    weights = round(softmax(x[ids])) * round(s[ids])      # rounded to x.dtype after each step
    return float32(weights), int32(ids)

Eager PyTorch needs seven launches for this. `reference_routing` is that eager path.

How equality is reached (PyTorch's CUDA sources TensorTopK.cu, Sort.cu, SortingCommon.cuh,
bitonicSort.cuh and PersistentSoftmax.cuh are the specification; the code here is our own):

* ``torch.topk`` with one block per row first gathers the elements greater than the K-th value
  in index order, then those equal to it in index order until K are there. It compares bit
  patterns, so -0 < +0, and every NaN counts as the greatest.
* For K <= 32 it then runs an unstable bitonic sort over 32 slots. That sort compares floats, so
  -0 == +0. Ties leave it in an order that is fixed but is not index order, and the sum over
  experts depends on it. With P the power of two that holds K, slots beyond P never take part,
  so the network is: sort P slots, then merge them again once for every doubling from 2P to 32.
* ``softmax`` over at most 32 elements runs in fp32 within one warp: subtract the maximum,
  accurate ``expf``, butterfly sum (offsets P/2 .. 1), IEEE division, round to the input dtype.
* ``expf`` is written in PTX: Triton builds libdevice with flush-to-zero and PyTorch is built
  without, so a libdevice call would lose the subnormal results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.rounding import round_to

MAX_EXPERTS = 512
MAX_TOPK = 32
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@triton.jit
def _put(regs, i: tl.constexpr, value):
    return regs[:i] + (value,) + regs[i + 1 :]


@triton.jit
def _swap_if(regs, i: tl.constexpr, j: tl.constexpr, swap):
    a = regs[i]
    b = regs[j]
    regs = _put(regs, i, tl.where(swap, b, a))
    return _put(regs, j, tl.where(swap, a, b))


@triton.jit
def _expf(x, PTX: tl.constexpr):
    # The range reduction is that of CUDA's expf without fast math: 2**i by exponent bits, i
    # clamped to [-126, 126], and a last multiplication that keeps subnormals.
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 shifted, reduced, power;
            .reg .b32 exponent;
            fma.rn.f32 shifted, $1, 0f3BBB989D, 0f3F000000;
            cvt.sat.f32.f32 shifted, shifted;
            fma.rm.f32 shifted, shifted, 0f437C0000, 0f4B400001;
            add.f32 reduced, shifted, 0fCB40007F;
            neg.f32 reduced, reduced;
            fma.rn.f32 reduced, $1, 0f3FB8AA3B, reduced;
            fma.rn.f32 reduced, $1, 0f32A57060, reduced;
            mov.b32 exponent, shifted;
            shl.b32 exponent, exponent, 23;
            mov.b32 power, exponent;
            ex2.approx.ftz.f32 reduced, reduced;
            mul.f32 $0, reduced, power;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.exp(x)


@triton.jit
def _exchange(
    keys, ids, lo: tl.constexpr, hi: tl.constexpr, flag: tl.constexpr, PACKED: tl.constexpr
):
    # Equal keys are exchanged when flag is false: that is what makes the sort unstable.
    if PACKED:
        swap = (keys[lo] > (keys[hi] | 0xFFFF)) == flag
    else:
        swap = (keys[lo] > keys[hi]) == flag
        ids = _swap_if(ids, lo, hi, swap)
    return _swap_if(keys, lo, hi, swap), ids


@triton.jit
def _pass(
    keys, ids, STRIDE: tl.constexpr, FLAG: tl.constexpr, P: tl.constexpr, PACKED: tl.constexpr
):
    for t in tl.static_range(P // 2):
        keys, ids = _exchange(
            keys,
            ids,
            2 * t - (t & (STRIDE - 1)),
            2 * t - (t & (STRIDE - 1)) + STRIDE,
            (t & FLAG) != 0,
            PACKED,
        )
    return keys, ids


@triton.jit
def _routing_kernel(
    router_logits_ptr,
    per_expert_scale_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    stride_token,
    stride_expert,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
    P: tl.constexpr,  # power of two >= K
    LOG_P: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter, which has no inline assembly
):
    """One program a token. After the K maxima everything is scalar, so no lane waits for another."""
    pdl.launch_dependents(PDL)
    pdl.wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    x = tl.load(
        router_logits_ptr + token * stride_token + expert * stride_expert,
        mask=expert < E,
        other=0.0,
    )
    LOWEST: tl.constexpr = -2147483648
    # 16-bit logits: value and expert share one int32, value in the upper half.
    PACKED: tl.constexpr = x.dtype != tl.float32

    # Signed integers in the order of PyTorch's radix select.
    if PACKED:
        INFINITY: tl.constexpr = 0x7F80 if x.dtype == tl.bfloat16 else 0x7C00
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        is_nan = (bits & 0x7FFF) > INFINITY
        key = tl.where(is_nan, 0x7FFF, bits ^ ((bits >> 15) & 0x7FFF))
        key = (key << 16) | (BLOCK_E - 1 - expert)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key = tl.where(expert < E, key, LOWEST)

    # The K greatest, lower index first among equals.
    keys = ()
    ids = ()
    for _ in tl.static_range(K):
        top = tl.max(key, axis=0)
        if PACKED:
            key = tl.where(key == top, LOWEST, key)
            keys = keys + (top >> 16,)
            ids = ids + (BLOCK_E - 1 - (top & 0xFFFF),)
        else:
            at = tl.min(tl.where(key == top, expert, BLOCK_E), axis=0)
            key = tl.where(expert == at, LOWEST, key)
            keys = keys + (top,)
            ids = ids + (at,)

    # Gather order: those above the K-th value by index, then those equal to it by index.
    rank = ()
    for j in tl.static_range(K):
        r = ids[j] + tl.where(keys[j] > keys[K - 1], 0, BLOCK_E)
        if PACKED:
            r = (r << 16) | (keys[j] & 0xFFFF)
        rank = rank + (r,)
    for i in tl.static_range(K - 1):
        for j in tl.static_range(K - 1 - i):
            if PACKED:
                lower = tl.minimum(rank[j], rank[j + 1])
                upper = tl.maximum(rank[j], rank[j + 1])
                rank = _put(_put(rank, j, lower), j + 1, upper)
            else:
                swap = rank[j] > rank[j + 1]
                rank = _swap_if(rank, j, j + 1, swap)
                keys = _swap_if(keys, j, j + 1, swap)

    # The sort compares floats: the key of -0, which is -1, becomes that of +0.
    for j in tl.static_range(K):
        if PACKED:
            k = (rank[j] << 16) | ((rank[j] >> 16) & (BLOCK_E - 1))
            keys = _put(keys, j, tl.where((k >> 16) == -1, k & 0xFFFF, k))
        else:
            keys = _put(keys, j, tl.where(keys[j] == -1, 0, keys[j]))
            ids = _put(ids, j, rank[j] & (BLOCK_E - 1))
    for _j in tl.static_range(K, P):
        keys = keys + (tl.full([], LOWEST, tl.int32),)
        ids = ids + (tl.full([], 0, tl.int32),)
    for size in tl.static_range(1, 6):
        for s in tl.static_range(min(size, LOG_P)):
            keys, ids = _pass(
                keys, ids, 2 ** (min(size, LOG_P) - 1 - s), 2 ** (size - 1), P, PACKED
            )

    # Softmax over the K, element 0 being the maximum (or a NaN, which makes the row NaN).
    logits = ()
    exps = ()
    for j in tl.static_range(K):
        k = keys[j]
        if PACKED:
            k = k >> 16
            bits16 = (k ^ ((k >> 15) & 0x7FFF)).to(tl.int16)
            logits = logits + (bits16.to(x.dtype, bitcast=True).to(tl.float32),)
        else:
            logits = logits + ((k ^ ((k >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True),)
        exps = exps + (_expf(logits[j] - logits[0], PTX),)
    total = exps
    for _j in tl.static_range(K, P):
        total = total + (0.0,)
    for s in tl.static_range(LOG_P):
        for j in tl.static_range(2 ** (LOG_P - 1 - s)):
            total = _put(total, j, total[j] + total[j + 2 ** (LOG_P - 1 - s)])

    slot = tl.arange(0, P)
    weights = tl.zeros([P], tl.float32)
    topk_ids = tl.zeros([P], tl.int32)
    for j in tl.static_range(K):
        weights = tl.where(slot == j, exps[j], weights)
        if PACKED:
            topk_ids = tl.where(slot == j, keys[j] & 0xFFFF, topk_ids)
        else:
            topk_ids = tl.where(slot == j, ids[j], topk_ids)
    # Through fp32 on purpose: that is how PyTorch narrows a double to bf16 or fp16.
    scale = round_to(tl.load(per_expert_scale_ptr + topk_ids).to(tl.float32), x.dtype, PTX)
    weights = round_to(tl.div_rn(weights, total[0]), x.dtype, PTX)
    weights = round_to(weights.to(tl.float32) * scale.to(tl.float32), x.dtype, PTX)
    out = token * K + slot
    tl.store(topk_weights_ptr + out, weights.to(tl.float32), mask=slot < K)
    tl.store(topk_ids_ptr + out, topk_ids, mask=slot < K)


INTERPRETED = not isinstance(_routing_kernel, triton.JITFunction)
"""True when this module was imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def unfit(router_logits: torch.Tensor, per_expert_scale: torch.Tensor, topk: int) -> str | None:
    """Why `fused_routing` does not take these arguments, or None if it does.

    Host checks only. The bounds on E, K and T are those within which ``torch.topk`` on CUDA
    uses one block per row and the small bitonic sort; outside them its order of ties differs.
    """
    if router_logits.dim() != 2:
        return f"router_logits must be [T, E], got {router_logits.dim()} dimensions"
    tokens, experts = router_logits.shape
    if not (INTERPRETED or (router_logits.is_cuda and torch.version.hip is None)):
        return f"router_logits must be on a CUDA device, got {router_logits.device}"
    if router_logits.dtype not in LOGIT_DTYPES:
        return f"router_logits must be bf16, fp16 or fp32, got {router_logits.dtype}"
    if per_expert_scale.shape != (experts,) or not per_expert_scale.is_contiguous():
        return f"per_expert_scale must be a contiguous [{experts}], got {tuple(per_expert_scale.shape)}"
    if per_expert_scale.dtype not in SCALE_DTYPES:
        return f"per_expert_scale must be bf16, fp16, fp32 or fp64, got {per_expert_scale.dtype}"
    if per_expert_scale.device != router_logits.device:
        return f"per_expert_scale is on {per_expert_scale.device}, router_logits on {router_logits.device}"
    if not 1 <= topk <= min(MAX_TOPK, experts):
        return f"topk must be in 1..{min(MAX_TOPK, experts)}, got {topk}"
    if experts > MAX_EXPERTS or (experts >= 300 and tokens >= 800):
        return f"router_logits has {tokens} x {experts} elements: torch.topk may take another path"
    if torch.is_grad_enabled() and (router_logits.requires_grad or per_expert_scale.requires_grad):
        return "router_logits or per_expert_scale requires a gradient"
    return None


def fused_routing(
    router_logits: torch.Tensor, per_expert_scale: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k, softmax over the k, per-expert scale and both casts in one launch. Bitwise.

    Args:
        router_logits: ``[T, E]``, bf16, fp16 or fp32, any strides, T may be 0.
        per_expert_scale: ``[E]``, contiguous, bf16, fp16, fp32 or fp64.
        topk: K, at most 32 and at most E.

    Returns:
        ``topk_weights`` ``[T, K]`` float32 and ``topk_ids`` ``[T, K]`` int32, with the bits of
        `reference_routing` on CUDA, the order of equal logits included.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(router_logits, per_expert_scale, topk)
    if reason is not None:
        raise ValueError(reason)
    return launch_routing(router_logits, per_expert_scale, topk)


def launch_routing(
    router_logits: torch.Tensor, per_expert_scale: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fused_routing` without its checks, for callers that have asked `unfit`."""
    tokens, experts = router_logits.shape
    topk_weights = router_logits.new_empty((tokens, topk), dtype=torch.float32)
    topk_ids = router_logits.new_empty((tokens, topk), dtype=torch.int32)
    if tokens:
        slots = triton.next_power_of_2(topk)
        _routing_kernel[(tokens,)](
            router_logits,
            per_expert_scale,
            topk_weights,
            topk_ids,
            router_logits.stride(0),
            router_logits.stride(1),
            E=experts,
            K=topk,
            BLOCK_E=triton.next_power_of_2(experts),
            P=slots,
            LOG_P=slots.bit_length() - 1,
            PTX=not INTERPRETED,
            num_warps=1,
            **pdl.options(router_logits),
        )
    return topk_weights, topk_ids


def reference_routing(
    router_logits: torch.Tensor, per_expert_scale: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The eager path, step by step. Shapes and dtypes as `fused_routing`.

    On CUDA this is what stock SGLang computes, bit for bit. On CPU ``torch.topk`` orders equal
    logits differently: use `gemma4_turbo.kernels.topk_order.cuda_topk_ids` there.
    """
    top, ids = router_logits.topk(topk, dim=-1)
    weights = top.softmax(dim=-1)
    weights = weights * per_expert_scale[ids].to(router_logits.dtype)
    return weights.float(), ids.int()
