"""What each port for SGLang 0.5.22 and 0.5.23 stands on, as data. Nothing here imports SGLang."""

from __future__ import annotations

from gemma4_turbo.engine.port import Port

HERE = __package__

# What a layer calls by way of its modules.
_NORM_CALLS = (
    "sglang.kernels.fused_op:BaseFusedOp.forward",
    "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
    "sglang.srt.layers.layernorm:rmsnorm",
)

PORTS: dict[str, Port] = {
    "step_prologue": Port(
        module=f"{HERE}.step_prologue",
        targets=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.forward",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.get_per_layer_inputs",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.project_per_layer_inputs",
        ),
        relies_on=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_per_layer_inputs",
            "sglang.srt.models.gemma3_causal:Gemma3TextScaledWordEmbedding",
            "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
            "sglang.kernels.fused_op:BaseFusedOp._resolve_forward_method",
        ),
        reads=(
            (
                "sglang.kernels.fused_op:BaseFusedOp.forward",
                (
                    "_UNRESOLVED",
                    "_forced_backend",
                    "_forward_method",
                    "_resolve_forward_method",
                    "_trace_enabled",
                    "get_fused_op_backend",
                ),
            ),
        ),
        written_for=("0.5.22", "0.5.23"),
        goes_round=_NORM_CALLS,
    ),
    "moe_align": Port(
        module=f"{HERE}.moe_align",
        targets=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"
            ":moe_align_block_size",
        ),
        relies_on=("sglang.kernels.ops.moe.fused_moe_triton_kernels:fused_moe_kernel",),
        written_for=("0.5.23",),
    ),
    "vision_syncs": Port(
        module=f"{HERE}.vision_syncs",
        targets=(
            "sglang.srt.layers.attention.vision:VisionTritonAttention.forward",
            "sglang.srt.layers.attention.vision:VisionFlash3Attention.forward",
            "sglang.srt.layers.attention.vision:VisionFlash4Attention.forward",
        ),
        relies_on=(
            "sglang.srt.layers.attention.vision:resolve_seqlens",
            "sglang.srt.layers.attention.vision:resolve_precomputed_max_seqlen",
            "sglang.srt.layers.attention.vision:_get_cu_seqlens_for_shape",
        ),
        written_for=("0.5.22", "0.5.23"),
    ),
}
