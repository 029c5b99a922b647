"""SGLang's own Gemma 4 text model on the CPU, small, without a server: the same in every line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma4_turbo.cli.small_moe import prepare_sglang
from tests.cpu import forward_batch


class Uniform(torch.nn.Module):
    """Stands in for attention over a KV cache, which needs a GPU: each query head as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(
        self, q: Any, k: Any, v: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Any:
        self.seen.append((k, v, save_kv_cache))
        return q.flatten(1)


def build(kind: str, layers: int = 2, uniform: bool = True) -> Any:
    """``moe``, ``ple`` or ``dense``; ``uniform``: with `Uniform` attention, not SGLang's module."""
    from sglang.srt.models.gemma4_causal import Gemma4TextModel
    from transformers import Gemma4TextConfig

    prepare_sglang()
    config = Gemma4TextConfig(
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=layers,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        global_head_dim=128,
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=256 if kind == "ple" else 0,
        num_kv_shared_layers=0,
        enable_moe_block=kind == "moe",
        num_experts=128 if kind == "moe" else None,
        top_k_experts=8 if kind == "moe" else None,
        moe_intermediate_size=32 if kind == "moe" else None,
        max_position_embeddings=128,
    )
    config.swa_head_dim = config.swa_v_head_dim = 128
    config.swa_num_key_value_heads = 1
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # SGLang takes a CPU for one of its own only with AMX, and otherwise wants vLLM's kernel.
            patch.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)
            model = Gemma4TextModel(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        low = 0.5 if "norm" in name or "scale" in name else -0.1
        parameter.data.uniform_(low, low + 0.2 if low < 0 else 1.5, generator=generator)
    for layer in model.layers:
        layer.layer_scalar.fill_(0.75)
        if uniform:
            layer.self_attn.attn = Uniform()
        rope = layer.self_attn.rotary_emb
        rope.cos_sin_cache = rope.cos_sin_cache.float()  # as on a GPU
        if layer.enable_moe_block:
            from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native

            layer.moe.experts.quant_method._forward_method = fused_moe_forward_native
    return model


def run(model: Any, tokens: int = 1, **fields: Any) -> torch.Tensor:
    """One step. A program of the interpreter takes as long for every token: two are several."""
    for layer in model.layers:
        layer.self_attn.attn.seen.clear()
    return model(torch.arange(tokens) % 64, torch.arange(tokens), forward_batch.prefill(**fields))
