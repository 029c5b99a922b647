"""Ports whose sources are the same in every supported release line: what they stand on, as data."""

from __future__ import annotations

from gemma4_turbo.engine.port import Port

HERE = __package__
GEMMA4_MODELS = "sglang.srt.models.gemma4_"  # how the modules of its models begin


# What the steps of a decoder layer's forward rely on, those of its end, and those of attention's.
_LAYER = (
    "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.__init__",
    "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_cuda",
)
_TAIL = (
    "sglang.srt.layers.gemma4_fused_ops:_gemma_dual_rmsnorm_residual_kernel",
    "sglang.srt.layers.gemma4_fused_ops:_gemma_rmsnorm_residual_kernel",
    "sglang.srt.layers.gemma4_fused_ops:gemma_dual_rmsnorm_residual_scalar",
    "sglang.srt.layers.gemma4_fused_ops:gemma_rmsnorm_residual_scalar",
)
_ATTENTION = (
    "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
    "sglang.srt.layers.gemma4_fused_ops:gemma_qkv_rmsnorm",
    "sglang.srt.layers.gemma4_fused_ops:_gemma_qkv_rmsnorm_kernel",
)

# What a layer calls by way of its modules.
_OP = "sglang.srt.layers.utils.multi_platform:MultiPlatformOp.forward"
_NORM_CALLS = (
    _OP,
    "sglang.srt.layers.layernorm:RMSNorm.forward",
    "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward",
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_cuda",
    "sglang.srt.layers.layernorm:rmsnorm",
    "sglang.srt.layers.layernorm:fused_add_rmsnorm",
)
_LINEAR_CALLS = (
    "sglang.srt.layers.linear:ReplicatedLinear.forward",
    "sglang.srt.layers.linear:ColumnParallelLinear.forward",
    "sglang.srt.layers.linear:MergedColumnParallelLinear.forward",
    "sglang.srt.layers.linear:QKVParallelLinear.forward",
    "sglang.srt.layers.linear:RowParallelLinear.forward",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply",
)
_MLP_CALLS = (
    *_LINEAR_CALLS,
    _OP,
    "sglang.srt.models.gemma3_causal:Gemma3MLP.forward",
    "sglang.srt.layers.activation:GeluAndMul.forward",
    "sglang.srt.layers.activation:GeluAndMul.forward_cuda",
    "sglang.srt.layers.activation:gelu_tanh_and_mul",
)
_ROPE_CALLS = (
    _OP,
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward",
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_cuda",
    "sglang.srt.layers.rotary_embedding.rope_variant:Gemma4RotaryEmbedding.forward",
    "sglang.srt.layers.rotary_embedding.rope_variant:Gemma4RotaryEmbedding.forward_cuda",
    "sglang.srt.layers.rotary_embedding.base:apply_rope_with_cos_sin_cache_inplace",
)
_EXPERTS_CALLS = (
    _OP,
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
_QKV_CALLS = ("sglang.srt.models.gemma4_causal:gemma_qkv_rmsnorm",)
_ATTENTION_CALLS = (
    "sglang.srt.layers.radix_attention:RadixAttention.forward",
    "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward",
    "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.set_kv_buffer",
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer",
)
# And all of it, for what runs in a graph that stock runs eagerly, or on fewer rows.
_LAYER_CALLS = (
    *_NORM_CALLS,
    *_MLP_CALLS,
    *_ROPE_CALLS,
    *_EXPERTS_CALLS,
    *_ATTENTION_CALLS,
    "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
    "sglang.srt.models.gemma4_causal:Gemma4Attention.forward",
    "sglang.srt.models.gemma4_causal:Gemma4Router.forward",
)

# The vision encoder is the same from 0.5.11 on; its linear layers and backends change later.
_VISION_RELEASES = (
    "0.5.11",
    "0.5.12",
    "0.5.12.post1",
    "0.5.13",
    "0.5.13.post1",
    "0.5.14",
    "0.5.15",
    "0.5.15.post1",
    "0.5.16",
    "0.5.17",
    "0.5.18",
    "0.5.19",
    "0.5.20",
    "0.5.21",
    "0.5.22",
    "0.5.23",
)
_VISION_BACKENDS = (
    "sglang.srt.layers.attention.vision:VisionTritonAttention.forward",
    "sglang.srt.layers.attention.vision:VisionFlash3Attention.forward",
)

_MTP_WORKER = "sglang.srt.speculative.frozen_kv_mtp_worker:FrozenKVMTPWorker"

# From the server's arguments to the input buffers of a piecewise graph.
_RUNNER = "sglang.srt.model_executor.piecewise_cuda_graph_runner:PiecewiseCudaGraphRunner"
# How one is compiled and recorded, and which batches it runs.
_RUNS = (
    f"{_RUNNER}.warmup_compile",
    f"{_RUNNER}.capture_one_batch_size",
    f"{_RUNNER}.can_run",
    f"{_RUNNER}.replay_prepare",
    f"{_RUNNER}.replay",
    "sglang.srt.compilation.compile:install_torch_compiled",
)
_MM_GRAPH = (
    "sglang.srt.managers.mm_utils:general_mm_embed_routine",
    "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.forward",
    "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.prepare_attn_masks",
    "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",
    "sglang.srt.model_executor.model_runner:ModelRunner.init_piecewise_cuda_graphs",
    *_RUNS,
    "sglang.srt.layers.radix_attention:unified_attention_with_output",
)
# And what it is cut into.
_PIECEWISE = (
    f"{_RUNNER}.__init__",
    *_RUNS,
    "sglang.srt.compilation.backend:split_graph",
    "sglang.srt.compilation.cuda_piecewise_backend:CUDAPiecewiseBackend.__call__",
    "sglang.srt.compilation.piecewise_context_manager:ForwardContext",
)


PORTS: dict[str, Port] = {
    "vision_batch": Port(
        module=f"{HERE}.vision_batch",
        targets=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_image_feature",
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_video_feature",
        ),
        relies_on=(
            "sglang.srt.models.gemma4_mm:Gemma4MultimodalEmbedder",
            "sglang.srt.models.gemma4_vision:Gemma4VisionEncoder.forward",
            "sglang.srt.models.gemma4_vision:Gemma4VisionTransformer.forward",
            "sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder._position_embeddings",
        ),
        written_for=_VISION_RELEASES,
    ),
    "vision_positions": Port(
        module=f"{HERE}.vision_positions",
        targets=("sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder._position_embeddings",),
        relies_on=("sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder.__init__",),
        written_for=_VISION_RELEASES,
    ),
    "vision_rope": Port(
        module=f"{HERE}.vision_rope",
        targets=("sglang.srt.models.gemma4_vision:_apply_multidimensional_rope",),
        relies_on=(
            "sglang.srt.models.gemma4_vision:_apply_rotary",
            "sglang.srt.models.gemma4_vision:_rotate_half",
        ),
        written_for=_VISION_RELEASES,
    ),
}
