"""`mlp_few` on SGLang's real dense MLP, on the CPU through Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.cli.small_model import build, run
from gemma4_turbo.engine import states
from gemma4_turbo.fusions.site import eager_site_of
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import mlp_few as kernel
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.ports.any.decode_step import mlp_few as patch
from gemma4_turbo.runtime.custom_ops import TRACED
from tests.cpu.conftest import only_patch, patched_sglang
from tests.cpu.ports.counted import counted

NAME = "mlp_few"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    with only_patch(NAME), torch._dynamo.config.patch(disable=True), torch.no_grad():
        assert ENGINE.runs[NAME].state == states.ACTIVE, ENGINE.runs[NAME].reason
        yield


@pytest.fixture
def module(on: None) -> Any:
    """Of its own for each test."""
    return build("dense").layers[0].mlp


def given(tokens: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, 256, generator=generator).bfloat16()


def counts_of(module: Any) -> torch.Tensor:
    owner, every = module.__dict__[linear.ARRIVED]
    assert owner is module
    (zeros,) = every
    assert isinstance(zeros, torch.Tensor)
    return zeros


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Two roundings of a row's largest."""
    bound = theirs.float().abs().amax(-1, keepdim=True) * patch.mlp_few.OUTPUT
    return bool(((ours.float() - theirs.float()).abs() <= bound).all())


def declined(module: Any, reason: str, tokens: int = 2) -> None:
    """Stock's bits, counted with the reason."""
    x, before = given(tokens), counted(NAME)
    assert torch.equal(patch.mlp(module, x), module(x))
    assert counted(NAME) == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME]._decline_reason


# The two kernels that are compiled.
@pytest.mark.parametrize("tokens", [1, 2])
def test_it_is_the_mlp(module: Any, tokens: int):
    x, before = given(tokens), counted(NAME)
    ours = patch.mlp(module, x)
    assert counted(NAME) == before.and_(engaged=1)
    assert near(ours, module(x))
    assert counts_of(module).count_nonzero() == 0


@pytest.mark.parametrize(("kind", "engaged", "declines"), [("dense", 2, 0), ("ple", 2, 0), ("moe", 0, 2)])  # fmt: skip
def test_every_layer_of_a_model_is_counted(kind: str, engaged: int, declines: int):
    model = build(kind)
    before = counted(NAME)
    ours = run(model, 2)
    assert counted(NAME) == before.and_(engaged=engaged, declined=declines)
    if declines:
        assert ENGINE.runs[NAME]._decline_reason == patch.BESIDE_EXPERTS
    ENGINE.revert()
    theirs = run(model, 2)
    assert torch.nn.functional.cosine_similarity(ours.float(), theirs.float()).min() > 0.999


@pytest.mark.parametrize(("tokens", "reason"), [(3, patch.TOO_MANY_TOKENS), (65, patch.TOO_MANY_TOKENS)])  # fmt: skip
def test_more_tokens_are_stocks(module: Any, tokens: int, reason: str):
    declined(module, reason, tokens)


def test_no_tokens_are_stocks(module: Any):
    before = counted(NAME)
    assert patch.mlp(module, given(0)).shape == (0, 256)
    assert counted(NAME) == before.and_(declined=1)
    assert "no tokens" in ENGINE.runs[NAME]._decline_reason


@pytest.mark.parametrize("part", ["", "gate_up_proj", "down_proj", "act_fn"])
def test_hooks_are_seen(module: Any, part: str):
    """Whoever hooks a part may change what goes through it."""
    seen: list[int] = []
    handle = module.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    declined(module, "hook")
    assert seen
    handle.remove()
    before = counted(NAME)
    patch.mlp(module, given())
    assert counted(NAME) == before.and_(engaged=1)


