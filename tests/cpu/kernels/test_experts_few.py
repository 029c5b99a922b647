"""`experts_few` in Triton's interpreter against plain torch with stock's roundings."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from gemma4_turbo.kernels import experts_few as kernel
from gemma4_turbo.kernels import measured
from gemma4_turbo.kernels.experts_few import Down, Tiles, Up

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]

POISON = 123.0
BF16, HALF = torch.bfloat16, torch.float16
TILES = Tiles(Up(4, 1, 64, 1), Down(2, 1, 32, 1, 0))
"""Small: a program of the first launch has 16 columns and blocks of 64, of the second 8 rows and 32."""


def operands(
    tokens: int = 2,
    choices: int = 4,
    experts: int = 6,
    width: int = 40,
    hidden: int = 136,
    dtype: torch.dtype = BF16,
) -> dict[str, torch.Tensor]:
    """What a router and a layer hand over; x is a view with a stride beyond its width."""
    generator = torch.Generator().manual_seed(tokens + 10 * choices)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    whole = torch.full((tokens, hidden + 24), POISON, dtype=dtype)
    whole[:, :hidden] = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(tokens, experts, generator=generator)
    return {
        "x": whole[:, :hidden],
        "w13": randn(experts, 2 * width, hidden),
        "w2": randn(experts, hidden, width),
        "topk_weights": torch.rand(tokens, choices, generator=generator) + 0.1,
        "topk_ids": scores.topk(choices, dim=-1).indices.int(),
    }


def compare(given: dict[str, torch.Tensor], tiles: Tiles = TILES) -> torch.Tensor:
    """With the reference and with fp64; returns what was found."""
    found = kernel.experts_few(**given, tiles=tiles)
    expected = kernel.reference_experts_few(**given)
    wide = {name: t.double() for name, t in given.items() if name != "topk_ids"}
    exact = kernel.reference_experts_few(**wide, topk_ids=given["topk_ids"])
    ours, theirs = (float((y.double() - exact).norm()) for y in (found, expected))
    # The same roundings: of the few sums that lie near the middle of two numbers one may round elsewhere.
    assert ours <= 1.1 * theirs
    ulp = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * ulp, atol=2 * ulp)
    return found


# Every number of tokens that the kernel takes, with ids that repeat among them; both dtypes; one choice
# and all eight, in groups of one, two and all at once.
@pytest.mark.parametrize(
    ("tokens", "choices", "dtype"),
    [*((tokens, 4, BF16) for tokens in range(9)), (2, 1, BF16), (1, 8, BF16), (2, 2, HALF)],
    ids=str,
)
def test_tokens_and_choices(tokens, choices, dtype):
    given = operands(tokens, choices, 9 if choices == 8 else 6, 16, 64, dtype)
    group = min(choices, 2 if tokens % 2 else 4)
    found = compare(given, TILES._replace(down=TILES.down._replace(group=group)))
    assert found.shape == (tokens, 64)


# Sizes below, at and beyond a program's part of them, in K and in rows, with what is masked at the end.
@pytest.mark.parametrize(
    ("width", "hidden"), [(8, 8), (16, 64), (24, 72), (64, 128), (40, 200)], ids=str
)
def test_sizes(width, hidden):
    compare(operands(1, 2, 3, width, hidden))


# Each field of the tiles other than in `TILES`, lines from one vector to a whole warp's, and the default.
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(Up(1, 2, 32, 2), Down(1, 2, 8, 2, 0)),
        Tiles(Up(2, 4, 8, 1), Down(4, 1, 256, 1, 2)),
        Tiles(Up(1, 1, 256, 4), Down(4, 4, 16, 1, 4)),
        kernel.choose(4),
    ],
    ids=str,
)
def test_tiles_change_the_order_of_addition_only(tiles):
    compare(operands(1, 4, 6, 24, 72), tiles)


def test_the_models_proportions():
    """A token of 26B-A4B with a sixteenth of its widths and the default tiles."""
    compare(operands(1, 8, 8, 40, 176), kernel.choose(8))


def test_choices_without_an_expert_add_nothing():
    """Not even what is not a number: their rows are read at expert 0, or not written at all."""
    given = operands(3)
    given["topk_ids"][:] = torch.tensor([[-1, 2, 3, -1], [4, -1, 1, 2], [-1, -1, -1, -1]])
    for name in ("w13", "w2"):
        given[name][0] = float("nan")
    found = compare(given)
    assert found[2].tolist() == [0.0] * found.shape[1]


def test_no_token_knows_of_another():
    """Bit for bit: alone, and among others that share its experts."""
    given = operands(8, 2, 3, 16, 64)
    found = kernel.experts_few(**given, tiles=TILES)
    again = kernel.experts_few(**given, tiles=TILES)
    assert torch.equal(found.view(torch.int16), again.view(torch.int16))
    own = {name: given[name][5:6] for name in ("x", "topk_weights", "topk_ids")}
    alone = kernel.experts_few(**(given | own), tiles=TILES)
    assert torch.equal(alone.view(torch.int16), found[5:6].view(torch.int16))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "w13", "w2", "topk_weights"])
def test_what_is_no_number(where, value):
    """It shows up where it does in the reference, and nowhere else."""
    given = operands(2, 2, 3, 16, 64)
    given["topk_ids"][:] = torch.tensor([[0, 1], [2, 1]])
    given[where][(0,) * given[where].dim()] = value
    found = kernel.experts_few(**given, tiles=TILES)
    expected = kernel.reference_experts_few(**given)
    assert not expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02, equal_nan=True)
    assert found[1].isfinite().all()


@pytest.mark.parametrize("left_out", [None, "gate and up", "activation", "expert"])
def test_the_roundings_are_stocks(left_out):
    """Sums of one product each, so that no order matters: bit for bit, and not with a rounding less."""

    def stocks(what: str, y: torch.Tensor) -> torch.Tensor:
        return y if what == left_out else y.bfloat16().float()

    generator = torch.Generator().manual_seed(1)
    x, w13 = torch.zeros(1, 64, dtype=BF16), torch.zeros(2, 16, 64, dtype=BF16)
    w2 = torch.zeros(2, 64, 8, dtype=BF16)
    x[0, 0] = 1.3
    w13[:, [0, 8], 0] = torch.randn(2, 2, generator=generator).bfloat16()
    w2[:, :, 0] = torch.randn(2, 64, generator=generator).bfloat16()
    factors = torch.tensor([[0.3, 0.7]])
    ids = torch.tensor([[1, 0]], dtype=torch.int32)
    expected = torch.zeros(64)
    for factor, expert in zip(factors[0], (1, 0), strict=True):
        gate, up = stocks("gate and up", w13[expert, [0, 8], 0].float() * x[0, 0].float())
        h = stocks("activation", torch.nn.functional.gelu(gate) * up)
        expected += stocks("expert", w2[expert, :, 0].float() * h * factor)
    found = kernel.experts_few(x, w13, w2, factors, ids, tiles=TILES)
    assert torch.equal(found[0], expected.bfloat16()) == (left_out is None)


# In one group, in two, and one choice at a time.
@pytest.mark.parametrize("group", [4, 2, 1])
def test_the_choices_are_added_from_the_first_to_the_last(group):
    """Something small after what cancels stays, before it it is lost: in fp32."""
    given = operands(1, 4, 4, 8, 8)
    given["topk_ids"][:] = torch.arange(4)
    for name in ("w13", "w2"):  # so that all experts' results differ by their factor alone
        given[name][:] = given[name][:1]
    tiles = TILES._replace(down=TILES.down._replace(group=group))
    huge = 2.0**60
    for factors, kept in (((1, huge, -huge, 0), False), ((huge, -huge, 1, 0), True)):
        given["topk_weights"][:] = torch.tensor(factors)
        assert bool(kernel.experts_few(**given, tiles=tiles).any()) == kept


def test_where_it_writes():
    """Into what is given and nothing beside it, x itself included. Programs of 16 rows, and 72 of them."""
    given = operands(2, 2, 3, 16, 72)
    tiles = TILES._replace(down=TILES.down._replace(line=16))
    expected = kernel.experts_few(**given, tiles=tiles)
    whole = torch.full((4, 136), POISON, dtype=BF16)
    out = whole[1:3, 32:104]
    assert kernel.experts_few(**given, tiles=tiles, out=out) is out
    assert torch.equal(out, expected)
    out[:] = POISON
    assert (whole == POISON).all()
    assert kernel.experts_few(**given, tiles=tiles, out=given["x"]) is given["x"]
    assert torch.equal(given["x"], expected)


GOOD = operands()
DECLINED: list[tuple[str, dict[str, Any]]] = [
    ("w13", {"w13": GOOD["w13"].float()}),
    ("w13", {"w13": GOOD["w13"][0]}),
    ("w13", {"w13": GOOD["w13"][:, :, :128]}),
    ("w13", {"w13": torch.ones(6, 72, 136, dtype=BF16)}),
    ("w13", {"w13": torch.ones(6, 80, 140, dtype=BF16)}),
    ("w13", {"w13": torch.ones(0, 80, 136, dtype=BF16)}),
    ("w13", {"w13": torch.ones(6 * 80 * 136 + 1, dtype=BF16)[1:].view(6, 80, 136)}),
    ("w2", {"w2": GOOD["w2"].half()}),
    ("w2", {"w2": GOOD["w2"][:, :, :32]}),
    ("w2", {"w2": GOOD["w2"].mT.contiguous().mT}),
    ("w2", {"w2": GOOD["w2"][:5]}),
    ("w2", {"w2": GOOD["w2"].to("meta")}),
    ("x", {"x": GOOD["x"][:, :128]}),
    ("x", {"x": GOOD["x"].half()}),
    ("x", {"x": torch.ones(136, 2, dtype=BF16).T}),
    ("x", {"x": torch.ones(2, 140, dtype=BF16)[:, :136]}),
    ("x", {"x": torch.ones(2, 144, dtype=BF16)[:, 1:137]}),
    ("x", {"x": torch.ones(9, 136, dtype=BF16)}),
    ("topk_ids", {"topk_ids": GOOD["topk_ids"].long()}),
    ("topk_ids", {"topk_ids": GOOD["topk_ids"][:1]}),
    ("topk_ids", {"topk_ids": GOOD["topk_ids"][:, :3].contiguous()}),
    ("topk_ids", {"topk_ids": GOOD["topk_ids"][:, :2]}),
    ("topk_weights", {"topk_weights": GOOD["topk_weights"].bfloat16()}),
    ("topk_weights", {"topk_weights": GOOD["topk_weights"][:, :2]}),
    ("topk_weights", {"topk_weights": torch.rand(4, 2).T}),
    ("out", {"out": torch.ones(2, 128, dtype=BF16)}),
    ("out", {"out": torch.ones(2, 136)}),
    ("out", {"out": torch.ones(136, 2, dtype=BF16).T}),
    ("tiles", {"tiles": TILES._replace(up=Up(3, 1, 64, 1))}),
    ("tiles", {"tiles": TILES._replace(up=Up(1, 1, 512, 1))}),
    ("tiles", {"tiles": TILES._replace(down=Down(2, 1, 4, 1, 0))}),
    ("tiles", {"tiles": TILES._replace(down=Down(8, 1, 64, 1, 0))}),
    ("tiles", {"tiles": TILES._replace(down=Down(2, 1, 64, 1, 8))}),
    ("tiles", {"tiles": TILES._replace(down=Down(2, 1, 64, 1, 3))}),
]


def test_what_the_cases_below_change_is_taken():
    """So that nothing but the change can be what is declined."""
    kernel.experts_few(**GOOD, tiles=TILES)
    reason = kernel.unfit(**GOOD, out=torch.ones(2, 136, dtype=BF16))
    assert reason is None


@pytest.mark.parametrize(("argument", "changed"), DECLINED)
def test_value_error_names_the_argument(argument, changed):
    with pytest.raises(ValueError, match=rf"^{re.escape(argument)} "):
        kernel.experts_few(**({**GOOD, "tiles": TILES} | changed))


def test_a_gpu_of_another_generation_is_declined(monkeypatch):
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    assert kernel.unfit(**GOOD) == measured.known("x", torch.device("cpu"))
