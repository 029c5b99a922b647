"""`feed_forward_few` in Triton's interpreter against plain torch with stock's roundings.

The interpreter runs programs one after the other, in the order of their numbers: a program that waits for a
later one, or for a wrong count, leaves NaN there. That programs run beside each other, tests/gpu shows.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from gemma4_turbo.kernels import feed_forward_few as kernel
from gemma4_turbo.kernels import router_few
from gemma4_turbo.kernels.dataflow import Product
from gemma4_turbo.kernels.feed_forward_few import Inputs, Tiles, Weights

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]

BF16, HALF = torch.bfloat16, torch.float16
TILES = Tiles(*(Product(rows, 1, line) for rows, line in ((1, 64), (2, 64), (2, 64), (2, 32), (2, 32))))  # fmt: skip
"""Small: a program has four lines of 64 or eight of 32."""


def operands(
    tokens: int = 2,
    hidden: int = 72,
    width: int = 24,
    narrow: int = 16,
    experts: int = 6,
    topk: int = 2,
    dtype: torch.dtype = BF16,
) -> tuple[Inputs, Weights, int]:
    """Inputs are views with a stride beyond their width."""
    generator = torch.Generator().manual_seed(tokens + 10 * topk)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    wide = torch.randn(3, tokens, hidden + 24, generator=generator).to(dtype)
    return (
        Inputs(*(x[:, :hidden] for x in wide)),
        Weights(
            drawn(2 * width, hidden),
            drawn(hidden, width),
            drawn(experts, hidden) * 3,
            torch.rand(experts, generator=generator) + 0.5,
            drawn(experts, 2 * narrow, hidden),
            drawn(experts, hidden, narrow),
        ),
        topk,
    )


def compare(given: tuple[Inputs, Weights, int], tiles: Tiles = TILES) -> kernel.Found:
    """With the reference and with fp64; returns what was found."""
    inputs, weights, _ = given
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    found = kernel.feed_forward_few(*given, counts, tiles)
    assert not counts.any()
    expected = kernel.reference_feed_forward_few(*given)
    assert torch.equal(found.routed.ids, expected.routed.ids)
    torch.testing.assert_close(found.routed.weights, expected.routed.weights, rtol=1e-6, atol=0)
    wide_inputs = Inputs(*(x.double() for x in inputs))
    wide = Weights(*(weight.double() for weight in weights))
    exact = kernel.reference_mlp(wide_inputs, wide)
    chosen = kernel.reference_experts(wide_inputs, wide, found.routed)
    for mine, stocks, true in (
        (found.mlp_output, expected.mlp_output, exact),
        (found.experts_output, expected.experts_output, chosen),
    ):
        ours, theirs = (float((y.double() - true).norm()) for y in (mine, stocks))
        # The same roundings: of the few sums near the middle of two numbers one may round elsewhere.
        assert ours <= 1.1 * theirs
    return found


# Every number of tokens that the kernel takes; one choice and all eight; both dtypes.
@pytest.mark.parametrize(
    ("tokens", "topk", "dtype"),
    [*((tokens, 2, BF16) for tokens in range(5)), (1, 1, BF16), (1, 8, BF16), (2, 4, HALF)],
    ids=str,
)
def test_tokens_and_choices(tokens, topk, dtype):
    given = operands(tokens, experts=9 if topk == 8 else 6, topk=topk, dtype=dtype)
    tiles = TILES._replace(chosen_down=TILES.chosen_down._replace(rows=min(2, topk)))
    found = compare(given, tiles)
    assert found.mlp_output.shape == found.experts_output.shape == (tokens, 72)


# Each of the widths below, at and beyond a program's part of it, masked at the end.
@pytest.mark.parametrize(
    ("hidden", "width", "narrow"), [(8, 8, 8), (64, 16, 16), (136, 40, 24)], ids=str
)
def test_sizes(hidden, width, narrow):
    compare(operands(1, hidden, width, narrow))


# Each field of the tiles other than in `TILES`, lines of one vector and of a whole warp.
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(Product(1, 2, 32), Product(1, 2, 32), Product(1, 4, 8), Product(1, 2, 16), Product(1, 2, 64)),
        Tiles(*(Product(rows, 1, 256) for rows in (1, 4, 4, 4, 2))),
        kernel.choose(2),
    ],
    ids=["narrow", "wide", "default"],
)  # fmt: skip
def test_tiles_change_the_order_of_addition_only(tiles):
    compare(operands(3), tiles)


def bits(found: kernel.Found) -> list[torch.Tensor]:
    halves = found.mlp_output, found.experts_output, found.routed.logits
    return [
        *(x.view(torch.int16) for x in halves),
        found.routed.weights.view(torch.int32),
        found.routed.ids,
    ]


def test_no_token_knows_of_another():
    """Bit for bit, at every run, alone and among others: four tokens are another kernel than one."""
    inputs, weights, topk = operands(4)
    whole = bits(kernel.feed_forward_few(inputs, weights, topk, None, TILES))
    again = bits(kernel.feed_forward_few(inputs, weights, topk, None, TILES))
    assert all(map(torch.equal, whole, again))
    own = Inputs(*(x[2:3] for x in inputs))
    alone = bits(kernel.feed_forward_few(own, weights, topk, None, TILES))
    assert all(torch.equal(a[2:3], b) for a, b in zip(whole, alone, strict=True))


def test_rows_in_a_thread_do_not_change_a_bit():
    """They may differ by the number of tokens; lines and blocks may not: they are the order of addition."""
    given = operands(2)
    plain = bits(kernel.feed_forward_few(*given, None, TILES))
    more = Tiles(*(product._replace(rows=product.rows * 2) for product in TILES))
    more = more._replace(router=TILES.router, chosen_down=TILES.chosen_down._replace(rows=1))
    assert all(map(torch.equal, plain, bits(kernel.feed_forward_few(*given, None, more))))


def test_launches_share_counts_one_after_the_other():
    """Of other numbers of tokens, too: what one leaves behind, the next one begins with."""
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    for tokens in (4, 1, 3):
        given = operands(tokens)
        found = bits(kernel.feed_forward_few(*given, counts, TILES))
        assert all(map(torch.equal, found, bits(kernel.feed_forward_few(*given, None, TILES))))
        assert not counts.any()


@pytest.mark.parametrize("count", ["ROUTED", "DENSE"])
def test_a_wrong_count_shows(count):
    """So that the other tests would see a program that waits for too few or too many."""
    counts = torch.zeros(kernel.COUNTS, dtype=torch.int32)
    counts[getattr(kernel, count)] = 1
    found = kernel.feed_forward_few(*operands(1), counts, TILES)
    output = found.mlp_output if count == "DENSE" else found.experts_output
    assert output.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["mlp", "router", "experts", "down", "w2"])
def test_what_is_no_number(where, value):
    """It shows up where it does in the reference: of a token's inputs, in its own rows alone."""
    inputs, weights, topk = operands(2)
    of_inputs = where in Inputs._fields
    given = getattr(inputs if of_inputs else weights, where)
    given[(0,) * given.dim()] = value
    found = kernel.feed_forward_few(inputs, weights, topk, None, TILES)
    expected = kernel.reference_feed_forward_few(inputs, weights, topk)
    assert torch.equal(found.routed.ids, expected.routed.ids)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02, equal_nan=True)
    if of_inputs:
        assert found.mlp_output[1].isfinite().all()
        assert found.experts_output[1].isfinite().all()


