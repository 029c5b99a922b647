"""A mixture-of-experts layer's feed-forward of a few tokens in one launch: router, dense MLP and experts.

With a, b, c the normed inputs of the dense MLP, the router and the experts::

    logits[t, e]       = round(sum_j b[t, j] r[e, j])
    ids, weights       = the routing of `gemma4_turbo.kernels.router_few`
    d[t, m]            = round(gelu_tanh(round(sum_j a[t, j] g[m, j])) * round(sum_j a[t, j] g[m + M, j]))
    mlp_output[t, i]   = round(sum_m d[t, m] w[i, m])
    experts_output[t]  = the sum of `gemma4_turbo.kernels.experts_few` over ids[t] with weights[t]

Sums are in fp32, roundings are stock's; the order of the long sums is not cuBLAS's: `tolerance`. A token's
bits are the same at every run and whatever else is in the batch.

One token of 26B-A4B reads 131 MB here, 30 us at the rate of an H200's memory. In five launches and two
streams each product ramps up and drains for itself, and nothing is read while the router waits for its last
sum. Here a program is a warp with a few rows of one of the matrices, in this order: the router's rows, gate
and up of the dense MLP, gate and up of the chosen experts, down of the dense MLP, down of the experts. A
program that needs what others compute waits for a count (`gemma4_turbo.kernels.dataflow`). The last program
sets the counts to zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import dataflow, experts_few, pdl, router_few, skinny_gemm
from gemma4_turbo.kernels.dataflow import (
    APART,
    Product,
    count_one,
    dense_down,
    dense_gated,
    or_nan,
    product_of,
    wait_for,
)
from gemma4_turbo.kernels.gelu import gelu_erf
from gemma4_turbo.kernels.matvec import LANES, VECTOR, gated, inside, load, over_lanes, summed
from gemma4_turbo.kernels.rounding import round_to, rounded
from gemma4_turbo.kernels.routing import route

MAX_TOKENS = 4

READERS = 8
"""Lines that say the same, so that not all programs ask for one."""
ROUTER, ROUTED, DENSE, ENDED, CHOSEN = (APART * line for line in range(5))
READY = CHOSEN + APART * MAX_TOKENS
EXPERTS = READY + APART * MAX_TOKENS * READERS
COUNTS = EXPERTS + APART * MAX_TOKENS * max(experts_few.CHOICES)
"""Numbers that are zero between launches: how many of the router's programs have ended, whether the tokens
are routed, programs of the dense gate and up, programs that nobody waits for, programs of the experts' gate
and up of each token, whether these are all, and for each choice of a token one more than its expert."""


# Nothing but the number itself is read.
READ: tl.constexpr = tl.constexpr("""{
.reg .pred there;
.reg .b32 number;
again:
ld.relaxed.gpu.global.b32 number, [$1];
setp.ne.s32 there, number, 0;
@there bra done;
nanosleep.u32 64;
bra again;
done:
mov.b32 $0, number;
}""")


class Tiles(NamedTuple):
    """How the work is cut."""

    router: Product
    dense: Product  # gate and up of the dense MLP
    chosen: Product  # gate and up of the experts
    dense_down: Product
    chosen_down: Product  # ``rows`` choices of each row


TILES = Tiles(
    Product(1, 4, 256),
    Product(2, 1, 256),
    Product(4, 1, 256),
    Product(4, 1, 256),
    Product(8, 1, 128),
)
"""The best for one token and for two on an H200 (`bench/feed_forward_few.py`). One for both: lines and blocks
make the order of addition, and a token's bits would depend on the number of tokens."""


class Found(NamedTuple):
    """What a launch computes."""

    mlp_output: torch.Tensor  # [T, H] in the dtype of the inputs
    experts_output: torch.Tensor  # likewise
    routed: router_few.Routed


