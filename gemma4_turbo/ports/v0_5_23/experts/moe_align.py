"""`moe_align` above the number of slots that stock itself takes in one launch.

This line's stock has a single launch for up to 64 slots and 64 experts or more, and its two launches
beyond: ours is for 65 to 512. What it is, is in `gemma4_turbo.ports.any.experts.moe_align`. Calls of up to 64
slots are stock's and are not counted.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.kernels import moe_align as kernel
from gemma4_turbo.ports.any.experts import moe_align as shared
from gemma4_turbo.ports.any.experts.moe_align import TARGET, Align
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.checks import Check
    from gemma4_turbo.engine.run import PatchRun

MULTIPLE = 4
"""Stock's CUDA kernel fills the slots four at a time: their buffer's length is rounded up."""


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernel where it fits and has passed its check, else stock."""
    align: Align = stock[TARGET]
    module = sys.modules[TARGET.partition(":")[0]]
    own = getattr(module, "SMALL_NUMEL_LIMIT", 64)  # only where there is CUDA
    few_buckets = module._CUDA_SMALL_BATCH_MAX_BUCKETS

    @functools.wraps(align)
    def moe_align_block_size(
        topk_ids: torch.Tensor,
        block_size: int,
        num_experts: int,
        ignore_invalid_expert: bool = False,
        *,
        return_inactive_prefix_count: bool = False,
        pad_expert_ids: bool = False,
    ) -> kernel.Alignment:
        if torch.compiler.is_compiling():
            custom_ops.not_traced("moe_align")
        elif topk_ids.numel() > own:
            if ignore_invalid_expert or return_inactive_prefix_count or pad_expert_ids:
                reason: str | None = "the call asks for more than stock's plain alignment"
            elif module._SGLANG_EXPERIMENTAL_LORA_OPTI:
                reason = "SGLANG_EXPERIMENTAL_LORA_OPTI may choose another kernel"
            elif num_experts + 1 <= few_buckets:
                reason = f"stock itself takes one launch for {num_experts} experts"
            else:
                reason = kernel.unfit(topk_ids, block_size, num_experts)
            if reason is None:
                capturing = custom_ops.capturing()
                reason = shared.check_unfit(
                    run, align, topk_ids, block_size, num_experts, capturing, MULTIPLE
                )
                if reason is None:
                    run.engaged(capturing)
                    return kernel.launch_align(topk_ids, block_size, num_experts, MULTIPLE)
            run.declined(reason)
        return align(
            topk_ids,
            block_size,
            num_experts,
            ignore_invalid_expert,
            return_inactive_prefix_count=return_inactive_prefix_count,
            pad_expert_ids=pad_expert_ids,
        )

    return {TARGET: moe_align_block_size}


def verify(run: PatchRun, device: str) -> list[Check]:
    """One launch against stock's function (on a GPU) or plain torch (without)."""
    return shared.verify(run, device, MULTIPLE, slots=(80, 128, 256, 512), few=(80, 128))
