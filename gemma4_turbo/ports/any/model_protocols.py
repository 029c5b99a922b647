"""What the text model's ports read of SGLang's objects: a class for each of SGLang's, with nothing else in it.

What the steps in ``ports/any`` read, and what the ports of several lines do. What one line's ports read
alone is in its ``protocols.py``, which may add to a class of this file.

For the type checker alone, which does not look into SGLang: import it under ``TYPE_CHECKING``. Types are
those of SGLang's source. Where a port reads one more attribute, it is added here.

What SGLang sets to None, but a port reads only after it knows that it is there, has its type without
None, and a comment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol, overload

import torch

from gemma4_turbo.ports.any import protocols as any_line

# -- modules of the text model ----------------------------------------------------------------------


class Module(Protocol):
    """``torch.nn.Module``, beside what a class below reads of a module of SGLang's."""

    _forward_hooks: dict[int, Callable[..., Any]]
    _forward_pre_hooks: dict[int, Callable[..., Any]]
    _compiled_call_impl: Callable[..., Any] | None

    @property
    def _parameters(self) -> Mapping[str, torch.Tensor | None]: ...
    @property
    def _buffers(self) -> Mapping[str, torch.Tensor | None]: ...
    @property
    def _modules(self) -> Mapping[str, Module | None]: ...
    def modules(self) -> Iterator[Module]: ...
    def children(self) -> Iterator[Module]: ...


class PlatformOp(Module, Protocol):
    """``sglang.srt.layers.utils.multi_platform.MultiPlatformOp``: a module that chooses its function by platform."""

    _forward_method: MethodType


class Norm(PlatformOp, Protocol):
    """Either of the two norms below."""

    weight: torch.Tensor  # of a Gemma4RMSNorm without scale, and an RMSNorm without weight, ones

    @overload
    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...
    @overload
    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, /
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class RMSNorm(Norm, Protocol):
    """``sglang.srt.layers.layernorm.RMSNorm``."""

    variance_epsilon: float
    variance_size_override: int | None
    cast_x_before_out_mul: bool
    override_orig_dtype: torch.dtype | None


class Gemma4RMSNorm(Norm, Protocol):
    """``sglang.srt.layers.layernorm.Gemma4RMSNorm``; without a residual only."""

    eps: float
    scale_shift: float
    with_scale: bool


