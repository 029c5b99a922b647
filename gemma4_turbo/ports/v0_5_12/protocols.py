"""What the ports of 0.5.12 alone read of SGLang's objects: as `gemma4_turbo.ports.any.model_protocols`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from gemma4_turbo.ports.any import model_protocols as protocols

# -- attention backends and KV pools ---------------------------------------------------------------


class ForwardContext(Protocol):
    """``sglang.srt.compilation.piecewise_context_manager.ForwardContext``."""

    forward_batch: protocols.ForwardBatch
    attention_layers: list[protocols.RadixAttention]


class TRTLLMMetadata(Protocol):
    """``sglang.srt.layers.attention.trtllm_mha_backend.TRTLLMMHAMetadata``."""

    cache_seqlens_int32: torch.Tensor
    page_table: torch.Tensor | None
    swa_page_table: torch.Tensor | None


class TRTLLMBackend(Protocol):
    """``sglang.srt.layers.attention.trtllm_mha_backend.TRTLLMHAAttnBackend``."""

    forward_metadata: TRTLLMMetadata
    page_size: int
    max_context_len: int
    speculative_num_draft_tokens: int | None
    use_sliding_window_kv_pool: bool
    _swa_kv_pool: protocols.SWAKVPool | None

    def _get_layer_page_table(
        self, layer: protocols.RadixAttention, forward_batch: protocols.ForwardBatch, /
    ) -> torch.Tensor: ...


class SWAAllocator(protocols.KVAllocator, Protocol):
    """``sglang.srt.mem_cache.swa_memory_pool.SWATokenToKVPoolAllocator``."""

    full_to_swa_index_mapping: torch.Tensor
    _kvcache: protocols.SWAKVPool

    @property
    def size_full(self) -> int: ...
    @property
    def size_swa(self) -> int: ...
    def translate_loc_from_full_to_swa(self, kv_indices: torch.Tensor, /) -> torch.Tensor: ...


# -- runners and memory ----------------------------------------------------------------------------


class MultimodalRunner(protocols.ModelRunner, Protocol):
    """A `ModelRunner` of a `MultimodalModel`."""

    model: protocols.MultimodalModel


class PoolConfigurator(Protocol):
    """``sglang.srt.model_executor.pool_configurator.HybridSWAPoolConfigurator``."""

    _cell_size: float


# -- defects that no release has, in trees between two -----------------------------------------------


class WindowedBackend(Protocol):
    """An attention backend that keeps the state of a sliding-window KV pool."""

    use_sliding_window_kv_pool: bool
    _swa_kv_pool: object | None


class WindowedWorker(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_worker.FrozenKVMTPWorker``."""

    draft_attn_backend: WindowedBackend
    kv_context: protocols.FrozenKVContext | None  # before the model is bound


class WindowedRunner(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner.FrozenKVMTPCudaGraphRunner``."""

    frozen_kv_mtp_worker: WindowedWorker


class AssistantConfig(Protocol):
    """``transformers.PretrainedConfig`` of an assistant."""

    num_experts: int | None


class LaunchedAssistant(Protocol):
    """``sglang.srt.models.gemma4_mtp.Gemma4AssistantForCausalLM``."""

    config: AssistantConfig


# -- multi-token prediction ------------------------------------------------------------------------


class DraftBatch(protocols.ForwardBatch, Protocol):
    """A `ForwardBatch` of the draft's."""

    spec_info: protocols.DraftInput


class CapturedDraftBatch(DraftBatch, Protocol):
    """A `DraftBatch` over the buffers of a `DraftGraphRunner`."""

    seq_lens_cpu: torch.Tensor


class DraftWorker(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_worker.FrozenKVMTPWorker``."""

    topk: int
    speculative_num_steps: int
    speculative_num_draft_tokens: int
    draft_attn_backend: protocols.TritonBackend
    kv_context: protocols.FrozenKVContext  # None before the model is bound

    @property
    def draft_model_runner(self) -> protocols.ModelRunner: ...
    def draft(self, batch: protocols.ScheduleBatch, /) -> Any: ...
    def draft_forward(
        self, forward_batch: protocols.ForwardBatch, skip_attn_backend_init: bool, /
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def forward_draft_extend(
        self, batch: protocols.ScheduleBatch, /, *args: Any, **kwargs: Any
    ) -> None: ...
    def forward_draft_extend_after_decode(self, batch: protocols.ScheduleBatch, /) -> None: ...
    def _capture_for_decode(
        self, logits_output: protocols.LogitsProcessorOutput, draft_input: protocols.DraftInput, /
    ) -> None: ...
    def _init_frozen_kv_metadata(self, forward_batch: protocols.ForwardBatch, /) -> None: ...
    def _init_frozen_kv_metadata_replay_cuda_graph(
        self, forward_batch: protocols.ForwardBatch, bs: int, seq_lens_sum: int, /
    ) -> None: ...
    def _set_positions(self, forward_batch: protocols.ForwardBatch, /) -> None: ...
    def _target_kv_pool_view(
        self, forward_batch: protocols.ForwardBatch, /
    ) -> AbstractContextManager[None]: ...


class DraftBuffers(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner.FrozenKVMTPInputBuffers``."""

    req_pool_indices: torch.Tensor
    positions: torch.Tensor
    mrope_positions: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    hidden_states: torch.Tensor


class DeepEPAdapter(Protocol):
    """``sglang.srt.model_executor.cuda_graph_runner.DeepEPCudaGraphRunnerAdapter``."""

    def replay(self) -> None: ...


class DraftGraphRunner(Protocol):
    """``sglang.srt.speculative.frozen_kv_mtp_cuda_graph_runner.FrozenKVMTPCudaGraphRunner``."""

    frozen_kv_mtp_worker: DraftWorker
    model_runner: protocols.ModelRunner
    draft_attn_backend: protocols.TritonBackend
    buffers: DraftBuffers
    deepep_adapter: DeepEPAdapter
    stream: torch.cuda.Stream
    topk: int
    tp_size: int
    max_bs: int
    seq_len_fill_value: int
    disable_padding: bool
    require_mlp_sync: bool
    require_gathered_buffer: bool

    def _create_graph(self) -> torch.cuda.CUDAGraph: ...
    def _capture_init(self, run_once: Callable[[], object], /) -> None: ...
    def _capture_graph(
        self,
        graph: torch.cuda.CUDAGraph,
        pool: object,
        stream: torch.cuda.Stream,
        run_once: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        /,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
