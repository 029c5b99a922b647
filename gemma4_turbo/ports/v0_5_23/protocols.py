"""What this line's ports read of SGLang's objects: a class for each of SGLang's, with nothing else in it.

For the type checker alone, which does not look into SGLang: import it under ``TYPE_CHECKING``. What is
the same in every line is in `gemma4_turbo.ports.any.model_protocols`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Protocol

import torch

from gemma4_turbo.ports.any import model_protocols as protocols
from gemma4_turbo.ports.any import protocols as any_line


class RMSNorm(protocols.RMSNorm, Protocol):
    """``sglang.srt.layers.layernorm.RMSNorm``."""

    _quant_linear: protocols.Module | None

    def _resolve_forward_method(self) -> Callable[..., Any]: ...


class OutputTransform(Protocol):
    """``sglang.srt.layers.layer_boundary.output.OutputTransform``."""

    apply: Callable[[torch.Tensor], torch.Tensor]


class ResidualUpdate(Protocol):
    """``sglang.srt.layers.layer_boundary.residual.ResidualUpdate``."""

    is_plain_add: bool
    applied_at_exit: bool
    quantized_sum: bool
    bind: Callable[..., Any] | None


class StageDeclaration(Protocol):
    """``sglang.srt.layers.layer_boundary.factories.StageDeclaration``."""

    output_transform: OutputTransform | None
    update: ResidualUpdate


class EntryPath(Protocol):
    """``sglang.srt.layers.layer_boundary.contracts.EntryPath``."""

    prepare: Callable[..., Any]
    input_move: Callable[..., Any] | None
    declared_sum: object


class OutputContract(Protocol):
    """``sglang.srt.layers.layer_boundary.contracts.OutputContract``."""

    group: object
    always_partial: bool
    sum_impl: object


class StagePath(Protocol):
    """``sglang.srt.layers.layer_boundary.contracts.StagePath``."""

    entry: EntryPath
    output: OutputContract


class StagePlan(Protocol):
    """``sglang.srt.layers.layer_boundary.construction.StagePlan``."""

    norm: object
    paths: dict[Enum, StagePath]


class StageBoundary(Protocol):
    """``sglang.srt.layers.layer_boundary.stage.StageBoundary``."""

    declaration: StageDeclaration
    plan: StagePlan

    def sum_part(self, part: torch.Tensor, batch: LayerBatch, group: object, /) -> torch.Tensor: ...


class FusedMoE(protocols.FusedMoE, Protocol):
    """``sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE``."""

    moe_tp_size: int
    moe_ep_size: int
    reduce_results: bool


class MoE(protocols.MoE, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4MoE``."""

    experts: FusedMoE


