"""What 0.5.22 and 0.5.23 make of SGLang's modules, for `gemma4_turbo.ports.any.sglang_types`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.v0_5_23 import sums

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma4_turbo.ports.any.model_protocols import Group, Linear
    from gemma4_turbo.ports.v0_5_23.protocols import MoE

_fused_op: list[Any] = []


def load() -> None:
    """Look the classes up. Call it while a patch is built, never from traced code."""
    from sglang.kernels import fused_op
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    _fused_op[:] = [fused_op]
    sglang_types.load(
        sglang_types.Rules(
            running,
            _output_unfit,
            _parallel_unfit,
            _branches_unfit,
            lambda: bool(fused_moe.is_arch_support_pdl()),
            _tp_group,
            now_unfit,
            _norm_unfit,
            _linear_unfit,
            logits_unfit=_logits_unfit,
            routing_unfit=_routing_unfit,
        )
    )


def _tp_group() -> Group:
    from sglang.srt.runtime_context import get_parallel

    group: Group = get_parallel().tp_group
    return group


def running(module: Any) -> Callable[..., Any]:
    """Of a ``BaseFusedOp``: chosen at its first call, which ours may be in the place of."""
    if module._forward_method is None:
        module._forward_method = module._resolve_forward_method()
    method: Callable[..., Any] = module._forward_method
    return method


def now_unfit() -> str | None:
    """Why the fused operators do not run what they have chosen at present, or None: debug switches.

    A trace reads what is there: reading the environment would break its graph.
    """
    op = _fused_op[0]
    forced = op._forced_backend if torch.compiler.is_compiling() else op.get_fused_op_backend()
    if forced is not None and forced is not op._UNRESOLVED:
        return f"SGLang's fused operators are forced onto {forced.value}"
    if op._trace_enabled:
        return "SGLang writes down the calls of its fused operators"
    return None


def _norm_unfit(norm: object) -> str | None:
    if getattr(norm, "_quant_linear", None) is not None:
        return "an RMSNorm quantises what a linear layer reads"
    return None


def _linear_unfit(module: object) -> str | None:
    from sglang.srt.layers.quantization.unquant import get_bf16_gemm_backend

    backend = get_bf16_gemm_backend()
    if backend.is_cutedsl() or backend.is_gemv():
        return f"--bf16-gemm-backend {backend.value}: dense products do not run on cuBLAS"
    return None


def _output_unfit(module: Linear) -> str | None:
    from sglang.srt.layers.linear import get_group_rank_size

    if getattr(module, "use_decode_attn_tp", False):
        return "the layer's weight is cut otherwise for decoding"
    group = getattr(module, "tp_group", None)
    if group is None or get_group_rank_size(group)[1] == 1:
        return None
    if getattr(module, "gather_output", False):
        return "the output is gathered from several GPUs"
    if type(module) is sglang_types.types().row_linear:
        from sglang.srt.distributed.device_communicators import pynccl_allocator

        if module.reduce_results:  # Gemma 4's leave the sum to their layer
            return "the output is reduced over several GPUs"
        if pynccl_allocator.is_symmetric_memory_enabled():
            return "the output is reduced over several GPUs in symmetric memory"
    return sums.parallel_unfit()


def _parallel_unfit(moe: MoE) -> str | None:
    if moe.experts.moe_tp_size > 1 or moe.experts.moe_ep_size > 1:
        return "the experts' outputs are summed over several GPUs"
    return None


def _branches_unfit(moe: MoE) -> str | None:
    if moe.experts.moe_ep_size > 1 or moe.experts.reduce_results:
        return "the experts sum their outputs over several GPUs"
    return None


def _logits_unfit() -> str | None:
    """By ``transform_select_experts_inputs``, in place: in inference mode no version tells of it."""
    from sglang.srt.runtime_context import get_exec

    if get_exec().moe.ep_dispatch_algorithm == "fake":
        return "--ep-dispatch-algorithm fake: the logits are made up"
    return None


def _routing_unfit() -> str | None:
    """By ``select_experts``. Its kernels write in place, and raise no tensor's version."""
    from sglang.srt.environ import envs
    from sglang.srt.model_executor import forward_context
    from sglang.srt.runtime_context import get_exec

    for switch in (
        envs.SGLANG_SIMULATE_UNIFORM_EXPERTS,
        envs.SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS,
    ):
        if switch.get():
            return f"{switch.name}: the experts are not those of the router"
    algorithm = get_exec().moe.ep_dispatch_algorithm
    if algorithm is not None:
        return f"--ep-dispatch-algorithm {algorithm}: the experts are placed after the routing"
    if forward_context.has_forward_context():
        bound = forward_context.get_forward_context().moe_num_token_non_padded
        if bound is not None and bound() is not None:
            return "rows that pad the batch are masked after the routing"
    return None
