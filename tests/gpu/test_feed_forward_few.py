"""`feed_forward_few` at 26B-A4B's shape against fp64, the same bits at every run, and no wait for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gemma4_turbo.kernels import feed_forward_few as kernel
from gemma4_turbo.kernels import pdl, router_few
from gemma4_turbo.kernels.dataflow import Product
from gemma4_turbo.kernels.feed_forward_few import (
    Found,
    Inputs,
    Weights,
)

HIDDEN, WIDTH, NARROW, EXPERTS, TOPK = 2816, 2112, 704, 128, 8
DEFAULT = kernel.choose(TOPK)
# The default, one with lines within a warp and blocks of K held at once, and one with many rows in a thread.
CUTS = (
    DEFAULT,
    kernel.Tiles(Product(1, 2, 128), Product(1, 2, 128), Product(1, 2, 128), Product(2, 2, 64), Product(2, 1, 64)),
    kernel.Tiles(Product(1, 1, 256), Product(4, 1, 256), Product(4, 1, 256), Product(8, 1, 256), Product(8, 1, 256)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """With memory that was written to before: not a number in bf16."""
    poison = torch.full((64 << 20,), 0x7F, dtype=torch.uint8, device="cuda")
    del poison
    before = pdl.wanted
    with torch.no_grad():
        yield
    pdl.wanted = before


@pytest.fixture(scope="module")
def layers() -> list[Weights]:
    """Two layers, so that one launch finds nothing of the other's in the L2 cache."""
    generator = torch.Generator("cuda").manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        return made.normal_(0, shape[-1] ** -0.5, generator=generator)

    return [
        Weights(
            drawn(2 * WIDTH, HIDDEN),
            drawn(HIDDEN, WIDTH),
            drawn(EXPERTS, HIDDEN),
            torch.rand(EXPERTS, device="cuda", generator=generator) + 0.5,
            drawn(EXPERTS, 2 * NARROW, HIDDEN),
            drawn(EXPERTS, HIDDEN, NARROW),
        )
        for _ in range(2)
    ]


def inputs(tokens: int, seed: int = 0) -> Inputs:
    """Views with a stride beyond their width."""
    generator = torch.Generator("cuda").manual_seed(seed)
    wide = torch.randn(3, tokens, HIDDEN + 64, device="cuda", generator=generator).bfloat16()
    return Inputs(*(x[:, :HIDDEN] for x in wide))


def bits(found: Found) -> list[torch.Tensor]:
    halves = found.mlp_output, found.experts_output, found.routed.logits
    return [*(x.view(torch.int16) for x in halves), found.routed.weights.view(torch.int32), found.routed.ids]  # fmt: skip


def same(a: Found, b: Found) -> bool:
    return all(map(torch.equal, bits(a), bits(b)))


# Every number of tokens; each cut with the smallest and the largest number, launched early and as usual.
@pytest.mark.parametrize(
    ("tokens", "cut", "early"),
    [
        *((tokens, 0, True) for tokens in (1, 2, 3, 4)),
        *((tokens, cut, False) for tokens in (1, 4) for cut in range(len(CUTS))),
    ],
)
def test_as_near_to_fp64_as_stock(layers, tokens, cut, early):
    pdl.wanted = early
    given, weights = inputs(tokens), layers[0]
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32, device="cuda")
    found = kernel.feed_forward_few(given, weights, TOPK, counts, CUTS[cut])
    assert not counts.any()
    stock = kernel.reference_feed_forward_few(given, weights, TOPK)
    exact_logits = given.router.double() @ weights.router.double().T
    chosen, places = found.routed.ids.unique(return_inverse=True)
    wide = weights._replace(
        **{name: getattr(weights, name).double() for name in ("gate_up", "down")},
        w13=weights.w13[chosen].double(), w2=weights.w2[chosen].double(),
    )  # fmt: skip
    wide_inputs = Inputs(*(x.double() for x in given))
    routed = found.routed._replace(ids=places.int())
    for ours, theirs, exact in (
        (found.mlp_output, stock.mlp_output, kernel.reference_mlp(wide_inputs, wide)),
        (
            found.experts_output,
            kernel.reference_experts(given, weights, found.routed),
            kernel.reference_experts(wide_inputs, wide, routed),
        ),
        (found.routed.logits, stock.routed.logits, exact_logits),
    ):
        mine, stocks = (float((y.double() - exact).norm()) for y in (ours, theirs))
        assert mine <= 1.1 * stocks
    factors, ids = router_few.reference_routing(found.routed.logits, weights.scale, TOPK)
    assert torch.equal(found.routed.ids, ids)
    torch.testing.assert_close(found.routed.weights, factors, rtol=2**-18, atol=0)


