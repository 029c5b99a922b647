"""`feed_forward_few` in SGLang's real layers, on the CPU through Triton's interpreter.

Without a GPU stock's experts call neither the routing function nor the fused experts that are replaced:
`as_on_a_gpu` makes the calls of a GPU.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.cli.sglang_process import prepare_sglang
from gemma4_turbo.engine import states
from gemma4_turbo.fusions.site import UNPROVEN, eager_site_of
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import feed_forward_few as kernel
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.ports.any.experts import experts_few, router_few
from gemma4_turbo.ports.any.experts import feed_forward_few as patch
from tests.cpu.ports.counted import counted
from tests.cpu.ports.v0_5_23 import models

NAME = "feed_forward_few"
MODULE = experts_few.TARGET.partition(":")[0]
OTHERS = ["layer_norms", "qkv_norm"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def on(tmp_path: Any) -> Iterator[None]:
    with models.stock(tmp_path):
        prepare_sglang()
        import sglang.srt.models.gemma4_causal  # noqa: F401

        ENGINE.apply(only=[NAME, *OTHERS])
        assert ENGINE.runs[NAME].state == states.ACTIVE, ENGINE.runs[NAME].reason
        yield
    assert patch._slot == [None]


@pytest.fixture
def model(on: None) -> Any:
    """Of its own for each test: norms keep the function of their first call."""
    return models.build("moe")


@pytest.fixture
def layer(model: Any) -> Any:
    return model.layers[0]


class Calls:
    """What a GPU's experts call, with a change to it."""

    def __init__(self) -> None:
        self.routing: Callable[..., Any] = lambda *found: found
        self.options: dict[str, Any] = {}
        self.after: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
        self.stocks: list[torch.Tensor] = []  # inputs of stock's fused experts

    def forward(self, moe: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        names = sys.modules["sglang.srt.models.gemma4_causal"]
        topk = moe.topk.topk_config.top_k
        found = names.gemma4_fused_routing(logits, moe.per_expert_scale, topk)
        weights, ids = self.routing(*found)
        experts = moe.experts
        options = {"inplace": True, "activation": "gelu", "is_gated": True} | self.options
        return self.after(
            sys.modules[MODULE].fused_experts_impl(
                x, experts.w13_weight, experts.w2_weight, weights, ids, **options
            )
        )


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Calls:
    from sglang.kernels.ops.moe import gemma4_routing
    from sglang.srt.models import gemma4_causal

    calls = Calls()
    monkeypatch.setattr(gemma4_causal.Gemma4MoE, "forward", lambda *args: calls.forward(*args))

    def route(logits: torch.Tensor, scale: torch.Tensor, topk: int) -> Any:
        return kernel.router_few.reference_routing(logits, scale.data, topk)

    def fused(x: torch.Tensor, w13: Any, w2: Any, weights: Any, ids: Any, **_: Any) -> torch.Tensor:
        calls.stocks.append(x.clone())
        factors = weights.float()
        found = kernel.experts_few.reference_experts_few(x, w13, w2, factors, ids)
        return x.copy_(found)

    # The functions that the replacements call where nothing was handed over.
    for function, stock in (
        (gemma4_routing.gemma4_fused_routing, route),
        (sys.modules[MODULE].fused_experts_impl, fused),
    ):
        inner = function
        for cell in inner.__closure__ or ():
            if callable(cell.cell_contents) and cell.cell_contents is inner.__wrapped__:
                monkeypatch.setattr(cell, "cell_contents", stock)
    return calls


def site_of(layer: Any) -> Any:
    return eager_site_of(layer.moe, patch.FeedForwardSite, layer)


def inputs(tokens: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b, c = torch.randn(3, tokens, 256, generator=generator).bfloat16().unbind()
    return a, b, c


def expected(layer: Any, given: tuple[torch.Tensor, ...]) -> kernel.Found:
    weights = patch._weights(layer.mlp, layer.moe, layer.router.proj.weight)
    return kernel.reference_feed_forward_few(kernel.Inputs(*given), weights, 8)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours.float() - theirs.float()).abs().max() <= 2**-6 * theirs.float().abs().max())


