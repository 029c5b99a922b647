"""SGLang's classes in 0.5.11 and 0.5.12, for `gemma4_turbo.ports.any.sglang_types`."""

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
            _fits,
            _fits,
            _fits,
            _output_unfit,
            _parallel_unfit,
            False,
        )
    )


def _running(module: Any) -> Callable[..., Any] | None:
    method: Callable[..., Any] = module._forward_method
    return method


def _fits(module: Any) -> str | None:
    return None


def _output_unfit(module: Any) -> str | None:
    if type(module) is sglang_types.types().row_linear and module.tp_size > 1:
        return "the output is reduced over several GPUs"
    if getattr(module, "gather_output", False) and module.tp_size > 1:
        return "the output is gathered from several GPUs"
    return None


def _parallel_unfit(moe: Any) -> str | None:
    if moe.tp_size > 1 or getattr(moe.experts, "moe_ep_size", 1) > 1:
        return "the experts' outputs are reduced over several GPUs"
    return None
