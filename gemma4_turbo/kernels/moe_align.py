"""Slots of a small batch grouped by expert, for the fused MoE kernel, in one launch.

A slot is one of the ``N = T * K`` entries of ``topk_ids``; the slots of an expert are padded to
whole blocks of ``B``, and expert -1 (not on this rank) comes first. With
``count[e] = |{i : topk_ids[i] = e}|``::

    blocks[e]       = ceil(count[e] / B)
    first[e]        = sum of blocks[f] over f < e
    position[i]     = first[topk_ids[i]] * B + |{j < i : topk_ids[j] = topk_ids[i]}|
    sorted_token_ids[position[i]] = i, and N everywhere else
    expert_ids[first[e] .. first[e] + blocks[e] - 1] = e
    num_tokens_post_pad = B * sum of blocks

Stock SGLang does this in two launches if there are 64 experts or more: one fills, counts and scans,
the other places the slots with atomics. Its order inside an expert is therefore any order; here it
is that of the slots. The fused MoE kernel's output has the same bits for each of those orders: a
row of a block is one slot, its dot products read that slot's activations and the block's weights
only, in an order over K that depends neither on the block nor on the row, and it is stored at the
slot's own place. Blocks from ``num_tokens_post_pad`` on are not computed. There ``expert_ids`` is
left uninitialised, as in stock, and ``sorted_token_ids`` holds N, as in stock. (Two runs of stock
itself may differ where Marlin's kernels split K by block and an expert has several blocks, or
where the rows of a token are summed by atomics; there this order gives one of stock's results.)

How: bit b of 32 consecutive ids makes one 32-bit word, a bit plane. A lane that knows an expert id
ANDs the planes, inverted where its own bit is 0, and has the set of the 32 slots with that id; its
population count adds to the expert's count or, below the lane's own slot, to the slot's rank. That
is 32 comparisons an instruction and needs neither atomics nor sorting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels import pdl

MAX_SLOTS = 512
MAX_EXPERTS = 512


@triton.jit
def _popcount(x):
    # LLVM knows this form and makes it one popc instruction; Triton's interpreter has no popc.
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _keep_equal(matches, plane, ids, bit: tl.constexpr):
    # All ones where the id's own bit is set, else 0: XNOR keeps the slots that agree in this bit.
    own = (ids << (31 - bit)) >> 31
    return matches & ~(plane ^ own)


@triton.jit(do_not_specialize=["slots", "capacity"])
def _align_kernel(
    topk_ids_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_pad_ptr,
    slots,  # N
    capacity,  # length of sorted_token_ids
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two >= N
    BLOCK_E: tl.constexpr,  # power of two >= number of experts, at least 2
    LOG_E: tl.constexpr,
    FILL: tl.constexpr,  # number of threads
    PDL: tl.constexpr,
):
    """The only program. Every warp computes the planes itself, so that none waits for another."""
    pdl.launch_dependents(PDL)
    pdl.wait(PDL)
    NOBODY: tl.constexpr = -2  # no expert's id, and other than -1
    lane = tl.arange(0, 32)
    # Without the hint a thread would load neighbouring slots, which the scattered stores would then
    # have to exchange through shared memory.
    slot = tl.max_contiguous(tl.arange(0, BLOCK_N), 1)
    expert = tl.arange(0, BLOCK_E)
    ids = tl.load(topk_ids_ptr + slot, mask=slot < slots, other=NOBODY)
    group_ids = tl.load(topk_ids_ptr + lane, mask=lane < slots, other=NOBODY)

    # While the ids are on their way. The barrier below keeps these stores before the slots'.
    filled = tl.arange(0, FILL)
    nothing = tl.zeros([FILL], tl.int32) + slots
    for start in range(0, capacity, FILL):
        tl.store(sorted_token_ids_ptr + start + filled, nothing, mask=start + filled < capacity)

    rank = tl.zeros([BLOCK_N], tl.int32)
    count = tl.zeros([BLOCK_E], tl.int32)
    elsewhere = 0  # slots of expert -1
    for start in range(0, slots, 32):
        following = start + 32 + lane
        next_ids = tl.load(topk_ids_ptr + following, mask=following < slots, other=NOBODY)
        plane = tl.sum((group_ids & 1) << lane, axis=0)
        own_plane = plane
        of_slot = _keep_equal(tl.full([BLOCK_N], -1, tl.int32), plane, ids, 0)
        of_expert = _keep_equal(tl.full([BLOCK_E], -1, tl.int32), plane, expert, 0)
        for bit in tl.static_range(1, LOG_E):
            plane = tl.sum(((group_ids >> bit) & 1) << lane, axis=0)
            of_slot = _keep_equal(of_slot, plane, ids, bit)
            of_expert = _keep_equal(of_expert, plane, expert, bit)
        plane = tl.sum(((group_ids >> 31) & 1) << lane, axis=0)  # the sign
        of_slot = _keep_equal(of_slot, plane, ids, 31)
        of_expert = of_expert & ~plane
        elsewhere += _popcount(plane & own_plane)  # odd and negative: -1, not NOBODY
        count += _popcount(of_expert)
        ahead = slot - start  # how many of these 32 come before the slot
        before = tl.where(ahead > 31, -1, (1 << (ahead & 31)) - 1)
        rank += _popcount(of_slot & tl.where(ahead < 0, 0, before))
        group_ids = next_ids

    blocks = (count + (B - 1)) // B
    elsewhere_blocks = (elsewhere + (B - 1)) // B
    end = elsewhere_blocks + tl.cumsum(blocks, axis=0)
    slot_first = tl.gather(end - blocks, ids & (BLOCK_E - 1), axis=0)
    slot_first = tl.where(ids < 0, 0, slot_first)

    tl.debug_barrier()
    valid = slot < slots
    tl.store(sorted_token_ids_ptr + slot_first * B + rank, slot, mask=valid)
    tl.store(expert_ids_ptr + slot_first + rank // B, ids, mask=valid & (rank % B == 0))
    tl.store(num_tokens_post_pad_ptr + expert * 0, end * B, mask=expert == BLOCK_E - 1)


INTERPRETED = not isinstance(_align_kernel, triton.JITFunction)
"""True when this module was imported under ``TRITON_INTERPRET=1``: CPU tensors are taken."""


def unfit(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> str | None:
    """Why `moe_align` does not take these arguments, or None if it does. Host checks only."""
    if not (INTERPRETED or (topk_ids.is_cuda and torch.version.hip is None)):
        return f"topk_ids must be on a CUDA device, got {topk_ids.device}"
    if topk_ids.dtype != torch.int32:
        return f"topk_ids must be int32, got {topk_ids.dtype}"
    if not topk_ids.is_contiguous():
        return f"topk_ids must be contiguous, got strides {topk_ids.stride()}"
    if topk_ids.numel() > MAX_SLOTS:
        return f"topk_ids must have at most {MAX_SLOTS} elements, got {topk_ids.numel()}"
    if block_size < 1:
        return f"block_size must be positive, got {block_size}"
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"num_experts must be in 1..{MAX_EXPERTS}, got {num_experts}"
    return None


def moe_align(
    topk_ids: torch.Tensor, block_size: int, num_experts: int, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots grouped by expert and padded to blocks, in one launch. See the module for equations.

    Args:
        topk_ids: ``[T, K]`` int32, contiguous, ``T * K <= 512``; each in -1..num_experts-1, which is
            not checked. T may be 0.
        block_size: B, the fused MoE kernel's ``BLOCK_SIZE_M``; any positive number.
        num_experts: E, at most 512.
        multiple: the length of ``sorted_token_ids`` is rounded up to a multiple of it.

    Returns:
        ``sorted_token_ids`` int32, as long as stock's; ``expert_ids`` int32, one a block of it,
        uninitialised from ``num_tokens_post_pad / B`` on; ``num_tokens_post_pad`` ``[1]`` int32.

    Raises:
        ValueError: naming the argument, for anything `unfit` declines.
    """
    reason = unfit(topk_ids, block_size, num_experts)
    if reason is not None:
        raise ValueError(reason)
    return launch_align(topk_ids, block_size, num_experts, multiple)