class Own(torch.nn.Module):
    """Somebody's, in the place of one of SGLang's."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        found = self.inner(x)
        return (found[0] * 2, None) if isinstance(found, tuple) else found * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gate_up_proj", "a linear layer is a"),
        ("down_proj", "a linear layer is a"),
        ("act_fn", "the dense MLP's activation is a"),
    ],
)
def test_another_part_is_stocks(module: Any, name: str, reason: str):
    """Also one that comes when the MLP has run before."""
    patch.mlp(module, given())
    module._modules[name] = Own(getattr(module, name))
    declined(module, reason)


def test_a_bias_is_stocks(module: Any):
    patch.mlp(module, given())
    module.down_proj.bias = torch.nn.Parameter(torch.ones(256).bfloat16())
    declined(module, "has a bias")


def test_weights_of_another_kind_are_stocks(module: Any):
    """Of another layout, the parameter kept: looked at in each call."""
    patch.mlp(module, given())
    weight = module.gate_up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    declined(module, "gate_up must be contiguous")


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_written_weights_are_read(module: Any, name: str):
    before = patch.mlp(module, given())
    module.get_submodule(name).weight.data.mul_(0.5)
    after = patch.mlp(module, given())
    assert near(after, module(given()))
    assert not torch.equal(before, after)


def test_a_replaced_weight_is_looked_at_anew(module: Any):
    patch.mlp(module, given())
    site = eager_site_of(module, patch.MlpSite)
    own = module.down_proj.weight
    module.down_proj.weight = torch.nn.Parameter(own.data * 2, requires_grad=False)
    assert near(patch.mlp(module, given()), module(given()))
    assert eager_site_of(module, patch.MlpSite) is not site


def test_batch_invariant_mode_is_stocks(module: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang_types, "batch_invariant_unfit", lambda: "batch-invariant mode")
    declined(module, "batch-invariant mode")


def test_gpus_that_share_the_work_sum(module: Any, monkeypatch: pytest.MonkeyPatch):
    """What the down projection does after its product, where it does so itself."""
    rules = sglang_types.rules()._replace(sum_of=lambda of: lambda x: x * 3)
    monkeypatch.setattr(sglang_types, "rules", lambda: rules)
    assert near(patch.mlp(module, given()), module(given()) * 3)


def test_a_capture_wants_a_run_before_it(module: Any, monkeypatch: pytest.MonkeyPatch):
    """Counts are never made while a CUDA graph is captured."""
    import gemma4_turbo.fusions.fusion as fusion

    with monkeypatch.context() as inside:
        for of in (linear, fusion):
            inside.setattr(of, "capturing", lambda: True)
        declined(module, "was not run before the capture")
    patch.mlp(module, given())
    with monkeypatch.context() as inside:
        for of in (linear, fusion):
            inside.setattr(of, "capturing", lambda: True)
        before = counted(NAME)
        patch.mlp(module, given())
        assert counted(NAME) == before.and_(engaged=1, captured=1)


def test_skinny_gemm_has_the_rest(module: Any):
    """Three tokens are its, with both patches in; the first two are not counted as its."""
    ENGINE.revert()
    ENGINE.apply(only=[NAME, "skinny_gemm"])
    both = NAME, "skinny_gemm"
    before = [counted(name) for name in both]
    patch.mlp(module, given(2))
    assert [counted(name) for name in both] == [before[0].and_(engaged=1), before[1]]
    patch.mlp(module, given(3))
    assert [counted(name) for name in both] == [
        before[0].and_(engaged=1, declined=1),
        before[1].and_(engaged=2),
    ]


def test_verify(module: Any):
    checks = patch.MLP_FEW.checks("cpu")
    assert [check.passed for check in checks] == [True, True]


# The kernel of one token and that of two: a decode step of one is most of a server's.
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_the_self_check_sees_a_wrong_kernel(
    module: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, wrong: float
):
    fusion = patch.MLP_FEW
    weights = module.gate_up_proj.weight, module.down_proj.weight
    args = patch.mlp_few.Args(given(), *weights, torch.zeros(kernel.COUNTS, dtype=torch.int32))
    assert fusion.differing(args, 0) == 0
    launch = kernel.launch_mlp_few

    def off(x: torch.Tensor, *more: Any) -> torch.Tensor:
        found = launch(x, *more)
        if x.shape[0] == tokens:
            found[0, found[0].abs().argmax()] *= wrong
        return found

    monkeypatch.setattr(kernel, "launch_mlp_few", off)
    assert fusion.differing(args, 0) == (2 if tokens == 1 else 1)  # two rows, each alone


def test_the_self_check_sees_another_activation(module: Any, monkeypatch: pytest.MonkeyPatch):
    """SiLU is GELU where the gate is far from 1, to either side."""
    linear_of = torch.nn.functional.linear

    def of_silu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *more: Any) -> Any:
        gate, up = linear_of(x, gate_up).chunk(2, -1)
        return linear_of(torch.nn.functional.silu(gate) * up, down)

    monkeypatch.setattr(kernel, "launch_mlp_few", of_silu)
    weights = module.gate_up_proj.weight, module.down_proj.weight
    args = patch.mlp_few.Args(given(), *weights, torch.zeros(kernel.COUNTS, dtype=torch.int32))
    assert patch.MLP_FEW.differing(args, 0) > 10


# Trained layers have rows longer than 1; the others are replaced.
@pytest.mark.parametrize("length", [1.0, 5.0, 0.0, float("nan")])
def test_the_self_check_passes_in_fp16(module: Any, length: float):
    """Nothing that it draws becomes infinite on the way."""
    weights = [
        torch.randn(w.shape, generator=torch.Generator().manual_seed(7)).half()
        * (length * w.shape[1] ** -0.5)
        for w in (module.gate_up_proj.weight, module.down_proj.weight)
    ]
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    args = patch.mlp_few.Args(given().half(), *weights, counts)
    assert patch.MLP_FEW.differing(args, 0) == 0


# What says nothing of the code; the verdict is shared and stays.
@pytest.mark.parametrize("fill", [float("nan"), 0.0, float("inf")])
def test_the_self_check_is_about_code_not_about_a_layers_weights(
    module: Any, monkeypatch: pytest.MonkeyPatch, fill: float
):
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    weights = module.gate_up_proj.weight, module.down_proj.weight
    weights[1].data.fill_(fill)
    args, fusion = patch.mlp_few.Args(given(), *weights, counts), patch.MLP_FEW
    assert fusion.differing(args, 0) == 0
    launch = kernel.launch_mlp_few
    monkeypatch.setattr(kernel, "launch_mlp_few", lambda *more: launch(*more) * 1.5)
    assert fusion.differing(args, 0) > 100


def test_another_layers_verdict_is_taken(module: Any):
    """Of the same shapes and dtype; of others not."""
    sites = [patch.MlpSite(layer.mlp) for layer in build("dense").layers]
    assert sites[0].key == sites[1].key == patch.MlpSite(module).key
    module.down_proj.weight = torch.nn.Parameter(torch.ones(256, 72).bfloat16())
    assert patch.MlpSite(module).key != sites[0].key
    assert patch.MlpSite(build("dense").layers[0].mlp.half()).key != sites[0].key


def test_counts_are_a_modules_own(module: Any):
    """Also of two with the same weights: a draft's, say, on a stream of its own."""
    other = build("dense").layers[0].mlp
    for name in ("gate_up_proj", "down_proj"):
        other.get_submodule(name).weight = module.get_submodule(name).weight
    assert torch.equal(patch.mlp(module, given()), patch.mlp(other, given()))
    assert counts_of(other) is not counts_of(module)