class Linear(Module, Protocol):
    """``sglang.srt.layers.linear``: all of its layers. The bias comes beside the result."""

    weight: torch.Tensor  # a quantised one may have none
    bias: torch.Tensor | None
    quant_method: object
    tp_size: int  # not of a ReplicatedLinear
    reduce_results: bool  # of a RowParallelLinear
    use_dp_attention_reduce: bool  # of a RowParallelLinear

    def __call__(self, x: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class RotaryEmbedding(PlatformOp, Protocol):
    """``sglang.srt.layers.rotary_embedding.base.RotaryEmbedding``."""

    cos_sin_cache: torch.Tensor
    head_size: int
    rotary_dim: int
    is_neox_style: bool
    use_fallback_kernel: bool

    def __call__(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, /
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class RadixAttention(any_line.RadixAttention, Module, Protocol):
    """``sglang.srt.layers.radix_attention.RadixAttention``."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        /,
        *,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor: ...


class Attention(Module, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4Attention``."""

    config: TextConfig
    head_dim: int
    num_heads: int
    num_kv_heads: int
    q_size: int
    kv_size: int
    sliding_window: int | None
    is_kv_shared_layer: bool
    kv_shared_layer_index: int | None
    qkv_proj: Linear
    q_norm: Gemma4RMSNorm
    k_norm: Gemma4RMSNorm
    v_norm: Gemma4RMSNorm
    rotary_emb: RotaryEmbedding
    attn: RadixAttention
    o_proj: Linear

    def __call__(
        self, *, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor: ...


class GeluAndMul(PlatformOp, Protocol):
    """``sglang.srt.layers.activation.GeluAndMul``."""

    approximate: str


class MLP(Module, Protocol):
    """``sglang.srt.models.gemma3_causal.Gemma3MLP``."""

    gate_up_proj: Linear
    act_fn: GeluAndMul
    down_proj: Linear

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


class Router(Module, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4Router``."""

    norm: Gemma4RMSNorm
    scale: torch.nn.Parameter
    root_size: torch.Tensor
    proj: Linear

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


class TopKConfig(Protocol):
    """``sglang.srt.layers.moe.topk.TopKConfig``."""

    top_k: int
    custom_routing_function: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # a Gemma4MoE has one
    output_format: object


class TopK(Module, Protocol):
    """``sglang.srt.layers.moe.topk.TopK``."""

    topk_config: TopKConfig


class MoeRunner(Protocol):
    """``sglang.srt.layers.moe.moe_runner.runner.MoeRunner``."""

    runner_backend: MoeRunnerBackend


class MoeRunnerBackend(Protocol):
    """``sglang.srt.layers.moe.utils.MoeRunnerBackend``, an enumeration."""

    @property
    def value(self) -> str: ...
    def is_triton(self) -> bool: ...


class MoeMethod(Protocol):
    """``sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod``, or its like for fp8."""

    runner: MoeRunner


class FusedMoE(Module, Protocol):
    """``sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE``."""

    quant_method: MoeMethod
    dispatcher: object
    w13_weight: torch.nn.Parameter
    w2_weight: torch.nn.Parameter


class MoE(Module, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4MoE``."""

    tp_size: int
    per_expert_scale: torch.nn.Parameter
    topk: TopK
    experts: FusedMoE

    def __call__(self, x: torch.Tensor, router_logits: torch.Tensor, /) -> torch.Tensor: ...


LayerOutputs = (
    tuple[torch.Tensor, torch.Tensor | None]
    | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
)
"""Hidden states, residual, and of the package's layers the hidden states through the next norm."""


class DecoderLayer(Module, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4DecoderLayer``."""

    self_attn: Attention
    mlp: MLP
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm
    layer_scalar: torch.Tensor
    enable_moe_block: bool
    has_ple: bool

    # None unless `enable_moe_block`.
    router: Router
    moe: MoE
    pre_feedforward_layernorm_2: RMSNorm
    post_feedforward_layernorm_1: RMSNorm
    post_feedforward_layernorm_2: RMSNorm

    # None unless `has_ple`.
    per_layer_input_gate: Linear
    per_layer_projection: Linear
    post_per_layer_input_norm: Gemma4RMSNorm

    def __call__(
        self,
        *,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        per_layer_input: torch.Tensor | None,
        forward_batch: ForwardBatch,
        **kwargs: Any,
    ) -> LayerOutputs: ...

    forward: Callable[..., Any]


class DecoderLayers(Protocol):
    """``torch.nn.ModuleList`` of decoder layers."""

    @property
    def _modules(self) -> Mapping[str, DecoderLayer]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[DecoderLayer]: ...
    @overload
    def __getitem__(self, index: int, /) -> DecoderLayer: ...
    @overload
    def __getitem__(self, index: slice, /) -> DecoderLayers: ...


class ScaledWordEmbedding(Module, Protocol):
    """``sglang.srt.models.gemma3_causal.Gemma3TextScaledWordEmbedding``."""

    weight: torch.nn.Parameter
    embed_scale: float
    max_norm: float | None

    def __call__(self, input_ids: torch.Tensor, /) -> torch.Tensor: ...


class TextConfig(Protocol):
    """``transformers.Gemma4TextConfig``, also as SGLang's ``ModelConfig.hf_text_config``."""

    hidden_size: int
    num_hidden_layers: int
    pad_token_id: int | None
    sliding_window: int


class TextModel(Module, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4TextModel``."""

    config: TextConfig
    layers: DecoderLayers
    norm: RMSNorm
    layers_to_capture: list[int]
    embed_tokens: ScaledWordEmbedding
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    embed_tokens_per_layer: ScaledWordEmbedding | None
    per_layer_model_projection: Linear | None

    # None without a `per_layer_model_projection`.
    per_layer_projection_norm: RMSNorm
    per_layer_projection_scale: torch.Tensor
    per_layer_input_scale: torch.Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_per_layer_inputs(self, input_ids: torch.Tensor, /) -> torch.Tensor | None: ...
    def project_per_layer_inputs(
        self, inputs_embeds: torch.Tensor, per_layer_inputs: torch.Tensor | None, /
    ) -> torch.Tensor | None: ...


class MultimodalConfig(Protocol):
    """``transformers.Gemma4Config``."""

    text_config: TextConfig
    image_token_id: int | None
    video_token_id: int | None
    audio_token_id: int | None


class MultimodalModel(Module, Protocol):
    """``sglang.srt.models.gemma4_mm.Gemma4ForConditionalGeneration``."""

    config: MultimodalConfig
    language_model: TextModel
    logits_processor: Callable[..., Any]
    capture_aux_hidden_states: bool

    def get_image_feature(self, items: list[Any]) -> torch.Tensor: ...
    def get_video_feature(self, items: list[Any]) -> torch.Tensor: ...
    def get_audio_feature(self, items: list[Any]) -> torch.Tensor: ...
    def prepare_attn_masks(
        self, forward_batch: ForwardBatch, input_ids: torch.Tensor, mask_dtype: torch.dtype
    ) -> object: ...


class AssistantModel(Module, Protocol):
    """``sglang.srt.models.gemma4_mtp.Gemma4AssistantForCausalLM``."""

    model: TextModel


# -- modules of the encoders ------------------------------------------------------------------------


class ClippableLinear(Module, Protocol):
    """``sglang.srt.layers.clippable_linear``: its row and column parallel layers."""

    linear: Linear


class ClippableQKVLinear(Module, Protocol):
    """``sglang.srt.layers.clippable_linear.ClippableQKVParallelLinear``."""

    qkv_proj: Linear
    q_size: int
    kv_size: int


class ClippableGateUpLinear(Module, Protocol):
    """``sglang.srt.layers.clippable_linear.ClippableGateUpParallelLinear``."""

    gate_up_proj: Linear
    proj_size: int


class VisionAttention(Module, Protocol):
    """``sglang.srt.models.gemma4_vision.Gemma4VisionAttention``."""

    qkv_backend: object


# -- a batch ------------------------------------------------------------------------------------------


class ForwardMode(Protocol):
    """``sglang.srt.model_executor.forward_batch_info.ForwardMode``, an enumeration."""

    @property
    def name(self) -> str: ...
    def is_extend(self) -> bool: ...
    def is_decode(self) -> bool: ...
    def is_idle(self) -> bool: ...


class CaptureHiddenMode(Protocol):
    """``sglang.srt.model_executor.forward_batch_info.CaptureHiddenMode``, an enumeration."""

    def need_capture(self) -> bool: ...


class DpPaddingMode(Protocol):
    """``sglang.srt.layers.dp_attention.DpPaddingMode``, an enumeration."""

    def is_max_len(self) -> bool: ...


class SpeculativeAlgorithm(Protocol):
    """``sglang.srt.speculative.spec_info.SpeculativeAlgorithm``, an enumeration."""

    def is_none(self) -> bool: ...


class ForwardBatch(Protocol):
    """``sglang.srt.model_executor.forward_batch_info.ForwardBatch``."""

    forward_mode: ForwardMode
    batch_size: int
    input_ids: torch.Tensor | None
    positions: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    seq_lens_sum: int
    num_token_non_padded_cpu: int
    padded_static_len: int

    # Where it is and what attends.
    req_to_token_pool: object
    token_to_kv_pool: KVPool
    out_cache_loc: torch.Tensor
    out_cache_loc_swa: torch.Tensor | None
    attn_backend: TritonBackend  # of another kind only `forward` is called
    _attn_output: torch.Tensor  # set by SGLang's operator of attention, for a backend to write to

    # Of an extend step.
    extend_num_tokens: int | None
    extend_seq_lens: torch.Tensor | None
    extend_prefix_lens: torch.Tensor | None
    extend_start_loc: torch.Tensor | None
    extend_seq_lens_cpu: list[int] | None
    extend_prefix_lens_cpu: list[int] | None
    extend_logprob_start_lens_cpu: list[int] | None
    mm_inputs: Sequence[object] | None

    # What is wanted of it.
    return_logprob: bool
    return_hidden_states_before_norm: bool
    return_pooled_hidden_states: bool
    capture_hidden_mode: CaptureHiddenMode | None
    is_prefill_only: bool
    dimensions: list[int] | None
    multi_item_delimiter_indices: list[torch.Tensor] | None
    lora_ids: list[str | None] | None
    spec_info: object | None
    spec_algorithm: SpeculativeAlgorithm | None

    # Of several GPUs, and of special backends.
    global_num_tokens_cpu: list[int] | None
    dp_local_start_pos: torch.Tensor | None
    dp_local_num_tokens: torch.Tensor | None
    dp_padding_mode: DpPaddingMode  # None without data parallel attention
    tbo_split_seq_index: int | None
    tbo_children: list[ForwardBatch] | None
    attn_cp_metadata: object | None
    hisparse_coordinator: object | None

    def contains_image_inputs(self) -> bool: ...


class Prefill(ForwardBatch, Protocol):
    """A `ForwardBatch` whose lengths are known on the host."""

    seq_lens_cpu: torch.Tensor
    extend_seq_lens_cpu: list[int]
    extend_prefix_lens_cpu: list[int]


class Request(Protocol):
    """``sglang.srt.managers.schedule_batch.Req``."""

    rid: str
    req_pool_idx: int | None
    origin_input_ids: Sequence[int]

    def finished(self) -> bool: ...


class ScheduleBatch(Protocol):
    """``sglang.srt.managers.schedule_batch.ScheduleBatch``, and the ``ModelWorkerBatch`` made of it."""

    reqs: list[Request]
    forward_mode: ForwardMode
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    req_pool_indices: torch.Tensor
    device: str
    spec_info: object | None


# -- attention backends and KV pools ------------------------------------------------------------------


class TritonBackend(any_line.TritonBackend, Protocol):
    """``sglang.srt.layers.attention.triton_backend.TritonAttnBackend``."""

    token_to_kv_pool_allocator: KVAllocator
    num_head: int
    v_head_dim: int
    swa_v_head_dim: int | None
    max_kv_splits: int

    def get_num_kv_splits(self, num_kv_splits: torch.Tensor, seq_lens: torch.Tensor, /) -> None: ...
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        /,
    ) -> torch.Tensor: ...


class KVPool(Protocol):
    """``sglang.srt.mem_cache.memory_pool.KVCache``, of any kind."""

    dtype: torch.dtype

    def get_key_buffer(self, layer_id: int, /) -> torch.Tensor: ...
    def get_value_buffer(self, layer_id: int, /) -> torch.Tensor: ...
    def get_kv_buffer(self, layer_id: int, /) -> tuple[torch.Tensor, torch.Tensor]: ...
    def set_kv_buffer(
        self,
        layer: RadixAttention,
        loc: torch.Tensor,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: torch.Tensor | float | None = None,
        v_scale: torch.Tensor | float | None = None,
        /,
    ) -> None: ...


class MHAKVPool(KVPool, Protocol):
    """``sglang.srt.mem_cache.memory_pool.MHATokenToKVPool``."""

    store_dtype: torch.dtype
    start_layer: int | None
    k_buffer: list[torch.Tensor]
    v_buffer: list[torch.Tensor]


class SWAKVPool(KVPool, Protocol):
    """``sglang.srt.mem_cache.swa_memory_pool.SWAKVPool``."""

    full_kv_pool: MHAKVPool
    swa_kv_pool: MHAKVPool
    layers_mapping: dict[int, tuple[int, bool]]
    full_to_swa_index_mapping: torch.Tensor | None
    swa_loc: torch.Tensor | None

    def set_swa_loc(self, loc: torch.Tensor | None, /) -> None: ...
    def translate_loc_from_full_to_swa(self, kv_indices: torch.Tensor, /) -> torch.Tensor: ...


class KVAllocator(Protocol):
    """``sglang.srt.mem_cache.allocator.BaseTokenToKVPoolAllocator``."""

    page_size: int


# -- the server and its runners -----------------------------------------------------------------------


class ModelConfig(Protocol):
    """``sglang.srt.configs.model_config.ModelConfig``."""

    hf_config: object
    hf_text_config: TextConfig
    context_len: int
    is_multimodal: bool
    full_attention_layer_ids: list[int]
    swa_attention_layer_ids: list[int]


class ServerArgs(Protocol):
    """``sglang.srt.server_args.ServerArgs``."""

    model_path: str
    model_impl: str
    quantization: str | None
    is_embedding: bool
    tp_size: int
    pp_size: int
    attention_backend: str | None
    prefill_attention_backend: str | None
    moe_runner_backend: str
    chunked_prefill_size: int | None
    disable_piecewise_cuda_graph: bool
    enforce_piecewise_cuda_graph: bool
    piecewise_cuda_graph_max_tokens: int | None
    piecewise_cuda_graph_tokens: list[int] | None
    speculative_algorithm: str | None
    disaggregation_mode: str
    enable_hierarchical_cache: bool
    enable_lora: bool | None
    forward_hooks: list[dict[str, Any]] | None
    debug_tensor_dump_output_folder: str | None
    swa_full_tokens_ratio: float

    def get_model_config(self) -> ModelConfig: ...


class LogitsProcessorOutput(Protocol):
    """``sglang.srt.layers.logits_processor.LogitsProcessorOutput``."""

    next_token_logits: torch.Tensor
    hidden_states: torch.Tensor  # None unless captured, as in every draft


class ModelRunnerOutput(Protocol):
    """``sglang.srt.model_executor.model_runner.ModelRunnerOutput``."""

    logits_output: LogitsProcessorOutput


class Group(Protocol):
    """``sglang.srt.distributed.parallel_state.GroupCoordinator``."""

    world_size: int
    rank_in_group: int
    ranks: list[int]


class ModelRunner(Protocol):
    """``sglang.srt.model_executor.model_runner.ModelRunner``."""

    server_args: ServerArgs
    model_config: ModelConfig
    model: Module
    is_multimodal: bool
    is_draft_worker: bool
    model_is_mrope: bool
    device: str
    gpu_id: int
    kv_cache_dtype: torch.dtype
    req_to_token_pool: object
    spec_algorithm: SpeculativeAlgorithm
    piecewise_cuda_graph_runner: object | None

    def forward(
        self, forward_batch: ForwardBatch, *, skip_attn_backend_init: bool
    ) -> ModelRunnerOutput: ...
    def _resolve_max_num_reqs(self, token_capacity: int, /) -> int: ...


# -- multi-token prediction ---------------------------------------------------------------------------


class DraftInput(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_info.FrozenKVMTPDraftInput``."""

    topk_p: torch.Tensor
    topk_index: torch.Tensor
    hidden_states: torch.Tensor
    bonus_tokens: torch.Tensor
    positions: torch.Tensor | None
    capture_hidden_mode: CaptureHiddenMode
    num_tokens_per_req: int
    num_tokens_for_logprob_per_req: int

    @classmethod
    def create_idle_input(
        cls,
        *,
        device: str,
        hidden_size: int | None,
        dtype: torch.dtype | None,
        topk: int,
        capture_hidden_mode: CaptureHiddenMode,
    ) -> DraftInput: ...


class FrozenKVContext(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_info.FrozenKVMTPContext``."""

    target_token_to_kv_pool: KVPool

    def get_physical_layer_id(self, idx: int, /) -> int: ...
