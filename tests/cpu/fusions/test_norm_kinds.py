"""How the kind of stock's RMSNorm is chosen; that the kinds' bits are right is compared on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.catalogue import PATCHES
from gemma4_turbo.engine import states
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.fusions.site import UNPROVEN, Site
from gemma4_turbo.kernels.norms import rmsnorm as norms
from gemma4_turbo.kernels.norms.rmsnorm import Kind

ROW = torch.empty(1, 256, dtype=torch.bfloat16)
ONES = torch.ones(1, 256, dtype=torch.bfloat16)
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


@pytest.mark.parametrize(("cute", "first"), [(True, Kind.CUTE), (False, Kind.FAST_MATH)])
def test_what_is_said_decides_what_is_tried_first(wrong, cute, first):
    assert norm_kinds.compare(NOTHING, ROW, cute) == (first, None)
    assert wrong["asked"] == [(first, seed) for seed in range(norm_kinds.ROUNDS)]


def test_a_single_bit_in_the_last_round_rules_a_kind_out(wrong):
    wrong[Kind.CUTE] = [0] * (norm_kinds.ROUNDS - 1) + [1]
    wrong[Kind.FAST_MATH] = [3] * norm_kinds.ROUNDS
    assert norm_kinds.compare(NOTHING, ROW, cute=True) == (Kind.PRECISE, None)


def test_none_of_them(wrong):
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

    patch = PATCHES[0]

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


class Doubled(Fusion[torch.Tensor, torch.Tensor]):
    """Twice; traced, three times. Compared never: off a GPU there is nothing to compare with."""

    def unfit(self, args: torch.Tensor) -> str | None:
        return None

    def launch(self, args: torch.Tensor, kind: int) -> torch.Tensor:
        return args * 2

    def traced(self, args: torch.Tensor, kind: int) -> torch.Tensor:
        return args * 3

    def like(self, args: torch.Tensor) -> torch.Tensor:
        return args


def doubled(monkeypatch: pytest.MonkeyPatch, kinds: norm_kinds.Kinds) -> tuple[Any, Any, Any]:
    """The fusion, its run, and a site; stock runs ``kinds``."""
    monkeypatch.setattr(norm_kinds, "find", lambda like: kinds)
    fusion, run = Doubled("some"), Counted()
    fusion.run = run  # type: ignore[assignment]
    site: Any = Site((object(), 256), SimpleNamespace(is_torch_compile=False))
    site.some = UNPROVEN
    return fusion, run, site


def test_a_fusion_without_a_kind_stays_with_stock_and_is_reported(monkeypatch):
    kinds = norm_kinds.Kinds(reason="self-check: no kind", traced_reason="self-check: no kind")
    fusion, run, site = doubled(monkeypatch, kinds)
    for _ in range(2):
        assert fusion(site, ONES) is None
    assert run.states == [(states.FAILED, "self-check: no kind")]
    assert run.reasons == ["self-check: no kind"] * 2
    assert run.count == 0


def test_a_traced_call_needs_its_own_kind(monkeypatch):
    """Eager is proven, traced is not: traced code makes stock's calls."""
    kinds = norm_kinds.Kinds(eager=int(Kind.CUTE), traced_reason="self-check: no kind")
    fusion, run, site = doubled(monkeypatch, kinds)
    assert torch.equal(fusion(site, ONES), ONES * 2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fusion(site, ONES) is None
    site.kinds = kinds._replace(traced_reason=None)
    assert torch.equal(fusion(site, ONES), ONES * 3)
    # The module runs its native form there, for Inductor.
    site.norm.is_torch_compile = True
    assert fusion(site, ONES) is None
    assert run.count == 1


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
