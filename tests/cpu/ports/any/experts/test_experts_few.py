"""`experts_few` on SGLang's real function, on the CPU through Triton's interpreter."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import experts_few as kernel
from gemma4_turbo.ports.any.experts import experts_few as patch
from tests.cpu.conftest import only_patch, patched_sglang
from tests.cpu.ports.counted import counted

NAME = "experts_few"
MODULE, _, FUNCTION = patch.TARGET.partition(":")
STOCK = "stock's"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from gemma4_turbo.cli.sglang_process import prepare_sglang

    with patched_sglang(tmp_path_factory, only=[NAME]):
        prepare_sglang()
        yield


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    with only_patch(NAME):
        yield


def given(
    tokens: int = 2, choices: int = 4, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """Small experts; x is contiguous, as stock asks for."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    scores = torch.rand(tokens, 6, generator=generator)
    factors, ids = scores.softmax(-1).topk(choices, dim=-1)
    x = torch.randn(tokens, 32, generator=generator).to(dtype)
    return [x, randn(6, 16, 32), randn(6, 32, 8), factors, ids.int()]


@pytest.fixture
def stocks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls that reach the inside of stock's function; its kernels want a GPU."""
    calls: list[dict[str, Any]] = []
    module = sys.modules[MODULE]
    size = len(inspect.signature(module._prepare_fused_moe_run).parameters)
    assert size > 4
    prepared = (None,) * (7 if hasattr(module, "moe_combine_topk") else 6)

    def sequence(*args: Any, **kwargs: Any) -> str:
        calls.append(kwargs)
        return STOCK

    monkeypatch.setattr(module, "_prepare_fused_moe_run", lambda *a, **k: prepared)
    monkeypatch.setattr(module, "_fused_moe_kernel_sequence", sequence)
    return calls


def fused_experts(*args: Any, **kwargs: Any) -> Any:
    return getattr(sys.modules[MODULE], FUNCTION)(*args, **kwargs)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("tokens", [1, patch.MOST_TOKENS])
def test_the_sum_over_the_experts(tokens: int, inplace: bool):
    operands = given(tokens)
    expected = kernel.reference_experts_few(*operands)
    before = counted(NAME)
    found = fused_experts(*operands, activation="gelu", inplace=inplace)
    assert counted(NAME) == before.and_(engaged=1)
    assert (found is operands[0]) == inplace
    bound = expected.float().abs().amax(-1, keepdim=True) * patch.BOUND
    assert ((found.float() - expected.float()).abs() <= bound).all()


def test_handed_over_by_place(stocks: list[dict[str, Any]]):
    """As SGLang's operators do: all options, in stock's order."""
    options = list(inspect.signature(getattr(sys.modules[MODULE], FUNCTION)).parameters.values())[
        5:
    ]
    chosen = ["gelu" if option.name == "activation" else option.default for option in options]
    assert isinstance(fused_experts(*given(), *chosen), torch.Tensor)
    assert stocks == []
    names = [option.name for option in options]
    chosen[names.index("routed_scaling_factor")] = 2.5
    assert fused_experts(*given(), *chosen) == STOCK
    assert stocks[0]["routed_scaling_factor"] == 2.5


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"activation": "silu"}, "activation is silu"),
    ({"activation": "gelu_tanh"}, "activation is gelu_tanh"),
    ({"b1": torch.ones(1)}, "b1 is given"),
    ({"use_fp8_w8a8": True}, "use_fp8_w8a8 is True"),
    ({"use_int4_w4a16": True}, "use_int4_w4a16 is True"),
    ({"w1_scale": torch.ones(1)}, "w1_scale is given"),
    ({"no_combine": True}, "no_combine is True"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
    ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input is True"),
    ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0"),
    ({"is_gated": False}, "is_gated is False"),
]


@pytest.mark.parametrize(("options", "reason"), OTHERS, ids=[reason for _, reason in OTHERS])
def test_whatever_else_a_call_asks_for_is_stocks(
    options: dict[str, Any], reason: str, stocks: list[dict[str, Any]]
):
    before = counted(NAME)
    operands = given()
    if options.get("use_int4_w4a16"):
        operands[1] = operands[1][..., :16].contiguous()
    assert fused_experts(*operands, **{"activation": "gelu", **options}) == STOCK
    assert counted(NAME) == before.and_(declined=1)
    assert ENGINE.runs[NAME]._decline_reason == reason
    name = next(iter(options))
    assert stocks[0][name] is options[name]


