"""Every patch as data, one record each.

A record is all that the rest of the package knows of a patch. Its code is in
``patches/<name>.py``, its kernel in ``kernels/<name>.py``, its tests in ``tests/*/test_<name>.py``,
and the fingerprints of its targets, release by release, in ``releases.json``.
"""

from __future__ import annotations

from typing import NamedTuple

BITWISE = "bitwise"  # stock's bits on every input it accepts
TOLERANCE = "tolerance"  # bounded distance from stock; the bounds are in the kernel's docstring
BEHAVIOUR = "behaviour"  # no arithmetic of its own: defaults, fixes, graphs


class Alias(NamedTuple):
    """Another variable that switches a patch, as the patch's forerunner named it."""

    env: str
    disables: bool  # True: a true value switches the patch off


class Patch(NamedTuple):
    """One patch."""

    name: str
    summary: str
    targets: tuple[str, ...]  # "module:qualname", replaced
    relies_on: tuple[str, ...]  # "module:qualname", not replaced, but its source must be known
    written_for: tuple[str, ...]  # releases whose source of all of these the patch was written for
    numerics: str
    traced: bool  # torch.compile may trace the replacement
    default: bool
    # (target, name): stock has it if the target uses the name; None: no release has it
    superseded_when: tuple[str, str] | None = None
    superseded_since: str = ""  # first release for which that holds, "" if none
    origin: str = ""
    aliases: tuple[Alias, ...] = ()
    requires: tuple[str, ...] = ()  # patches that it stands on: off when one of them is
    # It mends a defect and looks for it by itself, whatever the release; no fingerprint decides.
    finds_defect: bool = False
    # Modules of relies_on that SGLang imports only when it builds the model: not waited for, their
    # source is read from disk.
    lazy: tuple[str, ...] = ()
    # Functions that it does not call, or calls on something else than stock does: whoever has wrapped
    # one of them would be bypassed. Those of relies_on are looked at as well.
    goes_round: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether other models than Gemma 4 use a target."""
        return any(not target.startswith("sglang.srt.models.gemma4_") for target in self.targets)

    @property
    def env(self) -> str:
        """The patch's own switch."""
        return f"GEMMA4_TURBO_{self.name.upper()}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything whose source decides whether the patch fits."""
        return self.targets + self.relies_on

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold `sources` and are waited for."""
        holding = {target.partition(":")[0] for target in self.sources}
        return tuple(sorted(holding - set(self.lazy)))


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

CATALOGUE: tuple[Patch, ...] = (
    Patch(
        name="router",
        summary="MoE routing (top-k, softmax, per-expert scale, two casts) in one launch instead of seven",
        targets=("sglang.srt.models.gemma4_causal:Gemma4MoE.__init__",),
        relies_on=("sglang.srt.layers.moe.topk:TopK.forward_cuda",),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        superseded_when=(
            "sglang.srt.models.gemma4_causal:Gemma4MoE.__init__",
            "gemma4_fused_routing",
        ),
        superseded_since="0.5.13",
        numerics=BITWISE,
        # torch.compile may reach the routing function on the decode path, not the replaced
        # constructor; the routing function hides its kernel behind a custom op there.
        traced=True,
        default=True,
        origin="pyc96/sglang#1; upstream sgl-project/sglang#26502",
        aliases=(Alias("SGLANG_GEMMA4_DISABLE_FUSED_ROUTER", disables=True),),
    ),
    Patch(
        name="step_prologue",
        summary="Per-layer inputs (E2B, E4B) in two launches and a GEMM; token ids are not copied",
        targets=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.forward",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.get_per_layer_inputs",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.project_per_layer_inputs",
        ),
        relies_on=(
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.get_per_layer_inputs",
            "sglang.srt.models.gemma3_causal:Gemma3TextScaledWordEmbedding",
            "sglang.srt.layers.layernorm:RMSNorm.forward_cuda",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=True,
        default=True,
        goes_round=_NORM_CALLS,
    ),
    Patch(
        name="moe_align",
        summary="Expert alignment of small batches for the fused MoE kernel, in one launch instead of two",
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
        numerics=BITWISE,
        # It is called inside SGLang's opaque fused-experts operators; a trace that reaches it all
        # the same sees stock's function.
        traced=False,
        default=True,
    ),
    Patch(
        name="layer_norms",
        summary="RMSNorms, residual add and router scale between attention and MLP, in one launch",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=True,
        default=True,
        origin="pyc96/sglang#18",
        goes_round=(*_NORM_CALLS, "sglang.srt.models.gemma4_causal:Gemma4Router.forward"),
    ),
    Patch(
        name="router_norm",
        summary="Router RMSNorm and scale in one launch, on layers that `layer_norms` declines",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Router.forward",),
        relies_on=(
            "sglang.srt.models.gemma4_causal:Gemma4Router.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4Router.fuse_scale",
            "sglang.srt.layers.layernorm:Gemma4RMSNorm.forward_cuda",
        ),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        superseded_when=("sglang.srt.models.gemma4_causal:Gemma4Router.forward", "_scale_fused"),
        superseded_since="0.5.13",
        numerics=BITWISE,
        traced=True,
        default=True,
        origin="sgl-project/sglang#26588",
        goes_round=_NORM_CALLS,
    ),
    Patch(
        name="ple_tail",
        summary="Epilogue of layers with per-layer embeddings (E2B, E4B): three launches beside the GEMMs",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=True,
        default=True,
        origin="pyc96/sglang#18",
        goes_round=_NORM_CALLS,
    ),
    Patch(
        name="qkv_norm",
        summary="RMSNorms of Q, K and V with one program per token and head",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Attention.forward",),
        relies_on=_ATTENTION,
        written_for=("0.5.12", "0.5.12.post1"),
        superseded_when=("sglang.srt.layers.gemma4_fused_ops:_gemma_qkv_rmsnorm_kernel", "BY_HEAD"),
        superseded_since="0.5.13",
        numerics=BITWISE,
        traced=True,
        default=True,
        origin="sgl-project/sglang#26588, #25461",
        goes_round=_QKV_CALLS,
    ),
    Patch(
        name="rope_store",
        summary="RoPE and KV store in the launch of the QKV norms; no dummy K on KV-shared layers",
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
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=True,
        default=True,
        requires=("qkv_norm",),
        goes_round=(*_QKV_CALLS, *_ROPE_CALLS, *_ATTENTION_CALLS),
    ),
    Patch(
        name="qkv_proj",
        summary="QKV projection without the unused K and V rows on KV-shared layers",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Attention.forward",),
        relies_on=_ATTENTION,
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=TOLERANCE,
        traced=True,
        default=True,
        origin="sgl-project/sglang#25461",
        goes_round=_LINEAR_CALLS,
    ),
    Patch(
        name="input_norm",
        summary="Input RMSNorm of the next layer in the launch of the layer before it",
        targets=(
            "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",
        ),
        relies_on=(
            *_LAYER,
            *_TAIL,
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=True,
        default=True,
        goes_round=_NORM_CALLS,
    ),
    Patch(
        name="experts_sum",
        summary="Sum over a token's experts in the launch of the layer's last norm",
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
        numerics=BITWISE,
        traced=True,
        default=True,
        goes_round=_EXPERTS_CALLS,
    ),
    Patch(
        name="mlp_stream",
        summary="Dense MLP on a second CUDA stream, concurrent with the experts, inside CUDA graphs",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=True,
        default=True,
        goes_round=_MLP_CALLS,
    ),
    Patch(
        name="skinny_gemm",
        summary="Linear layers of up to 64 tokens, with the activation fused into the preceding GEMM",
        targets=(
            "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.forward",
        ),
        relies_on=(
            *_LAYER,
            "sglang.srt.models.gemma3_causal:Gemma3MLP",
            "sglang.srt.layers.activation:GeluAndMul.forward_cuda",
            "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply",
            "sglang.srt.layers.linear:RowParallelLinear.forward",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=TOLERANCE,
        traced=True,
        default=True,
        goes_round=_MLP_CALLS,
    ),
    Patch(
        name="pdl",
        summary="Programmatic dependent launch between the package's own kernels (Hopper and later)",
        targets=("sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",),
        relies_on=_LAYER,
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=True,
        default=True,
    ),
    Patch(
        name="extend_attention",
        summary="Prefill and verification attention for head sizes 128, 256 and 512 (Hopper); window indices without host syncs",
        targets=(
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend",
            "sglang.srt.layers.attention.triton_backend:update_sliding_window_buffer",
            "sglang.srt.layers.attention.triton_backend:update_sliding_window_buffer_cuda_graph",
        ),
        relies_on=(
            "sglang.srt.layers.attention.triton_backend:ForwardMetadata",
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
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=TOLERANCE,
        # torch.compile splits its graphs around attention; a trace that reaches it sees stock.
        traced=False,
        default=True,
        origin="sgl-project/sglang#26588",
        # It asks for the GPU's capability while it is imported: not before the device is chosen.
        lazy=("sglang.srt.layers.attention.triton_ops.extend_attention",),
    ),
    Patch(
        name="vision_batch",
        summary="Batched vision encoder: images and video frames of one patch count share a call",
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
        numerics=TOLERANCE,
        traced=False,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#26606 (open)",
    ),
    Patch(
        name="vision_positions",
        summary="Vision position embeddings by table lookup instead of a one-hot matrix product",
        targets=("sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder._position_embeddings",),
        relies_on=("sglang.srt.models.gemma4_vision:Gemma4VisionPatchEmbedder.__init__",),
        written_for=_VISION_RELEASES,
        numerics=BITWISE,
        traced=False,
        default=True,
    ),
    Patch(
        name="vision_clamps",
        summary="Clamps with infinite bounds are skipped in the vision and audio encoders",
        targets=(
            "sglang.srt.layers.clippable_linear:ClippableRowParallelLinear.forward",
            "sglang.srt.layers.clippable_linear:ClippableColumnParallelLinear.forward",
            "sglang.srt.layers.clippable_linear:ClippableQKVParallelLinear.forward",
            "sglang.srt.layers.clippable_linear:ClippableGateUpParallelLinear.forward",
            "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.load_weights",
        ),
        relies_on=(),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BITWISE,
        traced=False,
        default=True,
    ),
    Patch(
        name="vision_masks",
        summary="Attention masks of the vision encoder are built only for backends that read them",
        targets=("sglang.srt.models.gemma4_vision:Gemma4VisionAttention.forward",),
        relies_on=(
            *_VISION_BACKENDS,
            "sglang.srt.layers.attention.vision:VisionFlash4Attention.forward",
        ),
        written_for=_VISION_RELEASES[:8],
        numerics=BITWISE,
        traced=False,
        default=True,
    ),
    Patch(
        name="vision_syncs",
        summary="Vision attention without device-to-host syncs for a length that the host knows",
        targets=_VISION_BACKENDS,
        relies_on=("sglang.srt.layers.attention.vision:resolve_seqlens",),
        written_for=_VISION_RELEASES[:8],
        numerics=BITWISE,
        traced=False,
        default=True,
    ),
    Patch(
        name="vision_rope",
        summary="RoPE of the vision encoder in one launch each for Q and K",
        targets=("sglang.srt.models.gemma4_vision:_apply_multidimensional_rope",),
        relies_on=(
            "sglang.srt.models.gemma4_vision:_apply_rotary",
            "sglang.srt.models.gemma4_vision:_rotate_half",
        ),
        written_for=_VISION_RELEASES,
        numerics=BITWISE,
        traced=False,
        default=True,
    ),
    Patch(
        name="optional_kv",
        summary="Piecewise CUDA graphs for text-only E2B and E4B, with which stock fails to start",
        targets=("sglang.srt.layers.radix_attention:RadixAttention.forward",),
        relies_on=("sglang.srt.layers.radix_attention:unified_attention_with_output",),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        # Its operator took more arguments, and optional key and value, in one release.
        superseded_when=(
            "sglang.srt.layers.radix_attention:unified_attention_with_output",
            "topk_indices",
        ),
        superseded_since="0.5.13",
        numerics=BEHAVIOUR,
        traced=True,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#26515",
    ),
    Patch(
        name="mm_prefill_graph",
        summary="Piecewise CUDA graphs for the language model of multimodal checkpoints",
        targets=("sglang.srt.server_args:ServerArgs._handle_piecewise_cuda_graph",),
        relies_on=_MM_GRAPH,
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        origin="pyc96/sglang#18",
        aliases=(Alias("SGLANG_ENABLE_PIECEWISE_CUDA_GRAPH_FOR_MM", disables=False),),
        # The server's arguments are read before any of it is imported.
        lazy=tuple(source.partition(":")[0] for source in _MM_GRAPH),
        goes_round=_LAYER_CALLS,
    ),
    Patch(
        name="yoco",
        summary="You Only Cache Once: KV-shared layers (E2B, E4B) prefill only the rows whose logits are needed",
        targets=(
            "sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",
            "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ),
        relies_on=(
            *_LAYER,
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.forward",
            "sglang.srt.layers.radix_attention:RadixAttention.forward",
            "sglang.srt.layers.attention.triton_backend:ForwardMetadata",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.init_forward_metadata",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",
            "sglang.srt.layers.logits_processor:LogitsProcessor._get_pruned_states",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=TOLERANCE,
        traced=True,
        default=True,
        origin="pyc96/sglang#18; upstream sgl-project/sglang#27183 (open)",
        aliases=(Alias("SGLANG_GEMMA4_YOCO", disables=False),),
        goes_round=(
            *_LAYER_CALLS,
            "sglang.srt.layers.logits_processor:LogitsProcessor.forward",
        ),
    ),
    Patch(
        name="yoco_graph",
        summary="CUDA graphs for the KV-shared layers of a prefill, on the rows that `yoco` keeps",
        targets=("sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",),
        relies_on=(
            *_LAYER,
            "sglang.srt.models.gemma4_causal:Gemma4DecoderLayer.forward",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4Attention.forward",
            "sglang.srt.layers.radix_attention:RadixAttention.forward",
            "sglang.srt.layers.attention.triton_backend:ForwardMetadata",
            "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode",
            "sglang.srt.layers.attention.triton_backend"
            ":TritonAttnBackend.init_forward_metadata_capture_cuda_graph",
            "sglang.srt.layers.attention.triton_ops.decode_attention:decode_attention_fwd",
            "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
            "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool.get_key_buffer",
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.get_key_buffer",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BEHAVIOUR,
        traced=True,
        default=True,
        requires=("yoco",),
        goes_round=_LAYER_CALLS,
    ),
    Patch(
        name="yoco_piecewise",
        summary="The cut of `yoco` inside piecewise CUDA graphs of prefill",
        targets=("sglang.srt.models.gemma4_causal:Gemma4TextModel.forward",),
        relies_on=(
            *_LAYER,
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "sglang.srt.models.gemma4_causal:Gemma4ForCausalLM.forward",
            "sglang.srt.model_executor.model_runner:ModelRunner.init_piecewise_cuda_graphs",
            *_PIECEWISE,
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=TOLERANCE,
        traced=True,
        default=True,
        requires=("yoco", "optional_kv"),
        lazy=tuple(dict.fromkeys(source.partition(":")[0] for source in _PIECEWISE)),
        goes_round=_LAYER_CALLS,
    ),
    Patch(
        name="shared_kv_pool",
        summary="KV pools without memory for KV-shared layers (18 of 42 on E4B, 20 of 35 on E2B)",
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
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
    ),
    Patch(
        name="swa_ratio",
        summary="Default `swa_full_tokens_ratio` of 0.15 for the MoE models; an explicit value wins",
        targets=("sglang.srt.server_args:ServerArgs._handle_model_specific_adjustments",),
        relies_on=(
            "sglang.srt.model_executor.pool_configurator:HybridSWAPoolConfigurator.__init__",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BEHAVIOUR,
        traced=False,
        default=False,
        origin="pyc96/sglang#2, #18",
        # The server's arguments are read before it is imported.
        lazy=("sglang.srt.model_executor.pool_configurator",),
    ),
    Patch(
        name="decode_attention",
        summary="Decode attention for head sizes 256 and 512 (Hopper), with splits chosen on the device from the lengths",
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
        numerics=TOLERANCE,
        # A trace sees stock's function.
        traced=False,
        default=True,
    ),
    Patch(
        name="moe_configs",
        summary="Tuned block sizes of the fused MoE kernel for 26B-A4B on H100 and H200",
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
        numerics=TOLERANCE,
        # It is called inside SGLang's opaque fused-experts operators; a trace sees stock's function.
        traced=False,
        default=True,
        origin="sgl-project/sglang#26588",
    ),
    Patch(
        name="mtp_merge_batch",
        summary="MTP fix: merging a batch whose requests all finished in one verify step",
        targets=("sglang.srt.managers.schedule_batch:ScheduleBatch.merge_batch",),
        relies_on=(
            "sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPDraftInput",
            "sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPVerifyInput",
            "sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPDraftExtendInput",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.create_idle_input",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.merge_batch",
            "sglang.srt.speculative.eagle_info:EagleDraftInput.filter_batch",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        superseded_when=(
            "sglang.srt.speculative.frozen_kv_mtp_worker"
            ":FrozenKVMTPWorker.forward_batch_generation",
            "_draft_preprocess_idle",
        ),
        superseded_since="0.5.13",
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        origin="pyc96/sglang#22; upstream sgl-project/sglang#26859",
    ),
    Patch(
        name="frozen_kv_views",
        summary="MTP fix: the draft's attention backend follows a swapped KV pool",
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
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        origin="pyc96/sglang#6; upstream sgl-project/sglang#26966",
        finds_defect=True,
    ),
    Patch(
        name="kv_scales",
        summary="8-bit KV cache fix: KV-shared layers and the MTP draft dequantise with the owner layer's scales",
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
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        origin="vllm-project/vllm#55559, #48666",
    ),
    Patch(
        name="mtp_launch",
        summary="MTP fix: assistants without a pipeline group or expert count can be loaded",
        targets=(
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.__init__",
            "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM.load_weights",
        ),
        relies_on=("sglang.srt.models.gemma4_causal:Gemma4ForCausalLM.load_weights",),
        written_for=(),  # no release has the defects, a development tree between two had them
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        origin="sgl-project/sglang#26026",
        finds_defect=True,
    ),
    Patch(
        name="mtp_moe_runner",
        summary="MTP fix: an unquantised MoE gets no FlashInfer runner unless one is requested",
        targets=("sglang.srt.server_args:ServerArgs._handle_model_specific_adjustments",),
        relies_on=(),
        written_for=(),  # as for mtp_launch
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        origin="sgl-project/sglang#26026",
        finds_defect=True,
    ),
    Patch(
        name="mtp_chain",
        summary="MTP drafts with one candidate per step: arg-max instead of softmax, no tree search",
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
        written_for=("0.5.12", "0.5.12.post1"),
        # The token is stock's but where a softmax rounds two logits to one probability.
        numerics=TOLERANCE,
        traced=False,
        default=True,
        lazy=(_MTP_WORKER.partition(":")[0],),
    ),
    Patch(
        name="mtp_seed_graph",
        summary="CUDA graphs for the MTP draft's seed step, which stock runs eagerly",
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
            "sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner:FrozenKVMTPInputBuffers",
            "sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPDraftInput",
            "sglang.srt.speculative.frozen_kv_mtp_utils:set_frozen_kv_positions",
            "sglang.srt.speculative.frozen_kv_mtp_utils:target_kv_pool_view",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        origin="upstream sgl-project/sglang#25539",
        lazy=(_MTP_WORKER.partition(":")[0],),
        goes_round=_LAYER_CALLS,
    ),
    Patch(
        name="mtp_metadata",
        summary="Attention metadata and positions of the MTP seed step are reused by the draft",
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
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BEHAVIOUR,
        traced=False,
        default=True,
        requires=("mtp_seed_graph",),
        lazy=(_MTP_WORKER.partition(":")[0], "sglang.srt.layers.attention.triton_backend"),
    ),
    Patch(
        name="swa_window",
        summary="Sliding-window off-by-one fix: layers attend to exactly the trained window; changes the output",
        targets=("sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",),
        relies_on=("sglang.srt.models.gemma4_causal:get_attention_sliding_window_size",),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1", "0.5.13", "0.5.13.post1"),
        superseded_when=(
            "sglang.srt.models.gemma4_causal:Gemma4Attention.__init__",
            "get_attention_sliding_window_size",
        ),
        superseded_since="0.5.14",
        numerics=BEHAVIOUR,  # a fix, and the one that changes what stock computes
        traced=False,
        default=False,
        origin="upstream sgl-project/sglang#26147",
    ),
    Patch(
        name="trtllm_debug",
        summary="Debug traps around the TRT-LLM attention kernel and the sliding-window allocator",
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
            "sglang.srt.layers.attention.trtllm_mha_backend:TRTLLMMHAMetadata",
            "sglang.srt.layers.attention.trtllm_mha_backend"
            ":TRTLLMHAAttnBackend._get_layer_page_table",
            "sglang.srt.mem_cache.swa_memory_pool:SWATokenToKVPoolAllocator.__init__",
        ),
        written_for=("0.5.12", "0.5.12.post1"),
        numerics=BEHAVIOUR,
        traced=False,
        default=False,
        origin="pyc96/sglang#3",
        aliases=(Alias("SGLANG_TRTLLM_MHA_DEBUG", disables=False),),
    ),
)


def by_name(name: str) -> Patch:
    """The record called ``name``; KeyError if there is none."""
    for patch in CATALOGUE:
        if patch.name == name:
            return patch
    raise KeyError(name)