def test_counts_are_a_copys_own(module: Any):
    """A shallow one has its original's attributes, and may run beside it."""
    ours = patch.mlp(module, given())
    other = copy.copy(module)
    assert torch.equal(patch.mlp(other, given()), ours)
    mine, its = counts_of(module), counts_of(other)
    assert its.data_ptr() != mine.data_ptr()
    patch.mlp(module, given())
    assert counts_of(module) is mine  # they stay
    assert counts_of(other) is its


def test_traced_code_is_stocks_and_counted(module: Any):
    ENGINE.runs[NAME]._decline_reason = ""
    before = counted(NAME)
    torch.compiler.reset()
    with torch._dynamo.config.patch(disable=False):
        traced = torch.compile(lambda x: patch.mlp(module, x), backend="eager", dynamic=False)
        found = traced(given())
    torch.compiler.reset()
    assert torch.equal(found, module(given()))
    now = counted(NAME)
    assert now.engaged == before.engaged
    assert now.declined > before.declined
    assert ENGINE.runs[NAME].full_reason().endswith(TRACED)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (given().t().contiguous().t(), "contiguous rows"),
        (torch.ones(2, 257).bfloat16()[:, :256], "rows at multiples of 16 bytes"),
        (torch.ones(513).bfloat16()[1:].view(2, 256), "x must be aligned to 16 bytes"),
    ],
)
def test_rows_that_the_kernel_cannot_read_are_stocks(module: Any, x: torch.Tensor, reason: str):
    ENGINE.runs[NAME]._decline_reason = ""
    before = counted(NAME)
    assert torch.equal(patch.mlp(module, x), module(x))
    assert counted(NAME) == before.and_(declined=1)
    assert reason in ENGINE.runs[NAME]._decline_reason