def test_no_token_knows_of_another(layers):
    given = inputs(4)
    whole = bits(kernel.feed_forward_few(given, layers[0], TOPK))
    for token in range(4):
        own = Inputs(*(x[token : token + 1] for x in given))
        alone = bits(kernel.feed_forward_few(own, layers[0], TOPK))
        assert all(torch.equal(a[token : token + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("early", [False, True])
def test_the_same_bits_at_every_run(layers, early):
    """Of launches one behind the other, which share their counts: a race would show in some of 400."""
    pdl.wanted = early
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32, device="cuda")
    every = [inputs(tokens, seed) for seed, tokens in enumerate((1, 4, 2, 3))]
    first = [kernel.feed_forward_few(x, w, TOPK, counts) for x in every for w in layers]
    for _ in range(50):
        again = [kernel.feed_forward_few(x, w, TOPK, counts) for x in every for w in layers]
        assert all(map(same, first, again))
    assert not counts.any()


def test_in_a_graph(layers):
    """Replayed on other inputs."""
    pdl.wanted = True
    given, other = inputs(2), inputs(2, 1)
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32, device="cuda")
    expected = [kernel.feed_forward_few(x, layers[0], TOPK, counts) for x in (given, other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.launch_feed_forward_few(given, layers[0], TOPK, counts, DEFAULT)
    for x, result in zip((given, other), expected, strict=True):
        for here, new in zip(given, x, strict=True):
            here.copy_(new.clone())
        graph.replay()
        assert same(found, result)


def test_two_streams_and_a_busy_gpu_do_not_wait_for_ever(layers):
    """Launches of two streams take each other's multiprocessors, and a product takes those of both."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    counts = [torch.zeros(kernel.COUNTS, dtype=torch.int32, device="cuda") for _ in streams]
    given = inputs(4)
    expected = [kernel.feed_forward_few(given, weights, TOPK) for weights in layers]
    wide = torch.randn(4096, 4096, device="cuda").bfloat16()
    torch.cuda.synchronize()
    found = []
    for _ in range(30):
        for stream, weights, zeros in zip(streams, layers, counts, strict=True):
            with torch.cuda.stream(stream):
                found.append(kernel.feed_forward_few(given, weights, TOPK, zeros))
        wide @ wide
    torch.cuda.synchronize()
    assert all(same(one, expected[i % 2]) for i, one in enumerate(found))


def test_equal_logits_and_what_is_no_number(layers):
    """Ties go to the lower expert; infinities and NaN of one token stay with it."""
    given = inputs(4)
    given.router[1] = 0
    given.mlp[2, 5] = float("inf")
    given.experts[3, 7] = float("nan")
    found = kernel.feed_forward_few(given, layers[0], TOPK)
    assert found.routed.ids[1].tolist() == list(range(TOPK))
    assert found.mlp_output[2].isnan().any()
    assert found.experts_output[3].isnan().all()
    for output, token in ((found.mlp_output, 2), (found.experts_output, 3)):
        others = [i for i in range(4) if i != token]
        assert output[others].isfinite().all()


def test_no_tokens(layers):
    found = kernel.feed_forward_few(inputs(0), layers[0], TOPK)
    assert found.mlp_output.shape == found.experts_output.shape == (0, HIDDEN)
