"""`router_few` at 26B-A4B's shape: logits against fp64 and cuBLAS, routing against SGLang's own kernel."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels import router_few as kernel
from tests.gpu.lines import need
from tests.router_inputs import KINDS, logits

HIDDEN, EXPERTS, TOPK = 2816, 128, 8
need("router_few")


@pytest.fixture(autouse=True)
def _inference():
    """As in a server, and with memory that was written to before: not a number in bf16."""
    poison = torch.full((16 << 20,), 0x7F, dtype=torch.uint8, device="cuda")
    del poison
    with torch.no_grad():
        yield


def operands(
    tokens: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x as a view with a stride beyond its width."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    x = randn(tokens, HIDDEN + 64).to(dtype)[:, :HIDDEN]
    w = (randn(EXPERTS, HIDDEN) * HIDDEN**-0.5).to(dtype)
    return x, w, (torch.rand(EXPERTS, generator=generator, device="cuda") * 2).to(dtype)


def check(found: kernel.Routed, s: torch.Tensor, topk: int = TOPK) -> None:
    """Ids exactly those that SGLang's kernel finds for these logits, weights to a few ulp of fp32."""
    weights, ids = lines.stock().routing(found.logits, s, topk)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.weights, weights, rtol=2e-6, atol=0, equal_nan=True)


# All numbers of tokens that are taken, in the models' dtype; the other one at one of them.
@pytest.mark.parametrize("dependent", [False, True], ids=["", "pdl"])
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [*((n, torch.bfloat16) for n in range(kernel.MAX_TOKENS + 1)), (3, torch.float16)],
    ids=str,
)
def test_against_fp64_and_stock(tokens, dtype, dependent, monkeypatch):
    monkeypatch.setattr(pdl, "wanted", dependent)
    x, w, s = operands(tokens, dtype)
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
    found = kernel.router_few(x, w, s, TOPK, arrived)
    check(found, s)
    exact = x.double() @ w.double().T
    ours, cublas = found.logits.double(), torch.nn.functional.linear(x, w).double()
    if tokens:
        error, allowed = ((y - exact).norm() / exact.norm() for y in (ours, cublas))
        assert error <= 1.1 * allowed
    assert (ours - exact).abs().le(exact.abs() * torch.finfo(dtype).eps + 2e-5).all()
    for _ in range(20):  # the same bits at every run, whoever arrives last
        again = kernel.router_few(x, w, s, TOPK, arrived)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert int(arrived) == 0


def test_a_token_does_not_depend_on_the_others():
    x, w, s = operands(8)
    found = kernel.router_few(x, w, s, TOPK)
    for row in range(8):
        alone = kernel.router_few(x[row : row + 1], w, s, TOPK)
        for one, every in zip(alone, found, strict=True):
            assert torch.equal(one[0], every[row])


@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_logits(kind, dtype):
    """The weight is what a one-hot x makes the logits: ties, infinities, NaN, zeros, subnormals."""
    for row in logits(kind, 8, EXPERTS, TOPK, dtype, torch.Generator("cuda").manual_seed(5)):
        w = torch.zeros(EXPERTS, HIDDEN, dtype=dtype, device="cuda")
        w[:, 0] = row
        x = torch.zeros(1, HIDDEN, dtype=dtype, device="cuda")
        x[0, 0] = 1
        s = torch.linspace(0.5, 2, EXPERTS, device="cuda").to(dtype)
        found = kernel.router_few(x, w, s, TOPK)
        same = found.logits.view(torch.int16) == row.view(torch.int16)
        assert (same | (row == 0) | row.isnan()).all()
        check(found, s)


@pytest.mark.parametrize(("experts", "topk"), [(1, 1), (5, 5), (60, 6), (300, 16), (1024, 8)])
def test_odd_sizes(experts, topk):
    generator = torch.Generator("cuda").manual_seed(experts)
    x = torch.randn(3, 1544, device="cuda", generator=generator).bfloat16()
    w = torch.randn(experts, 1544, device="cuda", generator=generator).bfloat16() / 40
    s = torch.rand(experts, device="cuda", generator=generator)
    check(kernel.router_few(x, w, s, topk), s, topk)


def test_in_a_graph_with_other_inputs():
    x, w, s = operands(4)
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel.router_few(x, w, s, TOPK, arrived)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.router_few(x, w, s, TOPK, arrived)
    for _ in range(5):
        x.normal_()
        graph.replay()
        expected = kernel.router_few(x, w, s, TOPK, torch.zeros_like(arrived))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
