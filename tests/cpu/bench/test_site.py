"""bench/site: what random weights become before an engine runs with them."""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.cpu.conftest import REPOSITORY

FP8 = torch.float8_e4m3fn


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.delenv("BENCH_PATCHED", raising=False)
    for name in ("BENCH_UNIT_NORMS", "BENCH_AGREEING", "BENCH_CHECKPOINT", "BENCH_KV_SCALES"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(REPOSITORY / "bench" / "site" / "sitecustomize.py"))


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def test_scales_are_one(site: dict[str, Any]):
    """Drawn numbers in quantised weights, none in their scales nor in those of a KV cache."""
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.k_scale, model.attn.v_scale = (
        parameter(torch.tensor(-1.0)),
        parameter(torch.ones(())),
    )
    model.mlp = nn.Module()
    model.mlp.weight = parameter(torch.zeros(4, 8).to(FP8))
    model.mlp.weight_scale = parameter(torch.ones(1, 4))
    model.w13_weight_scale = parameter(torch.ones(2))
    model.layer_scalar = parameter(torch.ones(1))

    def draw(model: nn.Module, low: float, high: float) -> None:
        for tensor in model.state_dict().values():
            tensor.copy_(torch.full(tensor.shape, low))

    loader = SimpleNamespace(initialize_dummy_weights=draw)
    site["_widen"](loader)
    loader.initialize_dummy_weights(model)
    found = {
        name: set(tensor.float().flatten().tolist()) for name, tensor in model.state_dict().items()
    }
    drawn = float(torch.tensor(-0.03).to(FP8))
    scales = ("attn.k_scale", "attn.v_scale", "mlp.weight_scale", "w13_weight_scale")
    assert found == {
        **{name: {1.0} for name in scales},
        "mlp.weight": {drawn},
        "layer_scalar": {float(torch.tensor(-0.03))},
    }


class Attention(nn.Module):
    """As much of a layer's as the scales need."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.is_kv_shared_layer = shared
        self.attn = nn.Module()
        self.attn.k_scale = self.attn.v_scale = self.attn.k_scale_float = None


def test_scales_of_a_kv_cache(site: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Of owners; readers have 1, as where a checkpoint has no scale for them; an assistant has none."""
    monkeypatch.setenv("BENCH_KV_SCALES", "0.5:0.25")
    target, assistant = (
        nn.Sequential(nn.Linear(1, 1), Attention(False), Attention(True)) for _ in range(2)
    )
    assistant.backbone_hidden_size = 8
    loader = SimpleNamespace(initialize_dummy_weights=lambda model, low, high: None)
    site["_widen"](loader)
    for model in (target, assistant):
        loader.initialize_dummy_weights(model)
    found = [
        (attention.attn.k_scale.item(), attention.attn.k_scale_float, attention.attn.v_scale.item())
        for attention in target[1:]
    ]
    assert found == [(0.5, 0.5, 0.25), (1, 1, 1)]
    assert isinstance(target[1].attn.k_scale, nn.Parameter)
    assert all(attention.attn.k_scale is None for attention in assistant[1:])


@pytest.mark.parametrize("quantised", [False, True])
def test_values_share_the_weight_of_keys(site: dict[str, Any], quantised: bool):
    """[out, in], and [in, out] where a release quantises before it draws; 16 queries, 4 keys."""
    rows = torch.arange(24.0)[:, None].expand(24, 6).contiguous()
    weight = rows.to(FP8).t() if quantised else rows
    attention = SimpleNamespace(
        config=SimpleNamespace(attention_k_eq_v=True),
        qkv_proj=SimpleNamespace(weight=parameter(weight)),
        q_size=16,
        kv_size=4,
        is_kv_shared_layer=False,
    )
    site["_tie_values_to_keys"](attention)
    found = (weight.t() if quantised else weight).float()[:, 0].tolist()
    assert found == [
        float(torch.tensor(i).float().to(FP8) if quantised else i)
        for i in [*range(20), 16, 17, 18, 19]
    ]
