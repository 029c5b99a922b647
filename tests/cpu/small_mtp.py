"""A small Gemma 4 and its assistant from SGLang's own classes on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

WINDOW, HIDDEN, VOCAB, LAYERS, SHARED = 16, 32, 64, 6, 2


def text_config(layers: int = LAYERS, shared: int = SHARED, **changed: Any) -> Any:
    """Sliding and full layers in turn, the last ``shared`` of them without a KV cache."""
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **{
            "hidden_size": HIDDEN,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": WINDOW,
            "vocab_size": VOCAB,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": shared,
            "max_position_embeddings": 128,
            "enable_moe_block": False,
            "tie_word_embeddings": True,
            **changed,
        }
    )


def quantised_kv() -> Any:
    """A quantisation that, like any with an FP8 KV cache, gives attention scales; no other."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.radix_attention import RadixAttention

    class ScaledKV(QuantizationConfig):
        """Linear layers as they are, attention with scales."""

        get_name = get_min_capability = get_supported_act_dtypes = get_scaled_act_names = None
        get_config_filenames = from_config = None

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            if isinstance(layer, RadixAttention):
                return BaseKVCacheMethod(self)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    return ScaledKV()


@contextlib.contextmanager
def ready() -> Iterator[None]:
    """What the constructors need; the rotary embedding, which needs a GPU, is left out."""
    from sglang.srt.models import gemma4_causal

    from gemma4_turbo.cli.sglang_process import prepare_sglang

    prepare_sglang()
    with mock.patch.object(gemma4_causal, "get_rope", return_value=None):
        yield


def target(quant_config: Any = None, **changed: Any) -> Any:
    """A stock ``Gemma4ForCausalLM``."""
    from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM

    with ready():
        return Gemma4ForCausalLM(text_config(**changed), quant_config)


def assistant(quant_config: Any = None, **changed: Any) -> Any:
    """A stock ``Gemma4AssistantForCausalLM`` of two layers."""
    from sglang.srt.models.gemma4_mtp import Gemma4AssistantForCausalLM

    config = SimpleNamespace(
        text_config=text_config(2, 0, **changed),
        backbone_hidden_size=HIDDEN,
        use_ordered_embeddings=False,
    )
    with ready():
        return Gemma4AssistantForCausalLM(config, quant_config)


def attentions(model: Any) -> list[Any]:
    """The ``RadixAttention`` of each layer."""
    return [layer.self_attn.attn for layer in model.model.layers]


def load_scales(model: Any, scales: dict[int, tuple[float, float]]) -> None:
    """What SGLang's loader does with a checkpoint that has ``scales`` for some layers."""
    for index, attention in enumerate(attentions(model)):
        for name, value in zip(("k_scale", "v_scale"), scales.get(index, (-1, -1)), strict=True):
            getattr(attention, name).data.copy_(torch.tensor(float(value)))
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
