"""What each port for SGLang 0.5.11 and 0.5.12 stands on, as data. Nothing here imports SGLang."""

from __future__ import annotations

from gemma4_turbo.engine.port import Lacks, Port
from gemma4_turbo.ports.any import calls
from gemma4_turbo.ports.any.sources import VISION_RELEASES

HERE = __package__


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
_NORM_CALLS = (_OP, *calls.NORM)
_MLP_CALLS = (*calls.LINEAR, _OP, *calls.MLP)
_ROPE_CALLS = (_OP, *calls.ROPE)
_EXPERTS_CALLS = (_OP, *calls.EXPERTS)
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

# It takes `forward` from `AttentionBackend`, and with it who calls what.
_BY_BASE = (
    Lacks(
        "sglang.srt.layers.attention.triton_backend:TritonAttnBackend",
        ("forward", "forward_mixed"),
        "AttentionBackend",
    ),
)
# Who reads a checkpoint's scales of K and V, by `BaseKVCacheMethod.process_weights_after_loading`.
_SCALED = (
    "sglang.srt.layers.quantization.fp8:Fp8KVCacheMethod",
    "sglang.srt.layers.quantization.modelopt_quant:ModelOptFp8KVCacheMethod",
    "sglang.srt.layers.quantization.quark.quark:QuarkKVCacheMethod",
)

_VISION_BACKENDS = (
    "sglang.srt.layers.attention.vision:VisionTritonAttention.forward",
    "sglang.srt.layers.attention.vision:VisionFlash3Attention.forward",
)

# They take all but one method from SGLang's inputs for EAGLE.
_MTP_INPUTS = "sglang.srt.speculative.frozen_kv_mtp_info"
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
)


# Of which a decode step of the KV-shared layers makes one of its own.
_METADATA_READS = (
    (
        "sglang.srt.layers.attention.triton_backend:ForwardMetadata",
        (
            *("attn_logits", "attn_lse", "max_extend_len", "num_kv_splits", "kv_indptr"),
            *("kv_indices", "qo_indptr", "custom_mask", "mask_indptr", "window_kv_indptr"),
            *("window_kv_indices", "window_num_kv_splits", "window_kv_offsets"),
            "swa_attn_logits",
        ),
    ),
    (
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
        (
            *("forward_mode", "batch_size", "input_ids", "req_pool_indices", "seq_lens"),
            *("seq_lens_cpu", "seq_lens_sum", "out_cache_loc", "out_cache_loc_swa", "positions"),
            *("extend_num_tokens", "extend_seq_lens", "extend_prefix_lens", "mm_inputs"),
            *("extend_seq_lens_cpu", "extend_prefix_lens_cpu", "extend_start_loc"),
            *("num_token_non_padded_cpu", "padded_static_len", "req_to_token_pool"),
            *("token_to_kv_pool", "attn_backend", "hisparse_coordinator"),
        ),
    ),
)


