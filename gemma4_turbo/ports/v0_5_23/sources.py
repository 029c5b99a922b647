"""What each port for SGLang 0.5.22 and 0.5.23 stands on, as data. Nothing here imports SGLang."""

from __future__ import annotations

from gemma4_turbo.engine.port import Port

HERE = __package__

_BACKEND = "sglang.srt.layers.attention.triton_backend"
_KERNELS = "sglang.kernels.ops.attention"
_POOLS = "sglang.srt.mem_cache"

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


PORTS: dict[str, Port] = {
    "extend_attention": Port(
        module=f"{HERE}.extend_attention",
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
    "decode_attention": Port(
        module=f"{HERE}.decode_attention",
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
}
