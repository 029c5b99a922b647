"""Small Gemma 4 text models with SGLang's own quantisation methods, their products computed on the CPU.

What a method registers on a layer is SGLang's doing; only the product, which needs a GPU's kernels, is
replaced: by that of a dense matrix that the layer's name and sizes decide. So a product that is left
out, done twice or done with another layer's weight shows in the numbers.
"""

from __future__ import annotations

import sys
import types
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

HIDDEN, INTERMEDIATE, HEAD, HEADS, EXPERTS = 256, 256, 128, 2, 128
KINDS = ("dense", "moe", "ple", "kv")
"""Dense, with experts, with per-layer embeddings, with a KV-shared layer."""

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
NVFP4 |= {"group_size": 16}


def _compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return _class("CompressedTensorsConfig").from_config(
        {"format": form, "ignore": [], "config_groups": {"group_0": group}}
    )


def _eight_bits(kind: str) -> Any:
    plain = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = {**plain, "strategy": "channel", "dynamic": False}
    form = "float-quantized" if kind == "float" else "int-quantized"
    return _compressed(form, weights, {**plain, "strategy": "token", "dynamic": True})


def _w4a16() -> Any:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return _compressed("pack-quantized", weights | {"group_size": 128, "dynamic": False}, None)


def _class(name: str) -> Any:
    from sglang.srt.layers import quantization

    return getattr(quantization, name)


CONFIGS: dict[str, Callable[[], Any]] = {
    # Without `weight`: qweight, weight_packed and the like.
    "awq": lambda: _class("AWQConfig").from_config(AWQ),
    "awq_marlin": lambda: _class("AWQMarlinConfig").from_config(AWQ),
    "gptq": lambda: _class("GPTQConfig").from_config(GPTQ),
    "gptq_marlin": lambda: _class("GPTQMarlinConfig").from_config(GPTQ),
    "auto_round": lambda: _class("AutoRoundConfig").from_config(
        {"bits": 4, "group_size": 128, "sym": True, "packing_format": "auto_round:auto_gptq"}
    ),
    "gguf": lambda: _class("GGUFConfig")(),
    "w4a16": _w4a16,
    "nvfp4": lambda: _compressed(
        "nvfp4-pack-quantized", NVFP4 | {"dynamic": False}, NVFP4 | {"dynamic": "local"}
    ),
    "qoq": lambda: _class("QoQConfig").from_config({"wbits": 4, "group_size": 128}),
    # With a `weight` that is no plain matrix: 8 bits, or packed into bytes.
    "modelopt_fp4": lambda: _class("ModelOptFp4Config")(True, None, 16, [], {}),
    "modelopt_fp8": lambda: _class("ModelOptFp8Config")(True, None, [], {}),
    "compressed_fp8": lambda: _eight_bits("float"),
    "compressed_int8": lambda: _eight_bits("int"),
    "bitsandbytes": lambda: _class("BitsAndBytesConfig").from_config({"load_in_4bit": True}),
    "w8a8_int8": lambda: _class("W8A8Int8Config").from_config({}),
    "w8a8_fp8": lambda: _class("W8A8Fp8Config")(True),
    "fp8": lambda: _class("Fp8Config")(is_checkpoint_fp8_serialized=True),
    "fp8_blocks": lambda: _class("Fp8Config")(
        is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128]
    ),
    "fbgemm_fp8": lambda: _class("FBGEMMFp8Config")([], 100.0),
    "int8_blocks": lambda: _class("BlockInt8Config")(True, "dynamic", None, [128, 128]),
    # A bf16 `weight` until the loader has quantised it.
    "fp8_online": lambda: _class("Fp8Config")(),
}
WITHOUT_WEIGHT = list(CONFIGS)[: list(CONFIGS).index("modelopt_fp4")]


def awq_without(*names: str) -> Any:
    """AWQ for all linear layers but those whose name holds one of these."""
    return _class("AWQConfig").from_config({**AWQ, "modules_to_not_convert": list(names)})


def pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    """What the configurations ask of the machine before they register a parameter.

    A GPU of compute capability 10.0, which all of them support, and bitsandbytes, which is not
    installed: its linear method asks for the version only.
    """
    capability = (10, 0)
    patch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    _class("AWQConfig")
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.srt.layers.quantization."):
            if hasattr(module, "get_device_capability"):
                patch.setattr(module, "get_device_capability", lambda *device: capability)
            if hasattr(module, "is_blackwell_supported"):
                patch.setattr(module, "is_blackwell_supported", lambda *device: True)
    library = types.ModuleType("bitsandbytes")
    library.__dict__.update(__version__="0.46.1", nn=types.ModuleType("bitsandbytes.nn"))
    library.nn.__dict__.update(Int8Params=torch.nn.Parameter)
    patch.setitem(sys.modules, "bitsandbytes", library)
    patch.setitem(sys.modules, "bitsandbytes.nn", library.nn)


