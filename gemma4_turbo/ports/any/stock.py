"""SGLang's own kernels, one method per stage, as its Gemma 4 calls them.

Whoever needs stock goes through here: what runs where a fusion declines, self-checks, ``verify``, benchmarks,
`tune` and GPU tests. Each looks its kernel up at the call, where SGLang's model does, so that a wrapper that
somebody put there is called too. What a line calls by another name, or in another way, is in its ``stock.py``.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from gemma4_turbo.fusions.stock import Functions, Stock

if TYPE_CHECKING:
    from types import ModuleType

    from gemma4_turbo.kernels.moe_align import Alignment

TRITON_UTILS = "sglang.srt.layers.moe.moe_runner.triton_utils"

Pair = tuple[torch.Tensor, torch.Tensor]

_module = cache(import_module)  # a call that is timed does not look for it again


class Embedding(NamedTuple):
    """What `Calls.per_layer_inputs` reads: a table ``[V, L * D]``, its scale, and how many ids have a row."""

    table: torch.Tensor
    scale: float
    vocabulary: int


class Projection(NamedTuple):
    """What `Calls.project_per_layer_inputs` reads behind its product; ``weight [D]`` and ``eps`` are its norm's."""

    scale: torch.Tensor
    weight: torch.Tensor
    eps: float
    input_scale: torch.Tensor | None


def text_model(
    layers: int, width: int, embedding: Embedding | None, projection: Projection | None
) -> Any:
    """What the two methods for per-layer inputs read of a ``Gemma4TextModel``.

    Its product hands its input on: ``x`` is what the projection gives, ``[T, L * D]``.

    Args:
        layers: L.
        width: D.
        embedding: for `Calls.per_layer_inputs`, or None.
        projection: for `Calls.project_per_layer_inputs`, or None.
    """
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.models.gemma3_causal import Gemma3TextScaledWordEmbedding

    model = SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=layers),
        hidden_size_per_layer_input=width,
        per_layer_model_projection=lambda x: (x, None),
    )
    if embedding is not None:
        table, scale, model.vocab_size_per_layer_input = embedding
        model.embed_tokens_per_layer = Gemma3TextScaledWordEmbedding(1, 1, None, embed_scale=scale)
        model.embed_tokens_per_layer.weight = torch.nn.Parameter(table, requires_grad=False)
    if projection is not None:
        norm = RMSNorm(width, projection.eps)
        norm.weight = torch.nn.Parameter(projection.weight, requires_grad=False)
        model.per_layer_projection_norm = norm
        model.per_layer_projection_scale = projection.scale
        model.per_layer_input_scale = projection.input_scale
    return model


