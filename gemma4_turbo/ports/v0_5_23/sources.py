"""What each port for SGLang 0.5.22 and 0.5.23 stands on, as data. Nothing here imports SGLang."""

from __future__ import annotations

from gemma4_turbo.engine.port import Lacks, Port
from gemma4_turbo.ports.any import calls

HERE = __package__
RELEASES = ("0.5.23",)

_MODEL = "sglang.srt.models.gemma4_causal"
_OP = "sglang.kernels.fused_op:BaseFusedOp.forward"
_BOUNDARY = "sglang.srt.layers.layer_boundary"
_RESIDUAL = f"{_BOUNDARY}.residual"
_STAGE = f"{_BOUNDARY}.stage:StageBoundary"
_PLAN = f"{_BOUNDARY}.construction:StagePlan"
_EXIT = f"{_BOUNDARY}.exit:ExitPolicy"
_STREAM = f"{_RESIDUAL}.stream:ResidualStream"
_READS = f"{_RESIDUAL}.add_norm"

# What a layer's boundaries do on one GPU and under tensor parallelism, which the layer's forward stands for.
_BOUNDARIES = (
    f"{_BOUNDARY}.prepare:_reduce_update_read",
    f"{_BOUNDARY}.boundary:_select_entry_step",
    f"{_BOUNDARY}.ops:attn_tp_all_reduce",
    "sglang.srt.layers.moe.utils:sum_post_experts_output",
    f"{_MODEL}:Gemma4DecoderLayer._next_stream",
    f"{_MODEL}:Gemma4DecoderLayer.stage_facts",
    f"{_BOUNDARY}.prepare:_update_read",
    f"{_BOUNDARY}.prepare:_run_entry",
    # Of each class what these layers run: not pipelines, captures, branches, row transport.
    *(
        f"{_STAGE}.{name}"
        for name in (
            *("__init__", "kind", "norm", "entry", "prepare", "finish", "exit", "sum_part"),
            *("_prepare", "_prepare_input", "_prepare_attention", "_select"),
        )
    ),
    *(f"{_PLAN}.{name}" for name in ("__init__", "variant_for", "path_for", "output")),
    # Through what a boundary reads: the very object that it was bound with, or another one for each batch.
    f"{_BOUNDARY}.boundary:bind_entry",
    f"{_BOUNDARY}.boundary:_bind_entry_path",
    f"{_RESIDUAL}:bind_read",
    *(
        f"{_BOUNDARY}.boundary:_TransformedRead.{name}"
        for name in ("bind", "_bind", "update_and_read")
    ),
    *(
        f"{_EXIT}.{name}"
        for name in (
            *("__init__", "ffn_exit", "_decide", "_complete_now", "_record_output"),
            *("_defers_sum", "_next_input_can_scatter"),
            *("_dp_reduce_scatter_step", "_sum_in_reduce_scatter"),
        )
    ),
    f"{_BOUNDARY}.exit:FfnExit.__init__",
    f"{_BOUNDARY}.exit:FfnExit.finish",
    f"{_BOUNDARY}.ops:sum_output",
    f"{_RESIDUAL}.batch:set_written",
    f"{_RESIDUAL}.batch:start",
    *(f"{_STREAM}.{name}" for name in ("__init__", "check", "input", "record", "write")),
    f"{_READS}:NormQuantReadout.init_residual",
    f"{_READS}:NormQuantReadout.read",
    f"{_READS}:NormReadout.read",
    f"{_READS}:NormReadout.update_and_read",
    f"{_READS}:ReplaceAtExit.update",
)
# And what the layer's forward asks of them, each time the layer's parts change.
_LAYER_READS = (
    (f"{_STAGE}.__init__", ("plan", "declaration")),
    (f"{_PLAN}.__init__", ("norm", "paths")),
    (f"{_BOUNDARY}.factories:StageDeclaration", ("output_transform", "update")),
    (f"{_BOUNDARY}.output:OutputTransform", ("apply",)),
    (f"{_BOUNDARY}.contracts:BatchVariant", ("ORDINARY",)),
    (f"{_BOUNDARY}.contracts:StagePath", ("entry", "output")),
    (f"{_BOUNDARY}.contracts:EntryPath", ("prepare", "input_move", "declared_sum")),
    (f"{_BOUNDARY}.contracts:OutputContract", ("group", "always_partial", "sum_impl")),
    (f"{_BOUNDARY}.layout:SumGroup", ("ATTN_TP", "TP", "MOE_OUTPUT")),
    (f"{_READS}:PlainAdd", ("bind", "is_plain_add", "quantized_sum")),
    (f"{_READS}:ReplaceAtExit", ("bind", "applied_at_exit")),
    (f"{_READS}:NormQuantReadout", ("bind",)),
    (f"{_READS}:NormReadout", ("bind",)),
    (f"{_BOUNDARY}.boundary:_TransformedRead", ("bind", "inner")),
    (f"{_STREAM}.__init__", ("residual", "pending")),
    ("sglang.srt.model_executor.forward_batch_info:ForwardBatch", ("residual_stream",)),
)
# What the steps of a decoder layer's forward rely on, those of its end, and those of attention's.
_LAYER = (
    f"{_MODEL}:Gemma4DecoderLayer.__init__",
    f"{_MODEL}:Gemma4Router.fuse_scale",
    f"{_MODEL}:Gemma4Router.forward",
    "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
    "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_cuda",
    *_BOUNDARIES,
)
_OPS = "sglang.kernels.ops.layernorm.gemma4_fused_ops"
_TAIL = (
    f"{_OPS}:_gemma_dual_rmsnorm_residual_kernel",
    f"{_OPS}:_gemma_rmsnorm_residual_kernel",
    f"{_OPS}:gemma_dual_rmsnorm_residual_scalar",
    f"{_OPS}:gemma_rmsnorm_residual_scalar",
)
_ATTENTION = (
    f"{_MODEL}:Gemma4Attention.__init__",
    f"{_OPS}:gemma_qkv_rmsnorm",
    f"{_OPS}:_gemma_qkv_rmsnorm_kernel",
    f"{_OPS}:_gemma_qkv_rmsnorm_store",
)

