"""`experts_sum`: the sum over a token's experts in the launch of the layer's end.

SGLang's reduction for few tokens is replaced by one that, when the layer asks, hands its input over instead.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.fusions.fusion import forget
from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.ports.v0_5_23.decode_step import decoder_layer

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

REDUCTION = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_combine_topk"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The shared forward of the layer, and the reduction that can be skipped."""
    combine = stock[REDUCTION]
    summing = layer_steps.Summing

    @functools.wraps(combine)
    def moe_combine_topk(
        intermediate_cache3: torch.Tensor,
        out_hidden_states: torch.Tensor,
        routed_scaling_factor: float | None,
        no_combine: bool = False,
        use_fused_moe_sum_all_reduce: bool = False,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        plain = not (no_combine or use_fused_moe_sum_all_reduce)
        if (
            summing.wanted
            and plain
            and routed_scaling_factor in (None, 1.0)
            and _sums_few(intermediate_cache3)
        ):
            summing.wanted = False
            summing.taken, summing.buffer = intermediate_cache3, out_hidden_states
            return out_hidden_states
        found: torch.Tensor = combine(
            intermediate_cache3,
            out_hidden_states,
            routed_scaling_factor,
            no_combine,
            use_fused_moe_sum_all_reduce,
            *args,
            **kwargs,
        )
        return found

    layer = decoder_layer.enable((layer_steps.EXPERTS_SUM,), run, stock)
    return {**layer, REDUCTION: moe_combine_topk}


def _sums_few(x: torch.Tensor) -> bool:
    """Whether stock sums ``[tokens, topk, hidden]`` by its kernel for few tokens."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    few: bool = fused_moe._use_moe_sum_reduce_torch_compile(x.shape[0])
    return few and x.shape[1] > 2 and x.is_cuda and x.is_contiguous()


def undo(run: PatchRun) -> None:
    """Switch the fusion off; the shared forward may live on for other patches."""
    layer_steps.EXPERTS_SUM.run = None
    forget("experts_sum")


def verify(run: PatchRun, device: str) -> list[Check]:
    """Kernel against stock's calls."""
    return layer_steps.experts_sum_checks(device)