class Calls(Stock):
    """Of the stages that every line calls by the same names."""

    extend_kernel: ClassVar[str]
    """The module of ``extend_attention_fwd``."""
    decode_kernel: ClassVar[str]
    """The module of ``decode_attention_fwd``."""
    moe_kernel: ClassVar[str]
    """The module of ``invoke_fused_moe_kernel``."""

    # -- norms --------------------------------------------------------------------------------------

    def eager_norms(self) -> Functions:
        """What ``RMSNorm.forward_cuda`` calls."""
        from sglang.srt.layers import layernorm

        return Functions(layernorm.rmsnorm, layernorm.fused_add_rmsnorm)

    def norms_are_cute(self) -> bool:
        """What flashinfer says, whose norms these are; False where it is not imported."""
        flashinfer: Any = sys.modules.get("flashinfer.norm")
        return flashinfer is not None and not getattr(flashinfer, "_USE_CUDA_NORM", True)

    def qkv_rmsnorm(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor | None,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        """Norms of Q, K and V over each head, in place; V's has no weight."""
        from sglang.srt.models import gemma4_causal

        gemma4_causal.gemma_qkv_rmsnorm(
            q,
            k,
            v,
            q_weight,
            k_weight,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            eps=eps,
        )

    def rope(self) -> Any:
        """The module of ``apply_rope_with_cos_sin_cache_inplace``."""
        raise NotImplementedError

    def rotate(
        self,
        positions: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        cos_sin_cache: torch.Tensor,
    ) -> None:
        """Rotary embedding of Q and K ``[rows, heads, head_dim]``, halves apart, in place."""
        self.rope().apply_rope_with_cos_sin_cache_inplace(
            positions=positions, q=q, k=k, cos_sin_cache=cos_sin_cache, is_neox=True
        )

    def norm_residual(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        scalar: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """``(norm(x) + residual) * scalar``."""
        from sglang.srt.models import gemma4_causal

        return gemma4_causal.gemma_rmsnorm_residual_scalar(  # type: ignore[no-any-return]
            x, weight, residual, scalar, eps
        )

    def dual_norm_residual(
        self,
        mlp: torch.Tensor,
        mlp_weight: torch.Tensor,
        experts: torch.Tensor,
        experts_weight: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        scalar: torch.Tensor,
        eps: tuple[float, float, float],
    ) -> torch.Tensor:
        """``(norm(norm_1(mlp) + norm_2(experts)) + residual) * scalar``; ``eps`` of 1, 2 and the last."""
        from sglang.srt.models import gemma4_causal

        return gemma4_causal.gemma_dual_rmsnorm_residual_scalar(  # type: ignore[no-any-return]
            mlp, mlp_weight, experts, experts_weight, weight, residual, scalar, *eps
        )

    # -- per-layer inputs ---------------------------------------------------------------------------

    def per_layer_inputs(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, scaled: ``[T, L, D]`` of ``ids [T]``."""
        from sglang.srt.models.gemma4_causal import Gemma4TextModel

        return Gemma4TextModel.get_per_layer_inputs(model, ids)  # type: ignore[no-any-return]

    def project_per_layer_inputs(
        self, model: Any, x: torch.Tensor, inputs: torch.Tensor | None
    ) -> torch.Tensor:
        """``norm(x * scale)``, and with ``inputs [T, L, D]`` their scaled sum."""
        from sglang.srt.models.gemma4_causal import Gemma4TextModel

        return Gemma4TextModel.project_per_layer_inputs(  # type: ignore[no-any-return]
            model, x, inputs
        )

    # -- attention ----------------------------------------------------------------------------------

    def extend_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        k_buffer: torch.Tensor,
        v_buffer: torch.Tensor,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        longest: int,
        *,
        sm_scale: float,
        is_causal: bool = True,
        sliding_window_size: int = -1,
        custom_mask: torch.Tensor | None = None,
        mask_indptr: torch.Tensor | None = None,
        window_kv_offsets: torch.Tensor | None = None,
        skip_prefix_custom_mask: bool = True,
    ) -> torch.Tensor:
        """Attention of new tokens into ``out``, which is returned.

        Its arguments are those of `gemma4_turbo.kernels.attention.extend.extend_attention`, but q, k and v
        have to be contiguous.
        """
        _module(self.extend_kernel).extend_attention_fwd(
            q,
            k,
            v,
            out,
            k_buffer,
            v_buffer,
            qo_indptr,
            kv_indptr,
            kv_indices,
            custom_mask,
            is_causal,
            mask_indptr,
            longest,
            1.0,
            1.0,
            sm_scale,
            skip_prefix_custom_mask=skip_prefix_custom_mask,
            sliding_window_size=sliding_window_size,
            window_kv_offsets=window_kv_offsets,
        )
        return out

    def query_block(self, head_dim: int) -> int:
        """Rows of a block of queries on this GPU, which shows in what a custom mask lets them see."""
        return _query_block(self.extend_kernel, head_dim)

    def decode_attention(
        self,
        q: torch.Tensor,
        k_buffer: torch.Tensor,
        v_buffer: torch.Tensor,
        out: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        buffers: Pair,
        splits: torch.Tensor,
        sm_scale: float,
        use_pdl: bool = False,
    ) -> torch.Tensor:
        """Attention of a decode step into ``out``, which is returned, in two launches.

        Args:
            q: as the next five of `gemma4_turbo.kernels.attention.decode.decode_attention`.
            k_buffer: the pool's.
            v_buffer: the pool's.
            out: like q.
            kv_indptr: where a sequence's slots begin.
            kv_indices: the slots.
            buffers: fp32 between the launches: ``[rows, heads, splits, dim]`` and ``[rows, heads, splits]``.
            splits: int32 ``[rows]``, none above the buffers'.
            sm_scale: factor of the logits.
            use_pdl: with programmatic dependent launch.
        """
        _module(self.decode_kernel).decode_attention_fwd(
            q,
            k_buffer,
            v_buffer,
            out,
            kv_indptr,
            kv_indices,
            *buffers,
            splits,
            buffers[0].shape[2],
            sm_scale,
            1.0,
            1.0,
            use_pdl=use_pdl,
        )
        return out

    def store_kv(
        self, k: torch.Tensor, v: torch.Tensor, pool: Pair, locations: torch.Tensor
    ) -> None:
        """K and V ``[rows, heads, head_dim]`` into a layer's pool at ``locations``."""
        from sglang.srt.mem_cache import memory_pool

        memory_pool._set_kv_buffer_impl(
            k,
            v,
            *pool,
            locations,
            row_dim=k.shape[1] * k.shape[2],
            store_dtype=k.dtype,
            device_module=torch.cuda,
            **self.store_options(pool),
        )

    def store_options(self, pool: Pair) -> dict[str, Any]:
        """What a line's store is told beside that."""
        return {}

    # -- experts ------------------------------------------------------------------------------------

    @abstractmethod
    def routing(self, logits: torch.Tensor, scale: torch.Tensor, topk: int) -> Pair:
        """Weights, fp32 and each times its expert's ``scale [E]``, and int32 ids, of ``logits [T, E]``."""

    def experts_module(self) -> ModuleType:
        """The module of the fused experts, which calls everything below by names of its own."""
        return _module(f"{TRITON_UTILS}.fused_moe")

    def experts_tables(self) -> ModuleType:
        """The module that looks up their block sizes."""
        return _module(f"{TRITON_UTILS}.fused_moe_triton_config")

    def align(self, topk_ids: torch.Tensor, block_size: int, num_experts: int) -> Alignment:
        """Slots grouped by expert, in blocks."""
        return self.experts_module().moe_align_block_size(  # type: ignore[no-any-return]
            topk_ids, block_size, num_experts
        )

    def fused_experts(
        self,
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        factors: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """GELU experts of ``x [T, H]``, contiguous; its arguments are those of `gemma4_turbo.kernels.experts_few`."""
        from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        count = w13.shape[0]
        config = MoeRunnerConfig(
            num_experts=count, num_local_experts=count, activation="gelu", inplace=False
        )
        chosen = StandardTopKOutput(factors, ids, factors)  # the logits are not read
        return self.experts_module().fused_experts(  # type: ignore[no-any-return]
            x, w13, w2, chosen, config
        )

    def experts_kernel(self) -> ModuleType:
        """The module of the Triton kernel that the fused experts launch twice."""
        return _module(self.moe_kernel)


@cache
def _query_block(module: str, head_dim: int) -> int:
    sizes = _module(module)._get_block_sizes_for_extend_attention(head_dim, head_dim)
    return int(sizes[3])
