"""`experts_few` for this line's server; what it is, is in `gemma4_turbo.ports.any.experts.experts_few`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any.experts import experts_few as shared

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.fusions.fusion import Step

undo = shared.undo
verify = shared.verify


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The kernels where they fit and have passed their check, else stock."""
    return enable((shared.EXPERTS_FEW,), run, stock)


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Give fusions to a patch; returns the replacement."""
    return shared.enable(fusions, run, stock, sums_over_ranks, empty_like)


def sums_over_ranks() -> bool:
    """By the server's arguments."""
    from sglang.srt.runtime_context import get_exec

    return bool(get_exec().moe.enable_fused_moe_sum_all_reduce)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """In symmetric memory where stock has it there, for the sum over the ranks."""
    from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
    from sglang.srt.layers.dp_attention import is_allocation_symmetric
    from sglang.srt.runtime_context import get_parallel

    with use_symmetric_memory(get_parallel().tp_group, disabled=not is_allocation_symmetric()):
        return torch.empty_like(x)
