"""`mlp_few` in Triton's interpreter against plain torch with stock's roundings.

The interpreter runs programs one after the other, in the order of their numbers: a program that waits for a
later one, or for a wrong count, leaves NaN there. That programs run beside each other, tests/gpu shows.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from gemma4_turbo.kernels import mlp_few as kernel
from gemma4_turbo.kernels.dataflow import Product
from gemma4_turbo.kernels.mlp_few import Tiles

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]
BF16, HALF = torch.bfloat16, torch.float16
TILES = Tiles(Product(2, 1, 64), Product(2, 1, 32))
"""Small: a program has four lines of 64 or eight of 32."""
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(
    tokens: int = 2, hidden: int = 72, width: int = 24, dtype: torch.dtype = BF16
) -> Operands:
    """x is a view with a stride beyond its width."""
    generator = torch.Generator().manual_seed(tokens + width)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    x = torch.randn(tokens, hidden + 24, generator=generator).to(dtype)[:, :hidden]
    return x, drawn(2 * width, hidden), drawn(hidden, width)


def compare(given: Operands, tiles: Tiles = TILES) -> None:
    """Within two roundings of a row's largest, of stock's and of fp64."""
    found = kernel.mlp_few(*given, None, tiles)
    exact = kernel.reference_mlp_few(*(tensor.double() for tensor in given))
    stock = kernel.reference_mlp_few(*given)
    assert found.dtype == given[0].dtype
    bound = exact.abs().amax(-1, keepdim=True) * (2.0**-6 if found.dtype == BF16 else 2.0**-9)
    assert bool(((found.double() - exact).abs() <= bound).all())
    assert bool(((found.double() - stock.double()).abs() <= bound).all())


# A kernel for one token, for two, and for up to four; K with a rest, and without; rows with a rest.
@pytest.mark.parametrize(
    ("tokens", "hidden", "width"), [(1, 72, 24), (2, 64, 32), (3, 72, 40), (4, 8, 8), (1, 264, 104)]
)
def test_mlp_few(tokens, hidden, width):
    compare(operands(tokens, hidden, width))


def test_fp16():
    compare(operands(2, dtype=HALF))


@pytest.mark.parametrize(
    "tiles",
    [
        kernel.TILES,
        Tiles(Product(1, 2, 64), Product(4, 2, 32)),
        Tiles(Product(8, 1, 32), Product(1, 1, 128)),
    ],
    ids=["default", "deep", "wide"],
)
def test_tiles_change_the_order_of_addition_only(tiles):
    compare(operands(3), tiles)


def test_no_token_knows_of_another():
    """Bit for bit, at every run, alone and among others: four tokens are another kernel than one."""
    x, gate_up, down = operands(4)
    whole = kernel.mlp_few(x, gate_up, down, None, TILES).view(torch.int16)
    again = kernel.mlp_few(x, gate_up, down, None, TILES).view(torch.int16)
    alone = kernel.mlp_few(x[2:3], gate_up, down, None, TILES).view(torch.int16)
    assert torch.equal(whole, again)
    assert torch.equal(whole[2:3], alone)


def test_counts_are_left_as_zeros():
    """Launches one behind the other share them; a count that is not zero is a wait that ends too soon."""
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    for tokens in (1, 4, 2):
        given = operands(tokens)
        found = kernel.mlp_few(*given, counts, TILES)
        assert torch.equal(found, kernel.mlp_few(*given, None, TILES))
        assert not counts.any()
    counts[0] = 1
    assert kernel.mlp_few(*operands(1), counts, TILES).isnan().all()


def test_no_tokens():
    assert kernel.mlp_few(*operands(0)).shape == (0, 72)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-40, 0.0])
def test_what_is_no_number_comes_out_as_stocks(value):
    """In one token; the other one's numbers are its own."""
    x, gate_up, down = operands(2)
    x = x.clone()
    x[0, 3] = value
    found = kernel.mlp_few(x, gate_up, down, None, TILES)
    stock = kernel.reference_mlp_few(x, gate_up, down)
    assert torch.equal(found[0].isnan(), stock[0].isnan())
    torch.testing.assert_close(found[1], stock[1], rtol=2**-6, atol=2**-6)


X = torch.zeros(2, 72, dtype=BF16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, g, d: (X.repeat(3, 1), g, d), "x must have at most 4 rows"),
        (lambda x, g, d: (x[:, :64], g, d), "x must be [T, 72]"),
        (lambda x, g, d: (x.float(), g, d), "x is torch.float32"),
        (lambda x, g, d: (torch.zeros(2, 73, dtype=BF16)[:, 1:], g, d), "x must have rows at multiples"),
        (lambda x, g, d: (torch.zeros(2, 80, dtype=BF16)[:, 1:73], g, d), "x must be aligned"),
        (lambda x, g, d: (x, g.float(), d), "gate_up must be [a multiple of 16, H]"),
        (lambda x, g, d: (x, g[:40], d), "gate_up must be [a multiple of 16, H]"),
        (lambda x, g, d: (x, g[:, :70], d), "gate_up must be [2 M, a multiple of 8]"),
        (lambda x, g, d: (x, g[:0], d), "gate_up must be [2 M"),
        (lambda x, g, d: (x, g.repeat(1, 2)[:, ::2], d), "gate_up must be contiguous"),
        (lambda x, g, d: (x, g, d.T), "down must be (72, 24)"),
        (lambda x, g, d: (x, g, d.half()), "down is torch.float16"),
        (lambda x, g, d: (x, g, d, torch.zeros(3, dtype=torch.int32)), f"counts must be {kernel.COUNTS} int32"),
        (lambda x, g, d: (x, g, d, torch.zeros(kernel.COUNTS, 2, dtype=torch.int32)[:, 0]), "counts must be contiguous"),
        (lambda x, g, d: (x, g, d, torch.zeros(64)), f"counts must be {kernel.COUNTS} int32"),
        (lambda x, g, d: (x, g, d, None, TILES._replace(down=Product(3, 1, 64))), "tiles must be powers of two"),
        (lambda x, g, d: (x, g, d, None, TILES._replace(down=Product(2, 1, 512))), "tiles must have lines"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change: Any, message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kernel.mlp_few(*change(*operands()))
