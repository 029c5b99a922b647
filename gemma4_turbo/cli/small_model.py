"""A small Gemma 4 text model of SGLang's own classes on the CPU, without a server."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from gemma4_turbo.cli.sglang_process import prepare_sglang

HIDDEN, EXPERTS, TOPK, WIDTH, VOCABULARY = 256, 128, 8, 32, 64


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


@contextlib.contextmanager
def constructing(dtype: torch.dtype) -> Iterator[None]:
    """Parameters of a model that is built meanwhile are of ``dtype``, its rotation that of a CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # SGLang takes a CPU for one of its own only with AMX, and otherwise wants vLLM's kernel.
        with patch("sglang.srt.layers.rotary_embedding.base._is_cpu", True):
            yield
    finally:
        torch.set_default_dtype(before)


def build(kind: str, layers: int = 2, uniform: bool = True) -> Any:
    """Random weights, bf16.

    Args:
        kind: ``moe`` as 26B-A4B, ``ple`` (per-layer embeddings) as E4B, or ``dense`` as 31B.
        layers: an even number, every other one with full attention.
        uniform: with `Uniform` attention, not SGLang's module.
    """
    from sglang.srt.models.gemma4_causal import Gemma4TextModel
    from transformers import Gemma4TextConfig

    prepare_sglang()
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "global_head_dim": 128,
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 256 if kind == "ple" else 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": kind == "moe",
        "num_experts": EXPERTS if kind == "moe" else None,
        "top_k_experts": TOPK if kind == "moe" else None,
        "moe_intermediate_size": WIDTH if kind == "moe" else None,
        "max_position_embeddings": 128,
    }
    config = Gemma4TextConfig(**shape)
    config.swa_head_dim = config.swa_v_head_dim = 128
    config.swa_num_key_value_heads = 1
    with constructing(torch.bfloat16):
        model = Gemma4TextModel(config)
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

            # SGLang's CPU experts know only SiLU; its native path, used under torch.compile, GELU.
            layer.moe.experts.quant_method._forward_method = fused_moe_forward_native
    return model


def prefill(**fields: Any) -> Any:
    """A batch of one prompt, as far as layers read it; what none reads is None."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    required = {
        field.name: None
        for field in dataclasses.fields(ForwardBatch)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    given: Any = {**required, "forward_mode": ForwardMode.EXTEND, "batch_size": 1, **fields}
    return ForwardBatch(**given)


def run(model: Any, tokens: int = 1, **fields: Any) -> torch.Tensor:
    """``[tokens, hidden]`` of one step.

    A program of the interpreter takes as long for every token: two are several.
    """
    for layer in model.layers:
        if isinstance(layer.self_attn.attn, Uniform):
            layer.self_attn.attn.seen.clear()
    ids, positions = torch.arange(tokens) % VOCABULARY, torch.arange(tokens)
    with torch.no_grad():
        result: torch.Tensor = model(ids, positions, prefill(**fields))
    return result
