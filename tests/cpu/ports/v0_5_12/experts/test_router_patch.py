"""The router patch on SGLang's real Gemma4MoE, on the CPU through Triton's interpreter."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import router as kernel
from gemma4_turbo.ports.v0_5_12.experts import router as patch
from gemma4_turbo.runtime.verdicts import Verdicts
from tests.cpu.conftest import patched_sglang
from tests.router_inputs import bits_differ, logits
from tests.runs import unpublished

STOCK_NAME = "Gemma4MoE.__init__.<locals>.routing_function"


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's Gemma 4 module imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    """Each test starts with the patch on."""
    ENGINE.apply()
    assert ENGINE.runs["router"].state == states.ACTIVE
    with torch.no_grad():
        yield
    ENGINE.revert()


def build():  # -> SmallMoE
    from tests.cpu.ports.v0_5_12 import small_moe

    return small_moe.build()


def routing_of(small) -> types.FunctionType:
    return small.moe.topk.topk_config.custom_routing_function


def test_a_constructed_moe_routes_through_the_kernel():
    """Same router, same tokens: the very bits of stock's closure, and the call is counted."""
    from tests.cpu.ports.v0_5_12 import small_moe

    run = ENGINE.runs["router"]
    small = build()
    assert routing_of(small).__qualname__ != STOCK_NAME
    tokens = small_moe.tokens_without_ties(small, 16)
    before = run.counters.engaged
    weights, ids, output = small_moe.run(small, tokens)
    assert run.counters.engaged == before + 2  # top-k once alone and once in the layer

    ENGINE.revert()
    stock = small_moe.build()
    assert routing_of(stock).__qualname__ == STOCK_NAME
    stock_weights, stock_ids, stock_output = small_moe.run(stock, tokens)
    assert bits_differ((weights, ids), (stock_weights, stock_ids)) == 0
    assert torch.equal(output, stock_output)


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    """A sentinel in the kernel's place changes the layer's output."""
    from tests.cpu.ports.v0_5_12 import small_moe

    small = build()
    tokens = small_moe.tokens_without_ties(small, 4)
    _, _, before = small_moe.run(small, tokens)
    right = kernel.launch_routing
    monkeypatch.setattr(kernel, "launch_routing", lambda *a: (right(*a)[0] * 3, right(*a)[1]))
    _, _, after = small_moe.run(small, tokens)
    assert not torch.equal(before, after)


def test_revert_gives_a_live_model_its_closure_back():
    small = build()
    ours = routing_of(small)
    ENGINE.revert()
    assert routing_of(small) is ours.gemma4_turbo_stock
    assert routing_of(small).__qualname__ == STOCK_NAME


def test_revert_leaves_a_foreign_routing_function_alone():
    small = build()

    def theirs(*args):
        raise AssertionError

    small.moe.topk.topk_config.custom_routing_function = theirs
    ENGINE.revert()
    assert routing_of(small) is theirs


def test_stock_routing_is_the_closure_itself():
    """The closure made from the constructor's code runs stock's very code object."""
    from sglang.srt.models.gemma4_causal import Gemma4MoE

    small = build()
    closure = routing_of(small).gemma4_turbo_stock
    made = patch.stock_routing(Gemma4MoE.__init__.__wrapped__, small.moe.per_expert_scale)
    assert made.__code__ is closure.__code__


def test_ineligible_calls_take_stocks_path():
    """fp64 logits: stock's result, nothing engaged, and the reason is in the report."""
    small = build()
    run = ENGINE.runs["router"]
    x = torch.randn(3, 128, dtype=torch.float64)
    before = run.counters.engaged
    got = routing_of(small)(x, x, 8, True)
    assert bits_differ(got, routing_of(small).gemma4_turbo_stock(x, x, 8, True)) == 0
    assert run.counters.engaged == before
    assert "float64" in run.full_reason()


def test_scale_updates_reach_the_kernel():
    """Weights loaded into the parameter after construction are used."""
    small = build()
    x = logits("few values", 2, 128, 8, torch.bfloat16, torch.Generator().manual_seed(1))
    before = routing_of(small)(x, x, 8, True)[0]
    small.moe.per_expert_scale.copy_(small.moe.per_expert_scale * 2)
    assert torch.equal(routing_of(small)(x, x, 8, True)[0], before * 2)


