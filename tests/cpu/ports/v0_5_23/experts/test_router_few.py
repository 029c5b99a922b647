"""`router_few` in SGLang's real layers, on the CPU through Triton's interpreter.

Without a GPU stock's routing function does not call the function that is replaced: it is called here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli.sglang_process import prepare_sglang
from gemma4_turbo.engine import states
from gemma4_turbo.fusions.site import UNPROVEN, eager_site_of
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import router_few as kernel
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.ports.any.experts import router_few as patch
from tests.cpu.ports.counted import counted
from tests.cpu.ports.v0_5_23 import models

NAME = "router_few"
STOCK = "stock's"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with models.stock(tmp_path):
        prepare_sglang()
        import sglang.kernels.ops.moe.gemma4_routing as module
        import sglang.srt.models.gemma4_causal  # noqa: F401

        ENGINE.apply(only=[NAME, "layer_norms", "qkv_norm"])
        assert ENGINE.runs[NAME].state == states.ACTIVE, ENGINE.runs[NAME].reason
        assert module.gemma4_fused_routing.__wrapped__.__name__ == "gemma4_fused_routing"
        yield
    patch._slot[0] = None


@pytest.fixture
def model(on: None) -> Any:
    """Of its own for each test: norms keep the function of their first call."""
    return models.build("moe")


@pytest.fixture
def layer(model: Any) -> Any:
    return model.layers[0]


def site_of(layer: Any) -> Any:
    return eager_site_of(layer.router, patch.RouterSite, layer)


def rows(tokens: int = 2) -> torch.Tensor:
    return torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16()


def asked(logits: torch.Tensor, scale: torch.Tensor, topk: int = 8) -> Any:
    """As stock's routing function does, with logits on a GPU."""
    return sys.modules["sglang.srt.models.gemma4_causal"].gemma4_fused_routing(logits, scale, topk)


@pytest.fixture
def stocks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits that reach stock's kernel."""
    import sglang.kernels.ops.moe.gemma4_routing as module

    calls: list[torch.Tensor] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda logits, *args, **kwargs: calls.append(logits)

    monkeypatch.setattr(module, "_gemma4_routing_kernel", Kernel())
    return calls


def test_each_layer_routes_in_the_launch_of_its_product(model: Any):
    before = counted(NAME)
    found = models.run(model)
    assert counted(NAME) == before.and_(engaged=2)
    ENGINE.revert()
    expected = models.run(model)
    assert (found.float() - expected.float()).abs().max() < 0.06 * expected.float().abs().max()


def test_who_asks_for_the_very_logits_gets_what_the_launch_has_found(layer: Any, stocks: Any):
    x, scale = rows(), layer.moe.per_expert_scale
    logits = patch.logits(layer, x)
    weights, ids = asked(logits, scale)
    expected, expected_ids = kernel.reference_routing(logits, scale.data, 8)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    assert stocks == []
    # Once more, as where the experts run a second time: they may have written to the first ones.
    asked(logits, scale)
    assert len(stocks) == 1


def test_whoever_asks_for_anything_else_gets_stocks(layer: Any, stocks: Any):
    scale = layer.moe.per_expert_scale
    logits = patch.logits(layer, rows())
    asked(logits.clone(), scale)
    asked(logits, scale.clone())
    asked(logits, scale, 4)
    assert len(stocks) == 3
    patch.done(layer, rows())
    asked(logits, scale)  # the layer has ended
    assert len(stocks) == 4


def test_the_newest_launch_alone_is_handed_on(model: Any, layer: Any, stocks: Any):
    first = patch.logits(layer, rows())
    other = model.layers[1]
    patch.logits(other, rows())
    asked(first, layer.moe.per_expert_scale)
    assert len(stocks) == 1


@pytest.mark.parametrize(
    "part", ["router", "router.proj", "moe", "moe.topk"], ids=lambda part: part.replace(".", "-")
)
def test_hooks_are_seen(layer: Any, part: str):
    """Whoever hooks a part may change what goes through it: stock's calls."""
    module = layer.get_submodule(part)
    handle = module.register_forward_hook(lambda *args: None)
    try:
        before = counted(NAME)
        patch.logits(layer, rows())
        assert counted(NAME) == before.and_(declined=1)
        assert "hook" in ENGINE.runs[NAME]._decline_reason
        assert patch._slot == [None]
    finally:
        handle.remove()
    before = counted(NAME)
    patch.logits(layer, rows())
    assert counted(NAME) == before.and_(engaged=1)


