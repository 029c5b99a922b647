"""Small checkpoints of trained models' structure through stock's real loader, against transformers.

What random weights of ``--load-format dummy`` never meet: K projections that are V's as well, the router's
scale, the experts' names, tied embeddings, layers without K and V of their own, a layer's scalar.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bench.models import small_models, small_tasks
from gemma4_turbo.cli import lines
from gemma4_turbo.cli.sglang_process import prepare_sglang
from tests.cpu import forward_batch

TOKENS = 40  # several windows
SIZES = {
    "moe": small_models.Size(
        256, 64, "sfsf", 4, 2, 1, window=8, experts=16, expert_width=32, topk=4, k_eq_v=True
    ),
    "ple": small_models.Size(256, 64, "ssfssf", 2, 1, 1, window=8, per_layer=64, shared=3),
}
"""Layers, K = V, sharing and head sizes as in the models that are trained; the rest small."""


class Loaded(NamedTuple):
    """A checkpoint folder and its model in stock and in transformers."""

    size: small_models.Size
    folder: Path
    stock: Any
    named: set[str]  # what `load_weights` says that it loaded
    theirs: Any


def random_weights(model: Any) -> None:
    """Nothing is one or zero, which a loader could leave out unseen."""
    generator = torch.Generator().manual_seed(3)
    for tensor in model.parameters():
        if tensor.dim() == 1:
            tensor.data.mul_(0.5 + torch.rand(tensor.shape, generator=generator))


def stock_model(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Any, set[str]]:
    """By SGLang's own loader from the files; and what `load_weights` says that it loaded."""
    from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM

    return by_stock(Gemma4ForCausalLM, folder, patch)


def by_stock(
    kind: Any, folder: Path, patch: pytest.MonkeyPatch, **of_config: Any
) -> tuple[Any, set[str]]:
    """As `stock_model`, of this class and with these fields of SGLang's ``ModelConfig``."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import get_model_loader

    prepare_sglang()
    # SGLang takes a CPU for one of its own only with AMX, and otherwise wants vLLM's kernel.
    patch.setattr("sglang.srt.layers.rotary_embedding.base._is_cpu", True)
    named: set[str] = set()
    load_weights = kind.load_weights

    def heard(self: Any, weights: Any) -> Any:
        named.update(load_weights(self, weights))
        return named

    patch.setattr(kind, "load_weights", heard)
    config = ModelConfig(str(folder), dtype="float32", **of_config)
    loader = get_model_loader(LoadConfig(), config)
    return loader.load_model(model_config=config, device_config=DeviceConfig("cpu")), named


@pytest.fixture(scope="module", params=SIZES)
def loaded(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """One of the checkpoints."""
    size = SIZES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    fields = small_models.published(size)
    model = small_models.build(fields, "eager")
    small_models.initialise(model, 1)
    random_weights(model)
    small_models.save(folder, model, fields, {})
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if lines.router_scale_is_folded():
            from tests.cpu.ports.v0_5_23.models import norms_as_on_a_gpu

            norms_as_on_a_gpu(patch)
        stock, named = stock_model(folder, patch)
        yield Loaded(
            size, folder, stock, named, small_models.load(folder, torch.float32, "cpu", "eager")
        )


class Causal(torch.nn.Module):
    """Stands in for attention over a KV cache, which needs a GPU; layers share ``kept`` as a pool."""

    def __init__(self, window: int | None, owner: int, kept: dict[int, Any]) -> None:
        super().__init__()
        self.window, self.owner, self.kept = window, owner, kept

    def forward(
        self, q: Any, k: Any, v: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if save_kv_cache:
            self.kept[self.owner] = (k, v)
        k, v = self.kept[self.owner]
        group = q.shape[1] // k.shape[1]
        k, v = (part.view(len(q), -1, q.shape[2]).repeat_interleave(group, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k)
        at = torch.arange(len(q))
        behind = at[:, None] - at
        seen = (behind >= 0) & (behind < (self.window or len(q)))
        scores = scores.masked_fill(~seen, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def stock_logits(loaded: Loaded, ids: torch.Tensor) -> torch.Tensor:
    """Stock's forward over a prompt; its head as the logits processor applies it."""
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native

    model, kept = loaded.stock, {}
    for index, (layer, kind) in enumerate(zip(model.model.layers, loaded.size.kinds, strict=True)):
        attention = layer.self_attn
        owner = attention.attn.layer_id if hasattr(attention.attn, "layer_id") else index
        attention.attn = Causal(loaded.size.window if kind == "s" else None, owner, kept)
        attention.attn.layer_id = owner
        if loaded.size.experts:
            # SGLang's experts for a CPU know only SiLU.
            layer.moe.experts.quant_method._forward_method = fused_moe_forward_native
    hidden = model.model(ids, torch.arange(len(ids)), forward_batch.prefill())
    cap = model.logits_processor.final_logit_softcapping
    return torch.tanh(hidden @ model.lm_head.weight.T / cap) * cap


