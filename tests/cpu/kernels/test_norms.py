"""The orders of addition of stock's RMSNorm kernels, in Triton's interpreter: every bit of the sums."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gemma4_turbo.kernels.norms import rmsnorm as norms

pytestmark = pytest.mark.skipif(not norms.INTERPRETED, reason="needs Triton's interpreter")

WIDTHS = (256, 512, 1536, 2560, 2816, 3072, 3328, 5376, 6144)


@triton.jit
def _totals_kernel(
    x_ptr,
    r_ptr,
    out_ptr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    ADD: tl.constexpr,
    WARPS: tl.constexpr,
):
    if IN_MEMORY:
        total, rounded = norms.sums_of_squares_in_memory(x_ptr, r_ptr, N, ADD, WARPS, False)
    else:
        column = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < N, other=0.0).to(tl.float32)
        total = norms.sum_of_squares(x, BLOCK)
        rounded = total
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, rounded)


def totals(
    x: torch.Tensor, in_memory: bool, r: torch.Tensor | None = None, warps: int | None = None
) -> torch.Tensor:
    out = torch.zeros(2)
    width = x.shape[0]
    _totals_kernel[(1,)](
        x,
        x if r is None else r,
        out,
        N=width,
        BLOCK=triton.next_power_of_2(width),
        IN_MEMORY=in_memory,
        ADD=r is not None,
        WARPS=norms.warps(width, norms.Kind.CUTE) if warps is None else warps,
    )
    return out


def chain(x: torch.Tensor) -> torch.Tensor:
    """CuTe's order, one addition at a time. ``x``: fp32 whose squares are exact."""
    threads = 32 if x.shape[0] <= 3072 else 64
    stretch = threads * 8
    padded = torch.nn.functional.pad(x, (0, -x.shape[0] % stretch)).view(-1, threads, 8)
    lanes = torch.zeros(threads)
    for block in padded:
        for j in range(8):
            lanes = lanes + block[:, j] * block[:, j]
    while lanes.shape[0] > threads // 32:
        lanes = lanes.view(threads // 32, -1, 2).sum(-1).reshape(-1)
    return lanes[0] if threads == 32 else lanes[0] + lanes[1]


def butterfly(x: torch.Tensor) -> torch.Tensor:
    """FlashInfer's CUDA order."""
    lanes = torch.zeros(x.shape[0] // 256, 32)
    for j in range(8):
        column = x.view(-1, 32, 8)[:, :, j]
        lanes = lanes + column * column
    warps = _halve(lanes)
    return _halve(torch.nn.functional.pad(warps, (0, 32 - warps.shape[0]))[None])[0]


def _halve(lanes: torch.Tensor) -> torch.Tensor:
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def numbers(width: int, seed: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("width", WIDTHS)
def test_sum_in_registers_is_flashinfers(width):
    for seed in range(8):
        x = numbers(width, seed)
        assert totals(x, in_memory=False)[0] == butterfly(x.float())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("warps", [None, 1, 4])
def test_sum_in_memory_is_cutes(width, warps):
    for seed in range(8):
        x = numbers(width, seed)
        assert totals(x, in_memory=True, warps=warps)[0] == chain(x.float())


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_a_sum(width):
    for seed in range(4):
        x, r = numbers(width, seed), numbers(width, seed + 100)
        whole, rounded = totals(x, in_memory=True, r=r)
        f = x.float() + r.float()
        # Triton's interpreter does not fuse; of the unrounded sum the squares are not exact.
        assert whole == chain(f)
        assert rounded == chain(f.bfloat16().float())


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_the_orders_differ(width):
    """So that the tests above tell them apart."""
    different = [numbers(width, seed).float() for seed in range(64)]
    assert any(chain(x) != butterfly(x) for x in different)


def test_flushing():
    tiny = torch.tensor([1e-39, -1e-39, 1.2e-38, 0.0])
    assert (tiny[:2] != 0).all()
    out = torch.empty(4)
    _mul_kernel[(1,)](tiny, out, KIND=int(norms.Kind.FAST_MATH))
    assert out[:2].tolist() == [0.0, 0.0]
    assert torch.signbit(out[:2]).tolist() == [False, True]
    assert out[2] == tiny[2]
    for kind in (norms.Kind.CUTE, norms.Kind.PRECISE):
        _mul_kernel[(1,)](tiny, out, KIND=int(kind))
        assert torch.equal(out, tiny)


@triton.jit
def _mul_kernel(x_ptr, out_ptr, KIND: tl.constexpr):
    at = tl.arange(0, 4)
    tl.store(out_ptr + at, norms.mul(tl.load(x_ptr + at), 1.0, KIND, False))