def outputs(layer: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    found = patch.outputs(layer, *given)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_a_layer_is_one_launch(layer: Any, as_on_a_gpu: Calls):
    given = inputs()
    x = given[2].clone()
    before = counted(NAME)
    mlp, experts = outputs(layer, given)
    assert counted(NAME) == before.and_(engaged=1)
    assert as_on_a_gpu.stocks == []
    theirs = expected(layer, given)
    assert near(mlp, theirs.mlp_output)
    assert near(experts, theirs.experts_output)
    assert torch.equal(given[2], x)  # whoever looks at the experts' input sees it


def test_a_model_computes_what_stock_does(
    model: Any, as_on_a_gpu: Calls, monkeypatch: pytest.MonkeyPatch
):
    before = counted(NAME)
    found = models.run(model)
    assert counted(NAME) == before.and_(engaged=2)
    assert as_on_a_gpu.stocks == []
    ENGINE.revert()
    monkeypatch.undo()  # stock's own experts, without a GPU
    models.norms_as_on_a_gpu(monkeypatch)
    ENGINE.apply(only=OTHERS)
    stock = models.run(model)
    assert (found.float() - stock.float()).abs().max() < 0.06 * stock.float().abs().max()


def test_without_a_gpu_the_experts_are_stocks(layer: Any):
    """They route by other functions: the dense MLP alone is the launch's, and that is no engagement."""
    given = inputs()
    theirs = expected(layer, given)
    before = counted(NAME)
    mlp, experts = outputs(layer, given)
    assert counted(NAME) == before.and_(declined=1)
    assert near(mlp, theirs.mlp_output)
    assert near(experts, theirs.experts_output)
    assert site_of(layer).feed_forward_few is None


def changed(t: torch.Tensor) -> torch.Tensor:
    return t + 0


@pytest.mark.parametrize(
    "routing",
    [
        lambda weights, ids: (changed(weights), ids),
        lambda weights, ids: (weights, changed(ids)),
        lambda weights, ids: (weights, ids.sub_(ids).add_(3)),
        lambda weights, ids: (weights.mul_(2), ids),
        lambda weights, ids: (weights[:, :4], ids[:, :4]),
    ],
    ids=["weights", "ids", "ids in place", "weights in place", "fewer"],
)
def test_another_routing_runs_the_experts(layer: Any, as_on_a_gpu: Calls, routing: Any):
    """Redundant experts, masks: whoever changes the routing in between gets what it asks for."""
    as_on_a_gpu.routing = routing
    given = inputs()
    x = given[2].clone()
    theirs = expected(layer, given)
    weights, ids = routing(theirs.routed.weights.clone(), theirs.routed.ids.clone())
    w = patch._weights(layer.mlp, layer.moe, layer.router.proj.weight)
    asked = kernel.experts_few.reference_experts_few(x, w.w13, w.w2, weights, ids)
    before = counted(NAME)
    mlp, experts = outputs(layer, given)
    assert counted(NAME) == before.and_(declined=1)
    assert len(as_on_a_gpu.stocks) == 1
    assert torch.equal(as_on_a_gpu.stocks[0], x)
    assert near(mlp, theirs.mlp_output)
    assert near(experts, asked)


def silently(t: torch.Tensor, value: float) -> torch.Tensor:
    """Written as by a kernel of somebody's: no version is raised."""
    t.data.fill_(value)
    return t


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SGLANG_SIMULATE_UNIFORM_EXPERTS", "SGLANG_SIMULATE_UNIFORM_EXPERTS"),
        ("SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS", "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS"),
        ("dispatch", "--ep-dispatch-algorithm fake"),
        ("padding", "rows that pad the batch"),
    ],
)
def test_a_routing_that_kernels_write_over_is_stocks(
    layer: Any, as_on_a_gpu: Calls, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
):
    """SGLang's own ways to change what the routing function has found: no version tells of them."""
    from sglang.srt import runtime_context
    from sglang.srt.model_executor import forward_context

    as_on_a_gpu.routing = lambda weights, ids: (weights, silently(ids, 3))
    with monkeypatch.context() as inside:
        if name == "dispatch":
            moe = SimpleNamespace(ep_dispatch_algorithm="fake")
            inside.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(moe=moe))
        elif name == "padding":
            context = SimpleNamespace(moe_num_token_non_padded=lambda: torch.tensor(1))
            inside.setattr(forward_context, "_current", context)
        else:
            inside.setenv(name, "1")
        declined(layer, reason)
    # A state of the server, not of the layer.
    as_on_a_gpu.routing = lambda *found: found
    before = counted(NAME)
    outputs(layer, inputs())
    assert counted(NAME) == before.and_(engaged=1)