@triton.jit
def _expert_of(number_ptr, PTX: tl.constexpr):
    """Once it is known. In the interpreter negative if it is not."""
    if PTX:
        number = tl.inline_asm_elementwise(
            READ, "=r,l", [number_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        number = tl.load(number_ptr)
    return number - 1


@triton.jit
def _router(
    x_ptr, stride_x, tokens, w_ptr, scale_ptr, logits_ptr, weights_ptr, ids_ptr, counts_ptr, tile,
    TILES: tl.constexpr, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
    BLOCK_E: tl.constexpr, P: tl.constexpr, ACROSS: tl.constexpr, REPEAT: tl.constexpr, LINE: tl.constexpr,
    ROUTER: tl.constexpr, ROUTED: tl.constexpr, EXPERTS: tl.constexpr,
    APART: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Some experts' logits; the last of these programs routes."""
    sums = product_of(
        x_ptr, stride_x, tokens, w_ptr, tile, counts_ptr, 0, E, H, T, 1, REPEAT, ACROSS, LINE, False, PDL, PTX,
    )  # fmt: skip
    token = tl.arange(0, T)[:, None]
    expert = tile * ACROSS + tl.arange(0, ACROSS)[None, :]
    logits = round_to(sums, logits_ptr.dtype.element_ty, PTX)
    tl.store(logits_ptr + token * E + expert, logits, mask=(token < tokens) & (expert < E))
    if count_one(counts_ptr + ROUTER, "acq_rel") == TILES - 1:
        route(logits_ptr, scale_ptr, weights_ptr, ids_ptr, tokens, E, K, T, BLOCK_E, P, PTX)
        tl.debug_barrier()
        slot = tl.arange(0, T)[:, None] * K + tl.arange(0, P)[None, :]
        taken = (slot < tokens * K) & (tl.arange(0, P)[None, :] < K)
        numbers = tl.load(ids_ptr + slot, mask=taken, other=0) + 1
        experts_ptr = counts_ptr + EXPERTS + slot * APART
        tl.atomic_xchg(experts_ptr, numbers, mask=taken, sem="relaxed")
        count_one(counts_ptr + ROUTED, "release")


@triton.jit
def _chosen(
    x_ptr, stride_x, w_ptr, h_ptr, expert_ptr, slot, tile,
    N: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
    REPEAT: tl.constexpr, LINE: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """An expert's activations, some columns of one token."""
    pdl.wait(PDL)
    expert = _expert_of(expert_ptr, PTX)
    there = expert >= 0
    expert = tl.maximum(expert, 0).to(tl.int64)
    x_ptr += (slot // K).to(tl.int64) * stride_x
    w_ptr += expert * (2 * N * H)
    gate, up = gated(x_ptr, 0, 1, w_ptr, tile, N, H, 1, ROWS, REPEAT, ACROSS, LINE, PDL, PTX)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    gate = or_nan(gate, there, PTX)
    h = gelu_erf(rounded(gate, dtype, PTX)) * rounded(up, dtype, PTX)
    n = (
        tile * (ROWS * ACROSS)
        + tl.arange(0, ROWS)[:, None] * ACROSS
        + tl.arange(0, ACROSS)[None, :]
    )
    tl.store(h_ptr + slot * N + n, round_to(h, dtype, PTX), mask=n < N)


@triton.jit
def _chosen_down(
    h_ptr, w_ptr, ids_ptr, weights_ptr, out_ptr, routed_ptr, ready_ptr, token, tile, steps,
    H: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, ACROSS: tl.constexpr,
    REPEAT: tl.constexpr, LINE: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The experts' output, some columns of one token, summed from the first choice to the last."""
    SIDE: tl.constexpr = ACROSS * LINE
    STEP: tl.constexpr = REPEAT * LINE
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    side = tl.arange(0, SIDE)[None, None, :]
    n = tl.arange(0, REPEAT)[None, :, None] * LINE + side % LINE
    row = inside(tile * ACROSS + side // LINE, H, ACROSS)
    pdl.wait(PDL)
    there = wait_for(routed_ptr, 1, PTX)
    total = tl.zeros([ACROSS], tl.float32)
    for first in tl.static_range(0, K, GROUP):
        slot = token * K + first + tl.arange(0, GROUP)[:, None, None]
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        at = w_ptr + expert * (H * N) + (row * N + n)
        w = load(at, n, N, N % STEP != 0)
        if first == 0:
            there = there & wait_for(ready_ptr, 1, PTX)
        h_at = h_ptr + (slot * N + n)
        sums = summed(w, at, h_at, n, steps, N, GROUP, REPEAT, SIDE, STEP, PTX)
        factor = tl.load(weights_ptr + token * K + first + tl.arange(0, GROUP)[:, None])
        y = rounded(over_lanes(sums, GROUP, ACROSS, LINE) * factor, dtype, PTX)
        choice = tl.arange(0, GROUP)[:, None]
        for j in tl.static_range(GROUP):
            total += tl.sum(tl.where(choice == j, y, 0.0), axis=0)
    total = or_nan(total, there, PTX)
    i = tile * ACROSS + tl.arange(0, ACROSS)
    tl.store(out_ptr + token * H + i, round_to(total, dtype, PTX), mask=i < H)


# Were the few steps known to the compiler, it would unroll them and put loads behind products.
@triton.jit(do_not_specialize=["tokens", "steps"])
def _feed_forward_few_kernel(
    mlp_input_ptr, router_input_ptr, experts_input_ptr,  # [T, H]
    gate_up_ptr, down_ptr,  # [2 M, H], [H, M]
    router_ptr, scale_ptr,  # [E, H], [E]
    w13_ptr, w2_ptr,  # [E, 2 N, H], [E, H, N]
    mlp_output_ptr, experts_output_ptr,  # [T, H]
    logits_ptr, weights_ptr, ids_ptr,  # [T, E], [T, K], [T, K]
    dense_ptr, chosen_ptr,  # [T, M], [T * K, N]
    counts_ptr, tokens, stride_mlp, stride_router, stride_experts,
    steps,  # of the columns of an expert's down projection
    H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr,  # power of two >= tokens
    BLOCK_E: tl.constexpr, P: tl.constexpr,  # powers of two >= E and K
    ROUTER_REPEAT: tl.constexpr, ROUTER_LINE: tl.constexpr,
    DENSE_ROWS: tl.constexpr, DENSE_REPEAT: tl.constexpr, DENSE_LINE: tl.constexpr,
    CHOSEN_ROWS: tl.constexpr, CHOSEN_REPEAT: tl.constexpr, CHOSEN_LINE: tl.constexpr,
    DOWN_ROWS: tl.constexpr, DOWN_REPEAT: tl.constexpr, DOWN_LINE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_REPEAT: tl.constexpr, GROUP_LINE: tl.constexpr,
    LANES: tl.constexpr,
    ROUTER: tl.constexpr, ROUTED: tl.constexpr, DENSE: tl.constexpr, ENDED: tl.constexpr,
    CHOSEN: tl.constexpr, READY: tl.constexpr, EXPERTS: tl.constexpr, COUNTS: tl.constexpr,
    APART: tl.constexpr, READERS: tl.constexpr,
    BLOCK_LINES: tl.constexpr,  # power of two >= COUNTS / APART
    PDL: tl.constexpr,
    PTX: tl.constexpr,  # False in Triton's interpreter
):  # fmt: skip
    pdl.launch_dependents(PDL)
    SIDE: tl.constexpr = LANES * 8
    ROUTER_ACROSS: tl.constexpr = SIDE // ROUTER_LINE
    DENSE_ACROSS: tl.constexpr = SIDE // DENSE_LINE
    CHOSEN_ACROSS: tl.constexpr = SIDE // CHOSEN_LINE
    DOWN_ACROSS: tl.constexpr = SIDE // DOWN_LINE
    GROUP_ACROSS: tl.constexpr = SIDE // GROUP_LINE
    # Programs of each kind; those of the experts for each choice, or for each token.
    ROUTER_TILES: tl.constexpr = (E + ROUTER_ACROSS - 1) // ROUTER_ACROSS
    DENSE_TILES: tl.constexpr = (M + DENSE_ROWS * DENSE_ACROSS - 1) // (DENSE_ROWS * DENSE_ACROSS)
    CHOSEN_TILES: tl.constexpr = (N + CHOSEN_ROWS * CHOSEN_ACROSS - 1) // (
        CHOSEN_ROWS * CHOSEN_ACROSS
    )
    DOWN_TILES: tl.constexpr = (H + DOWN_ROWS * DOWN_ACROSS - 1) // (DOWN_ROWS * DOWN_ACROSS)
    GROUP_TILES: tl.constexpr = (H + GROUP_ACROSS - 1) // GROUP_ACROSS
    FIRST: tl.constexpr = ROUTER_TILES + DENSE_TILES
    number = tl.program_id(0)
    slots = tokens * K
    if number < ROUTER_TILES:
        _router(
            router_input_ptr, stride_router, tokens, router_ptr, scale_ptr, logits_ptr, weights_ptr, ids_ptr,
            counts_ptr, number, ROUTER_TILES, H, E, K, BLOCK_T, BLOCK_E, P, ROUTER_ACROSS, ROUTER_REPEAT,
            ROUTER_LINE, ROUTER, ROUTED, EXPERTS, APART, PDL, PTX,
        )  # fmt: skip
    elif number < FIRST:
        dense_gated(
            mlp_input_ptr, stride_mlp, tokens, gate_up_ptr, dense_ptr, number - ROUTER_TILES,
            M, H, BLOCK_T, DENSE_ROWS, DENSE_ACROSS, DENSE_REPEAT, DENSE_LINE, PDL, PTX,
        )  # fmt: skip
        count_one(counts_ptr + DENSE, "release")
    elif number < FIRST + slots * CHOSEN_TILES:
        slot = (number - FIRST) % slots
        _chosen(
            experts_input_ptr, stride_experts, w13_ptr, chosen_ptr, counts_ptr + EXPERTS + slot * APART, slot,
            (number - FIRST) // slots, N, H, K, CHOSEN_ROWS, CHOSEN_ACROSS, CHOSEN_REPEAT, CHOSEN_LINE,
            PDL, PTX,
        )  # fmt: skip
        token = slot // K
        chosen_count_ptr = counts_ptr + CHOSEN + token * APART
        if count_one(chosen_count_ptr, "release") == K * CHOSEN_TILES - 1:
            # The last one has all that the others have stored, and hands it on.
            there = wait_for(chosen_count_ptr, K * CHOSEN_TILES, PTX)
            line = token * READERS + tl.arange(0, READERS)
            ones = tl.full([READERS], 1, tl.int32) + tl.where(there, 0, 1)  # 2: see `wait_for`
            tl.atomic_xchg(counts_ptr + READY + line * APART, ones, sem="release")
    else:
        last = number - FIRST - slots * CHOSEN_TILES
        if last < DOWN_TILES:
            dense_down(
                dense_ptr, tokens, down_ptr, mlp_output_ptr, counts_ptr + DENSE, DENSE_TILES, last,
                H, M, BLOCK_T, DOWN_ROWS, DOWN_ACROSS, DOWN_REPEAT, DOWN_LINE, PDL, PTX,
            )  # fmt: skip
        else:
            which = (last - DOWN_TILES) % tokens
            tile = (last - DOWN_TILES) // tokens
            ready_ptr = counts_ptr + READY + (which * READERS + tile % READERS) * APART
            _chosen_down(
                chosen_ptr, w2_ptr, ids_ptr, weights_ptr, experts_output_ptr, counts_ptr + ROUTED, ready_ptr,
                which, tile, steps, H, N, K, GROUP, GROUP_ACROSS, GROUP_REPEAT, GROUP_LINE, PDL, PTX,
            )  # fmt: skip
        # Each of these has read all that it waited for.
        if count_one(counts_ptr + ENDED, "relaxed") == DOWN_TILES + tokens * GROUP_TILES - 1:
            # Nobody waits any more: zeros for the next launch.
            line = tl.arange(0, BLOCK_LINES)
            zeros = tl.zeros([BLOCK_LINES], tl.int32)
            tl.store(counts_ptr + line * APART, zeros, mask=line < COUNTS // APART)


INTERPRETED = not isinstance(_feed_forward_few_kernel, triton.JITFunction)
"""True when imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


class Weights(NamedTuple):
    """Of one layer, all in one dtype but the scale."""

    gate_up: torch.Tensor  # [2 M, H], contiguous, as all
    down: torch.Tensor  # [H, M]
    router: torch.Tensor  # [E, H]
    scale: torch.Tensor  # [E], of each expert; bf16, fp16 or fp32
    w13: torch.Tensor  # [E, 2 N, H]: an expert's gate above its up projection
    w2: torch.Tensor  # [E, H, N]


class Inputs(NamedTuple):
    """Of one call: ``[T, H]`` each, with contiguous rows."""

    mlp: torch.Tensor
    router: torch.Tensor
    experts: torch.Tensor


def weights_unfit(weights: Weights, topk: int) -> str | None:
    """Why `feed_forward_few` does not take these weights, or None."""
    gate_up, router, scale, w13 = weights.gate_up, weights.router, weights.scale, weights.w13
    reason = dataflow.gate_up_unfit(gate_up)
    if reason is not None:
        return reason
    width, hidden = gate_up.shape[0] // 2, gate_up.shape[1]
    if router.dim() != 2 or router.shape[1] != hidden or not router.shape[0]:
        return f"router must be [E, {hidden}], got {tuple(router.shape)}"
    experts = router.shape[0]
    if w13.dim() != 3 or w13.shape[0] != experts or w13.shape[2] != hidden:
        return f"w13 must be [{experts}, 2 N, {hidden}], got {tuple(w13.shape)}"
    if w13.shape[1] % (2 * VECTOR) or not w13.shape[1]:
        return (
            f"w13 must be [{experts}, a multiple of {2 * VECTOR}, {hidden}], got {tuple(w13.shape)}"
        )
    shapes = {"down": (hidden, width), "w2": (experts, hidden, w13.shape[1] // 2)}
    for name, shape in shapes.items():
        if getattr(weights, name).shape != shape:
            return f"{name} must be {shape}, got {tuple(getattr(weights, name).shape)}"
    if scale.shape != (experts,) or scale.dtype not in router_few.SCALE_DTYPES:
        return f"scale must be [{experts}] in {router_few.SCALE_DTYPES}, got {tuple(scale.shape)} {scale.dtype}"
    if experts > router_few.MAX_EXPERTS or topk not in experts_few.CHOICES or topk > experts:
        return f"topk must be 1, 2, 4 or 8 of up to {router_few.MAX_EXPERTS} experts, got {topk} of {experts}"
    for name, tensor in weights._asdict().items():
        if tensor.device != gate_up.device:
            return f"{name} is on {tensor.device}, gate_up on {gate_up.device}"
        if name != "scale" and tensor.dtype != gate_up.dtype:
            return f"{name} is {tensor.dtype}, gate_up {gate_up.dtype}"
        if not tensor.is_contiguous():
            return f"{name} must be contiguous, got strides {tensor.stride()}"
        if name != "scale" and tensor.data_ptr() % 16:
            return f"{name} must be aligned to 16 bytes"
    return None


def inputs_unfit(inputs: Inputs, weights: Weights) -> str | None:
    """Why it does not take these inputs beside weights that it takes, or None. Host checks only."""
    rows, like = inputs.mlp.shape[0], weights.gate_up
    if not (INTERPRETED or like.is_cuda):
        return f"gate_up must be on a CUDA device, got {like.device}"
    if rows > MAX_TOKENS:
        return f"mlp must have at most {MAX_TOKENS} rows, got {rows}"
    for name, x in inputs._asdict().items():
        if x.dim() != 2 or x.shape != (rows, like.shape[1]) or x.stride(1) != 1:
            return f"{name} must be [{rows}, {like.shape[1]}] with contiguous rows, got {tuple(x.shape)}"
        if x.dtype != like.dtype or x.device != like.device:
            return f"{name} is {x.dtype} on {x.device}, gate_up {like.dtype} on {like.device}"
        if x.stride(0) % VECTOR or x.data_ptr() % 16:
            return f"{name} must be aligned to 16 bytes"
    return None


def tiles_unfit(tiles: Tiles, topk: int) -> str | None:
    """Why the kernel cannot be cut so, or None."""
    reason = dataflow.tiles_unfit(tiles)
    if reason is not None:
        return reason
    if tiles.router.rows != 1:
        return f"tiles must have one row of the router in a line, got {tiles.router}"
    if topk % tiles.chosen_down.rows:
        return f"tiles must have choices that divide {topk}, got {tiles.chosen_down}"
    return None


def choose(topk: int) -> Tiles:
    """A cut for so many choices of a token."""
    down = TILES.chosen_down
    return TILES._replace(chosen_down=down._replace(rows=min(down.rows, topk)))


def feed_forward_few(
    inputs: Inputs,
    weights: Weights,
    topk: int,
    counts: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> Found:
    """The equations of this module.

    Args:
        inputs: T up to `MAX_TOKENS`, may be 0.
        weights: of a layer; H, M and N are multiples of 8.
        topk: K, 1, 2, 4 or 8.
        counts: zeros, int32, `COUNTS` of them; left as zeros. No two launches that may run at the same time
            share them. None: made here.
        tiles: how the work is cut; None: `choose`.

    Returns:
        Both outputs, logits, weights and ids.

    Raises:
        ValueError: naming the argument.
    """
    tiles = choose(topk) if tiles is None else tiles
    reason = (
        weights_unfit(weights, topk)
        or inputs_unfit(inputs, weights)
        or tiles_unfit(tiles, topk)
        or dataflow.counts_unfit(counts, COUNTS, weights.gate_up.device)
    )
    if reason is not None:
        raise ValueError(reason)
    if counts is None:
        counts = torch.zeros(COUNTS, dtype=torch.int32, device=weights.gate_up.device)
    return launch_feed_forward_few(inputs, weights, topk, counts, tiles)


def launch_feed_forward_few(
    inputs: Inputs,
    weights: Weights,
    topk: int,
    counts: torch.Tensor,
    tiles: Tiles,
) -> Found:
    """`feed_forward_few` without its checks."""
    like = inputs.mlp
    tokens, hidden = like.shape
    experts, width = weights.router.shape[0], weights.down.shape[1]
    narrow = weights.w2.shape[2]
    found = Found(
        like.new_empty((tokens, hidden)),
        like.new_empty((tokens, hidden)),
        router_few.Routed(
            like.new_empty((tokens, experts)),
            like.new_empty((tokens, topk), dtype=torch.float32),
            like.new_empty((tokens, topk), dtype=torch.int32),
        ),
    )
    if tokens == 0:
        return found
    router, dense, chosen, down, group = tiles
    programs = (
        dataflow.tiles(experts, router, 1)
        + dataflow.tiles(width, dense, dense.rows)
        + tokens * topk * dataflow.tiles(narrow, chosen, chosen.rows)
        + dataflow.tiles(hidden, down, down.rows)
        + tokens * dataflow.tiles(hidden, group, 1)
    )
    _feed_forward_few_kernel[(programs,)](
        *inputs,
        *weights,
        found.mlp_output,
        found.experts_output,
        *found.routed,
        like.new_empty((tokens, width)),
        like.new_empty((tokens * topk, narrow)),
        counts,
        tokens,
        *(x.stride(0) for x in inputs),
        triton.cdiv(narrow, group.repeat * group.line),
        H=hidden,
        M=width,
        N=narrow,
        E=experts,
        K=topk,
        BLOCK_T=1 << (tokens - 1).bit_length(),
        BLOCK_E=1 << (experts - 1).bit_length(),
        P=1 << (topk - 1).bit_length(),
        ROUTER_REPEAT=router.repeat,
        ROUTER_LINE=router.line,
        DENSE_ROWS=dense.rows,
        DENSE_REPEAT=dense.repeat,
        DENSE_LINE=dense.line,
        CHOSEN_ROWS=chosen.rows,
        CHOSEN_REPEAT=chosen.repeat,
        CHOSEN_LINE=chosen.line,
        DOWN_ROWS=down.rows,
        DOWN_REPEAT=down.repeat,
        DOWN_LINE=down.line,
        GROUP=group.rows,
        GROUP_REPEAT=group.repeat,
        GROUP_LINE=group.line,
        LANES=LANES,
        ROUTER=ROUTER,
        ROUTED=ROUTED,
        DENSE=DENSE,
        ENDED=ENDED,
        CHOSEN=CHOSEN,
        READY=READY,
        EXPERTS=EXPERTS,
        COUNTS=COUNTS,
        APART=APART,
        READERS=READERS,
        BLOCK_LINES=1 << (COUNTS // APART - 1).bit_length(),
        PTX=not INTERPRETED,
        num_warps=1,
        **pdl.options(like),
    )
    return found


def reference_feed_forward_few(inputs: Inputs, weights: Weights, topk: int) -> Found:
    """Stock's calls in plain torch, rounding where they round."""
    routed = router_few.reference_router_few(inputs.router, weights.router, weights.scale, topk)
    mlp_output = reference_mlp(inputs, weights)
    return Found(mlp_output, reference_experts(inputs, weights, routed), routed)


def reference_mlp(inputs: Inputs, weights: Weights) -> torch.Tensor:
    """The dense MLP's output, likewise; with everything in fp64 nothing is rounded."""
    dense = skinny_gemm.reference_skinny_gemm(
        inputs.mlp, weights.gate_up, skinny_gemm.Epilogue.GELU_AND_MUL
    )
    return torch.nn.functional.linear(dense, weights.down)


def reference_experts(inputs: Inputs, weights: Weights, routed: router_few.Routed) -> torch.Tensor:
    """The experts' output of this routing, likewise."""
    factors = routed.weights.to(torch.promote_types(inputs.experts.dtype, torch.float32))
    return experts_few.reference_experts_few(
        inputs.experts, weights.w13, weights.w2, factors, routed.ids
    )
