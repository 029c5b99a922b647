"""`moe_align` for this line's signature; what it is, is in `gemma4_turbo.ports.any.experts.moe_align`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.kernels import moe_align as kernel
from gemma4_turbo.ports.any.experts import moe_align as shared
from gemma4_turbo.ports.any.experts.moe_align import TARGET, Align
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

verify = shared.verify


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernel where it fits and has passed its check, else stock."""
    align: Align = stock[TARGET]

    @functools.wraps(align)
    def moe_align_block_size(
        topk_ids: torch.Tensor, block_size: int, num_experts: int
    ) -> kernel.Alignment:
        if torch.compiler.is_compiling():
            custom_ops.not_traced("moe_align")
            return align(topk_ids, block_size, num_experts)
        reason = kernel.unfit(topk_ids, block_size, num_experts)
        if reason is None:
            capturing = custom_ops.capturing()
            reason = shared.check_unfit(run, align, topk_ids, block_size, num_experts, capturing)
            if reason is None:
                run.engaged(capturing)
                return kernel.launch_align(topk_ids, block_size, num_experts)
        run.declined(reason)
        return align(topk_ids, block_size, num_experts)

    return {TARGET: moe_align_block_size}
