"""`mlp_few` at the models' shapes against fp64, the same bits at every run, and no wait for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gemma4_turbo.kernels import mlp_few as kernel
from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.dataflow import Product
from gemma4_turbo.kernels.mlp_few import Tiles

# E2B's layers of both kinds, E4B's, 31B's, and one with a rest in both sizes.
SHAPES = ((1536, 6144), (1536, 12288), (2560, 10240), (5376, 21504), (1000, 1352))
CUTS = (
    kernel.TILES,
    Tiles(Product(1, 2, 128), Product(2, 2, 64)),
    Tiles(Product(4, 1, 256), Product(8, 1, 256)),
)


@pytest.fixture(autouse=True)
def early() -> Iterator[None]:
    """As the patch `pdl` found it."""
    kept = pdl.wanted
    yield
    pdl.wanted = kept


def operands(
    hidden: int, width: int, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(width + tokens)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)

    return drawn(tokens, hidden), drawn(2 * width, hidden) * hidden**-0.5, drawn(hidden, width) * width**-0.5  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize(("hidden", "width"), SHAPES)
def test_no_farther_from_fp64_than_stock(hidden, width, tokens):
    """Plus a tenth, of the norm of a row: its sums are in fp32, roundings stock's."""
    given = operands(hidden, width, tokens)
    exact = kernel.reference_mlp_few(*(tensor.double() for tensor in given))
    stock = kernel.reference_mlp_few(*given)
    for tiles in CUTS:
        found = kernel.mlp_few(*given, None, tiles)
        error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (found, stock))
        assert error <= 1.1 * allowed, tiles


@pytest.mark.parametrize("wanted", [False, True])
def test_the_same_bits_at_every_run(wanted):
    """Of launches one behind the other, which share their counts: a race would show in some of 500."""
    pdl.wanted = wanted
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32, device="cuda")
    every = [operands(1536, 6144, tokens) for tokens in (1, 4, 2, 3)]
    first = [kernel.mlp_few(*given, counts) for given in every]
    for _ in range(125):
        again = [kernel.mlp_few(*given, counts) for given in every]
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(first, again, strict=True))  # fmt: skip
    assert not counts.any()


def test_in_a_graph():
    """Replayed on other inputs."""
    pdl.wanted = True
    x, gate_up, down = operands(2560, 10240, 2)
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32, device="cuda")
    kernel.mlp_few(x, gate_up, down, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.mlp_few(x, gate_up, down, counts)
    for seed in range(3):
        x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        graph.replay()
        assert torch.equal(found, kernel.mlp_few(x, gate_up, down))
    assert not counts.any()


def test_beside_a_busy_gpu():
    """Programs that wait keep nobody out whom they wait for, whatever else takes the multiprocessors."""
    given = operands(2560, 10240, 1)
    alone = kernel.mlp_few(*given)
    side = torch.cuda.Stream()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(side):
        for _ in range(20):
            a = (a @ a).clamp_(-1, 1)
    for _ in range(50):
        assert torch.equal(kernel.mlp_few(*given), alone)
    torch.cuda.synchronize()
