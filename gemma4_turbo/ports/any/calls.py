"""What Gemma 4's layers call by way of their modules, in every release line; as data, for ``goes_round``.

A line adds the ``forward`` that its multi-platform modules inherit, and what it alone has. Some of the
functions are inherited where SGLang defines them: somebody may set them on the class all the same.
"""

from __future__ import annotations

NORM = (
    "sglang.srt.layers.layernorm:RMSNorm.forward",
    "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward",
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_cuda",
    "sglang.srt.layers.layernorm:rmsnorm",
    "sglang.srt.layers.layernorm:fused_add_rmsnorm",
)
LINEAR = (
    "sglang.srt.layers.linear:ReplicatedLinear.forward",
    "sglang.srt.layers.linear:ColumnParallelLinear.forward",
    "sglang.srt.layers.linear:MergedColumnParallelLinear.forward",
    "sglang.srt.layers.linear:QKVParallelLinear.forward",
    "sglang.srt.layers.linear:RowParallelLinear.forward",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply",
)
MLP = (
    "sglang.srt.models.gemma3_causal:Gemma3MLP.forward",
    "sglang.srt.layers.activation:GeluAndMul.forward",
    "sglang.srt.layers.activation:GeluAndMul.forward_cuda",
    "sglang.srt.layers.activation:gelu_tanh_and_mul",
)
DENSE_MLP = (  # not called where a kernel computes it: its code is relied on
    "sglang.srt.models.gemma3_causal:Gemma3MLP.forward",
    "sglang.srt.layers.activation:GeluAndMul.forward_cuda",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply",
    "sglang.srt.layers.linear:RowParallelLinear.forward",
)
ROPE = (
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward",
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_cuda",
    "sglang.srt.layers.rotary_embedding.rope_variant:Gemma4RotaryEmbedding.forward",
    "sglang.srt.layers.rotary_embedding.rope_variant:Gemma4RotaryEmbedding.forward_cuda",
    "sglang.srt.layers.rotary_embedding.base:apply_rope_with_cos_sin_cache_inplace",
)
EXPERTS = (
    "sglang.srt.models.gemma4_causal:Gemma4MoE.forward",
    "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.forward",
    "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.forward_impl",
    "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.run_moe_core",
    "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod.apply",
    "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod.forward",
    "sglang.srt.layers.quantization.unquant:UnquantizedFusedMoEMethod.forward_cuda",
    "sglang.srt.layers.quantization.fp8:Fp8MoEMethod.apply",
    "sglang.srt.layers.moe.token_dispatcher.standard:StandardDispatcher.combine",
    "sglang.srt.layers.moe.moe_runner.runner:MoeRunner.run",
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts",
)
QKV = ("sglang.srt.models.gemma4_causal:gemma_qkv_rmsnorm",)
