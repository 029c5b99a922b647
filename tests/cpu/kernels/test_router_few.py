"""`router_few` in Triton's interpreter against plain torch: logits within bounds, their routing exact."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.kernels import router_few as kernel
from gemma4_turbo.kernels import routing
from tests.router_inputs import KINDS, logits

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]

POISON = 123.0
BF16, HALF = torch.bfloat16, torch.float16


def operands(
    tokens: int, experts: int, hidden: int, dtype: torch.dtype = BF16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x as a view with a stride beyond its width, a weight likewise, a scale."""
    generator = torch.Generator().manual_seed(tokens + experts + hidden)

    def rows(count: int, factor: float) -> torch.Tensor:
        whole = torch.full((count, hidden + 64), POISON, dtype=dtype)
        whole[:, :hidden] = (torch.randn(count, hidden, generator=generator) * factor).to(dtype)
        return whole[:, :hidden]

    return (
        rows(tokens, 1.0),
        rows(experts, hidden**-0.5),
        torch.rand(experts, generator=generator) * 2,
    )


def check(
    found: kernel.Routed, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, topk: int
) -> None:
    """Logits near those in fp64, the routing that of the logits."""
    exact = x.double() @ w.double().T
    ulp = torch.finfo(x.dtype).eps
    torch.testing.assert_close(
        found.logits.double(), exact, rtol=ulp, atol=1e-5 * x.shape[1] ** 0.5
    )
    routed(found, s, topk)


def routed(found: kernel.Routed, s: torch.Tensor, topk: int) -> None:
    """Ids exactly, weights to a few ulp of fp32."""
    weights, ids = kernel.reference_routing(found.logits, s, topk)
    assert found.ids.dtype == torch.int32
    assert found.weights.dtype == torch.float32
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.weights, weights, rtol=1e-6, atol=0, equal_nan=True)


# Tokens: each power of two, and one between. Experts and K: powers of two and not. Hidden: less than a
# block, a block, and one with a part of a block left. Each dtype.
CASES = [
    (1, 128, 2816, 8, BF16),
    (3, 60, 1024, 6, BF16),
    (8, 33, 1544, 16, BF16),
    (2, 5, 64, 5, HALF),
    (4, 16, 2048, 1, HALF),
    (0, 16, 64, 2, BF16),
]


@pytest.mark.parametrize(("tokens", "experts", "hidden", "topk", "dtype"), CASES, ids=str)
def test_router_few(tokens: int, experts: int, hidden: int, topk: int, dtype: torch.dtype):
    x, w, s = operands(tokens, experts, hidden, dtype)
    arrived = torch.zeros(1, dtype=torch.int32)
    found = kernel.router_few(x, w, s, topk, arrived)
    assert found.logits.shape == (tokens, experts)
    assert found.ids.shape == (tokens, topk)
    check(found, x, w, s, topk)
    assert int(arrived) == 0
    again = kernel.router_few(x, w, s, topk, arrived)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_logits(kind: str, dtype: torch.dtype):
    """The weight is what a one-hot x makes the logits: ties, infinities, NaN, zeros, subnormals."""
    wanted = logits(kind, 2, 48, 8, dtype, torch.Generator().manual_seed(5))
    w = torch.zeros(48, 64, dtype=dtype)
    w[:, 0] = wanted[0]
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, 0] = 1
    s = torch.linspace(0.5, 2, 48).to(dtype)
    found = kernel.router_few(x, w, s, 8)
    same = found.logits.view(torch.int16) == wanted[:1].view(torch.int16)
    # -0 + 0 is 0, and a NaN's bits are the processor's own.
    assert (same | (wanted[:1] == 0) | wanted[:1].isnan()).all()
    routed(found, s, 8)


def test_signed_zeros_and_nans_in_order():
    """The order is that of stock's sort key, which looks at bits."""
    nan, inf = float("nan"), float("inf")
    row = torch.tensor([[-inf, 0.0, -0.0, inf, nan, -nan, -1.0, 1.0]], dtype=BF16)
    row.view(torch.int16)[0, 4], row.view(torch.int16)[0, 5] = 0x7FC0, 0x7FC0 - 0x8000
    found = torch.empty(1, 8, dtype=torch.int32)
    weights = torch.empty(1, 8)
    routing.route[(1,)](
        row, torch.ones(8), weights, found, 1, E=8, K=8, BLOCK_T=1, BLOCK_E=8, P=8, PTX=False
    )
    assert found.tolist() == [[4, 3, 7, 1, 2, 6, 0, 5]]
    assert torch.equal(kernel.reference_routing(row, torch.ones(8), 8)[1], found)


@pytest.mark.parametrize("scale", kernel.SCALE_DTYPES, ids=str)
def test_every_scale_dtype(scale: torch.dtype):
    x, w, s = operands(2, 16, 64)
    check(kernel.router_few(x, w, s.to(scale), 4), x, w, s.to(scale), 4)


def test_bad_arguments_are_named():
    x, w, s = operands(2, 16, 64)
    odd = torch.zeros(2, 130, dtype=BF16)[:, 1:65]
    for given, name in (
        ((x, w.float(), s, 4), "weight must be"),
        ((x, w[:, :60], s, 4), "weight must be"),
        ((x.float(), w, s, 4), "x must be"),
        ((x.t(), w, s, 4), "x must be"),
        ((x.repeat(5, 1), w, s, 4), "x must have at most 8 rows"),
        ((x, w, s[:8], 4), "scale must be"),
        ((x, w, s.double(), 4), "scale must be"),
        ((x, w, s, 0), "topk must be"),
        ((x, w, s, 17), "topk must be"),
        ((x, w, s.to("meta"), 4), "scale is on meta"),
        ((odd, w, s, 4), "aligned"),
    ):
        with pytest.raises(ValueError, match=name):
            kernel.router_few(*given)
    with pytest.raises(ValueError, match="arrived must be int32"):
        kernel.router_few(x, w, s, 4, torch.zeros(1))