def test_inference_mode_is_stocks(layer: Any, as_on_a_gpu: Calls):
    """Its tensors do not tell of a change in place, which is how it is seen here."""
    as_on_a_gpu.routing = lambda weights, ids: (weights, ids.fill_(3))
    with torch.inference_mode():
        declined(layer, "inference mode")


def test_an_input_that_was_changed_in_place_runs_the_experts(layer: Any, as_on_a_gpu: Calls):
    given = inputs()

    def routing(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given[2].mul_(2)
        return weights, ids

    as_on_a_gpu.routing = routing
    before = counted(NAME)
    outputs(layer, given)
    assert counted(NAME) == before.and_(declined=1)
    assert len(as_on_a_gpu.stocks) == 1


def test_one_sum_of_both_is_stocks(layer: Any, as_on_a_gpu: Calls, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt import runtime_context

    moe = SimpleNamespace(ep_dispatch_algorithm=None, enable_fused_moe_sum_all_reduce=True)
    monkeypatch.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(moe=moe))
    before = counted(NAME)
    outputs(layer, inputs())
    assert counted(NAME) == before.and_(declined=1)
    assert len(as_on_a_gpu.stocks) == 1


@pytest.mark.parametrize(
    "options", [{"inplace": False}, {"activation": "silu"}, {"routed_scaling_factor": 2.0}], ids=str
)
def test_another_call_runs_the_experts(layer: Any, as_on_a_gpu: Calls, options: Any):
    as_on_a_gpu.options = options
    before = counted(NAME)
    outputs(layer, inputs())
    assert counted(NAME) == before.and_(declined=1)
    assert len(as_on_a_gpu.stocks) == 1


def test_whoever_goes_on_with_the_output_makes_the_experts_run(layer: Any, as_on_a_gpu: Calls):
    as_on_a_gpu.after = lambda x: x * 2
    given = inputs()
    theirs = expected(layer, given)
    before = counted(NAME)
    _, experts = outputs(layer, given)
    assert counted(NAME) == before.and_(declined=1)
    assert near(experts, theirs.experts_output * 2)
    assert site_of(layer).feed_forward_few == patch.WENT_ON
    assert patch.outputs(layer, *inputs()) is None


@pytest.mark.parametrize("name", ["w13_weight", "w2_weight"])
def test_experts_of_another_layer_are_not_taken_for_this_ones(
    model: Any, layer: Any, as_on_a_gpu: Calls, monkeypatch: pytest.MonkeyPatch, name: str
):
    """A block that runs one of another's weights on the handed routing."""
    own, other = layer.moe.experts, model.layers[1].moe.experts
    parts = {"w13_weight": own.w13_weight, "w2_weight": own.w2_weight, name: getattr(other, name)}
    run = as_on_a_gpu.forward

    def forward(moe: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scale = moe.per_expert_scale
        mixed = SimpleNamespace(
            experts=SimpleNamespace(**parts), topk=moe.topk, per_expert_scale=scale
        )
        return run(mixed, x, logits)

    monkeypatch.setattr(as_on_a_gpu, "forward", forward)
    outputs(layer, inputs())
    assert len(as_on_a_gpu.stocks) == 1


def test_two_layers_with_one_block_of_experts(model: Any, layer: Any, as_on_a_gpu: Calls):
    """What is kept on the block is the layer's that was looked at."""
    outputs(layer, inputs())
    other = model.layers[1]
    other.moe, other.router.proj = layer.moe, layer.router.proj
    given = inputs()
    theirs = expected(other, given)
    mlp, experts = outputs(other, given)
    assert near(mlp, theirs.mlp_output)
    assert near(experts, theirs.experts_output)
    given = inputs()
    theirs = expected(layer, given)
    assert near(outputs(layer, given)[0], theirs.mlp_output)


def test_a_copy_of_a_block_is_looked_at_anew(layer: Any, as_on_a_gpu: Calls):
    """A deep copy of what is kept on it would copy the layer, which holds what cannot be copied."""
    outputs(layer, inputs())
    layer.moe = copy.deepcopy(layer.moe)
    layer.mlp.down_proj.weight.data.mul_(-1)
    given = inputs()
    theirs = expected(layer, given)
    assert near(outputs(layer, given)[0], theirs.mlp_output)


def test_a_function_set_on_a_copys_part_is_seen(layer: Any, as_on_a_gpu: Calls):
    outputs(layer, inputs())
    layer.moe = copy.deepcopy(layer.moe)
    layer.moe.experts.run_moe_core = lambda **given: None
    declined(layer, "run_moe_core of somebody else's")


PARTS = ("mlp", "mlp.gate_up_proj", "mlp.down_proj", "mlp.act_fn", "router", "router.proj", "moe", "moe.topk", "moe.experts")  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.replace(".", "-"))
def test_hooks_are_seen(layer: Any, as_on_a_gpu: Calls, part: str):
    """Whoever hooks a part may change what goes through it: stock's calls."""
    handle = layer.get_submodule(part).register_forward_hook(lambda *args: None)
    try:
        declined(layer, "hook")
    finally:
        handle.remove()
    before = counted(NAME)
    outputs(layer, inputs())
    assert counted(NAME) == before.and_(engaged=1)


def declined(layer: Any, reason: str, tokens: int = 2) -> None:
    before = counted(NAME)
    assert patch.outputs(layer, *inputs(tokens)) is None
    assert counted(NAME) == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME]._decline_reason


