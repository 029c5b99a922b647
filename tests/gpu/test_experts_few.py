"""`experts_few` at 26B-A4B's shapes against fp64 and stock's fused experts, and the same bits at every run."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.kernels import experts_few as kernel
from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.experts_few import Down, Tiles, Up
from tests.gpu.lines import give_arguments

HIDDEN, EXPERTS, TOPK = 2816, 128, 8
# The default, and cuts with several warps, lines within a warp, groups, and blocks of K held at once.
CUTS = (
    kernel.choose(TOPK),
    Tiles(Up(2, 2, 256, 4), Down(4, 2, 128, 1, 2)),
    Tiles(Up(4, 1, 128, 2), Down(8, 1, 64, 4, 8)),
)

Weights = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch):
    """As in a server, and with memory that was written to before: not a number in bf16."""
    give_arguments(monkeypatch)
    poison = torch.full((64 << 20,), 0x7F, dtype=torch.uint8, device="cuda")
    del poison
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[704, 352], ids=["one GPU", "two GPUs"])
def weights(request: pytest.FixtureRequest) -> Weights:
    """All experts of one layer, as wide as on one GPU and on each of two."""
    width, generator = request.param, torch.Generator("cuda").manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        return made.normal_(0, shape[-1] ** -0.5, generator=generator)

    return randn(EXPERTS, 2 * width, HIDDEN), randn(EXPERTS, HIDDEN, width)


def routed(tokens: int, skewed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x as a view with a stride beyond its width, factors and experts."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    scores = randn(tokens, EXPERTS)
    if skewed:  # every token on the same nine experts
        scores[:, 119:] += 20
    factors, ids = scores.topk(TOPK, dim=-1)
    x = randn(tokens, HIDDEN + 64).bfloat16()[:, :HIDDEN]
    return x, factors.softmax(dim=-1), ids.int()


def stock(x: torch.Tensor, weights: Weights, factors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """SGLang's own five launches."""
    return lines.stock().fused_experts(x.contiguous(), *weights, factors, ids)


def exact(x: torch.Tensor, weights: Weights, factors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """In fp64, from the chosen experts' weights alone."""
    chosen, places = ids.unique(return_inverse=True)
    w13, w2 = (weight[chosen].double() for weight in weights)
    return kernel.reference_experts_few(x.double(), w13, w2, factors.double(), places.int())


@pytest.mark.parametrize("skewed", [False, True], ids=["any expert", "few experts"])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_no_farther_from_fp64_than_stock(weights, tokens, skewed):
    x, factors, ids = routed(tokens, skewed)
    truth = exact(x, weights, factors, ids)
    theirs = (stock(x, weights, factors, ids).double() - truth).norm() / truth.norm()
    for tiles in CUTS:
        found = kernel.experts_few(x, *weights, factors, ids, tiles=tiles)
        ours = (found.double() - truth).norm() / truth.norm()
        assert float(ours) <= 1.1 * float(theirs), tiles
        for _ in range(20):
            again = kernel.experts_few(x, *weights, factors, ids, tiles=tiles)
            assert torch.equal(again.view(torch.int16), found.view(torch.int16)), tiles


def test_a_tokens_bits_are_its_own(weights):
    x, factors, ids = routed(8, True)
    found = kernel.experts_few(x, *weights, factors, ids)
    for token in range(8):
        own = slice(token, token + 1)
        alone = kernel.experts_few(x[own], *weights, factors[own], ids[own])
        assert torch.equal(alone.view(torch.int16), found[own].view(torch.int16))


def test_choices_without_an_expert_add_nothing(weights):
    """What the first launch leaves unwritten is not read."""
    x, factors, ids = routed(3, False)
    ids[0, ::2] = -1
    ids[1] = -1
    found = kernel.experts_few(x, *weights, factors, ids)
    kept = torch.where(ids < 0, torch.zeros_like(factors), factors)
    expected = kernel.experts_few(x, *weights, kept, ids.clamp(min=0))
    assert torch.equal(found, expected)
    assert not found[1].any()


def test_launched_early_within_a_graph(monkeypatch, weights):
    """Each call on the result of the one before, so that whoever does not wait reads the wrong one."""
    if not pdl.supported(torch.device("cuda")):
        pytest.skip("this GPU or this Triton has no programmatic dependent launch")
    x, factors, ids = routed(2, False)

    def chain() -> torch.Tensor:
        y = x
        for tiles in CUTS * 4:
            y = kernel.experts_few(y, *weights, factors, ids, tiles=tiles)
            y = torch.nn.functional.rms_norm(y, (HIDDEN,))
            y = kernel.experts_few(y, *weights, factors, ids, tiles=tiles)
            y = kernel.experts_few(y * 8, *weights, factors, ids, tiles=tiles) * 8
        return y

    expected = chain()
    assert expected.isfinite().all()
    monkeypatch.setattr(pdl, "wanted", True)
    before = pdl.launches
    assert torch.equal(chain(), expected)
    assert pdl.launches == before + 2 * 3 * 4 * len(CUTS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