def test_survives_fullgraph():
    """Traced by Dynamo with fullgraph, the kernel still runs, behind an opaque op."""
    torch._dynamo.reset()
    scale = torch.linspace(0.5, 1.5, 128)
    run = ENGINE.runs["router"]
    from sglang.srt.models.gemma4_causal import Gemma4MoE

    stock = patch.stock_routing(Gemma4MoE.__init__.__wrapped__, scale)
    routing = patch.routing_function(run, stock, scale)
    x = logits("few values", 3, 128, 8, torch.bfloat16, torch.Generator().manual_seed(2))
    before = run.counters.engaged
    compiled = torch.compile(lambda t: routing(t, t, 8, True), fullgraph=True, backend="eager")
    assert bits_differ(compiled(x), kernel.launch_routing(x, scale, 8)) == 0
    assert run.counters.engaged == before + 1
    explained = torch._dynamo.explain(lambda t: routing(t, t, 8, True))(x)
    assert explained.graph_break_count == 0


def test_state_says_when_the_backend_routes_by_itself(monkeypatch: pytest.MonkeyPatch):
    """flashinfer_trtllm never calls the routing function: not `active`."""
    from sglang.srt.layers.moe import utils

    small = build()
    assert patch._backend_unfit(small.moe.topk) is None
    monkeypatch.setattr(utils, "MOE_RUNNER_BACKEND", utils.MoeRunnerBackend.FLASHINFER_TRTLLM)
    reason = patch._backend_unfit(small.moe.topk)
    assert reason is not None
    assert "flashinfer_trtllm" in reason
    run = ENGINE.runs["router"]
    small.moe.topk.topk_config.custom_routing_function = routing_of(small).gemma4_turbo_stock
    patch._take_over(run, small.moe)
    assert run.state == states.UNSUPPORTED
    assert "flashinfer_trtllm" in run.reason


@pytest.mark.parametrize("late", [False, True], ids=["at construction", "at the first call"])
def test_a_failed_check_keeps_stock(monkeypatch: pytest.MonkeyPatch, late: bool):
    """A GPU on which one bit differs: stock's path, state failed, whenever that is found out."""
    small = build()
    run = ENGINE.runs["router"]
    monkeypatch.setattr(patch, "_verdicts", Verdicts())
    monkeypatch.setattr(patch, "_compare", lambda *args: "self-check: 1 of 512 rows differ")
    x = torch.randn(3, 128).bfloat16()
    if not late:
        small.moe.topk.topk_config.custom_routing_function = routing_of(small).gemma4_turbo_stock
        patch._take_over(run, small.moe)
        assert routing_of(small).__qualname__ == STOCK_NAME
    before = run.counters.engaged
    routing_of(small)(x, x, 8, True)
    assert run.counters.engaged == before
    assert run.state == states.FAILED
    assert "1 of 512 rows" in run.reason


def test_a_model_built_on_meta_is_checked_at_its_first_call(monkeypatch: pytest.MonkeyPatch):
    """No verdict is stored for a parameter without data."""
    monkeypatch.setattr(patch, "_verdicts", Verdicts())
    scale = torch.ones(128, device="meta")
    run = ENGINE.runs["router"]
    assert patch.self_check(run, print, scale, torch.bfloat16, 8) is None  # type: ignore[arg-type]
    assert patch._verdicts == {}


def test_a_foreign_routing_function_is_a_conflict():
    small = build()
    run = unpublished("router")
    small.moe.topk.topk_config.custom_routing_function = print
    patch._take_over(run, small.moe)
    assert run.state == states.CONFLICT
    assert routing_of(small) is print


def test_an_exception_of_ours_never_stops_the_model(monkeypatch: pytest.MonkeyPatch):
    """The model is built all the same, with stock's closure, and the state says why."""

    def broken(*args):
        raise RuntimeError("boom")

    monkeypatch.setattr(patch, "routing_function", broken)
    small = build()
    assert routing_of(small).__qualname__ == STOCK_NAME
    assert ENGINE.runs["router"].state == states.FAILED
    assert "boom" in ENGINE.runs["router"].reason


def test_verify_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    """The checks pass, and fail if two experts of one token change places."""
    run = ENGINE.runs["router"]
    assert all(check.passed for check in patch.verify(run, "cpu"))
    right = kernel.launch_routing

    def wrong(*args):
        weights, ids = right(*args)
        ids[0, :2] = ids[0, :2].flip(0)
        return weights, ids

    monkeypatch.setattr(kernel, "launch_routing", wrong)
    assert not any(check.passed for check in patch.verify(run, "cpu"))