# What stock's boundaries call around a layer, and ours do not: who has wrapped one sees the residual stream.
_STREAM_CALLS = (
    f"{_RESIDUAL}:bind_update",
    f"{_RESIDUAL}.batch:written_residual",
    f"{_RESIDUAL}.add_norm:_update_and_read_residual_plain",
    f"{_BOUNDARY}.ops:keep_output",
)

# What a layer calls by way of its modules.
_NORM_CALLS = (_OP, *calls.NORM)
_MLP_CALLS = (*calls.LINEAR, _OP, *calls.MLP)
_ROPE_CALLS = (_OP, *calls.ROPE)
_EXPERTS_CALLS = (
    _OP,
    *calls.EXPERTS,
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_combine_topk",
)
_ATTENTION_CALLS = (
    "sglang.srt.layers.radix_attention:RadixAttention.forward",
    "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward",
    "sglang.srt.layers.attention.triton_backend:TritonAttnBackend._set_kv_buffer",
    "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.set_kv_buffer",
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer",
)

_SPEC = "sglang.srt.speculative"
_DRAFT = f"{_SPEC}.frozen_kv_mtp_worker_v2:FrozenKVMTPDraftWorker"
_DRAFT_GRAPHS = f"{_SPEC}.frozen_kv_mtp_cuda_graph_runner"

_BACKEND = "sglang.srt.layers.attention.triton_backend"
# It takes `forward` from `AttentionBackend`, and with it who calls what.
_BY_BASE = (
    Lacks(f"{_BACKEND}:TritonAttnBackend", ("forward", "forward_mixed"), "AttentionBackend"),
)
# And how late a prefill reads its slots.
_CUT_BY_BASE = (
    *_BY_BASE,
    Lacks(
        f"{_BACKEND}:TritonAttnBackend",
        (
            *("resolve_prefill_shared_read_ends", "_snapshot_prefill_shared_reads"),
            "shared_read_ends",
        ),
        "AttentionBackend",
    ),
)
_KERNELS = "sglang.kernels.ops.attention"
_POOLS = "sglang.srt.mem_cache"

# Who reads a checkpoint's scales of K and V, by `BaseKVCacheMethod.process_weights_after_loading`.
_QUANT = "sglang.srt.layers.quantization"
_SCALED = (
    f"{_QUANT}.fp8:Fp8KVCacheMethod",
    f"{_QUANT}.modelopt_quant:ModelOptFp8KVCacheMethod",
    f"{_QUANT}.compressed_tensors.compressed_tensors:CompressedTensorsKVCacheMethod",
    f"{_QUANT}.quark.quark:QuarkKVCacheMethod",
)

# K's and V's buffers are read before the step's own rows are stored.
_BUFFERS = (
    f"{_POOLS}.memory_pool:MHATokenToKVPool._get_key_buffer",
    f"{_POOLS}.memory_pool:MHATokenToKVPool._get_value_buffer",
    f"{_POOLS}.swa_memory_pool:SWAKVPool.get_key_buffer",
    f"{_POOLS}.swa_memory_pool:SWAKVPool.get_value_buffer",
)
# What both forwards of the triton backend read of a layer, a batch, a pool and the backend.
_ATTENTION_READS = (
    (
        "sglang.srt.layers.radix_attention:RadixAttention.__init__",
        (
            *("layer_id", "tp_q_head_num", "qk_head_dim", "v_head_dim", "scaling"),
            *("sliding_window_size", "is_cross_attention", "logit_cap", "logit_capping_method"),
            *("xai_temperature_len", "attn_type", "k_scale", "v_scale"),
        ),
    ),
    ("sglang.srt.layers.radix_attention:AttentionType", ("DECODER",)),
    (
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
        ("out_cache_loc", "spec_info", "_attn_output"),
    ),
    (
        f"{_BACKEND}:TritonAttnBackend.__init__",
        (
            *("forward_metadata", "use_mla", "enable_deterministic", "sliding_window_size"),
            *("req_to_token", "token_to_kv_pool", "kv_index_translator", "dcp_size"),
            *("dllm_attention", "is_draft_runner", "use_verify_splitkv", "use_verify_shared_kv"),
            "allow_bidirectional_attention_in_extend",
        ),
    ),
    (
        f"{_BACKEND}:TritonAttnBackend._set_kv_buffer",
        ("forward_batch", "layer", "loc_info", "k", "v"),
    ),
    (
        f"{_BACKEND}:ForwardMetadata",
        (
            *("max_extend_len", "qo_indptr", "kv_indptr", "kv_indices", "custom_mask"),
            *("mask_indptr", "window_kv_indptr", "window_kv_indices", "window_kv_offsets"),
            "swa_out_cache_loc",
        ),
    ),
    (f"{_POOLS}.memory_pool:KVWriteLoc.for_batch", ("forward_batch", "swa_loc")),
    (
        f"{_POOLS}.memory_pool:MHATokenToKVPool",
        ("kv_cache_layout", "is_quantized_kv_cache"),
    ),
    (
        f"{_POOLS}.swa_memory_pool:SWAKVPool",
        ("full_kv_pool", "swa_kv_pool", "layers_mapping", "full_to_swa_index_mapping"),
    ),
    (f"{_POOLS}.base_swa_memory_pool:BaseSWAKVPool", ()),
    (
        f"{_POOLS}.kv_index_translator:KVIndexTranslator.__init__",
        ("is_translating", "req_to_token"),
    ),
)

