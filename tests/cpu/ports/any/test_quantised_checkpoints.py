"""Checkpoints of `bench.quantise_small` through stock's real loader: which weights it takes, and as what.

Products of quantised weights need a GPU's kernels. In their place stands the plain product of what the
loader has put into a layer: so a scale of another row or a number in another place shows in the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch

from bench import quantise_small
from bench.models import compressed, small_models
from bench.models.compressed import Scheme
from gemma4_turbo.cli import lines
from tests.cpu.ports.any import test_small_checkpoints as small
from tests.cpu.quantised import pretend_gpu

# The models differ in experts, K = V, shared KV and per-layer embeddings; the formats in all they write.
# Groups of 128 divide the hidden size, and not the MLP: W4A16 has both kinds of scales.
CASES = [(kind, scheme) for kind in small.SIZES for scheme in Scheme]


class Loaded(NamedTuple):
    """A quantised folder, the bf16 weights it was made of, and the folder's model in both."""

    scheme: Scheme
    size: small_models.Size
    before: compressed.Tensors
    file: compressed.Tensors
    stock: Any
    theirs: Any


def linear(self: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """A product with what a layer holds, in place of stock's kernels."""
    assert bias is None
    return torch.nn.functional.linear(x, held(layer))


def held(layer: Any) -> torch.Tensor:
    """The matrix ``[out, in]`` that stock's loader has put into a linear layer; quantised ones in fp32."""
    if hasattr(layer, "weight_packed"):
        scale = layer.weight_scale.data
        numbers = compressed.unpack(layer.weight_packed.data).float()
        return (numbers.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    if layer.weight.dtype == torch.float8_e4m3fn:  # stock turns it for its kernel
        return layer.weight.t().float() * layer.weight_scale
    return layer.weight


def dense_experts(experts: Any) -> None:
    """FP8 experts as dense ones, which SGLang's experts in plain torch take."""
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native

    for name in ("w13_weight", "w2_weight"):
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale")
        dense = weight.float() * scale
        setattr(experts, name, torch.nn.Parameter(dense, requires_grad=False))

    def apply(self: Any, layer: Any, dispatch_output: Any) -> Any:
        return fused_moe_forward_native(layer, dispatch_output)

    experts.quant_method.apply = MethodType(apply, experts.quant_method)


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def loaded(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """One of the checkpoints."""
    from safetensors.torch import load_file

    kind, scheme = request.param
    size = small.SIZES[kind]
    folder = tmp_path_factory.mktemp("plain") / kind
    fields = small_models.published(size)
    model = small_models.build(fields, "eager")
    small_models.initialise(model, 1)
    small.random_weights(model)
    small_models.save(folder, model, fields, {"model": kind})
    out = quantise_small.write(folder, scheme)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        pretend_gpu(patch)
        if lines.router_scale_is_folded():
            from tests.cpu.ports.v0_5_23.models import norms_as_on_a_gpu

            norms_as_on_a_gpu(patch)
        from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsConfig,
            CompressedTensorsLinearMethod,
        )
        from sglang.srt.layers.quantization.compressed_tensors.schemes import (
            CompressedTensorsWNA16,
        )

        # Repacks for Marlin, on a GPU alone.
        patch.setattr(CompressedTensorsWNA16, "process_weights_after_loading", lambda *given: None)
        patch.setattr(CompressedTensorsLinearMethod, "apply", linear)
        # fp32, which its kernels have not, shows a wrong weight that bf16 would hide.
        patch.setattr(CompressedTensorsConfig, "get_supported_act_dtypes", lambda *_: [torch.float])
        stock, _ = small.stock_model(out, patch)
        yield Loaded(
            scheme,
            size,
            load_file(folder / small_models.WEIGHTS),
            load_file(out / small_models.WEIGHTS),
            stock,
            small_models.load(out, torch.float32, "cpu", "eager"),
        )


def test_weights_of_stock_are_those_of_the_file(loaded: Loaded):
    plain = compressed.plain(loaded.file)
    first_shared = len(loaded.size.kinds) - loaded.size.shared
    for index, layer in enumerate(loaded.stock.model.layers):
        name = f"model.layers.{index}."
        # Layers that share KV have K and V in the file, but read another layer's.
        letters = "q" if index >= first_shared else "qkv"
        same = {"v": "k"} if loaded.size.k_eq_v and loaded.size.kinds[index] == "f" else {}
        rows = [plain[f"{name}self_attn.{same.get(x, x)}_proj.weight"].float() for x in letters]
        both = torch.cat([plain[f"{name}mlp.{x}_proj.weight"].float() for x in ("gate", "up")])
        joined = torch.cat(rows)
        torch.testing.assert_close(held(layer.self_attn.qkv_proj)[: len(joined)], joined)
        torch.testing.assert_close(held(layer.mlp.gate_up_proj), both)
        for ours, theirs in (
            (layer.self_attn.o_proj, "self_attn.o_proj.weight"),
            (layer.mlp.down_proj, "mlp.down_proj.weight"),
        ):
            assert ours.weight_scale.shape[0] == ours.output_size
            torch.testing.assert_close(held(ours), plain[name + theirs].float())


def test_what_is_quantised(loaded: Loaded):
    """In the file and in stock's modules: attention, MLP, and experts in FP8; nothing else."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    kinds = {
        name: type(module.quant_method).__name__
        for name, module in loaded.stock.named_modules()
        if isinstance(module, LinearBase)
    }
    for name, kind in kinds.items():
        wanted = ".self_attn." in name or ".mlp." in name
        assert (kind != UnquantizedLinearMethod.__name__) == wanted, name
    assert any("per_layer" in name for name in kinds) == bool(loaded.size.per_layer)
    assert any("router" in name for name in kinds) == bool(loaded.size.experts)
    if loaded.size.experts:
        method = loaded.stock.model.layers[0].moe.experts.quant_method
        assert (type(method).__name__ == "CompressedTensorsFusedMoEMethod") == (
            loaded.scheme == Scheme.FP8
        )
    plain = compressed.plain(loaded.file)
    assert set(plain) == set(loaded.before)
    assert {
        name
        for name, tensor in loaded.before.items()
        if not torch.equal(plain[name].float(), tensor.float())
    } == {
        name
        for name in loaded.before
        if compressed.LINEAR.fullmatch(name)
        or (loaded.scheme == Scheme.FP8 and compressed.EXPERTS.fullmatch(name))
    }


def test_experts_of_stock_are_those_of_the_file(loaded: Loaded):
    if not loaded.size.experts:
        pytest.skip("has no experts")
    plain = compressed.plain(loaded.file)
    for index, layer in enumerate(loaded.stock.model.layers):
        experts = layer.moe.experts
        for ours, theirs in (("w13_weight", "gate_up_proj"), ("w2_weight", "down_proj")):
            weight = getattr(experts, ours)
            assert (weight.dtype == torch.float8_e4m3fn) == (loaded.scheme == Scheme.FP8)
            if loaded.scheme == Scheme.FP8:
                weight = weight.float() * getattr(experts, f"{ours}_scale")
            wanted = plain[f"model.layers.{index}.experts.{theirs}"]
            torch.testing.assert_close(weight, wanted.float())


def test_logits_are_those_of_transformers_on_the_dequantised_weights(loaded: Loaded):
    """Last: this changes the experts. The quantised model is another one than that in bf16."""
    if loaded.size.experts and loaded.scheme == Scheme.FP8:
        for layer in loaded.stock.model.layers:
            dense_experts(layer.moe.experts)
    ours = small.stock_logits(
        small.Loaded(loaded.size, Path(), loaded.stock, set(), None), small.IDS
    )
    with small.with_stocks_gelu(loaded.theirs):
        theirs = small_models.logits(loaded.theirs, small.IDS[None])[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    loaded.theirs.load_state_dict(
        loaded.before | {"lm_head.weight": loaded.before["model.embed_tokens.weight"]}
    )
    with small.with_stocks_gelu(loaded.theirs):
        before = small_models.logits(loaded.theirs, small.IDS[None])[0]
    assert (ours - before).abs().max() > 1e-2


def test_packing_is_that_of_the_library():
    from compressed_tensors.compressors.pack_quantized import helpers

    numbers = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(1))
    packed = compressed.pack(numbers.to(torch.int8))
    assert torch.equal(packed, helpers.pack_to_int32(numbers.to(torch.int8), 4))
    assert torch.equal(compressed.unpack(packed), numbers.to(torch.int8))
