"""The quickened interpreter computes what Triton's own does, to the bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests import interpreter

pytestmark = [
    pytest.mark.skipif(
        triton.__version__ not in interpreter.RELEASES, reason="Triton's interpreter is another one"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _scaled(x, SCALE: tl.constexpr):
    return tl.where(x > 0, x * SCALE, tl.exp2(x))


@triton.jit
def _kernel(x, y, numbers, floats, integers, stride, columns, BLOCK: tl.constexpr):
    """Products, sums, a loop, calls in calls, widened and narrowed types, integers that wrap."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    there = at < columns
    a = tl.load(x + row * stride + at, there, other=0.5).to(tl.float32)
    b = tl.load(y + at[:, None] * BLOCK + at[None, :])
    sums = tl.dot(tl.broadcast_to(a[None, :], (BLOCK, BLOCK)), b.to(tl.float32))
    for step in range(3):
        sums = _scaled(sums, 0.25) + step
    total = tl.sum(sums, 1) + tl.max(sums, 0) + tl.cumsum(a, 0) + tl.reduce(a, 0, _larger)
    tl.store(floats + row * BLOCK + at, total.to(tl.bfloat16), there)
    found = tl.load(numbers + at)
    found = found * 65_537 + (found << 3) - (at & 5) + found // 3 + found % 7
    tl.store(integers + row * BLOCK + at, found, there)


@triton.jit
def _edges_kernel(x, halves, wide, narrow, BLOCK: tl.constexpr):
    """Both ways between bf16 and fp32 down to subnormals; quotients of halves; numbers beside blocks."""
    at = tl.arange(0, BLOCK)
    a, b, h = tl.load(x + at), tl.load(x + (at ^ 1)), tl.load(halves + at)
    tl.store(wide + at, a.to(tl.float32))
    tl.store(wide + BLOCK + at, (h / (h + 1)).to(tl.float32) * 3)
    near = (2 - a.to(tl.float32)) * 0.5 + (3 - a.to(tl.float32))
    tl.store(wide + 2 * BLOCK + at, near + 1 / (at + 3) + (at < 5) * -0.0)
    tl.store(narrow + at, (a.to(tl.float32) * 0.01).to(tl.bfloat16))
    tl.store(narrow + BLOCK + at, (a / b - 1).to(tl.bfloat16))
    tl.store(narrow + 2 * BLOCK + at, tl.where(at % 2 == 0, a, b))


def edges() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[:6] = torch.tensor([torch.inf, torch.nan, 1e-40, -3e-39, -0.0, 2e-38])
    wide, narrow = torch.zeros(3, 16), torch.zeros(3, 16, dtype=torch.bfloat16)
    _edges_kernel[(1,)](x, x.half() + 1, wide, narrow, BLOCK=16)
    return wide.view(torch.int32), narrow.view(torch.int16)


def launched() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 40, generator=generator).to(torch.bfloat16)[:, 3:]
    x[0, :4] = torch.tensor([torch.inf, torch.nan, 1e-40, -0.0])
    y = torch.randn(16, 16, generator=generator).half()
    numbers = torch.randint(-(2**31), 2**31 - 1, (16,), dtype=torch.int32, generator=generator)
    floats = torch.full((3, 16), 7, dtype=torch.bfloat16)
    integers = torch.full((3, 16), 7, dtype=torch.int32)
    _kernel[(3,)](x, y, numbers, floats, integers, x.stride(0), 13, BLOCK=16)
    return floats.view(torch.int16), integers


def test_same_bits():
    assert len(interpreter._swaps) == 13
    with interpreter.as_triton_has_it():
        floats, integers = launched()
    assert len(floats.unique()) > 20
    for _ in range(2):
        found, numbers = launched()
        assert torch.equal(found, floats)
        assert torch.equal(numbers, integers)


def test_same_bits_at_the_edges():
    """Where a quicker way could go wrong: subnormals, signed zeros, and halves, which are divided as fp32."""
    with interpreter.as_triton_has_it():
        expected = edges()
    assert ((expected[0][0] & 0x7F800000 == 0) & (expected[0][0] & 0x7FFFFF != 0)).any()
    for _ in range(2):
        for found, theirs in zip(edges(), expected, strict=True):
            assert torch.equal(found, theirs)


def test_the_language_is_put_back():
    """Code that is no kernel, and Triton's compiler, find it as it was; after an error too."""
    before = tl.load, tl.core.add, tl.tensor.__add__, tl.math.exp2, tl.range
    launched()
    assert (tl.load, tl.core.add, tl.tensor.__add__, tl.math.exp2, tl.range) == before
    with pytest.raises(triton.runtime.errors.TritonError):
        _kernel[(1,)](None, None, None, None, None, 0, 0, BLOCK=16)
    assert (tl.load, tl.core.add, tl.tensor.__add__, tl.math.exp2, tl.range) == before


def test_a_shape_that_is_no_power_of_two_is_refused_every_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [24])
        with pytest.raises(TypeError, match="Shape element"):
            tl.block_type(tl.float32, [16.0])
        tl.block_type(tl.float32, [16])
