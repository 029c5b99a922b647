"""Gemma 4's router for a few tokens in one launch: product, top-k, softmax and scale.

With x the router's normed input, w its weight, s the scale of each expert::

    logits[t, e]  = round(sum_j x[t, j] w[e, j])
    ids[t]        = the K greatest of logits[t], of equal ones the lower expert first
    weights[t, k] = exp(y[k] - max(y)) / sum_k exp(y[k] - max(y)) * s[ids[t, k]],  y = logits[t, ids[t]]

Sums and weights are fp32; the order of logits is that of their bits: -0 below +0, a NaN above infinity,
one with its sign bit set below minus infinity. It is the router of SGLang 0.5.13 and later (sglang's
gemma4_routing.py), where cuBLAS computes the logits in one or two launches and a sort of all experts
follows in another.

A program computes one expert's logits: a row of w is 5.6 KB for 26B-A4B, and 128 experts are a program
on nearly every multiprocessor. It holds its row in registers before it waits for x. The last program to
arrive routes all tokens, so that nobody waits for another launch. Its K rounds of a maximum need no sort.

Bounds: of a logit, a rounding of its dtype and fp32's error of a sum of H terms, as cuBLAS has; ids are
those of these logits exactly; of a weight, fp32's error of a sum of K terms. A token's bits do not depend
on the others in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.interpreted import to_float
from gemma4_turbo.kernels.rounding import round_to
from gemma4_turbo.kernels.routing import route

MAX_TOKENS = 8
MAX_TOPK = 16
MAX_EXPERTS = 1024
MAX_HIDDEN = 8192
DTYPES = (torch.bfloat16, torch.float16)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 1024  # numbers of a row at once: 16 bytes in each of 128 threads
WARPS = 4


class Routed(NamedTuple):
    """What a launch computes."""

    logits: torch.Tensor  # [T, E] in the dtype of x
    weights: torch.Tensor  # [T, K] fp32
    ids: torch.Tensor  # [T, K] int32


@triton.jit(do_not_specialize=["tokens"])
def _router_few_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    logits_ptr,
    weights_ptr,
    ids_ptr,
    arrived_ptr,
    tokens,
    stride_x,
    stride_w,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,  # power of two >= tokens
    BLOCK_E: tl.constexpr,
    P: tl.constexpr,  # power of two >= K
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter
):
    pdl.launch_dependents(PDL)
    expert = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    w_ptr += expert.to(tl.int64) * stride_w
    # Both as tuples, all loads before the first use. The weight's do not wait for another kernel.
    w = ()
    for i in tl.static_range(0, H, BLOCK):
        if i + BLOCK <= H:
            w = w + (tl.load(w_ptr + i + j),)
        else:
            w = w + (tl.load(w_ptr + i + j, mask=i + j < H, other=0.0),)
    pdl.wait(PDL)
    x = ()
    for t in tl.static_range(BLOCK_T):
        # A token past the last one repeats it, and is not stored.
        row_ptr = x_ptr + tl.minimum(t, tokens - 1).to(tl.int64) * stride_x
        for i in tl.static_range(0, H, BLOCK):
            if i + BLOCK <= H:
                x = x + (tl.load(row_ptr + i + j),)
            else:
                x = x + (tl.load(row_ptr + i + j, mask=i + j < H, other=0.0),)
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    for t in tl.static_range(BLOCK_T):
        products = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(BLOCKS):
            products += to_float(w[i], PTX) * to_float(x[t * BLOCKS + i], PTX)
        logit = round_to(tl.sum(products, axis=0), logits_ptr.dtype.element_ty, PTX)
        tl.store(logits_ptr + t * E + expert, logit, mask=t < tokens)
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if before == E - 1:
        tl.store(arrived_ptr, 0)  # for the next launch
        route(
            logits_ptr, scale_ptr, weights_ptr, ids_ptr, tokens, E, K, BLOCK_T, BLOCK_E, P, PTX
        )  # fmt: skip


INTERPRETED = not isinstance(_router_few_kernel, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def unfit(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, topk: int) -> str | None:
    """Why `router_few` does not take these arguments, or None. Host checks only."""
    if weight.dim() != 2 or weight.stride(1) != 1 or weight.dtype not in DTYPES:
        return f"weight must be [E, H] bf16 or fp16 with contiguous rows, got {tuple(weight.shape)} {weight.dtype}"
    experts, hidden = weight.shape
    if not 1 <= experts <= MAX_EXPERTS or not 8 <= hidden <= MAX_HIDDEN or hidden % 8:
        return (
            f"weight must be [up to {MAX_EXPERTS}, a multiple of 8 up to {MAX_HIDDEN}], "
            f"got {tuple(weight.shape)}"
        )
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] != hidden or x.dtype != weight.dtype:
        return f"x must be [T, {hidden}] {weight.dtype} with contiguous rows, got {tuple(x.shape)} {x.dtype}"
    if x.shape[0] > MAX_TOKENS:
        return f"x must have at most {MAX_TOKENS} rows, got {x.shape[0]}"
    if scale.shape != (experts,) or scale.stride(0) != 1 or scale.dtype not in SCALE_DTYPES:
        return f"scale must be a contiguous [{experts}] in {SCALE_DTYPES}, got {tuple(scale.shape)} {scale.dtype}"
    if not 1 <= topk <= min(experts, MAX_TOPK):
        return f"topk must be 1 to {min(experts, MAX_TOPK)}, got {topk}"
    for name, tensor in (("weight", weight), ("scale", scale)):
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    if not (INTERPRETED or x.is_cuda):
        return f"x must be on a CUDA device, got {x.device}"
    if x.stride(0) % 8 or weight.stride(0) % 8 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return "x and weight must be aligned to 16 bytes"
    return None


def router_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    topk: int,
    arrived: torch.Tensor | None = None,
) -> Routed:
    """The equations of this module.

    Args:
        x: ``[T, H]``, bf16 or fp16, contiguous rows, T up to `MAX_TOKENS`, may be 0.
        weight: ``[E, H]`` in the same dtype, contiguous rows.
        scale: ``[E]``, bf16, fp16 or fp32.
        topk: K, up to `MAX_TOPK`.
        arrived: a zero, int32; left as zero. No two launches that may run at the same time share one.
            None: made here.

    Returns:
        Logits, weights and ids.

    Raises:
        ValueError: naming the argument.
    """
    reason = unfit(x, weight, scale, topk)
    if (
        reason is None
        and arrived is not None
        and (arrived.dtype != torch.int32 or not arrived.numel())
    ):
        reason = f"arrived must be int32, got {tuple(arrived.shape)} {arrived.dtype}"
    if reason is not None:
        raise ValueError(reason)
    if arrived is None:
        arrived = torch.zeros(1, dtype=torch.int32, device=x.device)
    return launch_router_few(x, weight, scale, topk, arrived)


def launch_router_few(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, topk: int, arrived: torch.Tensor
) -> Routed:
    """`router_few` without its checks."""
    tokens, (experts, hidden) = x.shape[0], weight.shape
    found = Routed(
        x.new_empty((tokens, experts)),
        x.new_empty((tokens, topk), dtype=torch.float32),
        x.new_empty((tokens, topk), dtype=torch.int32),
    )
    if tokens == 0:
        return found
    _router_few_kernel[(experts,)](
        x,
        weight,
        scale,
        *found,
        arrived,
        tokens,
        x.stride(0),
        weight.stride(0),
        H=hidden,
        E=experts,
        K=topk,
        BLOCK_T=1 << (tokens - 1).bit_length(),
        BLOCK_E=1 << (experts - 1).bit_length(),
        P=1 << (topk - 1).bit_length(),
        BLOCK=BLOCK,
        PTX=not INTERPRETED,
        num_warps=WARPS,
        **pdl.options(x),
    )
    return found


def reference_router_few(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, topk: int
) -> Routed:
    """The equations in plain torch: the logits are `torch.nn.functional.linear`'s."""
    logits = torch.nn.functional.linear(x, weight)
    return Routed(logits, *reference_routing(logits, scale, topk))


def reference_routing(
    logits: torch.Tensor, scale: torch.Tensor, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of bf16 or fp16 logits."""
    bits = logits.view(torch.int16).long()
    order = bits ^ ((bits >> 15) & 0x7FFF)
    ids = order.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    y = logits.gather(1, ids).float()
    # A maximum of Triton's leaves NaN out.
    highest = y.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(
        1, keepdim=True
    )
    exps = torch.exp(y - highest)
    total = exps.sum(1, keepdim=True)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return exps / total * scale.float()[ids], ids.int()
