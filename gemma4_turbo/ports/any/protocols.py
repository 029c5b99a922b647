"""What the ports of every line read of SGLang's objects: a class for each of SGLang's, with nothing else in it.

For the type checker alone, which does not look into SGLang: import it under ``TYPE_CHECKING``. Where a
port reads one more attribute, it is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch


class ServerArgs(Protocol):
    """``sglang.srt.server_args.ServerArgs``."""

    enforce_piecewise_cuda_graph: bool
    moe_runner_backend: str


# -- modules that a port goes round --------------------------------------------------------------------


class Module(Protocol):
    """``torch.nn.Module``, beside what a class below reads of a module of SGLang's."""

    _forward_hooks: dict[int, Callable[..., Any]]
    _forward_pre_hooks: dict[int, Callable[..., Any]]

    @property
    def _parameters(self) -> Mapping[str, torch.Tensor | None]: ...
    @property
    def _buffers(self) -> Mapping[str, torch.Tensor | None]: ...
    @property
    def _modules(self) -> Mapping[str, Module | None]: ...
    def modules(self) -> Iterator[Module]: ...
    def children(self) -> Iterator[Module]: ...


class Linear(Module, Protocol):
    """``sglang.srt.layers.linear``: all of its layers. The bias comes beside the result."""

    def __call__(self, x: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class RMSNorm(Module, Protocol):
    """``sglang.srt.layers.layernorm.RMSNorm``; without a residual only."""

    weight: torch.Tensor
    variance_epsilon: float
    variance_size_override: int | None
    cast_x_before_out_mul: bool
    _forward_method: Callable[..., Any] | None  # None: chosen at the first call

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


class ScaledWordEmbedding(Module, Protocol):
    """``sglang.srt.models.gemma3_causal.Gemma3TextScaledWordEmbedding``."""

    weight: torch.nn.Parameter
    embed_scale: float
    max_norm: float | None

    def __call__(self, input_ids: torch.Tensor, /) -> torch.Tensor: ...


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
    num_hidden_layers: int
    pad_token_id: int | None


class MultimodalConfig(Protocol):
    """``transformers.Gemma4Config``."""

    text_config: TextConfig
    image_token_id: int | None
    video_token_id: int | None
    audio_token_id: int | None


class TextModel(Protocol):
    """``sglang.srt.models.gemma4_causal.Gemma4TextModel``."""

    config: TextConfig
    embed_tokens: ScaledWordEmbedding
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    embed_tokens_per_layer: ScaledWordEmbedding | None
    per_layer_model_projection: Linear | None

    # None without a `per_layer_model_projection`.
    per_layer_projection_norm: RMSNorm
    per_layer_projection_scale: torch.Tensor
    per_layer_input_scale: torch.Tensor

    @property
    def device(self) -> torch.device: ...
    def dtype(self) -> torch.dtype: ...
    def get_per_layer_inputs(self, input_ids: torch.Tensor, /) -> torch.Tensor | None: ...


class MultimodalModel(Protocol):
    """``sglang.srt.models.gemma4_mm.Gemma4ForConditionalGeneration``."""

    config: MultimodalConfig
    vision_tower: VisionTower
    embed_vision: MultimodalEmbedder
    language_model: TextModel
    logits_processor: Callable[..., Any]
    capture_aux_hidden_states: bool

    def get_per_layer_inputs(self, input_ids: torch.Tensor, /) -> torch.Tensor | None: ...
    def get_image_feature(self, items: list[Any]) -> torch.Tensor: ...
    def get_video_feature(self, items: list[Any]) -> torch.Tensor: ...
    def get_audio_feature(self, items: list[Any]) -> torch.Tensor: ...
    def prepare_attn_masks(
        self, forward_batch: Any, input_ids: torch.Tensor, mask_dtype: torch.dtype
    ) -> object: ...


class MultimodalItem(Protocol):
    """``sglang.srt.managers.schedule_batch.MultimodalDataItem``."""

    feature: object
