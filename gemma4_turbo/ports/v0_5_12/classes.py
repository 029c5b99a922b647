"""What 0.5.11 and 0.5.12 make of SGLang's modules, for `gemma4_turbo.ports.any.sglang_types`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import sglang_types

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gemma4_turbo.ports.any.model_protocols import Group, Linear, MoE, PlatformOp


def load() -> None:
    """Look the classes up. Call it while a patch is built, never from traced code."""
    sglang_types.load(
        sglang_types.Rules(
            _running,
            _output_unfit,
            _parallel_unfit,
            _parallel_unfit,
            _never,
            _tp_group,
            sum_of=_sum_of,
        )
    )


def _tp_group() -> Group:
    from sglang.srt.distributed import get_tp_group

    group: Group = get_tp_group()
    return group


def _never() -> bool:
    return False


def _running(module: PlatformOp) -> Callable[..., Any] | None:
    method: Callable[..., Any] = module._forward_method
    return method


def _output_unfit(module: Linear) -> str | None:
    if getattr(module, "tp_size", 1) == 1:
        return None
    if getattr(module, "gather_output", False):
        return "the output is gathered from several GPUs"
    if type(module) is sglang_types.types().row_linear:
        from sglang.srt.distributed.device_communicators import pynccl_allocator
        from sglang.srt.layers.dp_attention import is_dp_attention_enabled

        if module.use_dp_attention_reduce or is_dp_attention_enabled():
            return "data-parallel attention: the output is reduced over other GPUs"
        if pynccl_allocator.is_symmetric_memory_enabled():
            return "the output is reduced over several GPUs in symmetric memory"
    return None


def _sum_of(module: Linear) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The all-reduce that a linear layer makes of its own product, by the name that it calls it."""
    if type(module) is not sglang_types.types().row_linear:
        return None
    if module.tp_size == 1 or not module.reduce_results:
        return None
    from sglang.srt.layers import linear

    return lambda part: linear.tensor_model_parallel_all_reduce(part)


def _parallel_unfit(moe: MoE) -> str | None:
    if moe.tp_size > 1 or getattr(moe.experts, "moe_ep_size", 1) > 1:
        return "the experts' outputs are reduced over several GPUs"
    return None
