"""The alignment above stock's own single launch, on SGLang's real module of this line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import moe_align as kernel
from gemma4_turbo.ports.any.experts import moe_align as shared
from gemma4_turbo.ports.v0_5_23.experts import moe_align as patch
from gemma4_turbo.runtime.verdicts import Verdicts
from tests.cpu.conftest import only_patch, patched_sglang
from tests.cpu.ports.counted import Counted, counted

NAME = "moe_align"
MODULE = patch.TARGET.partition(":")[0]
UTILS = MODULE.rpartition(".")[0]
HOLDERS = (MODULE, UTILS, f"{UTILS}.fused_moe", "sglang.srt.layers.moe.fused_moe_triton")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        import sglang.srt.layers.moe.fused_moe_triton  # noqa: F401

        yield


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared, "_verdicts", Verdicts())
    with only_patch(NAME):
        yield


@pytest.fixture
def stock_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls that reach stock's CUDA kernels, which a CPU does not have."""
    calls: list[tuple[Any, ...]] = []
    module = sys.modules[MODULE]
    for name in ("sgl_moe_align_block_size", "moe_align_small_numel"):
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append((a, k)), raising=False)
    return calls


def held() -> dict[str, Any]:
    """The function as each importing module has it."""
    return {name: vars(sys.modules[name])["moe_align_block_size"] for name in HOLDERS}


def align(*args: Any, **kwargs: Any) -> Any:
    return held()[MODULE](*args, **kwargs)


def ids(tokens: int, experts: int = 128, low: int = 0, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, experts, (tokens, 8), generator=generator, dtype=torch.int32)


def counts() -> Counted:
    return counted(NAME)


def of_stock(monkeypatch: pytest.MonkeyPatch, topk_ids: torch.Tensor, block: int, experts: int):
    """Stock's whole function as on a GPU, its own Triton kernel in the interpreter.

    That kernel is correct above its limit, and does not write beyond the last block.
    """
    module = sys.modules[MODULE]
    from sglang.kernels.ops.moe import moe_align_small_numel as small

    stock = held()[MODULE].__wrapped__
    with monkeypatch.context() as patched:
        patched.setattr(small, "is_arch_support_pdl", lambda: False)
        patched.setattr(module, "_is_cuda", True)
        patched.setattr(module, "SMALL_NUMEL_LIMIT", 512, raising=False)
        patched.setattr(module, "moe_align_small_numel", small.moe_align_small_numel, raising=False)
        return stock(topk_ids, block, experts)


def test_active_though_stock_has_one_for_few_slots():
    """The older line's port says that stock has it itself; the one that fits goes first."""
    run = ENGINE.runs[NAME]
    assert run.state == states.ACTIVE
    assert run.port is not None
    assert run.port.module == patch.__name__


def test_every_holder_gets_ours_and_stock_back():
    (ours,) = set(held().values())
    stock = ours.__wrapped__
    assert stock.__module__ == MODULE
    assert inspect.signature(ours) == inspect.signature(stock)
    ENGINE.revert()
    assert set(held().values()) == {stock}


