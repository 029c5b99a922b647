"""Stock's calls as the installed line makes them, with stand-ins for kernels that need a GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.ports.any import stock as shared


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> tuple[shared.Calls, list[Any]]:
    """The line's, and what a stand-in of its two modules of kernels and of the experts' was called with."""
    seen: list[Any] = []
    module = SimpleNamespace(
        **{
            name: lambda *args, name=name, **options: seen.append((name, args, options)) or name
            for name in (
                "extend_attention_fwd",
                "decode_attention_fwd",
                "moe_align_block_size",
                "fused_experts",
            )
        }
    )
    monkeypatch.setattr(shared, "_module", lambda name: module)
    return lines.stock(), seen


def test_attention_of_new_tokens(calls):
    stock, seen = calls
    tensors = [torch.empty(n) for n in range(9)]
    options = {"sliding_window_size": 7, "window_kv_offsets": None, "skip_prefix_custom_mask": True}
    assert stock.extend_attention(*tensors, 5, sm_scale=0.5, sliding_window_size=7) is tensors[3]
    ((name, args, given),) = seen
    assert name == "extend_attention_fwd"
    assert all(a is b for a, b in zip(args, tensors, strict=False))
    assert args[9:] == (None, True, None, 5, 1.0, 1.0, 0.5)
    assert given == options


def test_attention_of_a_decode_step(calls):
    """The number of splits is that of the buffers."""
    stock, seen = calls
    tensors = [torch.empty(n) for n in range(6)]
    buffers, splits = (torch.empty(2, 3, 8, 4), torch.empty(2, 3, 8)), torch.ones(2)
    assert stock.decode_attention(*tensors, buffers, splits, 0.5, True) is tensors[3]
    ((_, args, given),) = seen
    assert all(a is b for a, b in zip(args, (*tensors, *buffers, splits), strict=False))
    assert args[9:] == (8, 0.5, 1.0, 1.0)
    assert given == {"use_pdl": True}


def test_experts(calls):
    """As many as there are weights, GELU, out of place, all of them here."""
    stock, seen = calls
    x, w13, w2 = torch.empty(2, 4), torch.empty(3, 8, 4), torch.empty(3, 4, 4)
    factors, ids = torch.ones(2, 2), torch.zeros(2, 2).int()
    assert stock.fused_experts(x, w13, w2, factors, ids) == "fused_experts"
    assert stock.align(ids, 16, 3) == "moe_align_block_size"
    (_, (*given, chosen, config), _), (_, aligned, _) = seen
    assert all(a is b for a, b in zip(given, (x, w13, w2), strict=True))
    assert chosen.topk_weights is factors
    assert chosen.topk_ids is ids
    assert (config.num_experts, config.num_local_experts, config.activation) == (3, 3, "gelu")
    assert not config.inplace
    assert aligned == (ids, 16, 3)


def test_routing():
    """Softmax over the chosen, each times its expert's scale."""
    if lines.package().endswith("v0_5_23"):
        pytest.skip("this line's routing is a Triton kernel, which `router_few` is compared with")
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
    weights, ids = lines.stock().routing(logits, scale, 2)
    assert ids.tolist() == [[1, 2]]
    expected = torch.tensor([[3.0, 2.0]]).softmax(-1) * torch.tensor([[2.0, 4.0]])
    torch.testing.assert_close(weights, expected)


def test_its_modules_are_there():
    """Of every kernel that the line names."""
    stock = lines.stock()
    assert stock.experts_kernel().invoke_fused_moe_kernel
    assert stock.experts_module().fused_experts
    assert stock.experts_tables().get_moe_configs
    for name, function in (
        (stock.extend_kernel, "extend_attention_fwd"),
        (stock.decode_kernel, "decode_attention_fwd"),
    ):
        assert hasattr(shared._module(name), function)


@pytest.mark.parametrize(("cuda", "cute"), [(False, True), (True, False), (None, False)])
def test_what_flashinfer_says_of_its_norms(monkeypatch, cuda, cute):
    module: Any = None
    if cuda is not None:
        module = ModuleType("flashinfer.norm")
        module._USE_CUDA_NORM = cuda
    monkeypatch.setitem(sys.modules, "flashinfer.norm", module)
    assert lines.stock().norms_are_cute() is cute


def test_a_text_model_has_what_is_asked_for():
    """One part without the other."""
    table, weight = torch.randn(5, 8), torch.ones(4)
    embedding = shared.Embedding(table, 2.0, 4)
    model = shared.text_model(2, 4, embedding, None)
    assert not hasattr(model, "per_layer_projection_norm")
    found = lines.stock().per_layer_inputs(model, torch.tensor([3, 0]))
    torch.testing.assert_close(found, (table[[3, 0]] * 2.0).view(2, 2, 4))
    projection = shared.Projection(torch.tensor(0.5), weight, 1e-6, torch.tensor(2.0))
    model = shared.text_model(2, 4, None, projection)
    assert not hasattr(model, "embed_tokens_per_layer")
    assert model.per_layer_projection_norm.weight.data_ptr() == weight.data_ptr()
    assert model.per_layer_model_projection(3) == (3, None)
