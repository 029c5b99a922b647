"""What the ports of every line read of SGLang's objects: a class for each of SGLang's, with nothing else in it.

For the type checker alone, which does not look into SGLang: import it under ``TYPE_CHECKING``. Where a
port reads one more attribute, it is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch


class ServerArgs(Protocol):
    """``sglang.srt.server_args.ServerArgs``."""

    enforce_piecewise_cuda_graph: bool
    moe_runner_backend: str


# -- attention over a KV cache ------------------------------------------------------------------------


class RadixAttention(Protocol):
    """``sglang.srt.layers.radix_attention.RadixAttention``."""

    layer_id: int
    tp_q_head_num: int
    qk_head_dim: int
    v_head_dim: int
    scaling: float
    sliding_window_size: int | None  # -1, as well: none
    is_cross_attention: bool
    logit_cap: float
    logit_capping_method: str
    xai_temperature_len: int
    attn_type: object
    k_scale: torch.Tensor | float | None
    v_scale: torch.Tensor | float | None
    k_scale_float: float | None
    v_scale_float: float | None


class ForwardMetadata(Protocol):
    """``sglang.srt.layers.attention.triton_backend.ForwardMetadata``."""

    max_extend_len: int | torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    qo_indptr: torch.Tensor
    custom_mask: torch.Tensor | None
    mask_indptr: torch.Tensor | None
    window_kv_indptr: torch.Tensor  # None without a sliding window, as the next two
    window_kv_indices: torch.Tensor
    window_kv_offsets: torch.Tensor


class TritonBackend(Protocol):
    """``sglang.srt.layers.attention.triton_backend.TritonAttnBackend``."""

    forward_metadata: ForwardMetadata
    use_mla: bool
    enable_deterministic: bool
    allow_bidirectional_attention_in_extend: bool
    sliding_window_size: int | None
    req_to_token: torch.Tensor


class KVBuffers(Protocol):
    """``sglang.srt.mem_cache.memory_pool.KVCache``: what attention reads of it."""

    def get_key_buffer(self, layer_id: int, /) -> torch.Tensor: ...
    def get_value_buffer(self, layer_id: int, /) -> torch.Tensor: ...
    def get_kv_buffer(self, layer_id: int, /) -> tuple[torch.Tensor, torch.Tensor]: ...


# -- the vision encoder -------------------------------------------------------------------------------


class VisionConfig(Protocol):
    """``transformers.Gemma4VisionConfig``."""

    hidden_size: int
    intermediate_size: int
    position_embedding_size: int


class PatchEmbedder(Protocol):
    """``sglang.srt.models.gemma4_vision.Gemma4VisionPatchEmbedder``."""

    position_embedding_table: torch.Tensor


class VisionBackend(Protocol):
    """``sglang.srt.layers.attention.vision``: any of its kinds of attention."""

    flatten_batch: bool  # of a VisionSdpaAttention alone


class VisionAttention(Protocol):
    """``sglang.srt.models.gemma4_vision.Gemma4VisionAttention``."""

    qkv_backend: VisionBackend


class VisionLayer(Protocol):
    """``sglang.srt.models.gemma4_vision.Gemma4VisionEncoderLayer``."""

    self_attn: VisionAttention


class VisionLayers(Protocol):
    """``torch.nn.ModuleList`` of a vision encoder's layers."""

    def __iter__(self) -> Iterator[VisionLayer]: ...


class VisionTransformer(Protocol):
    """``sglang.srt.models.gemma4_vision.Gemma4VisionTransformer``."""

    layers: VisionLayers


class VisionTower(Protocol):
    """``sglang.srt.models.gemma4_vision.Gemma4VisionEncoder``."""

    config: VisionConfig
    patch_embedder: PatchEmbedder
    encoder: VisionTransformer

    @property
    def device(self) -> torch.device: ...
    def __call__(
        self, pixel_values: torch.Tensor, pixel_position_ids: torch.Tensor, /
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class MultimodalEmbedder(Protocol):
    """``sglang.srt.models.gemma4_mm.Gemma4MultimodalEmbedder``."""

    def __call__(self, *, inputs_embeds: torch.Tensor) -> torch.Tensor: ...


# -- the model that takes pictures --------------------------------------------------------------------


class TextConfig(Protocol):
    """``transformers.Gemma4TextConfig``."""

    hidden_size: int


class MultimodalConfig(Protocol):
    """``transformers.Gemma4Config``."""

    text_config: TextConfig


class TextModel(Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4TextModel``."""

    @property
    def device(self) -> torch.device: ...
    def dtype(self) -> torch.dtype: ...


class MultimodalModel(Protocol):
    """``sglang.srt.models.gemma4_mm.Gemma4ForConditionalGeneration``."""

    config: MultimodalConfig
    vision_tower: VisionTower
    embed_vision: MultimodalEmbedder
    language_model: TextModel


class MultimodalItem(Protocol):
    """``sglang.srt.managers.schedule_batch.MultimodalDataItem``."""

    feature: object
