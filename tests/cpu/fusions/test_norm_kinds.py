"""How the kind of stock's RMSNorm is chosen; that the kinds' bits are right is compared on a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.fusions import norm_kinds, steps
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms.rmsnorm import Kind

ROW = torch.empty(1, 256, dtype=torch.bfloat16)
NOTHING = norm_kinds.Functions(lambda *_: ROW, lambda *_: None)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> dict[Kind, list[int]]:
    """What each kind differs by, round by round; an absent kind never differs."""
    table: dict[Kind, list[int]] = {}
    asked: list[tuple[Kind, int]] = []

    def differing(stock, kind, like, seed):
        asked.append((kind, seed))
        return table.get(kind, [0] * norm_kinds.ROUNDS)[seed]

    monkeypatch.setattr(norm_kinds, "differing", differing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    table["asked"] = asked  # type: ignore[index]
    return table


def flashinfer(monkeypatch: pytest.MonkeyPatch, cuda: bool | None) -> None:
    module = None if cuda is None else SimpleNamespace(_USE_CUDA_NORM=cuda)
    monkeypatch.setitem(sys.modules, "flashinfer.norm", module)


@pytest.mark.parametrize(
    ("cuda", "first"), [(False, Kind.CUTE), (True, Kind.FAST_MATH), (None, Kind.FAST_MATH)]
)
def test_what_flashinfer_says_decides_what_is_tried_first(monkeypatch, wrong, cuda, first):
    flashinfer(monkeypatch, cuda)
    assert norm_kinds.compare(NOTHING, ROW) == (first, None)
    assert wrong["asked"] == [(first, seed) for seed in range(norm_kinds.ROUNDS)]


def test_a_single_bit_in_the_last_round_rules_a_kind_out(monkeypatch, wrong):
    flashinfer(monkeypatch, False)
    wrong[Kind.CUTE] = [0] * (norm_kinds.ROUNDS - 1) + [1]
    wrong[Kind.FAST_MATH] = [3] * norm_kinds.ROUNDS
    assert norm_kinds.compare(NOTHING, ROW) == (Kind.PRECISE, None)


def test_none_of_them(monkeypatch, wrong):
    flashinfer(monkeypatch, True)
    for kind in Kind:
        wrong[kind] = [int(kind) + 5] * norm_kinds.ROUNDS
    _, reason = norm_kinds.compare(NOTHING, ROW)
    assert reason is not None
    assert "RMSNorm over 256 torch.bfloat16 differs from stock on a GPU" in reason
    assert "5 as FAST_MATH, 7 as PRECISE, 6 as CUTE" in reason


def test_off_a_gpu_there_is_nothing_to_compare_with():
    assert norm_kinds.find(ROW) == norm_kinds.Kinds()


class Counted:
    """Stands in for a patch's run."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str]] = []
        self.reasons: list[str] = []
        self.count = 0

    def set(self, state: str, reason: str) -> None:
        self.states.append((state, reason))

    def engaged(self, captured: bool) -> None:
        self.count += 1

    def declined(self, reason: str) -> None:
        self.reasons.append(reason)


def test_a_step_without_a_kind_stays_with_stock_and_is_reported(monkeypatch):
    kinds = norm_kinds.Kinds(reason="self-check: no kind", traced_reason="self-check: no kind")
    monkeypatch.setattr(norm_kinds, "find", lambda like: kinds)
    step, run = steps.Step(), Counted()
    step.run = run  # type: ignore[assignment]
    plan = steps.Plan((256,), SimpleNamespace(is_torch_compile=False))
    plan.some = steps.UNPROVEN  # type: ignore[attr-defined]
    for _ in range(2):
        assert not step.may_run(plan, "some", None, lambda: pytest.fail("compared"), ROW)
    assert run.states == [(states.FAILED, "self-check: no kind")]
    assert run.reasons == ["self-check: no kind"] * 2
    assert run.count == 0


def test_a_traced_call_needs_its_own_kind(monkeypatch):
    """Eager is proven, traced is not: traced code makes stock's calls."""
    kinds = norm_kinds.Kinds(eager=int(Kind.CUTE), traced_reason="self-check: no kind")
    monkeypatch.setattr(norm_kinds, "find", lambda like: kinds)
    step, run = steps.Step(), Counted()
    step.run = run  # type: ignore[assignment]
    plan = steps.Plan(("another", 256), SimpleNamespace(is_torch_compile=False))
    plan.some = steps.UNPROVEN  # type: ignore[attr-defined]
    assert step.may_run(plan, "some", None, lambda: 0, ROW)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not step.may_run(plan, "some", None, lambda: 0, ROW)
    plan.kinds = kinds._replace(traced_reason=None)
    assert step.may_run(plan, "some", None, lambda: 0, ROW)
    # The module runs its native form there, for Inductor.
    plan.norm.is_torch_compile = True
    assert not step.may_run(plan, "some", None, lambda: 0, ROW)


@pytest.mark.skipif(not norms.INTERPRETED, reason="needs Triton's interpreter")
def test_operands_hold_what_kinds_disagree_about(monkeypatch):
    monkeypatch.setattr(norm_kinds, "NUMBERS", 256 * 32)
    x, residual, *weights = norm_kinds.operands(ROW, 0)
    tiny = torch.finfo(torch.bfloat16).tiny
    for tensor in (x, residual):
        values = tensor.float()
        assert ((values != 0) & (values.abs() < tiny)).any()
        assert values.isnan().any()
        assert values.isinf().any()
        assert (values == 0).all(-1).any()
    for weight in weights:
        assert torch.signbit(weight[weight == 0]).any()
        assert ((weight != 0) & (weight.abs().float() < tiny)).any()