# Of all layers, for what runs on fewer rows than stock's, or in a graph.
_LAYER_CALLS = (
    *_NORM_CALLS,
    *_MLP_CALLS,
    *_ROPE_CALLS,
    *_EXPERTS_CALLS,
    *_ATTENTION_CALLS,
    f"{_MODEL}:Gemma4DecoderLayer.forward",
    f"{_MODEL}:Gemma4Attention.forward",
    f"{_MODEL}:Gemma4Router.forward",
)
_EXECUTOR = "sglang.srt.model_executor"
# The loop over the layers, and a decode step of those that share KV.
_CUT = (
    *_LAYER,
    f"{_RESIDUAL}.batch:final_norm",
    f"{_RESIDUAL}.batch:take_output",
    f"{_RESIDUAL}.batch:clear",
    f"{_STREAM}.export",
    "sglang.srt.layers.aux_hidden_states:AuxHiddenStateList.capture",
    f"{_MODEL}:Gemma4DecoderLayer.forward",
    f"{_MODEL}:Gemma4Attention.__init__",
    f"{_MODEL}:Gemma4Attention.forward",
    "sglang.srt.layers.radix_attention:RadixAttention.forward",
    f"{_EXECUTOR}.forward_context:forward_context",
    # A prefill's slots are read late: nobody may write over them before its end.
    "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.resolve_prefill_shared_read_ends",
    "sglang.srt.layers.attention.base_attn_backend:AttentionBackend._snapshot_prefill_shared_reads",
    "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.shared_read_ends",
    f"{_EXECUTOR}.runner_utils.shared_read_event:maybe_publish_prefill_shared_read_done",
    f"{_BACKEND}:TritonAttnBackend.forward_decode",
    f"{_BACKEND}:TritonAttnBackend._fill_kv_indptr_and_indices",
    f"{_BACKEND}:TritonAttnBackend.get_num_kv_splits",
    f"{_BACKEND}:update_sliding_window_buffer",
    f"{_POOLS}.kv_index_translator:KVIndexTranslator.pack_read_stream",
    f"{_POOLS}.kv_index_translator:KVIndexTranslator.read_source",
    f"{_POOLS}.kv_index_translator:KVIndexTranslator._reads_translated",
    f"{_POOLS}.kv_index_translator:KVIndexTranslator._passthrough_table",
    f"{_KERNELS}.kv_indices:create_flashinfer_kv_indices_triton",
)
_CUT_READS = (
    *_LAYER_READS,
    (
        f"{_BACKEND}:ForwardMetadata",
        (
            *("attn_logits", "attn_lse", "max_extend_len", "num_kv_splits", "kv_indptr"),
            *("kv_indices", "qo_indptr", "custom_mask", "mask_indptr", "window_kv_indptr"),
            *("window_kv_indices", "window_num_kv_splits", "window_kv_offsets"),
            *("swa_attn_logits", "swa_out_cache_loc"),
        ),
    ),
    (
        f"{_BACKEND}:TritonAttnBackend.__init__",
        (
            *("forward_metadata", "use_mla", "enable_deterministic", "sliding_window_size"),
            *("req_to_token", "token_to_kv_pool", "kv_index_translator", "dcp_size"),
            *("dllm_attention", "enable_lean_attention", "num_head", "v_head_dim"),
            *("swa_v_head_dim", "max_kv_splits"),
        ),
    ),
    (
        f"{_EXECUTOR}.forward_batch_info:ForwardBatch",
        (
            *("forward_mode", "batch_size", "input_ids", "req_pool_indices", "seq_lens"),
            *("seq_lens_cpu", "seq_lens_sum", "out_cache_loc", "positions", "kv_loc_plan"),
            *("extend_num_tokens", "extend_seq_lens", "extend_prefix_lens", "mm_inputs"),
            *("extend_seq_lens_cpu", "extend_prefix_lens_cpu", "extend_start_loc"),
            *("extend_logprob_start_lens_cpu", "return_logprob", "capture_hidden_mode"),
            *("return_hidden_states_before_norm", "return_pooled_hidden_states"),
            *("is_prefill_only", "dimensions", "multi_item_delimiter_indices", "lora_ids"),
            *("spec_info", "spec_algorithm", "global_num_tokens_cpu", "tbo_split_seq_index"),
            *("tbo_children", "attn_cp_metadata", "attn_dcp_metadata", "residual_stream"),
            *("attn_tp_sequence_sharded", "token_indices_to_pool", "decision_layouts"),
            *("global_num_token_non_padded_cpu", "global_num_token_non_padded"),
            *("num_token_non_padded", "input_embeds", "mm_input_embeds", "_attn_output"),
        ),
    ),
    (f"{_POOLS}.swa_memory_pool:SWAKVPool", ("full_to_swa_index_mapping",)),
    (
        f"{_POOLS}.kv_index_translator:KVIndexTranslator.__init__",
        ("is_translating", "req_to_token"),
    ),
)
_SETUP = f"{_EXECUTOR}.model_runner_components"
_RUNNER = f"{_EXECUTOR}.runner.prefill_cuda_graph_runner"
_BREAKABLE = f"{_EXECUTOR}.runner_backend_utils.breakable_cuda_graph"
# Attention of one layer between two breakable graphs.
_BREAK = (
    "sglang.srt.layers.radix_attention:RadixAttention.forward",
    "sglang.srt.layers.radix_attention:RadixAttention._eager_attention",
    "sglang.srt.layers.attention.graph_utils:attention_input_scope",
    "sglang.srt.layers.attention.graph_utils:allocate_attention_outputs",
    f"{_BREAKABLE}.breakable_cuda_graph:eager_on_graph",
)
_GRAPH_SETUP = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
_RECORDER = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner"
_RECORDED = "sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend"
_MULTIMODAL = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration"

# What breakable graphs of a model that takes pictures are recorded from, and what feeds them.
_MM_GRAPH = (
    f"{_GRAPH_SETUP}:capture_prefill_graph",
    # How stock is told that there are to be none.
    "sglang.srt.model_executor.cuda_graph_config:check_cuda_graph_backend",
    "sglang.srt.runtime_context:_ConfigBag.override",
    f"{_RECORDER}:_build_layer_model_forward_kwargs",
    f"{_RECORDER}:_resolve_transformer_layer_model",
    f"{_RECORDER}:PrefillCudaGraphRunner._get_layer_model_positions",
    f"{_RECORDER}:PrefillCudaGraphRunner._run_forward",
    f"{_RECORDER}:PrefillCudaGraphRunner._capture_one_stream",
    f"{_RECORDER}:PrefillCudaGraphRunner.capture_prepare",
    f"{_RECORDER}:PrefillCudaGraphRunner.capture_one_shape",
    f"{_RECORDER}:PrefillCudaGraphRunner.load_batch",
    f"{_RECORDER}:PrefillCudaGraphRunner.can_run_graph",
    f"{_RECORDER}:PrefillCudaGraphRunner.can_replay_locally",
    f"{_RECORDER}:PrefillCudaGraphRunner._fill_input_embeds_slot",
    f"{_RECORDER}:PrefillCudaGraphRunner._execute_body_capture",
    f"{_RECORDED}:BreakableCudaGraphBackend.capture_one",
    f"{_RECORDED}:BreakableCudaGraphBackend.cleanup",
    "sglang.srt.model_executor.cuda_graph_buffer_registry:build_prefill_registry",
    "sglang.srt.managers.mm_utils:general_mm_embed_routine",
    "sglang.srt.managers.mm_utils:prepare_mm_inputs",
    f"{_MULTIMODAL}.forward",
    f"{_MULTIMODAL}.prepare_attn_masks",
    "sglang.srt.models.gemma4_unified:Gemma4UnifiedForConditionalGeneration.forward",
    f"{_MODEL}:Gemma4TextModel.forward",
    f"{_MODEL}:Gemma4TextModel.get_per_layer_inputs",
    "sglang.srt.layers.radix_attention:RadixAttention.forward",
    "sglang.srt.layers.radix_attention:RadixAttention._eager_attention",
)