class Own(torch.nn.Module):
    """Somebody's."""


@pytest.mark.parametrize(
    ("owner", "name", "reason"),
    [
        ("", "mlp", "the dense MLP is a"),
        ("mlp", "gate_up_proj", "a linear layer is a"),
        ("mlp", "down_proj", "a linear layer is a"),
        ("mlp", "act_fn", "the dense MLP's activation is a"),
        ("router", "proj", "a linear layer is a"),
        ("moe", "experts", "the experts are a"),
    ],
    ids=lambda value: value.replace(" ", "-") if value else "layer",
)
def test_another_part_is_stocks(
    layer: Any,
    as_on_a_gpu: Calls,
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    name: str,
    reason: str,
):
    """Also one that comes when the layer has run before."""
    outputs(layer, inputs())
    of = layer.get_submodule(owner) if owner else layer
    monkeypatch.setitem(of._modules, name, Own())
    declined(layer, reason)


def test_a_bias_is_stocks(layer: Any, as_on_a_gpu: Calls, monkeypatch: pytest.MonkeyPatch):
    outputs(layer, inputs())
    bias = torch.nn.Parameter(torch.ones(256).bfloat16())
    monkeypatch.setattr(layer.mlp.down_proj, "bias", bias)
    declined(layer, "has a bias")


def test_weights_of_somebody_elses_are_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    experts = layer.moe.experts

    class Packed(torch.nn.Parameter):
        pass

    monkeypatch.setitem(experts._parameters, "w2_weight", Packed(experts.w2_weight.data))
    declined(layer, "the experts' w2_weight is a Packed")


def test_quantised_weights_are_stocks(layer: Any, as_on_a_gpu: Calls):
    """Their numbers replaced in place, the parameter kept: looked at in each call."""
    outputs(layer, inputs())
    weight = layer.moe.experts.w13_weight
    kept = weight.data
    try:
        weight.data = kept.to(torch.float8_e4m3fn)
        declined(layer, "w13 is torch.float8_e4m3fn")
    finally:
        weight.data = kept


def test_written_weights_are_read(layer: Any, as_on_a_gpu: Calls):
    given = inputs()
    mlp, experts = outputs(layer, given)
    layer.mlp.down_proj.weight.data.mul_(-1)
    layer.moe.experts.w2_weight.data.mul_(-1)
    negative = outputs(layer, given)
    assert torch.equal(negative[0], -mlp)
    assert torch.equal(negative[1], -experts)


@pytest.mark.parametrize(("tokens", "reason"), [(3, "more than 2 tokens"), (0, "no tokens")])
def test_more_tokens_and_none_are_stocks(layer: Any, tokens: int, reason: str):
    declined(layer, reason, tokens)