class FoldedRouter(protocols.Router, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4Router``, whose scale becomes the norm's weight."""

    _scale_fused: bool

    def fuse_scale(self) -> None: ...


class ResidualStream(Protocol):
    """``sglang.srt.layers.layer_boundary.residual.stream.ResidualStream``."""

    residual: torch.Tensor | None
    pending: object | None


class LayerBatch(protocols.ForwardBatch, Protocol):
    """``sglang.srt.model_executor.forward_batch_info.ForwardBatch``, as the layers and the cut read it."""

    residual_stream: ResidualStream | None
    kv_loc_plan: object
    attn_tp_sequence_sharded: bool
    attn_dcp_metadata: object | None
    token_indices_to_pool: object | None
    decision_layouts: object | None
    global_num_token_non_padded_cpu: int
    global_num_token_non_padded: torch.Tensor | None
    num_token_non_padded: torch.Tensor | None
    input_embeds: torch.Tensor | None
    mm_input_embeds: torch.Tensor | None


class StagedLayer(protocols.DecoderLayer, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4DecoderLayer``."""

    attn_boundary: StageBoundary
    ffn_boundary: StageBoundary
    router: FoldedRouter
    _next_stream: Callable[..., torch.Tensor]


class GroupCoordinator(Protocol):
    """``sglang.srt.distributed.parallel_state.GroupCoordinator``."""

    world_size: int


class TextModel(protocols.TextModel, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4TextModel``."""

    pp_group: GroupCoordinator


class AuxHiddenStates(Protocol):
    """``sglang.srt.layers.aux_hidden_states.AuxHiddenStateList``, a list."""

    def __bool__(self) -> bool: ...
    def append(self, hidden: torch.Tensor, /) -> None: ...
    def capture(self, hidden: torch.Tensor, *, owned: bool = False) -> None: ...


class MultimodalModel(protocols.MultimodalModel, Protocol):
    """``sglang.srt.models.gemma4_mm.Gemma4ForConditionalGeneration``."""

    pp_group: GroupCoordinator
    lm_head_is_tied: bool
    lm_head: protocols.Module

    def get_per_layer_inputs(self, input_ids: torch.Tensor, /) -> torch.Tensor | None: ...


# -- attention over a KV cache ------------------------------------------------------------------------


class RadixAttention(any_line.RadixAttention, Protocol):
    """``sglang.srt.layers.radix_attention.RadixAttention``."""


class ForwardBatch(Protocol):
    """``sglang.srt.model_executor.forward_batch_info.ForwardBatch``."""

    out_cache_loc: torch.Tensor
    spec_info: object | None
    _attn_output: torch.Tensor | None  # where a breakable graph wants the attention's result


class ForwardMetadata(any_line.ForwardMetadata, Protocol):
    """``sglang.srt.layers.attention.triton_backend.ForwardMetadata``."""

    swa_out_cache_loc: torch.Tensor | None


class KVPool(any_line.KVBuffers, Protocol):
    """``sglang.srt.mem_cache.memory_pool.MHATokenToKVPool``, or a `SWAKVPool` of two."""

    is_quantized_kv_cache: bool
    kv_cache_layout: str


class SWAKVPool(any_line.KVBuffers, Protocol):
    """``sglang.srt.mem_cache.swa_memory_pool.SWAKVPool``."""

    full_kv_pool: KVPool
    swa_kv_pool: KVPool
    layers_mapping: dict[int, tuple[int, bool]]
    full_to_swa_index_mapping: torch.Tensor | None


class KVIndexTranslator(Protocol):
    """``sglang.srt.mem_cache.kv_index_translator.KVIndexTranslator``."""

    req_to_token: torch.Tensor
    is_translating: bool
    window_kv_kind: object

    def pack_read_stream(
        self,
        plan: object,
        /,
        *,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        indptr: torch.Tensor,
        out: torch.Tensor,
        kv_start_idx: torch.Tensor | None,
        token_mapping: torch.Tensor | None,
        kind: object = ...,
    ) -> None: ...


class KVWriteLoc(Protocol):
    """``sglang.srt.mem_cache.memory_pool.KVWriteLoc``."""

    @classmethod
    def for_batch(
        cls, forward_batch: ForwardBatch, *, swa_loc: torch.Tensor | None
    ) -> KVWriteLoc: ...


class TritonBackend(any_line.TritonBackend, Protocol):
    """``sglang.srt.layers.attention.triton_backend.TritonAttnBackend``."""

    forward_metadata: ForwardMetadata
    token_to_kv_pool: KVPool | SWAKVPool
    kv_index_translator: KVIndexTranslator
    dcp_size: int
    dllm_attention: object | None
    is_draft_runner: bool
    use_verify_splitkv: bool
    use_verify_shared_kv: bool
    enable_lean_attention: bool

    def _set_kv_buffer(
        self,
        forward_batch: ForwardBatch,
        layer: RadixAttention,
        loc_info: KVWriteLoc,
        k: torch.Tensor,
        v: torch.Tensor,
        /,
    ) -> None: ...

    @property
    def verify_mask(self) -> VerifyMask | None: ...


# -- speculation --------------------------------------------------------------------------------------


class TargetRunner(protocols.ModelRunner, Protocol):
    """``sglang.srt.model_executor.model_runner.ModelRunner``."""

    attn_backend: TritonBackend


class VerifyMask(Protocol):
    """``sglang.srt.layers.attention.verify_mask.VerifyMask``."""

    buffer: torch.Tensor
    mode: object

    def fits(self, bs: int, /) -> bool: ...


class RequestKV(Protocol):
    """``sglang.srt.managers.schedule_batch.ReqKvInfo``."""

    kv_allocated_len: int


class Request(Protocol):
    """``sglang.srt.managers.schedule_batch.Req``."""

    kv: RequestKV


class ScheduleBatch(Protocol):
    """``sglang.srt.managers.schedule_batch.ScheduleBatch``, in a decode step of a draft."""

    reqs: Sequence[Request]
    forward_mode: protocols.ForwardMode
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    seq_lens_sum: int | None
    return_hidden_states: bool
    spec_info: protocols.DraftInput


class DraftBatch(Protocol):
    """A ``ForwardBatch`` of the draft's."""

    input_ids: torch.Tensor
    spec_info: protocols.DraftInput

    def needs_forward_metadata_init(self) -> bool: ...


class TargetWorker(Protocol):
    """``sglang.srt.managers.tp_worker.TpModelWorker``."""

    @property
    def model_runner(self) -> TargetRunner: ...


class DraftRunner(Protocol):
    """``sglang.srt.model_executor.model_runner.ModelRunner`` of the draft."""

    def forward(self, forward_batch: DraftBatch, /) -> protocols.ModelRunnerOutput: ...


class DraftGraphRunner(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner.FrozenKVMTPCudaGraphRunner``."""

    def can_run_graph(self, forward_batch: DraftBatch, /) -> bool: ...
    def execute(
        self, forward_batch: DraftBatch, /
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class DraftWorker(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_worker_v2.FrozenKVMTPDraftWorker``."""

    topk: int
    speculative_num_steps: int
    speculative_num_draft_tokens: int
    target_worker: TargetWorker
    draft_attn_backend: TritonBackend
    cuda_graph_runner: DraftGraphRunner | None

    @property
    def draft_model_runner(self) -> DraftRunner: ...
    def draft_forward(
        self, forward_batch: DraftBatch, /
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def _init_frozen_kv_metadata(self, forward_batch: DraftBatch, /) -> None: ...
    def _position_for_batch(self, batch: ScheduleBatch, /) -> torch.Tensor: ...
    def _set_positions(self, forward_batch: DraftBatch, /) -> None: ...
    def _target_kv_pool_view(
        self, forward_batch: DraftBatch, /
    ) -> AbstractContextManager[None]: ...


# -- prefill graphs -----------------------------------------------------------------------------------


class ModelRunner(Protocol):
    """``sglang.srt.model_executor.model_runner.ModelRunner``."""

    model: object
    is_draft_worker: bool
    attn_backend: object


# -- CUDA graphs of prefill ---------------------------------------------------------------------------


class GraphedBatch(Protocol):
    """``sglang.srt.model_executor.forward_batch_info.ForwardBatch``, on its way to a runner."""


class GraphedTextModel(TextModel, Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4TextModel``, which is recorded."""

    def children(self) -> Iterator[protocols.Module]: ...


class GraphedModel(Protocol):
    """``sglang.srt.models.gemma4_mm.Gemma4ForConditionalGeneration``, whose language model is recorded."""

    language_model: GraphedTextModel


class EagerRunner(Protocol):
    """``sglang.srt.model_executor.runner.eager_runner.EagerRunner``."""


class GraphBackend(Protocol):
    """``...runner_backend.breakable_cuda_graph_backend.BreakableCudaGraphBackend``."""

    def cleanup(self) -> None: ...


class PrefillCudaGraphRunner(Protocol):
    """``sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner``."""

    backend: GraphBackend

    def can_run_graph(self, forward_batch: GraphedBatch, /) -> bool: ...
    def _fill_input_embeds_slot(
        self, args: Any, layer_kwargs: dict[str, Any], static_num_tokens: int, /
    ) -> None: ...


class GraphCapture(Protocol):
    """``...model_runner_components.cuda_graph_setup.GraphCapture``."""

    runner: PrefillCudaGraphRunner


class GraphedRunner(Protocol):
    """``sglang.srt.model_executor.model_runner.ModelRunner``, as it records."""

    server_args: object
    model_config: protocols.ModelConfig
    model: GraphedModel
    is_draft_worker: bool
    attn_backend: object
    device: str
    gpu_id: int
    eager_runner: EagerRunner
    prefill_cuda_graph_runner: PrefillCudaGraphRunner | EagerRunner | None


class PhaseConfig(Protocol):
    """``sglang.srt.model_executor.cuda_graph_config.PhaseConfig``."""

    backend: str
    max_bs: int | None
    bs: list[int] | None


class CudaGraphConfig(Protocol):
    """``sglang.srt.model_executor.cuda_graph_config.CudaGraphConfig``."""

    prefill: PhaseConfig


class ResolvingArguments(Protocol):
    """``sglang.srt.arg_groups.model_override_base.ResolvingConfig``: the arguments as far as decided."""

    cuda_graph_config: CudaGraphConfig
    model_impl: str
    chunked_prefill_size: int | None
    attention_backend: str | None
    prefill_attention_backend: str | None
    disaggregation_mode: str
    enable_hierarchical_cache: bool
    swa_full_tokens_ratio: float | None
    disable_radix_cache: bool
    max_total_tokens: int | None
    tp_size: int
    pp_size: int


# -- pictures -----------------------------------------------------------------------------------------


class MultimodalProcessor(Protocol):
    """``sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor``."""

    FEATURE_NAMES: list[str]
    keep_mm_features_on_device: bool
    precompute_hash_before_cpu_transfer: bool


# -- memory -------------------------------------------------------------------------------------------


class ModelLayerInfo(Protocol):
    """``...model_runner_components.layer_setup.ModelLayerInfo``."""

    swa_attention_layer_ids: list[int] | None
    full_attention_layer_ids: list[int] | None


class SpeculativeAlgorithm(Protocol):
    """``sglang.srt.speculative.spec_info.SpeculativeAlgorithm``."""

    def is_none(self) -> bool: ...


class KVCacheConfigurator(Protocol):
    """``sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator``."""

    model: Any
    model_config: protocols.ModelConfig
    layer_info: ModelLayerInfo
    spec_algorithm: SpeculativeAlgorithm
    is_draft_worker: bool
    is_hybrid_swa: bool
    post_capture_kv_active: bool
    pp_size: int

    def resolve_max_num_reqs(self, token_capacity: int, /) -> int: ...


class MemoryPoolConfig(Protocol):
    """``sglang.srt.model_executor.pool_configurator.MemoryPoolConfig``."""

    max_total_num_tokens: int


class PoolConfigurator(Protocol):
    """``sglang.srt.model_executor.pool_configurator.HybridSWAPoolConfigurator``."""

    _cell_size: float