def test_stocks_own_default_is_another_activation(stocks: list[dict[str, Any]]):
    """An option that is not given has stock's default, which is `silu`."""
    assert fused_experts(*given()) == STOCK
    assert ENGINE.runs[NAME]._decline_reason == "activation is silu"


def test_an_option_that_is_not_known_is_stocks():
    """A later release adds one: stock's way, unless it has its default."""
    seen = []

    def stock(x: Any, w1: Any, w2: Any, weights: Any, ids: Any, inplace: bool = False, activation: str = "silu", novel: int = 0) -> str:  # fmt: skip
        seen.append(novel)
        return STOCK

    ours = patch._replacement(stock, lambda: False, torch.empty_like)
    assert ours(*given(), activation="gelu", novel=3) == STOCK
    assert isinstance(ours(*given(), activation="gelu", novel=0), torch.Tensor)
    assert ours(*given(), False, "gelu", 5) == STOCK
    assert seen == [3, 5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": patch.MOST_TOKENS + 1}, "more than 4 tokens"),
        ({"dtype": torch.float32}, "w13 must be a contiguous"),
    ],
)
def test_other_operands_are_stocks(
    change: dict[str, Any], reason: str, stocks: list[dict[str, Any]]
):
    assert fused_experts(*given(**change), activation="gelu") == STOCK
    assert ENGINE.runs[NAME]._decline_reason.startswith(reason)


def test_batch_invariant_mode_is_stocks(
    stocks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    from sglang.srt import batch_invariant_ops

    monkeypatch.setattr(batch_invariant_ops, "is_batch_invariant_mode_enabled", lambda: True)
    assert fused_experts(*given(), activation="gelu") == STOCK
    assert ENGINE.runs[NAME]._decline_reason.startswith("batch-invariant mode")


def test_a_sum_over_the_ranks_is_stocks(
    stocks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    line = sys.modules[ENGINE.runs[NAME].port.module]  # type: ignore[union-attr]
    module = sys.modules[MODULE]
    arguments = SimpleNamespace(
        enable_fused_moe_sum_all_reduce=True,
        moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=True),
    )
    if hasattr(module, "get_exec"):
        from sglang.srt import runtime_context as owner

        monkeypatch.setattr(owner, "get_exec", lambda: arguments)
    else:
        from sglang.srt import server_args as owner

        monkeypatch.setattr(owner, "get_global_server_args", lambda: arguments)
    assert line.sums_over_ranks()
    assert fused_experts(*given(), activation="gelu") == STOCK
    assert ENGINE.runs[NAME]._decline_reason.startswith("enable_fused_moe_sum_all_reduce")


def test_a_launch_that_fails_is_stocks_for_good(
    stocks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def launch(*args: Any) -> Any:
        calls.append(args)
        raise RuntimeError("no image")

    monkeypatch.setattr(kernel, "launch_experts_few", launch)
    run = ENGINE.runs[NAME]
    for _ in range(2):
        assert fused_experts(*given(), activation="gelu") == STOCK
    assert len(calls) == 1
    assert run.state == states.FAILED
    assert "no image" in run.reason


def test_the_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    key = (torch.device("cpu"), torch.bfloat16, 24, 64, 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    stock, made = kernel.launch_experts_few, []

    def launch(*args: Any) -> torch.Tensor:
        """The operands are the same each time, and so is what comes of them."""
        made[:] = made or [stock(*args)]
        return made[0].clone()

    monkeypatch.setattr(kernel, "launch_experts_few", launch)
    assert patch._compare(key) is None

    def wrong(*args: Any) -> torch.Tensor:
        found = launch(*args)
        found[-1, 7] *= 1.05
        return found

    monkeypatch.setattr(kernel, "launch_experts_few", wrong)
    assert "self-check" in str(patch._compare(key))
    monkeypatch.setattr(kernel, "launch_experts_few", lambda *a: launch(*a) * torch.nan)
    assert "self-check" in str(patch._compare(key))


def test_before_a_capture_it_waits(stocks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    assert fused_experts(*given(), activation="gelu") == STOCK
    assert "before the capture" in ENGINE.runs[NAME]._decline_reason


def test_it_is_taken_out(stocks: list[dict[str, Any]]):
    ENGINE.revert()
    assert fused_experts(*given(), activation="gelu") == STOCK
    assert len(stocks) == 1


def test_verify():
    found = patch.verify(ENGINE.runs[NAME], "cpu")
    assert [check.passed for check in found] == [True, True]