_PROCESSOR = "sglang.srt.multimodal.processors.base_processor:BaseMultimodalProcessor"
_PICTURES = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration"
_UNIFIED = "sglang.srt.models.gemma4_unified:Gemma4UnifiedForConditionalGeneration"

_KV = f"{_POOLS}.kv_cache_configurator:KVCacheConfigurator"
_SIZES = "sglang.srt.model_executor.pool_configurator"

# What layers call at each prefill, and graphs do not.
_PREFILL_CALLS = tuple(
    dict.fromkeys(
        (
            *_NORM_CALLS,
            *_MLP_CALLS,
            *calls.QKV,
            *_ROPE_CALLS,
            *_EXPERTS_CALLS,
            f"{_MODEL}:Gemma4Router.forward",
        )
    )
)


PORTS: dict[str, Port] = {
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
            "sglang.kernels.fused_op:BaseFusedOp._resolve_forward_method",
        ),
        reads=(
            (
                "sglang.srt.models.gemma3_causal:Gemma3TextScaledWordEmbedding.__init__",
                ("embed_scale",),
            ),
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
        module=f"{HERE}.experts.moe_align",
        targets=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"
            ":moe_align_block_size",
        ),
        relies_on=("sglang.kernels.ops.moe.fused_moe_triton_kernels:fused_moe_kernel",),
        written_for=("0.5.23",),
    ),
    "experts_few": Port(
        module=f"{HERE}.experts.experts_few",
        targets=("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts_impl",),
        relies_on=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_combine_topk",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:inplace_fused_experts",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:outplace_fused_experts",
        ),
        written_for=("0.5.23",),
        goes_round=(
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_prepare_fused_moe_run",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_combine_topk",
            "sglang.kernels.ops.moe.fused_moe_triton_kernels:invoke_fused_moe_kernel",
        ),
    ),
    "router_few": Port(
        module=f"{HERE}.wiring:router_few",
        targets=(
            f"{_MODEL}:Gemma4DecoderLayer.forward",
            "sglang.kernels.ops.moe.gemma4_routing:gemma4_fused_routing",
        ),
        relies_on=(
            *_LAYER,
            "sglang.kernels.ops.moe.gemma4_routing:_gemma4_routing_kernel",
            f"{_MODEL}:Gemma4MoE.__init__",
            f"{_MODEL}:Gemma4MoE.forward",
        ),
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(
            *_STREAM_CALLS,
            *calls.LINEAR,
            _OP,
            "sglang.srt.layers.moe.topk:TopK.forward_cuda",
            "sglang.srt.layers.moe.topk:select_experts",
        ),
    ),
    "feed_forward_few": Port(
        module=f"{HERE}.wiring:feed_forward_few",
        targets=(
            f"{_MODEL}:Gemma4DecoderLayer.forward",
            "sglang.kernels.ops.moe.gemma4_routing:gemma4_fused_routing",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts_impl",
        ),
        relies_on=(
            *_LAYER,
            "sglang.kernels.ops.moe.gemma4_routing:_gemma4_routing_kernel",
            f"{_MODEL}:Gemma4MoE.__init__",
            f"{_MODEL}:Gemma4MoE.forward",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_combine_topk",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:inplace_fused_experts",
            "sglang.srt.layers.moe.topk:_post_process_topk_ids",
            "sglang.srt.layers.moe.topk:apply_routing_simulation",
            "sglang.srt.layers.moe.topk:select_experts",
        ),
        reads=_LAYER_READS,
        written_for=("0.5.23",),
        goes_round=(
            *_STREAM_CALLS,
            *_MLP_CALLS,
            *_EXPERTS_CALLS,
            "sglang.srt.layers.moe.topk:TopK.forward_cuda",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_prepare_fused_moe_run",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
            "sglang.kernels.ops.moe.fused_moe_triton_kernels:invoke_fused_moe_kernel",
        ),
    ),
    "vision_syncs": Port(
        module=f"{HERE}.vision.vision_syncs",
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
    "optional_kv": Port(
        module=f"{HERE}.prefill.optional_kv",
        targets=(
            f"{_EXECUTOR}.model_runner:ModelRunner.get_cuda_graph_layers",
            f"{_SETUP}.cuda_graph_setup:index_attention_layers_by_global_id",
        ),
        relies_on=(
            # What the table is made of, and who reads it: nobody, of a Gemma 4.
            f"{_SETUP}.layer_setup:compute_attention_and_moe_layers",
            f"{_SETUP}.cuda_graph_setup:capture_prefill_graph",
            f"{_SETUP}.cuda_graph_setup:has_standard_gqa_for_all_local_layers",
            f"{_MODEL}:Gemma4Attention.__init__",
            # Attention between two graphs, without key and value.
            *_BREAK,
            f"{_MODEL}:Gemma4Attention.forward",
            f"{_BACKEND}:TritonAttnBackend.forward_extend",
            # What a graph's model is given.
            f"{_MODEL}:Gemma4ForCausalLM.forward",
            f"{_RUNNER}:_build_layer_model_forward_kwargs",
            f"{_RUNNER}:PrefillCudaGraphRunner._run_forward",
            f"{_RUNNER}:PrefillCudaGraphRunner._execute_body_capture",
            f"{_RUNNER}:PrefillCudaGraphRunner._prepare_forward_metadata_for_replay",
        ),
        written_for=RELEASES,
    ),
    # Stock runs a program for each head now, as the patch did.
    "qkv_norm": Port(
        targets=(f"{_OPS}:_gemma_qkv_rmsnorm_kernel",),
        superseded_when=(f"{_OPS}:_gemma_qkv_rmsnorm_kernel", "BY_HEAD"),
        superseded_since="0.5.13",
        tells_only=True,
    ),
    "layer_norms": Port(
        module=f"{HERE}.wiring:layer_norms",
        targets=(f"{_MODEL}:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(*_STREAM_CALLS, *_NORM_CALLS, f"{_MODEL}:Gemma4Router.forward"),
    ),
    "ple_tail": Port(
        module=f"{HERE}.wiring:ple_tail",
        targets=(f"{_MODEL}:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(*_STREAM_CALLS, *_NORM_CALLS),
    ),
    "input_norm": Port(
        module=f"{HERE}.wiring:input_norm",
        targets=(
            f"{_MODEL}:Gemma4DecoderLayer.forward",
            f"{_MODEL}:Gemma4TextModel.forward",
        ),
        relies_on=(
            *_LAYER,
            *_TAIL,
            f"{_RESIDUAL}.batch:final_norm",
            f"{_RESIDUAL}.batch:take_output",
            "sglang.srt.layers.aux_hidden_states:AuxHiddenStateList.capture",
        ),
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(*_STREAM_CALLS, *_NORM_CALLS),
    ),
    "experts_sum": Port(
        module=f"{HERE}.experts.experts_sum",
        targets=(
            f"{_MODEL}:Gemma4DecoderLayer.forward",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:moe_combine_topk",
        ),
        relies_on=(
            *_LAYER,
            *_TAIL,
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:_fused_moe_kernel_sequence",
            "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe"
            ":_use_moe_sum_reduce_torch_compile",
            "sglang.kernels.ops.moe.fused_moe_triton_kernels:moe_sum_reduce_triton",
            "sglang.kernels.ops.moe.fused_moe_triton_kernels:_moe_sum_reduce_kernel",
            f"{_MODEL}:Gemma4MoE.forward",
        ),
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(*_STREAM_CALLS, *_EXPERTS_CALLS),
    ),
    "mlp_stream": Port(
        module=f"{HERE}.wiring:mlp_stream",
        targets=(f"{_MODEL}:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(*_STREAM_CALLS, *_MLP_CALLS),
    ),
    "skinny_gemm": Port(
        module=f"{HERE}.wiring:skinny_gemm",
        targets=(
            f"{_MODEL}:Gemma4DecoderLayer.forward",
            f"{_MODEL}:Gemma4Attention.forward",
        ),
        relies_on=(*_LAYER, *calls.DENSE_MLP),
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(*_STREAM_CALLS, *_MLP_CALLS),
    ),
    "mlp_few": Port(
        module=f"{HERE}.wiring:mlp_few",
        targets=(f"{_MODEL}:Gemma4DecoderLayer.forward",),
        relies_on=(*_LAYER, *calls.DENSE_MLP),
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=(*_STREAM_CALLS, *_MLP_CALLS),
    ),
    "pdl": Port(
        module=f"{HERE}.wiring:pdl",
        targets=(f"{_MODEL}:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        reads=_LAYER_READS,
        written_for=RELEASES,
        goes_round=_STREAM_CALLS,
    ),
    "rope_store": Port(
        module=f"{HERE}.wiring:rope_store",
        targets=(f"{_MODEL}:Gemma4Attention.forward",),
        relies_on=(
            *_ATTENTION,
            "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_cuda",
            "sglang.srt.layers.rotary_embedding.rope_variant:Gemma4RotaryEmbedding",
            "sglang.srt.layers.radix_attention:RadixAttention.forward",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend._set_kv_buffer",
            "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.set_kv_buffer",
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer",
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._store_kv_layer",
            "sglang.srt.mem_cache.memory_pool:_set_kv_buffer_impl",
            "sglang.kernels.ops.kvcache.kvcache:store_cache",
        ),
        lacks=_BY_BASE,
        written_for=RELEASES,
        goes_round=(*calls.QKV, *_ROPE_CALLS, *_ATTENTION_CALLS),
    ),
    "qkv_proj": Port(
        module=f"{HERE}.wiring:qkv_proj",
        targets=(f"{_MODEL}:Gemma4Attention.forward",),
        relies_on=_ATTENTION,
        written_for=RELEASES,
        goes_round=calls.LINEAR,
    ),
    "extend_attention": Port(
        module=f"{HERE}.attention.extend_attention",
        targets=(
            f"{_BACKEND}:TritonAttnBackend.forward_extend",
            f"{_BACKEND}:update_sliding_window_buffer",
        ),
        relies_on=(
            # What is in a batch's metadata, and for whom it is made.
            f"{_BACKEND}:TritonAttnBackend.init_forward_metadata",
            f"{_BACKEND}:TritonAttnBackend._update_target_verify_buffers",
            f"{_BACKEND}:TritonAttnBackend._update_draft_extend_buffers",
            f"{_BACKEND}:TritonAttnBackend._build_cuda_graph_forward_metadata",
            # What is not called any more.
            f"{_BACKEND}:TritonAttnBackend._forward_extend_kernel",
            f"{_BACKEND}:TritonAttnBackend._can_run_dense_fp8_chunked_mha",
            f"{_KERNELS}.extend_attention:extend_attention_fwd",
            f"{_KERNELS}.extend_attention:_fwd_kernel",
            f"{_KERNELS}.extend_attention:_get_block_sizes_for_extend_attention",
            # Where a window's slots come from.
            f"{_POOLS}.kv_index_translator:KVIndexTranslator.pack_read_stream",
            f"{_POOLS}.kv_index_translator:KVIndexTranslator.read_source",
            f"{_POOLS}.kv_index_translator:KVIndexTranslator._reads_translated",
            f"{_POOLS}.kv_index_translator:KVIndexTranslator._passthrough_table",
            f"{_KERNELS}.kv_indices:create_flashinfer_kv_indices_triton",
            f"{_POOLS}.swa_memory_pool:SWAKVPool.translate_loc_from_full_to_swa",
            *_BUFFERS,
        ),
        reads=_ATTENTION_READS,
        written_for=("0.5.23",),
        # It asks for the GPU's capability while it is imported: not before the device is chosen.
        lazy=(f"{_KERNELS}.extend_attention",),
    ),
    "yoco": Port(
        module=f"{HERE}.wiring:yoco",
        targets=(
            f"{_MODEL}:Gemma4TextModel.forward",
            f"{_EXECUTOR}.forward_batch_info:ForwardBatch.init_new",
        ),
        relies_on=(
            *_CUT,
            f"{_BACKEND}:TritonAttnBackend.init_forward_metadata",
            f"{_BACKEND}:TritonAttnBackend.forward_extend",
            "sglang.srt.layers.logits_processor:LogitsProcessor._get_pruned_states",
        ),
        lacks=_CUT_BY_BASE,
        reads=_CUT_READS,
        written_for=RELEASES,
        goes_round=(*_LAYER_CALLS, "sglang.srt.layers.logits_processor:LogitsProcessor.forward"),
    ),
    "yoco_graph": Port(
        module=f"{HERE}.wiring:yoco_graph",
        targets=(f"{_MODEL}:Gemma4TextModel.forward",),
        relies_on=(
            *_CUT,
            f"{_EXECUTOR}.forward_batch_info:ForwardBatch.init_new",
            f"{_BACKEND}:TritonAttnBackend._build_cuda_graph_forward_metadata",
            f"{_KERNELS}.decode_attention:decode_attention_fwd",
            *_BUFFERS,
        ),
        lacks=_CUT_BY_BASE,
        reads=_CUT_READS,
        written_for=RELEASES,
        lazy=(f"{_KERNELS}.decode_attention",),
        goes_round=_LAYER_CALLS,
    ),
    "yoco_piecewise": Port(
        module=f"{HERE}.wiring:yoco_piecewise",
        targets=(f"{_MODEL}:Gemma4TextModel.forward",),
        relies_on=(
            *_CUT,
            *_BREAK,
            f"{_MODEL}:Gemma4ForCausalLM.forward",
            f"{_BREAKABLE}.breakable_cuda_graph:BreakableCUDAGraph.replay",
            f"{_EXECUTOR}.runner_utils.forward_batch:get_forward_batch",
            f"{_EXECUTOR}.runner_utils.prefill_graph:get_prefill_raw_num_tokens",
            f"{_EXECUTOR}.runner_utils.prefill_graph:is_in_prefill_graph_scope",
            f"{_RUNNER}:PrefillCudaGraphRunner.load_batch",
            f"{_RUNNER}:PrefillCudaGraphRunner._run_forward",
            f"{_RUNNER}:PrefillCudaGraphRunner._execute_body_capture",
        ),
        lacks=_CUT_BY_BASE,
        reads=_CUT_READS,
        written_for=RELEASES,
        goes_round=_LAYER_CALLS,
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
            "sglang.kernels.ops.moe.fused_moe_triton_kernels:fused_moe_kernel",
        ),
        written_for=RELEASES,
    ),
    "decode_attention": Port(
        module=f"{HERE}.attention.decode_attention",
        targets=(f"{_BACKEND}:TritonAttnBackend.forward_decode",),
        relies_on=(
            # No window has more slots than the backend's window, no sequence more than its row.
            f"{_BACKEND}:TritonAttnBackend.init_forward_metadata",
            f"{_BACKEND}:TritonAttnBackend._init_forward_metadata_out_graph",
            f"{_BACKEND}:TritonAttnBackend._update_decode_kv_buffers",
            f"{_BACKEND}:TritonAttnBackend._fill_kv_indptr_and_indices",
            f"{_BACKEND}:TritonAttnBackend._build_cuda_graph_forward_metadata",
            f"{_BACKEND}:TritonMultiStepDraftBackend.common_template",
            f"{_BACKEND}:TritonMultiStepDraftBackend._fill_window_rail",
            f"{_BACKEND}:update_sliding_window_buffer",
            "sglang.kernels.ops.speculative.cache_locs:generate_draft_decode_kv_indices",
            "sglang.kernels.ops.speculative.cache_locs:generate_draft_decode_window_kv_indices",
            # What is not called any more.
            f"{_KERNELS}.decode_attention:decode_attention_fwd",
            *_BUFFERS,
        ),
        reads=_ATTENTION_READS,
        written_for=("0.5.23",),
        # SGLang imports it when it makes the backend.
        lazy=(f"{_KERNELS}.decode_attention",),
    ),
    # The draft reads its cache through the context that it is bound to; whose scales stay 1.
    "kv_scales": Port(
        module=f"{HERE}.attention.kv_scales",
        targets=(
            "sglang.srt.model_executor.model_runner:ModelRunner.configure_kv_cache_dtype",
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.build_frozen_kv_mtp_context",
            "sglang.srt.layers.quantization.kv_cache"
            ":BaseKVCacheMethod.process_weights_after_loading",
            f"{_BACKEND}:TritonAttnBackend.__init__",
        ),
        relies_on=(
            f"{_MODEL}:Gemma4Attention.__init__",
            f"{_MODEL}:Gemma4Attention.forward",
            "sglang.srt.models.gemma4_mtp:_resolve_target_text_model",
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.bind_frozen_kv_context",
            f"{_BACKEND}:TritonAttnBackend.forward_decode",
            f"{_BACKEND}:TritonAttnBackend.forward_extend",
            "sglang.srt.layers.attention.base_attn_backend:AttentionBackend.forward",
            "sglang.srt.layers.radix_attention:RadixAttention.forward",
            "sglang.srt.layers.radix_attention:RadixAttention._eager_attention",
            "sglang.srt.layers.quantization.kv_cache:BaseKVCacheMethod.create_weights",
            f"{_POOLS}.memory_pool:MHATokenToKVPool.set_kv_buffer",
            f"{_POOLS}.kv_cache_dtype:configure_kv_cache_dtype",
            *_BUFFERS,
        ),
        methods_of=_SCALED,
        lacks=_BY_BASE,
        reads=(
            (
                "sglang.srt.layers.radix_attention:RadixAttention.__init__",
                ("layer_id", "k_scale", "v_scale", "k_scale_float", "v_scale_float"),
            ),
            (
                f"{_BACKEND}:TritonAttnBackend.__init__",
                ("forward_metadata", "token_to_kv_pool", "kv_index_translator", "dcp_size"),
            ),
            (f"{_BACKEND}:ForwardMetadata", ("swa_out_cache_loc",)),
            (
                f"{_POOLS}.memory_pool:MHATokenToKVPool",
                ("kv_cache_layout", "is_quantized_kv_cache"),
            ),
            (
                f"{_POOLS}.swa_memory_pool:SWAKVPool",
                ("full_kv_pool", "swa_kv_pool", "layers_mapping", "get_kv_buffer"),
            ),
            (
                f"{_POOLS}.kv_index_translator:KVIndexTranslator.__init__",
                ("is_translating",),
            ),
        ),
        written_for=("0.5.23",),
    ),
    "mtp_chain": Port(
        module=f"{HERE}.speculation.mtp_chain",
        targets=(f"{_DRAFT}.draft_forward",),
        relies_on=(
            f"{_DRAFT}.draft",
            f"{_DRAFT}._init_frozen_kv_metadata",
            f"{_DRAFT_GRAPHS}:FrozenKVMTPCudaGraphRunner.capture_one_shape",
            f"{_DRAFT_GRAPHS}:FrozenKVMTPCudaGraphRunner.execute",
            f"{_SPEC}.frozen_kv_mtp_utils:set_frozen_kv_positions",
            f"{_SPEC}.frozen_kv_mtp_utils:position_for_batch",
            f"{_SPEC}.frozen_kv_mtp_utils:target_kv_pool_view",
            f"{_SPEC}.spec_utils:_select_top_k_tokens_first",
            f"{_SPEC}.spec_utils:_select_top_k_tokens_later",
            "sglang.srt.utils.common:fast_topk",
            f"{_SPEC}.eagle_utils:organize_draft_results",
        ),
        methods_of=(f"{_DRAFT_GRAPHS}:FrozenKVMTPCudaGraphRunner",),
        written_for=("0.5.23",),
        lazy=(_DRAFT_GRAPHS,),  # imported to capture graphs, which may be off
    ),
    "mtp_sync": Port(
        module=f"{HERE}.speculation.mtp_sync",
        targets=(f"{_DRAFT}.draft",),
        relies_on=(
            f"{_DRAFT}._init_frozen_kv_metadata",
            f"{_DRAFT}._init_frozen_kv_metadata_replay_cuda_graph",
            f"{_DRAFT}._position_for_batch",
            f"{_DRAFT}._set_positions",
            f"{_DRAFT_GRAPHS}:FrozenKVMTPCudaGraphRunner.execute",
            f"{_SPEC}.frozen_kv_mtp_utils:set_frozen_kv_positions",
            f"{_SPEC}.frozen_kv_mtp_utils:position_for_batch",
            f"{_SPEC}.frozen_kv_mtp_info:FrozenKVMTPVerifyInput.__post_init__",
            f"{_SPEC}.eagle_info:EagleVerifyInput.__post_init__",
            f"{_SPEC}.eagle_utils:build_tree_kernel_efficient",
            # How many slots a request has at least.
            f"{_SPEC}.eagle_utils:eagle_prepare_for_decode",
            f"{_SPEC}.eagle_utils:eagle_prepare_for_verify",
            f"{_POOLS}.allocation:alloc_for_spec_decode",
            f"{_POOLS}.allocation_sizing:page_aligned_decode_alloc_lens",
            f"{_POOLS}.allocation_sizing:get_alloc_reserve_per_decode",
            # Who reads the mask and the sum of the lengths, and which buffer is whose.
            "sglang.srt.layers.attention.verify_mask:VerifyMask.fits",
            "sglang.srt.layers.attention.verify_mask:tree_mask_numel",
            "sglang.srt.layers.attention.verify_mask:maybe_create_verify_mask",
            f"{_BACKEND}:TritonAttnBackend.verify_mask",
            f"{_BACKEND}:TritonAttnBackend.init_cuda_graph_state",
            f"{_BACKEND}:TritonAttnBackend.init_forward_metadata",
            f"{_BACKEND}:TritonAttnBackend._init_forward_metadata_out_graph",
            f"{_BACKEND}:TritonAttnBackend._apply_cuda_graph_metadata",
            f"{_BACKEND}:TritonAttnBackend._update_target_verify_buffers",
            f"{_BACKEND}:TritonAttnBackend._build_cuda_graph_forward_metadata",
        ),
        methods_of=(
            f"{_DRAFT_GRAPHS}:FrozenKVMTPCudaGraphRunner",
            f"{_SPEC}.frozen_kv_mtp_info:FrozenKVMTPVerifyInput",
        ),
        reads=(
            ("sglang.srt.layers.attention.verify_mask:VerifyMask", ("buffer", "mode")),
            ("sglang.srt.managers.schedule_batch:ReqKvInfo", ("kv_allocated_len",)),
            (
                "sglang.srt.managers.schedule_batch:ScheduleBatch",
                ("reqs", "seq_lens", "seq_lens_cpu", "seq_lens_sum", "spec_info"),
            ),
            (
                "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
                ("batch", "model_runner", "return_hidden_states_before_norm", "seq_lens_sum"),
            ),
        ),
        written_for=("0.5.23",),
        lazy=(_DRAFT_GRAPHS,),
    ),
    # The draft's input is in the place of the verification's after every step, whoever has finished.
    "mtp_merge_batch": Port(
        targets=(f"{_SPEC}.frozen_kv_mtp_worker_v2:FrozenKVMTPWorkerV2.forward_batch_generation",),
        superseded_when=(
            f"{_SPEC}.frozen_kv_mtp_worker_v2:FrozenKVMTPWorkerV2.forward_batch_generation",
            "_draft_extend_for_decode",
        ),
        superseded_since="0.5.14",
        tells_only=True,
    ),
    # The seed step is the first one of the draft's own graph.
    "mtp_seed_graph": Port(
        targets=(f"{_DRAFT}.draft_forward",),
        superseded_when=(f"{_DRAFT}.draft_forward", "bonus_tokens"),
        superseded_since="0.5.14",
        tells_only=True,
    ),
    # And both run on metadata that are made once.
    "mtp_metadata": Port(
        targets=(f"{_DRAFT}.draft_forward",),
        superseded_when=(f"{_DRAFT}.draft_forward", "needs_forward_metadata_init"),
        superseded_since="0.5.14",
        tells_only=True,
    ),
    # FlashInfer's runner is for one kind of quantised weights, which is asked for.
    "mtp_moe_runner": Port(
        targets=("sglang.srt.arg_groups.model_overrides.gemma4:_gemma4_overrides",),
        superseded_when=(
            "sglang.srt.arg_groups.model_overrides.gemma4:_gemma4_overrides",
            "quantization",
        ),
        superseded_since="0.5.19",
        tells_only=True,
        finds_defect=True,
    ),
    "picture_memory": Port(
        module=f"{HERE}.vision.picture_memory",
        targets=(f"{_PROCESSOR}._call_processor",),
        relies_on=(
            f"{_PROCESSOR}._temporary_fast_processor_cuda_pool",
            f"{_PROCESSOR}.keep_mm_features_on_device",
            # Between the call and the model: a wrapper there may count on a GPU.
            f"{_PROCESSOR}.process_mm_data",
            f"{_PROCESSOR}._process_and_collect_mm_items",
            f"{_PROCESSOR}.collect_mm_items_from_processor_output",
            f"{_PROCESSOR}.process_and_combine_mm_data",
            f"{_PROCESSOR}.process_and_combine_mm_data_async",
        ),
        methods_of=(
            "sglang.srt.multimodal.processors.gemma4:Gemma4SGLangProcessor",
            "sglang.srt.multimodal.processors.gemma4_unified:Gemma4UnifiedSGLangProcessor",
        ),
        # Who reads what is moved copies it to the model's device first.
        reads=(
            (f"{_PICTURES}.get_image_feature", ("all_position_ids", "to")),
            (f"{_PICTURES}.get_video_feature", ("all_position_ids", "to")),
            (f"{_PICTURES}.get_audio_feature", ("input_features_mask", "to")),
            (f"{_UNIFIED}.get_image_feature", ("_embed_patches", "items")),
            (f"{_UNIFIED}.get_video_feature", ("_embed_patches", "items")),
            (f"{_UNIFIED}._embed_patches", ("position_attr", "to")),
            (f"{_UNIFIED}.get_audio_feature", ("input_features_mask", "to")),
        ),
        written_for=("0.5.23",),
        # Imported by the processors of the models, after what is patched.
        lazy=(_PICTURES.partition(":")[0], _UNIFIED.partition(":")[0]),
    ),
    "mm_prefill_graph": Port(
        module=f"{HERE}.prefill.mm_prefill_graph",
        targets=(
            "sglang.srt.arg_groups.cuda_graph_hook:disable_breakable_cudagraph_if_incompatible",
        ),
        relies_on=_MM_GRAPH,
        methods_of=(_UNIFIED,),
        reads=((f"{_GRAPH_SETUP}:GraphCapture", ("runner",)),),
        written_for=RELEASES,
        # The server's arguments are read before any of it is imported.
        lazy=tuple(source.partition(":")[0] for source in _MM_GRAPH),
        decides=("sglang.srt.arg_groups.cuda_graph_hook",),
        goes_round=_PREFILL_CALLS,
    ),
    "shared_kv_pool": Port(
        module=f"{HERE}.memory.shared_kv_pool",
        targets=(f"{_KV}.__post_init__", f"{_KV}.config_from_budget"),
        relies_on=(
            f"{_MODEL}:Gemma4Attention.__init__",
            # Who reads the lists of layers, and for what.
            f"{_KV}._build_hybrid_swa_kv_pool",
            f"{_KV}._build_default_req_pool",
            f"{_KV}.resolve_max_num_reqs",
            f"{_SIZES}:create_memory_pool_configurator",
            *(
                f"{_SIZES}:HybridSWAPoolConfigurator.{name}"
                for name in (
                    *("__init__", "_full_cell_bytes", "_swa_cell_bytes", "_recompute_cell_size"),
                    *("_solve_pool_sizes", "_make_pool_config", "calculate_pool_sizes"),
                    "calculate_pool_sizes_from_max_tokens",
                )
            ),
            *(
                f"{_SIZES}:SWARequestCapPoolConfigurator.{name}"
                for name in (
                    *("__init__", "is_applicable", "calculate_pool_sizes"),
                    "calculate_pool_sizes_from_max_tokens",
                )
            ),
            "sglang.srt.model_executor.model_runner:ModelRunner.init_kv_cache_configurator",
            f"{_POOLS}.allocation_sizing:get_req_to_token_extra_context_len",
            f"{_POOLS}.memory_pool:ReqToTokenPool.__init__",
            f"{_POOLS}.swa_memory_pool:SWAKVPool.__init__",
        ),
        methods_of=(f"{_SIZES}:SWARequestCapPoolConfigurator",),  # the rest is the other one's
        reads=(
            (
                "sglang.srt.model_executor.model_runner_components.layer_setup:ModelLayerInfo",
                ("full_attention_layer_ids", "swa_attention_layer_ids"),
            ),
        ),
        written_for=RELEASES,
    ),
    "swa_ratio": Port(
        module=f"{HERE}.memory.swa_ratio",
        targets=("sglang.srt.arg_groups.overrides:collect_model_override_declarations",),
        relies_on=("sglang.srt.arg_groups.model_overrides.gemma4:_gemma4_overrides",),
        reads=((f"{_SIZES}:HybridSWAPoolConfigurator.__init__", ("swa_full_tokens_ratio",)),),
        written_for=("0.5.22", "0.5.23"),
        # The server's arguments are read before it is imported.
        lazy=(_SIZES,),
    ),
    # Of graphs, newer lines' backends make the metadata here.
    "trtllm_debug": Port(
        targets=(
            "sglang.srt.layers.attention.trtllm_mha_backend"
            ":TRTLLMHAAttnBackend.init_forward_metadata_out_graph",
        ),
        needless="a tool for finding faults of the TRT-LLM backend that 0.5.12 has, which is another one",
    ),
}