def test_batch_invariant_mode_is_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang_types, "batch_invariant_unfit", lambda: "batch-invariant mode")
    declined(layer, "batch-invariant mode")


def test_several_gpus_are_stocks(layer: Any, monkeypatch: pytest.MonkeyPatch):
    rules = sglang_types.rules()._replace(parallel_unfit=lambda moe: "experts on several GPUs")
    monkeypatch.setattr(sglang_types, "rules", lambda: rules)
    declined(layer, "experts on several GPUs")


WAYS = (
    "sglang.srt.models.gemma3_causal:Gemma3MLP.forward",
    "sglang.srt.layers.activation:GeluAndMul.forward_cuda",
    "sglang.srt.layers.moe.topk:TopK.forward_cuda",
    "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.forward_impl",
    "sglang.srt.layers.moe.token_dispatcher.standard:StandardDispatcher.combine",
    "sglang.srt.layers.moe.moe_runner.runner:MoeRunner.run",
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts",
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.partition(":")[2])
def test_a_wrapper_around_what_is_gone_round_is_a_conflict(
    way: str, monkeypatch: pytest.MonkeyPatch
):
    """It would not be called, or would see a buffer that nobody has filled."""
    ENGINE.revert()
    module, _, qualname = way.partition(":")
    *outer, name = qualname.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(inner)(lambda *a, **k: inner(*a, **k)))
    ENGINE.apply(only=[NAME, *OTHERS])
    assert ENGINE.runs[NAME].state == states.CONFLICT, ENGINE.runs[NAME].reason


def test_a_layer_whose_norms_are_stocks_is_counted(model: Any):
    """Nothing is silently inactive: `layer_norms` makes the three inputs."""
    ENGINE.revert()
    ENGINE.apply(only=[NAME, "layer_norms"])
    before = counted(NAME)
    stack = models.build("moe")
    for one in stack.layers:
        one.pre_feedforward_layernorm_2.register_forward_hook(lambda *_: None)
    models.run(stack)
    assert counted(NAME) == before.and_(declined=2)
    assert ENGINE.runs[NAME]._decline_reason == patch.NO_NORMS


def test_a_capture_wants_a_run_before_it(
    layer: Any, as_on_a_gpu: Calls, monkeypatch: pytest.MonkeyPatch
):
    fusion = sys.modules["gemma4_turbo.fusions.fusion"]
    assert site_of(layer).feed_forward_few is UNPROVEN
    with monkeypatch.context() as inside:
        for module in (linear, fusion, patch):
            inside.setattr(module, "capturing", lambda: True)
        declined(layer, "was not run before the capture")
    outputs(layer, inputs())
    with monkeypatch.context() as inside:
        for module in (linear, fusion, patch):
            inside.setattr(module, "capturing", lambda: True)
        before = counted(NAME)
        outputs(layer, inputs())
        assert counted(NAME) == before.and_(engaged=1, captured=1)


def test_what_an_exception_leaves_behind_is_nothing(layer: Any, as_on_a_gpu: Calls):
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("somebody's")

    as_on_a_gpu.after = broken
    with pytest.raises(RuntimeError, match="somebody's"):
        patch.outputs(layer, *inputs())
    assert patch._slot == [None]


def test_the_experts_alone_are_as_ever_beside_it(request: pytest.FixtureRequest):
    """`experts_few` shares the replaced function, and goes in and out without it."""
    ENGINE.revert()
    ENGINE.apply(only=[NAME, "experts_few", *OTHERS])
    layer = models.build("moe").layers[0]
    request.getfixturevalue("as_on_a_gpu")
    before = counted(NAME), counted("experts_few")
    outputs(layer, inputs())
    assert (counted(NAME), counted("experts_few")) == (before[0].and_(engaged=1), before[1])
    ENGINE.revert()
    assert experts_few.EXPERTS_FEW.run is None
    assert patch.FEED_FORWARD_FEW.run is None
    assert not hasattr(sys.modules[MODULE].fused_experts_impl, "__wrapped__")


BESIDE = ["router_few", "experts_few", "experts_sum", "mlp_stream"]