def test_equal_logits_choose_the_lower_expert():
    inputs, weights, _ = operands(2)
    weights.router[:] = weights.router[:1]
    found = kernel.feed_forward_few(inputs, weights, 4, None, TILES)
    assert found.routed.ids.tolist() == [[0, 1, 2, 3]] * 2


def test_the_activations_are_stocks():
    """GELU of -3: a tenth apart in the dense MLP's tanh form and the experts' erf form."""
    inputs, weights, topk = operands(1, 8, 8, 8, 1, 1)
    for x in inputs:
        x[:] = torch.eye(8)[:1]
    for both in (weights.gate_up, weights.w13[0]):
        both[:] = 0
        both[:, 0] = torch.tensor([-3.0] * 8 + [1.0] * 8)
    for down in (weights.down, weights.w2[0]):
        down[:] = torch.eye(8)
    weights.scale[:] = 1
    found = kernel.feed_forward_few(inputs, weights, topk)
    gate = torch.tensor(-3.0)
    for output, form in ((found.mlp_output, "tanh"), (found.experts_output, "none")):
        expected = torch.nn.functional.gelu(gate, approximate=form).bfloat16()
        assert output.tolist() == [[float(expected)] * 8]


def part(of: Any, **changes: Any) -> Any:
    return of._replace(**changes)


