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
    return shared.enable(fusions, run, stock, sums_over_ranks, torch.empty_like)


def sums_over_ranks() -> bool:
    """By the server's arguments."""
    from sglang.srt.server_args import get_global_server_args

    return bool(get_global_server_args().enable_fused_moe_sum_all_reduce)
