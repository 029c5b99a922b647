"""SGLang's classes in 0.5.22 and 0.5.23, for `gemma4_turbo.ports.any.sglang_types`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import sglang_types

if TYPE_CHECKING:
    from collections.abc import Callable


def load() -> None:
    """Look the classes up. Call it while a patch is built, never from traced code."""
    if sglang_types.filled():
        return
    from sglang.srt.layers import activation, layernorm, linear, radix_attention
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.quantization import fp8, unquant
    from sglang.srt.layers.rotary_embedding import base, rope_variant
    from sglang.srt.mem_cache import memory_pool, swa_memory_pool
    from sglang.srt.models import gemma3_causal, gemma4_causal

    sglang_types.fill(
        sglang_types.Types(
            layernorm.RMSNorm,
            layernorm.Gemma4RMSNorm,
            (
                linear.ReplicatedLinear,
                linear.ColumnParallelLinear,
                linear.MergedColumnParallelLinear,
                linear.QKVParallelLinear,
                linear.RowParallelLinear,
            ),
            linear.QKVParallelLinear,
            linear.RowParallelLinear,
            unquant.UnquantizedLinearMethod,
            gemma3_causal.Gemma3MLP,
            activation.GeluAndMul,
            (base.RotaryEmbedding, rope_variant.Gemma4RotaryEmbedding),
            gemma4_causal.Gemma4DecoderLayer,
            gemma4_causal.Gemma4Router,
            gemma4_causal.Gemma4MoE,
            FusedMoE,
            (unquant.UnquantizedFusedMoEMethod, fp8.Fp8MoEMethod),
            StandardDispatcher,
            radix_attention.RadixAttention,
            layernorm,
            swa_memory_pool.SWAKVPool,
            memory_pool.MHATokenToKVPool,
            _running,
            _norm_unfit,
            _linear_unfit,
            _router_unfit,
            _output_unfit,
            _parallel_unfit,
            True,
        )
    )


def _running(module: Any) -> Callable[..., Any] | None:
    """Of a ``BaseFusedOp``: chosen at its first call, which may still be to come."""
    from sglang.kernels.fused_op import get_fused_op_backend

    if get_fused_op_backend() is not None:  # for all modules, a debug switch
        return None
    method: Callable[..., Any] = module._forward_method or module._resolve_forward_method()
    return method


def _norm_unfit(norm: Any) -> str | None:
    if getattr(norm, "_quant_linear", None) is not None:
        return "an RMSNorm quantises what a linear layer reads"
    return None


def _linear_unfit(module: Any) -> str | None:
    from sglang.srt.layers.quantization.unquant import get_bf16_gemm_backend

    backend = get_bf16_gemm_backend()
    if backend.is_cutedsl() or backend.is_gemv():
        return f"--bf16-gemm-backend {backend.value}: dense products do not run on cuBLAS"
    return None


def _router_unfit(router: Any) -> str | None:
    return None


def _output_unfit(module: Any) -> str | None:
    from sglang.srt.layers.linear import get_group_rank_size

    group = getattr(module, "tp_group", None)
    if group is not None and get_group_rank_size(group)[1] > 1:
        return "the layer is spread over several GPUs"
    if getattr(module, "use_decode_attn_tp", False):
        return "the layer's weight is cut otherwise for decoding"
    return None


def _parallel_unfit(moe: Any) -> str | None:
    if moe.experts.moe_tp_size > 1 or moe.experts.moe_ep_size > 1:
        return "the experts' outputs are summed over several GPUs"
    return None