X = torch.zeros(2, 72, dtype=BF16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, w, k: (i, w, 3), "topk must be 1, 2, 4 or 8"),
        (lambda i, w, k: (i, w, 8), "topk must be"),
        (lambda i, w, k: (part(i, mlp=X.repeat(3, 1)), w, k), "mlp must have at most 4 rows"),
        (lambda i, w, k: (part(i, router=X[:1]), w, k), "router must be [2, 72]"),
        (lambda i, w, k: (part(i, experts=X.float()), w, k), "experts is torch.float32"),
        (lambda i, w, k: (part(i, mlp=torch.zeros(2, 73, dtype=BF16)[:, 1:]), w, k), "mlp must be aligned"),
        (lambda i, w, k: (i, part(w, gate_up=w.gate_up.float()), k), "gate_up must be [a multiple"),
        (lambda i, w, k: (i, part(w, gate_up=w.gate_up[:40]), k), "gate_up must be [a multiple"),
        (lambda i, w, k: (i, part(w, down=w.down.T), k), "down must be (72, 24)"),
        (lambda i, w, k: (i, part(w, down=w.down.half()), k), "down is torch.float16"),
        (lambda i, w, k: (i, part(w, w2=w.w2[:5]), k), "w2 must be (6, 72, 16)"),
        (lambda i, w, k: (i, part(w, w13=w.w13[:5]), k), "w13 must be [6"),
        (lambda i, w, k: (i, part(w, w13=w.w13[:, :24]), k), "w13 must be [6, a multiple of 16"),
        (lambda i, w, k: (i, part(w, scale=w.scale[:5]), k), "scale must be [6]"),
        (lambda i, w, k: (i, part(w, router=w.router.repeat(1, 2)[:, ::2]), k), "router must be contiguous"),
        (lambda i, w, k: (i, w, k, torch.zeros(3, dtype=torch.int32)), f"counts must be {kernel.COUNTS} int32"),
        (lambda i, w, k: (i, w, k, torch.zeros(40)), f"counts must be {kernel.COUNTS} int32"),
        (lambda i, w, k: (i, w, k, None, part(TILES, dense=Product(3, 1, 64))), "tiles must be powers of two"),
        (lambda i, w, k: (i, w, k, None, part(TILES, dense=Product(2, 1, 512))), "tiles must have lines"),
        (lambda i, w, k: (i, w, k, None, part(TILES, router=Product(2, 1, 64))), "tiles must have one row"),
        (lambda i, w, k: (i, w, k, None, part(TILES, chosen_down=Product(4, 1, 64))), "tiles must have choices"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kernel.feed_forward_few(*change(*operands()))


def test_the_routing_is_router_fews():
    given = operands(3)
    found = kernel.feed_forward_few(*given, None, TILES).routed
    weights, ids = router_few.reference_routing(found.logits, given[1].scale, 2)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.weights, weights, rtol=1e-6, atol=0)