# Blocks by experts are the lengths' two cases, and 130 is no power of two: all pairs. Few slots and many,
# odd and even, with slots of other ranks and without, go round among them; each with two of the blocks.
@pytest.mark.parametrize(
    ("tokens", "low", "experts", "block"),
    [
        *((9, 0, 64, 16), (9, -1, 128, 48), (16, 0, 130, 64)),
        *((17, -1, 64, 48), (64, 0, 128, 64), (9, -1, 130, 16)),
        *((9, 0, 64, 64), (16, 0, 128, 16), (17, -1, 130, 48)),
        *((64, 0, 130, 16), (64, -1, 64, 16)),  # several slots of an expert, and the most
    ],
)
def test_what_stocks_own_kernel_gives(tokens, low, experts, block, monkeypatch):
    """Slots of other ranks among them; the very lengths, and the order inside an expert too."""
    topk_ids = ids(tokens, experts, low)
    before = counts()
    ours = align(topk_ids, block, experts)
    assert counts() == before.and_(engaged=1)
    theirs = of_stock(monkeypatch, topk_ids, block, experts)
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]
    assert ours[0].numel() % 4 == 0
    valid = int(theirs[2])
    assert int(ours[2]) == valid
    assert torch.equal(ours[0][:valid], theirs[0][:valid])
    assert bool((ours[0][valid:] == topk_ids.numel()).all())  # as stock's CUDA kernel leaves it
    assert torch.equal(ours[1][: valid // block], theirs[1][: valid // block])
    reference = kernel.reference_align(topk_ids, block, experts, patch.MULTIPLE)
    assert kernel.difference(ours, reference, block) is None


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_few_slots_are_stocks_and_not_counted(tokens, stock_calls):
    before = counts()
    align(ids(tokens), 16, 128)
    assert len(stock_calls) == 1
    assert counts() == before


def test_the_limit_is_stocks_own(monkeypatch: pytest.MonkeyPatch, stock_calls):
    """Read where stock reads it."""
    ENGINE.revert()
    monkeypatch.setattr(sys.modules[MODULE], "SMALL_NUMEL_LIMIT", 128, raising=False)
    ENGINE.apply(only=[NAME])
    before = counts()
    align(ids(16), 16, 128)
    assert counts() == before
    align(ids(17), 16, 128)
    assert counts() == before.and_(engaged=1)


@pytest.mark.parametrize(
    ("topk_ids", "experts", "options", "named"),
    [
        (ids(65), 128, {}, "at most 512"),
        (ids(9).long(), 128, {}, "int64"),
        (ids(18)[:, ::2], 128, {}, "contiguous"),
        (ids(9), 600, {}, "num_experts"),
        (ids(9, 63), 63, {}, "one launch for 63 experts"),
        (ids(9), 128, {"ignore_invalid_expert": True}, "plain alignment"),
        (ids(9), 128, {"return_inactive_prefix_count": True}, "plain alignment"),
        (ids(9), 128, {"pad_expert_ids": True}, "plain alignment"),
    ],
)
def test_declined_calls_reach_stock(topk_ids, experts, options, named):
    """With the very arguments; not counted as engaged; the reason is in the report."""
    run = ENGINE.runs[NAME]
    ENGINE.revert()
    stock = sys.modules[MODULE].moe_align_block_size
    passed = []

    def recorded(*given: Any, **named: Any) -> str:
        passed.append(inspect.signature(stock).bind(*given, **named))
        passed[-1].apply_defaults()
        return "stock's"

    ours = patch.build(run, {patch.TARGET: recorded})[patch.TARGET]
    before = counts()
    assert ours(topk_ids, 16, experts, **options) == "stock's"
    ((given),) = passed
    assert given.arguments.pop("topk_ids") is topk_ids
    expected = inspect.signature(stock).bind(topk_ids, 16, experts, **options)
    expected.apply_defaults()
    assert expected.arguments.pop("topk_ids") is topk_ids
    assert given.arguments == expected.arguments
    assert counts() == before.and_(declined=1)
    assert named in run.full_reason()


def test_an_experiment_of_stocks_is_stocks(monkeypatch: pytest.MonkeyPatch):
    """Which may choose another kernel by an environment variable."""
    run = ENGINE.runs[NAME]
    monkeypatch.setattr(sys.modules[MODULE], "_SGLANG_EXPERIMENTAL_LORA_OPTI", True)
    ours = patch.build(run, {patch.TARGET: lambda *a, **k: "stock's"})[patch.TARGET]
    assert ours(ids(9), 16, 128) == "stock's"
    assert "SGLANG_EXPERIMENTAL_LORA_OPTI" in run.full_reason()


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    sentinel = object()
    monkeypatch.setattr(kernel, "launch_align", lambda *args: sentinel)
    assert align(ids(9), 16, 128) is sentinel


def test_what_was_not_compared_before_a_capture_runs_stock(
    monkeypatch: pytest.MonkeyPatch, stock_calls
):
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    align(ids(9), 16, 128)
    assert len(stock_calls) == 1
    assert "before the capture" in ENGINE.runs[NAME].full_reason()
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: False)
    align(ids(9), 16, 128)
    monkeypatch.setattr(patch.custom_ops, "capturing", lambda: True)
    align(ids(9), 16, 128)
    assert len(stock_calls) == 1


def test_the_comparison_is_made_with_stocks_lengths(monkeypatch: pytest.MonkeyPatch):
    """One that rounds up to another multiple is seen."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    key = (torch.device("cpu"), 128, 16, 66)

    def stock(*given: Any) -> Any:
        return kernel.reference_align(*given, patch.MULTIPLE)

    assert shared._compare(stock, *key, patch.MULTIPLE) is None
    assert "sorted_token_ids" in str(shared._compare(stock, *key))


def test_traced_code_sees_stock(stock_calls):
    torch._dynamo.reset()
    before = counts()
    ours = held()[MODULE]
    compiled = torch.compile(
        lambda t: ours(t, 16, 128)[0].shape[0], fullgraph=True, backend="eager"
    )
    assert compiled(ids(16)) == 128 * 16
    assert counts() == before.and_(declined=1)


def test_verify_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    run = ENGINE.runs[NAME]
    checks = patch.verify(run, "cpu")
    assert checks
    assert all(check.passed and check.differing == 0 for check in checks)
    right = kernel.launch_align

    def wrong(*args: Any) -> Any:
        sorted_token_ids, expert_ids, post_pad = right(*args)
        sorted_token_ids[0] = sorted_token_ids[int(post_pad) - 1]
        return sorted_token_ids, expert_ids, post_pad

    monkeypatch.setattr(kernel, "launch_align", wrong)
    assert not any(check.passed for check in patch.verify(run, "cpu"))