class Own(torch.nn.Module):
    """Somebody's."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x[:, :128], None


def declined(layer: Any, reason: str) -> None:
    before = counted(NAME)
    patch.logits(layer, rows())
    assert counted(NAME) == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME]._decline_reason


def test_another_product_is_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(layer.router._modules, "proj", Own())
    declined(layer, "a linear layer is a")


def test_a_bias_is_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    patch.logits(layer, rows())
    monkeypatch.setattr(layer.router.proj, "bias", torch.nn.Parameter(torch.ones(128).bfloat16()))
    declined(layer, "has a bias")


def test_another_routing_function_is_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    """Also one that comes when the layer has run before."""
    patch.logits(layer, rows())
    config = layer.moe.topk.topk_config
    monkeypatch.setattr(config, "custom_routing_function", lambda **kwargs: None)
    declined(layer, "the routing function is")


def test_another_experts_block_is_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(layer._modules, "moe", Own())
    before = counted(NAME)
    patch.logits(layer, rows())
    assert counted(NAME) == before.and_(declined=1)
    assert "the experts' block is" in ENGINE.runs[NAME]._decline_reason


def test_a_wrapper_around_the_routing_function_is_stocks(layer: Any):
    """It has the name of what it wraps."""
    config = layer.moe.topk.topk_config
    stocks_own = config.custom_routing_function
    config.custom_routing_function = functools.wraps(stocks_own)(lambda **kwargs: None)
    try:
        declined(layer, "the routing function is")
    finally:
        config.custom_routing_function = stocks_own


def test_logits_that_were_changed_in_place_are_stocks(layer: Any, stocks: Any):
    logits = patch.logits(layer, rows())
    logits.add_(1)
    asked(logits, layer.moe.per_expert_scale)
    assert len(stocks) == 1


@pytest.mark.parametrize(
    "name", ["topk:TopK.forward_cuda", "topk:select_experts"], ids=["forward", "select"]
)
def test_a_wrapper_around_the_choice_of_experts_is_a_conflict(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    from sglang.srt.layers.moe import topk

    ENGINE.revert()
    owner = topk.TopK if "TopK" in name else topk
    attribute = name.rpartition(".")[2].rpartition(":")[2]
    inner = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, functools.wraps(inner)(lambda *a, **k: inner(*a, **k)))
    ENGINE.apply(only=[NAME, "layer_norms", "qkv_norm"])
    assert ENGINE.runs[NAME].state == states.CONFLICT, ENGINE.runs[NAME].reason


def test_no_tokens_are_stocks(layer: Any):
    before = counted(NAME)
    assert patch.logits(layer, rows(0)).shape == (0, 128)
    assert counted(NAME) == before.and_(declined=1)


def test_another_layers_launch_says_nothing_of_this_one(model: Any, layer: Any, stocks: Any):
    """Two forwards in turn, as of two micro-batches."""
    first = patch.logits(layer, rows())
    asked(first, layer.moe.per_expert_scale)
    other = model.layers[1]
    patch.logits(other, rows())
    patch.done(layer, SimpleNamespace(is_cuda=True))  # type: ignore[arg-type]
    before = counted(NAME)
    patch.logits(layer, rows())
    assert counted(NAME) == before.and_(engaged=1)


def test_more_tokens_are_stocks(layer: Any):
    before = counted(NAME)
    found = patch.logits(layer, rows(9))
    assert counted(NAME) == before.and_(declined=1)
    assert ENGINE.runs[NAME]._decline_reason == "more than 8 tokens"
    assert torch.equal(found, layer.router.proj(rows(9))[0])


def test_batch_invariant_mode_is_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang_types, "batch_invariant_unfit", lambda: "batch-invariant mode")
    declined(layer, "batch-invariant mode")


def test_logits_that_sglang_makes_up_are_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    """In place, and in inference mode no version tells of it."""
    from sglang.srt import runtime_context

    moe = SimpleNamespace(ep_dispatch_algorithm="fake")
    with monkeypatch.context() as inside:
        inside.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(moe=moe))
        declined(layer, "--ep-dispatch-algorithm fake")
    # A state of the server, not of the layer.
    before = counted(NAME)
    patch.logits(layer, rows())
    assert counted(NAME) == before.and_(engaged=1)


def test_a_capture_wants_a_run_before_it(layer: Any, monkeypatch: pytest.MonkeyPatch):
    layer.router.proj.__dict__.pop(linear.ARRIVED, None)
    site = site_of(layer)
    assert site.router_few is UNPROVEN
    with monkeypatch.context() as inside:
        for module in (linear, sys.modules["gemma4_turbo.fusions.fusion"]):
            inside.setattr(module, "capturing", lambda: True)
        declined(layer, "was not run before the capture")
    patch.logits(layer, rows())
    with monkeypatch.context() as inside:
        for module in (linear, sys.modules["gemma4_turbo.fusions.fusion"]):
            inside.setattr(module, "capturing", lambda: True)
        before = counted(NAME)
        patch.logits(layer, rows())
        assert counted(NAME) == before.and_(engaged=1, captured=1)


def test_where_nobody_asks_the_next_call_is_stocks(layer: Any):
    """As with experts that route by themselves: the launch would be for nothing."""
    patch.logits(layer, rows())
    patch.done(layer, SimpleNamespace(is_cuda=True))  # type: ignore[arg-type]
    declined(layer, patch.NOT_ASKED)


def test_what_an_exception_left_behind_says_nothing_of_the_next_layer(model: Any, layer: Any):
    patch.logits(layer, rows())  # and its experts raise
    other = model.layers[1]
    patch.logits(other, rows(9))
    patch.done(other, SimpleNamespace(is_cuda=True))  # type: ignore[arg-type]
    before = counted(NAME)
    patch.logits(other, rows())
    assert counted(NAME) == before.and_(engaged=1)


def test_a_written_weight_is_read(layer: Any):
    before = patch.logits(layer, rows())
    layer.router.proj.weight.data.mul_(-1)
    assert torch.equal(patch.logits(layer, rows()), -before)


def test_revert_gives_stocks_function_back(layer: Any, stocks: Any):
    logits = patch.logits(layer, rows())
    ENGINE.revert()
    assert not hasattr(
        sys.modules["sglang.srt.models.gemma4_causal"].gemma4_fused_routing, "__wrapped__"
    )
    asked(logits, layer.moe.per_expert_scale)
    assert len(stocks) == 1
    assert layer_steps.router_few.ROUTER_FEW.run is None
