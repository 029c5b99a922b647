"""`experts_sum`: the sum over a token's experts in the launch of the layer's end.

SGLang's reduction is replaced by one that, when the layer asks, hands its input over instead.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.fusion import forget
from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.ports.v0_5_12.decode_step import decoder_layer

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


REDUCTION = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_sum_reduce_torch_compile"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forward of the layer, and the reduction that can be skipped."""
    reduce = stock[REDUCTION]
    summing = layer_steps.Summing

    @functools.wraps(reduce)
    def moe_sum_reduce_torch_compile(
        x: torch.Tensor, out: torch.Tensor, routed_scaling_factor: float
    ) -> None:
        if summing.wanted and routed_scaling_factor == 1.0 and x.is_contiguous():
            summing.wanted, summing.taken, summing.buffer = False, x, out
            return
        reduce(x, out, routed_scaling_factor)

    layer = decoder_layer.enable((layer_steps.EXPERTS_SUM,), run)
    return {**layer, REDUCTION: moe_sum_reduce_torch_compile}


def undo(run: PatchRun) -> None:
    """Switch the fusion off; the shared forward may live on for other patches."""
    layer_steps.EXPERTS_SUM.run = None
    forget("experts_sum")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against stock's calls."""
    return layer_steps.experts_sum_checks(device)