# Each of those whose place it takes, and itself, taken out of all of them.
@pytest.mark.parametrize("out", [NAME, *BESIDE])
def test_any_of_its_neighbours_may_go(request: pytest.FixtureRequest, out: str):
    """It does the work of all, and counts for none of them; without it they do their own."""
    ENGINE.revert()
    ENGINE.apply(only=[NAME, *BESIDE, *OTHERS])
    for name in (NAME, *BESIDE):
        assert ENGINE.runs[name].state == states.ACTIVE, ENGINE.runs[name].reason
    layer = models.build("moe").layers[0]
    calls = request.getfixturevalue("as_on_a_gpu")
    before = [counted(name) for name in (NAME, *BESIDE)]
    both = outputs(layer, inputs())
    assert [counted(name) for name in (NAME, *BESIDE)] == [before[0].and_(engaged=1), *before[1:]]
    ENGINE._uninstall(ENGINE.runs[out])
    if out == NAME:
        assert patch.outputs(layer, *inputs()) is None
        logits = router_few.logits(layer, inputs()[1])
        layer.moe(inputs()[2], logits)
        assert counted("router_few") == before[1].and_(engaged=1)
    else:
        assert all(map(torch.equal, outputs(layer, inputs()), both))
    assert calls.stocks == []


def test_verify(layer: Any):
    """Its comparison passes, and sees a kernel that adds up other numbers."""
    assert all(check.passed for check in patch.FEED_FORWARD_FEW.checks("cpu"))


def test_the_self_check_sees_a_wrong_kernel(layer: Any, monkeypatch: pytest.MonkeyPatch):
    site = site_of(layer)
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    args = patch.feed_forward_few.Args(kernel.Inputs(*inputs()), site.weights, 8, counts)
    fusion = patch.FEED_FORWARD_FEW
    assert fusion.differing(args, 0) == 0
    launch = kernel.launch_feed_forward_few

    def wrong(*given: Any) -> kernel.Found:
        found = launch(*given)
        if found.mlp_output.shape[0] == 2:
            found.mlp_output[1, 2] *= 1.5
            found.experts_output[0, 3] = float("nan")
        return found

    monkeypatch.setattr(kernel, "launch_feed_forward_few", wrong)
    assert fusion.differing(args, 0) == 2


@pytest.mark.parametrize("of", ["mlp_output", "experts_output"])
def test_the_self_check_sees_another_activation(
    layer: Any, monkeypatch: pytest.MonkeyPatch, of: str
):
    """SiLU is GELU where the gate is far from 1, to either side."""
    site = site_of(layer)
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    args = patch.feed_forward_few.Args(kernel.Inputs(*inputs()), site.weights, 8, counts)
    launch, linear_of = kernel.launch_feed_forward_few, torch.nn.functional.linear
    silu = torch.nn.functional.silu

    def of_silu(given: kernel.Inputs, weights: kernel.Weights, *more: Any) -> kernel.Found:
        found = launch(given, weights, *more)
        if of == "mlp_output":
            gate, up = linear_of(given.mlp, weights.gate_up).chunk(2, -1)
            return found._replace(mlp_output=linear_of(silu(gate) * up, weights.down))
        with monkeypatch.context() as inside:
            inside.setattr(torch, "erf", lambda x: 2 * torch.sigmoid(x / 0.5**0.5) - 1)  # SiLU's
            experts = kernel.reference_experts(given, weights, found.routed)
        return found._replace(experts_output=experts)

    monkeypatch.setattr(kernel, "launch_feed_forward_few", of_silu)
    assert patch.FEED_FORWARD_FEW.differing(args, 0) > 10


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_self_check_looks_at_every_compiled_kernel(
    layer: Any, monkeypatch: pytest.MonkeyPatch, tokens: int
):
    """Of one token and of two: a decode step of one token is most of a server's."""
    site = site_of(layer)
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    args = patch.feed_forward_few.Args(kernel.Inputs(*inputs()), site.weights, 8, counts)
    launch = kernel.launch_feed_forward_few

    def wrong(given: kernel.Inputs, *more: Any) -> kernel.Found:
        found = launch(given, *more)
        if given.mlp.shape[0] == tokens:
            found.mlp_output[0, 2] = float("nan")
        return found

    monkeypatch.setattr(kernel, "launch_feed_forward_few", wrong)
    assert patch.FEED_FORWARD_FEW.differing(args, 0) == 1
