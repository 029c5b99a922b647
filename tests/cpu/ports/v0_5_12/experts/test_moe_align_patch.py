"""The alignment patch on SGLang's real modules, on the CPU through Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import moe_align as kernel
from gemma4_turbo.ports.any.experts import moe_align as shared
from gemma4_turbo.ports.v0_5_12.experts import moe_align as patch
from gemma4_turbo.runtime.verdicts import Verdicts
from tests.cpu.conftest import patched_sglang

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")

MOE = "sglang.srt.layers.moe"
MODULE = f"{MOE}.moe_runner.triton_utils.moe_align_block_size"
HOLDERS = (
    MODULE,
    f"{MOE}.moe_runner.triton_utils",
    f"{MOE}.moe_runner.triton_utils.fused_moe",
    f"{MOE}.fused_moe_triton",
)


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's MoE modules imported with the patches applied; reverted at the end."""
    with patched_sglang(tmp_path_factory, only=("moe_align",)):
        import sglang.srt.layers.moe.fused_moe_triton  # noqa: F401

        yield


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with the patch on and nothing proven."""
    monkeypatch.setattr(shared, "_verdicts", Verdicts())
    ENGINE.apply(only=("moe_align",))
    assert ENGINE.runs["moe_align"].state == states.ACTIVE
    yield
    ENGINE.revert()


@pytest.fixture
def stock_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls that reach stock's CUDA operator, which a CPU does not have."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        sys.modules[MODULE],
        "sgl_moe_align_block_size",
        lambda *args: calls.append(args),
        raising=False,
    )
    return calls


def held() -> dict[str, Any]:
    """The function as each importing module has it."""
    return {name: vars(sys.modules[name])["moe_align_block_size"] for name in HOLDERS}


def ids(tokens: int, experts: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, experts, (tokens, 8), generator=generator, dtype=torch.int32)


def test_every_holder_gets_ours_and_stock_back():
    (ours,) = set(held().values())
    stock = ours.__wrapped__
    assert stock.__module__ == MODULE
    assert stock.__code__.co_filename == sys.modules[MODULE].__file__
    ENGINE.revert()
    assert set(held().values()) == {stock}
    ENGINE.apply(only=("moe_align",))
    assert set(held().values()) != {stock}
    assert len(set(held().values())) == 1


def test_an_import_inside_a_function_gets_ours():
    """As LoRA's virtual experts and Marlin's experts do it, at every call."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size import (
        moe_align_block_size,
    )

    assert moe_align_block_size is held()[HOLDERS[2]]


def test_the_fused_moe_module_calls_the_kernel(stock_calls):
    """Counted, right, and stock's operator is not called."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    run = ENGINE.runs["moe_align"]
    before = run.counters.engaged
    topk_ids = ids(9)
    got = fused_moe.moe_align_block_size(topk_ids, 16, 128)
    assert kernel.difference(got, kernel.reference_align(topk_ids, 16, 128), 16) is None
    assert run.counters.engaged == before + 1
    assert stock_calls == []


def test_lengths_are_those_that_stock_allocates(stock_calls):
    """Stock's own Python, with its operator replaced, allocates what the kernel's launch does."""
    stock = held()[MODULE].__wrapped__
    for tokens in (0, 1, 15, 16, 17, 64):
        for block in (16, 48, 64):
            for experts in (64, 128, 130):
                got = held()[MODULE](ids(tokens, experts), block, experts)
                expected = stock(ids(tokens, experts), block, experts)
                assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]


@pytest.mark.parametrize(
    ("topk_ids", "experts", "named"),
    [
        (ids(65), 128, "at most 512"),
        (ids(4).long(), 128, "int64"),
        (ids(4)[:, ::2], 128, "contiguous"),
        (ids(4), 600, "num_experts"),
    ],
)
def test_declined_calls_reach_stock(stock_calls, topk_ids, experts, named):
    """With the very tensor; not counted as engaged; the reason is in the report."""
    run = ENGINE.runs["moe_align"]
    run._decline_reason = ""
    before = run.counters.engaged
    outputs = held()[MODULE](topk_ids, 16, experts)
    ((passed, buckets, block, *buffers, _, pad),) = stock_calls
    assert passed is topk_ids
    assert (buckets, block, pad) == (experts + 1, 16, True)
    assert all(a is b for a, b in zip(outputs, buffers, strict=True))
    assert run.counters.engaged == before
    assert named in run.full_reason()


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    sentinel = object()
    monkeypatch.setattr(kernel, "launch_align", lambda *args: sentinel)
    assert held()[MODULE](ids(2), 16, 128) is sentinel


def test_what_was_not_compared_before_a_capture_runs_stock(
    monkeypatch: pytest.MonkeyPatch, stock_calls
):
    """A comparison needs a synchronisation; one eager call is enough for all later captures."""
    run = ENGINE.runs["moe_align"]
    run._decline_reason = ""
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    held()[MODULE](ids(2), 16, 128)
    assert len(stock_calls) == 1
    assert "before the capture" in run.full_reason()
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: False)
    held()[MODULE](ids(3), 16, 128)
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    held()[MODULE](ids(2), 16, 128)
    assert len(stock_calls) == 1
    held()[MODULE](ids(2), 32, 128)
    assert len(stock_calls) == 2


def test_a_failed_check_keeps_stock(monkeypatch: pytest.MonkeyPatch, stock_calls):
    """A GPU on which one slot is elsewhere: stock's path, state failed."""
    run = ENGINE.runs["moe_align"]
    key = (torch.device("cpu"), 32, 16, 128)
    monkeypatch.setattr(
        shared, "_verdicts", Verdicts({key: "self-check: an expert's slots differ"})
    )
    before = run.counters.engaged
    held()[MODULE](ids(2), 16, 128)
    assert len(stock_calls) == 1
    assert run.counters.engaged == before


def test_the_comparison_sees_one_wrong_slot(monkeypatch: pytest.MonkeyPatch):
    arguments = (torch.device("cpu"), 32, 16, 128)
    assert shared._compare(kernel.reference_align, *arguments) is None
    right = kernel.launch_align

    def wrong(*args):
        sorted_token_ids, expert_ids, post_pad = right(*args)
        expert_ids[int(post_pad) // 16 - 1] -= 1
        return sorted_token_ids, expert_ids, post_pad

    monkeypatch.setattr(kernel, "launch_align", wrong)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    reason = shared._compare(kernel.reference_align, *arguments)
    assert reason is not None
    assert "expert_ids differ" in reason


def test_traced_code_sees_stock(stock_calls):
    """With fullgraph: stock's Python is inlined, as without the patch."""
    torch._dynamo.reset()
    run = ENGINE.runs["moe_align"]
    before = run.counters.engaged
    ours = held()[MODULE]
    compiled = torch.compile(
        lambda t: ours(t, 16, 128)[0].shape[0], fullgraph=True, backend="eager"
    )
    assert compiled(ids(2)) == 256
    assert run.counters.engaged == before


def test_verify_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    """The checks pass, and fail if two slots of different experts change places."""
    run = ENGINE.runs["moe_align"]
    checks = patch.verify(run, "cpu")
    assert checks
    assert all(check.passed and check.differing == 0 for check in checks)
    right = kernel.launch_align

    def wrong(*args):
        sorted_token_ids, expert_ids, post_pad = right(*args)
        sorted_token_ids[0] = sorted_token_ids[int(post_pad) - 1]
        return sorted_token_ids, expert_ids, post_pad

    monkeypatch.setattr(kernel, "launch_align", wrong)
    assert not any(check.passed for check in patch.verify(run, "cpu"))