class Attention(torch.nn.Module):
    """Stands in for attention over a KV cache: every head of Q, K and V shows in the result."""

    def forward(self, q, k, v, forward_batch, save_kv_cache=True):
        out = q.flatten(1)
        if k is None:
            return out
        return out + (k.flatten(1) + v.flatten(1).flip(1)).repeat(1, HEADS)


class Small:
    """A model, and the linear layers whose product was computed here, in order."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[str] = []

    def run(self) -> torch.Tensor:
        """One prefill step of one token: a product's rows know nothing of each other."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        self.calls.clear()
        ids, places, one = torch.tensor([5]), torch.tensor([3]), torch.tensor([1])
        batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=ids,
            req_pool_indices=one,
            seq_lens=one,
            out_cache_loc=one,
            seq_lens_sum=1,
            positions=places,
        )
        return self.model(ids, places, batch)


def build(
    kind: str,
    quantisation: Callable[[], Any] | None,
    change: Callable[[Any], None] | None,
    patch: pytest.MonkeyPatch,
) -> Small:
    """A model of a kind, always with the same numbers.

    Args:
        kind: of `KINDS`.
        quantisation: makes SGLang's configuration; None: the model is not quantised.
        change: what is done to the model before it runs.
        patch: takes back the replaced products.
    """
    from sglang.srt.models.gemma4_causal import Gemma4TextModel

    from gemma4_turbo.cli import sglang_process

    sglang_process.prepare_sglang()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.MonkeyPatch.context() as meanwhile:
            # SGLang takes a CPU for one of its own only with AMX, and otherwise wants vLLM's kernel.
            meanwhile.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)
            pretend_gpu(meanwhile)
            config = None if quantisation is None else quantisation()
            small = Small(Gemma4TextModel(_config(kind), quant_config=config))
    finally:
        torch.set_default_dtype(before)
    _fill(small.model)
    _replace_products(small, patch)
    if change is not None:
        change(small.model)
    return small


def _config(kind: str) -> Any:
    from transformers import Gemma4TextConfig

    moe, shared = kind == "moe", kind == "kv"
    config = Gemma4TextConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD,
        global_head_dim=HEAD,
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=256 if kind == "ple" else 0,
        num_kv_shared_layers=1 if shared else 0,
        enable_moe_block=moe,
        num_experts=EXPERTS if moe else None,
        top_k_experts=8 if moe else None,
        moe_intermediate_size=128 if moe else None,
        max_position_embeddings=128,
    )
    if (
        shared
    ):  # with a layer of its own type; the configuration wants the last one to be a full one
        config.layer_types = ["full_attention", "full_attention"]
    config.swa_head_dim = config.swa_v_head_dim = HEAD
    config.swa_num_key_value_heads = 1
    return config


def drawn(name: str, *shape: int) -> torch.Tensor:
    """Numbers that the name and the sizes decide, as large as a weight's."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(shape, generator=generator) * 0.2 - 0.1).bfloat16()


def _fill(model: Any) -> None:
    for name, parameter in model.named_parameters():
        plain = type(parameter) is torch.nn.Parameter and parameter.dtype == torch.bfloat16
        if not plain or ".experts." in name:
            continue
        values = drawn(name, *parameter.shape)
        parameter.data.copy_(values * 5 + 1 if "norm" in name or "scale" in name else values)
    for layer in model.layers:
        layer.layer_scalar.fill_(0.75)
        layer.self_attn.attn = Attention()
        rope = layer.self_attn.rotary_emb
        rope.cos_sin_cache = rope.cos_sin_cache.float()  # as on a GPU


def _replace_products(small: Small, patch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    names = {id(module): name for name, module in small.model.named_modules()}

    def product(self: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        assert bias is None
        name = names[id(layer)]
        small.calls.append(name)
        return torch.nn.functional.linear(x, drawn(name, layer.output_size, layer.input_size))

    def experts(self: Any, layer: Any, dispatch_output: Any) -> Any:
        x, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
        name = names[id(layer)]
        small.calls.append(name)
        gains = 10 * drawn(name, EXPERTS).float()[chosen.topk_ids.long()] * chosen.topk_weights
        out = torch.nn.functional.linear(x, drawn(name, HIDDEN, HIDDEN)) * gains.sum(1, True)
        return StandardCombineInput(hidden_states=out.to(x.dtype))

    for module in small.model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, LinearBase) and type(method) is not UnquantizedLinearMethod:
            patch.setattr(type(method), "apply", product)
        elif isinstance(module, FusedMoE):
            patch.setattr(type(method), "apply", experts)