PORTS: dict[str, Port] = {
    "router": Port(
        module=f"{HERE}.experts.router",
        targets=("sglang.srt.models.gemma4_causal:Gemma4MoE.__init__",),
        relies_on=("sglang.srt.layers.moe.topk:TopK.forward_cuda",),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        superseded_when=(
            "sglang.srt.models.gemma4_causal:Gemma4MoE.__init__",
            "gemma4_fused_routing",
        ),
        superseded_since="0.5.13",
    ),
    "step_prologue": Port(
        module=f"{HERE}.decode_step.step_prologue",
        targets=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.forward",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.get_per_layer_inputs",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.project_per_layer_inputs",
        ),
        relies_on=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_per_layer_inputs",
            "sglang.srt.models.gemma3_causal:Gemma3TextScaledWordEmbedding.forward",
            "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
        ),
        reads=(
            (
                "sglang.srt.models.gemma3_causal:Gemma3TextScaledWordEmbedding.__init__",
                ("embed_scale",),
            ),
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_NORM_CALLS,
    ),
    "moe_align": Port(
        module=f"{HERE}.experts.moe_align",
        targets=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"
            ":moe_align_block_size",
        ),
        relies_on=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_kernels"
            ":fused_moe_kernel",
        ),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        # Upstream's own single launch takes up to 64 slots.
        superseded_when=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"
            ":moe_align_block_size",
            "moe_align_small_numel",
        ),
        superseded_since="0.5.18",
    ),
    "experts_few": Port(
        module=f"{HERE}.experts.experts_few",
        targets=("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts_impl",),
        relies_on=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:inplace_fused_experts",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:outplace_fused_experts",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_prepare_fused_moe_run",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
        ),
    ),
    "layer_norms": Port(
        module=f"{HERE}.wiring:layer_norms",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=(*_NORM_CALLS, "sglang.srt.models.gemma4_causal:Gemma4Router.forward"),
    ),
    "router_norm": Port(
        module=f"{HERE}.experts.router_norm",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Router.forward",),
        relies_on=(
            "sglang.srt.models.gemma4_causal:Gemma4Router.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4Router.fuse_scale",
            "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_cuda",
        ),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        superseded_when=("sglang.srt.models.gemma4_causal:Gemma4Router.forward", "_scale_fused"),
        superseded_since="0.5.13",
        goes_round=_NORM_CALLS,
    ),
    "ple_tail": Port(
        module=f"{HERE}.wiring:ple_tail",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_NORM_CALLS,
    ),
    "qkv_norm": Port(
        module=f"{HERE}.wiring:qkv_norm",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Attention.forward",),
        relies_on=_ATTENTION,
        written_for=("0.5.12", "0.5.12.post1"),
        superseded_when=("sglang.srt.layers.gemma4_fused_ops:_gemma_qkv_rmsnorm_kernel", "BY_HEAD"),
        superseded_since="0.5.13",
        goes_round=calls.QKV,
    ),
    "rope_store": Port(
        module=f"{HERE}.wiring:rope_store",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Attention.forward",),
        relies_on=(
            *_ATTENTION,
            "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_cuda",
            "sglang.srt.layers.rotary_embedding.rope_variant:Gemma4RotaryEmbedding",
            "sglang.srt.layers.radix_attention:RadixAttention.forward",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",
            "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.set_kv_buffer",
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer",
            "sglang.srt.mem_cache.memory_pool:_set_kv_buffer_impl",
        ),
        lacks=_BY_BASE,
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=(*calls.QKV, *_ROPE_CALLS, *_ATTENTION_CALLS),
    ),
    "qkv_proj": Port(
        module=f"{HERE}.wiring:qkv_proj",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Attention.forward",),
        relies_on=_ATTENTION,
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=calls.LINEAR,
    ),
    "input_norm": Port(
        module=f"{HERE}.wiring:input_norm",
        targets=(
            "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",
        ),
        relies_on=(
            *_LAYER,
            *_TAIL,
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_NORM_CALLS,
    ),
    "experts_sum": Port(
        module=f"{HERE}.experts.experts_sum",
        targets=(
            "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_sum_reduce_torch_compile",
        ),
        relies_on=(
            *_LAYER,
            *_TAIL,
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
            "sglang.srt.models.gemma4_causal:Gemma4MoE.forward",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_EXPERTS_CALLS,
    ),
    "mlp_stream": Port(
        module=f"{HERE}.wiring:mlp_stream",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_MLP_CALLS,
    ),
    "skinny_gemm": Port(
        module=f"{HERE}.wiring:skinny_gemm",
        targets=(
            "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.forward",
        ),
        relies_on=(*_LAYER, *calls.DENSE_MLP),
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_MLP_CALLS,
    ),
    "mlp_few": Port(
        module=f"{HERE}.wiring:mlp_few",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=(*_LAYER, *calls.DENSE_MLP),
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_MLP_CALLS,
    ),
    "pdl": Port(
        module=f"{HERE}.wiring:pdl",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
    ),
    "extend_attention": Port(
        module=f"{HERE}.attention.extend_attention",
        targets=(
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend",
            "sglang.srt.layers.attention.triton_backend:update_sliding_window_buffer",
            "sglang.srt.layers.attention.triton_backend:update_sliding_window_buffer_cuda_graph",
        ),
        relies_on=(
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.init_forward_metadata",
            "sglang.srt.layers.attention.triton_ops.extend_attention:extend_attention_fwd",
            "sglang.srt.layers.attention.triton_ops.extend_attention:_fwd_kernel",
            "sglang.srt.layers.attention.triton_ops.extend_attention"
            ":_get_block_sizes_for_extend_attention",
            "sglang.srt.layers.attention.utils:create_flashinfer_kv_indices_triton",
            "sglang.srt.layers.radix_attention:RadixAttention.__init__",
            "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.translate_loc_from_full_to_swa",
            "sglang.srt.mem_cache.swa_memory_pool"
            ":SWATokenToKVPoolAllocator.translate_loc_from_full_to_swa",
        ),
        reads=(
            (
                "sglang.srt.layers.attention.triton_backend:ForwardMetadata",
                (
                    *("max_extend_len", "qo_indptr", "kv_indptr", "kv_indices"),
                    *("custom_mask", "mask_indptr"),
                    *("window_kv_indptr", "window_kv_indices", "window_kv_offsets"),
                ),
            ),
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        # It asks for the GPU's capability while it is imported: not before the device is chosen.
        lazy=("sglang.srt.layers.attention.triton_ops.extend_attention",),
    ),
    "vision_syncs": Port(
        module=f"{HERE}.vision.vision_syncs",
        targets=_VISION_BACKENDS,
        relies_on=("sglang.srt.layers.attention.vision:resolve_seqlens",),
        written_for=VISION_RELEASES[:8],
    ),
    "optional_kv": Port(
        module=f"{HERE}.prefill.optional_kv",
        targets=("sglang.srt.layers.radix_attention:RadixAttention.forward",),
        relies_on=("sglang.srt.layers.radix_attention:unified_attention_with_output",),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        # Its operator took more arguments, and optional key and value, in one release.
        superseded_when=(
            "sglang.srt.layers.radix_attention:unified_attention_with_output",
            "topk_indices",
        ),
        superseded_since="0.5.13",
    ),
    "mm_prefill_graph": Port(
        module=f"{HERE}.prefill.mm_prefill_graph",
        targets=("sglang.srt.server_args:ServerArgs._handle_piecewise_cuda_graph",),
        relies_on=_MM_GRAPH,
        written_for=("0.5.12", "0.5.12.post1"),
        # The server's arguments are read before any of it is imported.
        lazy=tuple(source.partition(":")[0] for source in _MM_GRAPH),
        goes_round=_LAYER_CALLS,
    ),
    "yoco": Port(
        module=f"{HERE}.wiring:yoco",
        targets=(
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",
            "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ),
        relies_on=(
            *_LAYER,
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.forward",
            "sglang.srt.layers.radix_attention:RadixAttention.forward",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.init_forward_metadata",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",
            "sglang.srt.layers.logits_processor:LogitsProcessor._get_pruned_states",
        ),
        lacks=_BY_BASE,
        reads=_METADATA_READS,
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=(
            *_LAYER_CALLS,
            "sglang.srt.layers.logits_processor:LogitsProcessor.forward",
        ),
    ),
    "yoco_graph": Port(
        module=f"{HERE}.wiring:yoco_graph",
        targets=("sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",),
        relies_on=(
            *_LAYER,
            "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.forward",
            "sglang.srt.layers.radix_attention:RadixAttention.forward",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",
            "sglang.srt.layers.attention.triton_backend"
            ":TritonAttnBackend.init_forward_metadata_capture_cuda_graph",
            "sglang.srt.layers.attention.triton_ops.decode_attention:decode_attention_fwd",
            "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
            "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.get_key_buffer",
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.get_key_buffer",
        ),
        lacks=_BY_BASE,
        reads=_METADATA_READS,
        written_for=("0.5.12", "0.5.12.post1"),
        goes_round=_LAYER_CALLS,
    ),
    "yoco_piecewise": Port(
        module=f"{HERE}.wiring:yoco_piecewise",
        targets=("sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",),
        relies_on=(
            *_LAYER,
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4ForCausalLM.forward",
            "sglang.srt.model_executor.model_runner:ModelRunner.init_piecewise_cuda_graphs",
            *_PIECEWISE,
        ),
        reads=(
            (
                "sglang.srt.compilation.piecewise_context_manager:ForwardContext",
                ("forward_batch",),
            ),
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        lazy=(
            *dict.fromkeys(source.partition(":")[0] for source in _PIECEWISE),
            "sglang.srt.compilation.piecewise_context_manager",
        ),
        goes_round=_LAYER_CALLS,
    ),
    "shared_kv_pool": Port(
        module=f"{HERE}.memory.shared_kv_pool",
        targets=(
            "sglang.srt.model_executor.pool_configurator:HybridSWAPoolConfigurator.__init__",
            "sglang.srt.model_executor.pool_configurator"
            ":HybridSWAPoolConfigurator.calculate_pool_sizes",
        ),
        relies_on=(
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.model_executor.pool_configurator"
            ":HybridSWAPoolConfigurator._solve_pool_sizes",
            "sglang.srt.model_executor.model_runner_kv_cache_mixin"
            ":ModelRunnerKVCacheMixin._resolve_max_num_reqs",
            "sglang.srt.mem_cache.memory_pool:ReqToTokenPool.__init__",
            "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.__init__",
            "sglang.srt.model_executor.model_runner:ModelRunner.adjust_hybrid_swa_layers_for_pp",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
    ),
    "swa_ratio": Port(
        module=f"{HERE}.memory.swa_ratio",
        targets=("sglang.srt.server_args:ServerArgs._handle_model_specific_adjustments",),
        relies_on=(
            "sglang.srt.model_executor.pool_configurator:HybridSWAPoolConfigurator.__init__",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        # The server's arguments are read before it is imported.
        lazy=("sglang.srt.model_executor.pool_configurator",),
    ),
    "decode_attention": Port(
        module=f"{HERE}.attention.decode_attention",
        targets=("sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",),
        relies_on=(
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.__init__",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.init_forward_metadata",
            "sglang.srt.layers.attention.triton_backend"
            ":TritonAttnBackend.init_forward_metadata_capture_cuda_graph",
            "sglang.srt.layers.attention.triton_backend"
            ":TritonAttnBackend.init_forward_metadata_replay_cuda_graph",
            "sglang.srt.layers.attention.triton_backend:update_sliding_window_buffer",
            "sglang.srt.layers.attention.triton_backend:update_sliding_window_buffer_cuda_graph",
            "sglang.srt.layers.attention.triton_ops.decode_attention:decode_attention_fwd",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
    ),
    "moe_configs": Port(
        module=f"{HERE}.experts.moe_configs",
        targets=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config:get_moe_configs",
        ),
        relies_on=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config"
            ":try_get_optimal_moe_config",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config"
            ":get_config_file_name",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_kernels"
            ":fused_moe_kernel",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
    ),
    "mtp_merge_batch": Port(
        module=f"{HERE}.speculation.mtp_merge_batch",
        targets=("sglang.srt.managers.schedule_batch:ScheduleBatch.merge_batch",),
        relies_on=(
            "sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPDraftInput.__post_init__",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.create_idle_input",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.merge_batch",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.filter_batch",
        ),
        methods_of=(
            f"{_MTP_INPUTS}:FrozenKVMTPDraftInput",
            f"{_MTP_INPUTS}:FrozenKVMTPVerifyInput",
            f"{_MTP_INPUTS}:FrozenKVMTPDraftExtendInput",
        ),
        # That there are such.
        reads=(
            ("sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPVerifyInput", ()),
            ("sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPDraftExtendInput", ()),
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        superseded_when=(
            "sglang.srt.speculative.frozen_kv_mtp_worker"
            ":FrozenKVMTPWorker.forward_batch_generation",
            "_draft_preprocess_idle",
        ),
        superseded_since="0.5.13",
    ),
    "frozen_kv_views": Port(
        module=f"{HERE}.speculation.defects:frozen_kv_views",
        targets=(
            "sglang.srt.speculative.frozen_kv_mtp_utils:frozen_kv_target_view",
            "sglang.srt.speculative.frozen_kv_mtp_utils:target_kv_pool_view",
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.__init__",
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.capture_one_batch_size",
        ),
        relies_on=(),
        written_for=(),  # no release has the defect, a development tree between two had it
        superseded_when=(
            "sglang.srt.layers.attention.trtllm_mha_backend:TRTLLMHAAttnBackend",
            "token_to_kv_pool_allocator",
        ),
        superseded_since="0.5.12",
        finds_defect=True,
    ),
    "kv_scales": Port(
        module=f"{HERE}.attention.kv_scales",
        targets=(
            "sglang.srt.model_executor.model_runner:ModelRunner.configure_kv_cache_dtype",
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.build_frozen_kv_mtp_context",
            "sglang.srt.layers.quantization.kv_cache"
            ":BaseKVCacheMethod.process_weights_after_loading",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend",
        ),
        relies_on=(
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.models.gemma4_mtp:_resolve_target_text_model",
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.bind_frozen_kv_context",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",
            "sglang.srt.layers.quantization.kv_cache:BaseKVCacheMethod.create_weights",
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer",
        ),
        methods_of=_SCALED,
        lacks=_BY_BASE,
        written_for=("0.5.12", "0.5.12.post1"),
    ),
    "mtp_launch": Port(
        module=f"{HERE}.speculation.defects:mtp_launch",
        targets=(
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.__init__",
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.load_weights",
        ),
        relies_on=("sglang.srt.models.gemma4_causal:Gemma4ForCausalLM.load_weights",),
        written_for=(),  # no release has the defects, a development tree between two had them
        finds_defect=True,
    ),
    "mtp_moe_runner": Port(
        module=f"{HERE}.speculation.defects:mtp_moe_runner",
        targets=("sglang.srt.server_args:ServerArgs._handle_model_specific_adjustments",),
        relies_on=(),
        written_for=(),  # as for mtp_launch
        finds_defect=True,
    ),
    "mtp_chain": Port(
        module=f"{HERE}.speculation.mtp_chain",
        targets=(
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.__init__",
        ),
        relies_on=(
            f"{_MTP_WORKER}.draft_forward",
            f"{_MTP_WORKER}._capture_for_decode",
            f"{_MTP_WORKER}._init_frozen_kv_metadata",
            f"{_MTP_WORKER}.draft",
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.replay",
            "sglang.srt.speculative.frozen_kv_mtp_utils:capture_for_decode",
            "sglang.srt.speculative.frozen_kv_mtp_utils:set_frozen_kv_positions",
            "sglang.srt.speculative.frozen_kv_mtp_utils:target_kv_pool_view",
            "sglang.srt.speculative.spec_utils:_select_top_k_tokens_first",
            "sglang.srt.speculative.spec_utils:_select_top_k_tokens_later",
            "sglang.srt.speculative.eagle_utils:organize_draft_results",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.filter_batch",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.merge_batch",
        ),
        methods_of=(f"{_MTP_INPUTS}:FrozenKVMTPDraftInput",),
        written_for=("0.5.12", "0.5.12.post1"),
        lazy=(_MTP_WORKER.partition(":")[0],),
    ),
    "mtp_seed_graph": Port(
        module=f"{HERE}.speculation.mtp_seed_graph",
        targets=(
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.capture_one_batch_size",
        ),
        relies_on=(
            f"{_MTP_WORKER}._run_assistant_seed_step",
            f"{_MTP_WORKER}._init_frozen_kv_metadata_replay_cuda_graph",
            f"{_MTP_WORKER}.forward_draft_extend",
            f"{_MTP_WORKER}.forward_draft_extend_after_decode",
            f"{_MTP_WORKER}.draft",
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.__init__",
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.replay",
            "sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPDraftInput.__post_init__",
            "sglang.srt.speculative.frozen_kv_mtp_utils:set_frozen_kv_positions",
            "sglang.srt.speculative.frozen_kv_mtp_utils:target_kv_pool_view",
        ),
        methods_of=(f"{_MTP_INPUTS}:FrozenKVMTPDraftInput",),
        reads=(
            (
                "sglang.srt.speculative.eagle_info:EagleDraftInput",
                (
                    *("topk_p", "topk_index", "hidden_states", "capture_hidden_mode"),
                    *("bonus_tokens", "num_tokens_per_req", "num_tokens_for_logprob_per_req"),
                ),
            ),
            (
                "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner:FrozenKVMTPInputBuffers",
                (
                    *("req_pool_indices", "positions", "mrope_positions", "seq_lens"),
                    *("seq_lens_cpu", "hidden_states"),
                ),
            ),
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        lazy=(_MTP_WORKER.partition(":")[0],),
        goes_round=_LAYER_CALLS,
    ),
    "mtp_metadata": Port(
        module=f"{HERE}.speculation.mtp_metadata",
        targets=(
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.capture",
        ),
        relies_on=(
            f"{_MTP_WORKER}.draft",
            f"{_MTP_WORKER}.forward_draft_extend",
            f"{_MTP_WORKER}.forward_draft_extend_after_decode",
            f"{_MTP_WORKER}._run_assistant_seed_step",
            f"{_MTP_WORKER}._init_frozen_kv_metadata",
            f"{_MTP_WORKER}._init_frozen_kv_metadata_replay_cuda_graph",
            f"{_MTP_WORKER}._init_draft_attn_backend",
            f"{_MTP_WORKER}._position_for_batch",
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.__init__",
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner"
            ":FrozenKVMTPCudaGraphRunner.replay",
            "sglang.srt.speculative.frozen_kv_mtp_utils:set_frozen_kv_positions",
            "sglang.srt.speculative.frozen_kv_mtp_utils:position_for_batch",
            "sglang.srt.layers.attention.triton_backend"
            ":TritonAttnBackend.init_forward_metadata_replay_cuda_graph",
            "sglang.srt.speculative.eagle_info:EagleVerifyInput.verify",
        ),
        methods_of=(f"{_MTP_INPUTS}:FrozenKVMTPVerifyInput",),
        written_for=("0.5.12", "0.5.12.post1"),
        lazy=(_MTP_WORKER.partition(":")[0], "sglang.srt.layers.attention.triton_backend"),
    ),
    # It reads what was accepted, and with it the lengths, before it goes on.
    "mtp_sync": Port(
        targets=("sglang.srt.speculative.frozen_kv_mtp_utils:capture_for_decode",),
        needless="the draft's worker waits for every verification, it does not run ahead of the GPU",
    ),
    # Up to 0.5.17, which the second of the targets tells, all of a process allocates from one pool.
    "picture_memory": Port(
        targets=(
            "sglang.srt.multimodal.processors.base_processor"
            ":BaseMultimodalProcessor.process_mm_data",
            "sglang.srt.managers.mm_utils:_move_items_to_device",
        ),
        needless="the image processor has no CUDA memory pool of its own that could stay behind",
    ),
    "swa_window": Port(
        module=f"{HERE}.attention.swa_window",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",),
        relies_on=("sglang.srt.models.gemma4_causal:get_attention_sliding_window_size",),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1", "0.5.13", "0.5.13.post1"),
        superseded_when=(
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "get_attention_sliding_window_size",
        ),
        superseded_since="0.5.14",
    ),
    "trtllm_debug": Port(
        module=f"{HERE}.attention.trtllm_debug",
        targets=(
            "sglang.srt.layers.attention.trtllm_mha_backend:TRTLLMHAAttnBackend.forward_decode",
            "sglang.srt.layers.attention.trtllm_mha_backend:TRTLLMHAAttnBackend.forward_extend",
            "sglang.srt.layers.attention.trtllm_mha_backend"
            ":TRTLLMHAAttnBackend.init_forward_metadata_replay_cuda_graph",
            "sglang.srt.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator.alloc",
            "sglang.srt.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator.alloc_extend",
            "sglang.srt.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator.alloc_decode",
        ),
        relies_on=(
            "sglang.srt.layers.attention.trtllm_mha_backend"
            ":TRTLLMHAAttnBackend._get_layer_page_table",
            "sglang.srt.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator.__init__",
        ),
        reads=(
            (
                "sglang.srt.layers.attention.trtllm_mha_backend:TRTLLMMHAMetadata",
                ("cache_seqlens_int32", "page_table", "swa_page_table"),
            ),
        ),
        written_for=("0.5.12", "0.5.12.post1"),
    ),
}