def launch_align(
    topk_ids: torch.Tensor, block_size: int, num_experts: int, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moe_align` without its checks, for callers that have asked `unfit`."""
    capacity = padded_capacity(topk_ids.numel(), block_size, num_experts, multiple)
    sorted_token_ids = topk_ids.new_empty(capacity)
    expert_ids = topk_ids.new_empty(triton.cdiv(capacity, block_size))
    num_tokens_post_pad = topk_ids.new_empty(1)
    align_into(topk_ids, block_size, num_experts, sorted_token_ids, expert_ids, num_tokens_post_pad)
    return sorted_token_ids, expert_ids, num_tokens_post_pad


def align_into(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
) -> None:
    """`launch_align` into given buffers of the lengths that it would allocate."""
    slots = variant(topk_ids)
    buckets = max(2, triton.next_power_of_2(num_experts))
    warps = 1 if slots <= 64 else 4
    _align_kernel[(1,)](
        topk_ids,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_pad,
        topk_ids.numel(),
        sorted_token_ids.numel(),
        B=block_size,
        BLOCK_N=slots,
        BLOCK_E=buckets,
        LOG_E=buckets.bit_length() - 1,
        FILL=32 * warps,
        num_warps=warps,
        **pdl.options(topk_ids),
    )


def variant(topk_ids: torch.Tensor) -> int:
    """BLOCK_N: with block_size and the number of experts, it says which compiled kernel runs."""
    return max(32, triton.next_power_of_2(topk_ids.numel()))


def padded_capacity(slots: int, block_size: int, num_experts: int, multiple: int = 1) -> int:
    """Length of ``sorted_token_ids``, as stock computes it: enough for every distribution."""
    if slots < num_experts + 1:
        capacity = slots * block_size
    else:
        capacity = slots + (num_experts + 1) * (block_size - 1)
    return -(-capacity // multiple) * multiple


def reference_align(
    topk_ids: torch.Tensor, block_size: int, num_experts: int, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The module's equations in plain torch. Shapes and dtypes as `moe_align`.

    Beyond the valid blocks ``expert_ids`` is -1.
    """
    slots = topk_ids.numel()
    buckets = topk_ids.flatten().long() + 1
    count = torch.bincount(buckets, minlength=num_experts + 1)
    blocks = (count + block_size - 1) // block_size
    order = buckets.argsort(stable=True)
    rank = torch.empty_like(buckets)
    rank[order] = torch.arange(slots, device=buckets.device)
    rank -= (count.cumsum(0) - count)[buckets]
    capacity = padded_capacity(slots, block_size, num_experts, multiple)
    sorted_token_ids = topk_ids.new_full((capacity,), slots)
    position = (blocks.cumsum(0) - blocks)[buckets] * block_size + rank
    sorted_token_ids[position] = torch.arange(slots, device=buckets.device, dtype=torch.int32)
    expert_ids = topk_ids.new_full((triton.cdiv(capacity, block_size),), -1)
    experts = torch.arange(-1, num_experts, device=buckets.device, dtype=torch.int32)
    used = experts.repeat_interleave(blocks)
    expert_ids[: len(used)] = used
    return sorted_token_ids, expert_ids, (blocks.sum() * block_size).int().reshape(1)


Alignment = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def difference(one: Alignment, other: Alignment, block_size: int) -> str | None:
    """In what two results are not equivalent, or None: equal but for the order inside an expert.

    Args:
        one: ``(sorted_token_ids, expert_ids, num_tokens_post_pad)``.
        other: likewise.
        block_size: B of both.
    """
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
    for name, a, b in zip(names, one, other, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} is {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}"
    valid = int(one[2])
    if valid != int(other[2]):
        return f"num_tokens_post_pad is {valid}, not {int(other[2])}"
    blocks = valid // block_size
    if not torch.equal(one[1][:blocks], other[1][:blocks]):
        return "expert_ids differ"
    if not torch.equal(one[0][valid:], other[0][valid:]):
        return "sorted_token_ids differ beyond num_tokens_post_pad"
    expert = one[1][:blocks].long().repeat_interleave(block_size) << 32
    if not torch.equal((expert + one[0][:valid]).sort()[0], (expert + other[0][:valid]).sort()[0]):
        return "an expert's slots differ"
    return None