@contextlib.contextmanager
def with_stocks_gelu(model: Any) -> Iterator[None]:
    """Transformers' experts with GELU by the error function, which stock's have; see the test of it."""
    theirs = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    kept = {name: module.act_fn for name, module in theirs.items()}
    for module in theirs.values():
        module.act_fn = torch.nn.GELU()
    yield
    for name, module in theirs.items():
        module.act_fn = kept[name]


def file(loaded: Loaded) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(loaded.folder / small_models.WEIGHTS)


IDS = torch.randint(4, 260, (TOKENS,), generator=torch.Generator().manual_seed(2))


def test_logits_are_those_of_transformers(loaded: Loaded):
    ours = stock_logits(loaded, IDS)
    with with_stocks_gelu(loaded.theirs):
        theirs = small_models.logits(loaded.theirs, IDS[None])[0]
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_stocks_experts_have_another_gelu_than_the_model(loaded: Loaded):
    """By the error function, where the config says tanh. Where this fails stock has changed that."""
    if not loaded.size.experts:
        pytest.skip("has no experts")
    theirs = small_models.logits(loaded.theirs, IDS[None])[0]
    far = (stock_logits(loaded, IDS) - theirs).abs().max().item()
    assert 2e-4 < far < 2e-2


def test_every_weight_of_stock_is_in_the_folder(loaded: Loaded):
    missing = {name for name, _ in loaded.stock.named_parameters()} - loaded.named
    first_shared = len(loaded.size.kinds) - loaded.size.shared
    allowed = {  # read another layer's K, which has its norm behind it
        f"model.layers.{i}.self_attn.k_norm.weight"
        for i in range(first_shared, len(loaded.size.kinds))
    }
    # Norms without a weight of their own have ones.
    assert {name for name in missing if "v_norm" not in name and "router.norm" not in name} == (
        allowed if loaded.size.shared else set()
    )


def test_full_layers_have_the_rows_of_k_as_v(loaded: Loaded):
    tensors = file(loaded)
    for index, kind in enumerate(loaded.size.kinds):
        attention = loaded.stock.model.layers[index].self_attn
        if attention.is_kv_shared_layer:
            continue
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        rows = dict(zip("qkv", attention.qkv_proj.weight.split(sizes), strict=True))
        for letter, part in rows.items():
            same = "k" if letter == "v" and kind == "f" and loaded.size.k_eq_v else letter
            written = tensors[f"model.layers.{index}.self_attn.{same}_proj.weight"].float()
            assert torch.equal(part, written), (index, letter)


def test_embeddings_are_tied(loaded: Loaded):
    tensors = file(loaded)
    assert "lm_head.weight" not in tensors
    assert torch.equal(loaded.stock.lm_head.weight, tensors["model.embed_tokens.weight"].float())


def test_router_and_experts(loaded: Loaded):
    if not loaded.size.experts:
        pytest.skip("has no experts")
    tensors = file(loaded)
    for index, layer in enumerate(loaded.stock.model.layers):
        name = f"model.layers.{index}."
        for ours, theirs in (
            (layer.router.scale, "router.scale"),
            (layer.moe.per_expert_scale, "router.per_expert_scale"),
            (layer.moe.experts.w13_weight, "experts.gate_up_proj"),
            (layer.moe.experts.w2_weight, "experts.down_proj"),
            (layer.layer_scalar, "layer_scalar"),
        ):
            assert torch.equal(ours, tensors[name + theirs].float()), theirs


def test_the_config_says_the_same_to_both(loaded: Loaded):
    config = json.loads((loaded.folder / "config.json").read_text())
    assert small_models.unrenamed(config) == small_models.published(loaded.size)
    assert config["vocab_size"] == small_tasks.VOCABULARY
