"""One kind follows stock's RMSNorm in every bit, and a wrong one is told from it."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.kernels.norms.rmsnorm import Kind

stock = lines.stock()
WIDTHS = [256, 1536, 2560, 2816, 5376]
STOCKS = {"eager": stock.eager_norms, "traced": stock.traced_norms}


def row(width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1, width, device="cuda", dtype=dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kind_agrees(width, dtype):
    kinds = norm_kinds.find(row(width, dtype))
    assert kinds.reason is None
    assert kinds.traced_reason is None


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", list(STOCKS))
def test_wrong_kinds_are_found_out(width, mode):
    like = row(width, torch.bfloat16)
    right = getattr(norm_kinds.find(like), mode)
    functions = STOCKS[mode]()
    with torch.no_grad():
        for kind in set(Kind) - {right}:
            wrong = sum(norm_kinds.differing(functions, kind, like, seed) for seed in range(8))
            assert wrong > 0, kind


def test_a_reason_names_what_differs(monkeypatch):
    """Stock's norm with another eps: no kind fits, and the reason counts how far each is off."""
    real = stock.eager_norms()

    def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return real.rmsnorm(x, weight, eps * 2)

    replaced = norm_kinds.Functions(rmsnorm, real.fused_add_rmsnorm)
    _, reason = norm_kinds.compare(replaced, row(1536, torch.bfloat16), rounds=1)
    assert reason is not None
    for kind in Kind:
        assert kind.name in reason


def test_compared_once(monkeypatch):
    like = row(1536, torch.bfloat16)
    norm_kinds.find(like)
    monkeypatch.setattr(norm_kinds, "compare", lambda *_: pytest.fail("compared again"))
    norm_kinds.find(like)
    norm_kinds.forget()
    monkeypatch.undo()
    assert norm_kinds.find(like).reason is None
