"""`decode_attention` on the GPU: against fp64, no farther than stock's kernels and a tenth; in graphs."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.attention import decode as kernel
from gemma4_turbo.kernels.attention.decode import Config

SPLITS = 8  # stock's default
HEADS = [
    (16, 8, 256),
    (16, 2, 512),
    (8, 2, 256),
    (8, 2, 512),
    (8, 1, 256),
    (8, 1, 512),
    (32, 16, 256),
    (32, 4, 512),
    (16, 1, 256),
    (16, 1, 512),
    (4, 4, 256),
]
LENGTHS = {
    "one": (1,),
    "ones": (1,) * 32,
    "batch 8 of 500": (500,) * 8,
    "batch 32": (577,) * 32,
    "ragged": (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 511, 1023, 1024, 1025, 4000),
    "long": (131072,),
    "two long": (32768, 16385),
}
LARGE_BATCHES = {
    "one long among short": (20000, *(3,) * 40),
    "256 short": tuple(range(1, 257)),
    "256 of 600": (600,) * 256,
}


@pytest.fixture(autouse=True)
def hopper() -> None:
    """The kernel is tuned for compute capability 9.0 and declines others."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def operands(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments, slots shuffled; slots that no sequence holds are NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    total = sum(lengths)
    pool = total + 64
    at = torch.randperm(pool, generator=generator, device="cuda")
    k, v = randn(pool, kv_heads, dim), randn(pool, kv_heads, dim)
    k[at[total:]], v[at[total:]] = torch.nan, torch.nan
    return {
        "q": randn(len(lengths), heads, dim),
        "k_buffer": k,
        "v_buffer": v,
        "kv_indptr": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda"),
        "kv_indices": at[:total].clone(),
        "sm_scale": dim**-0.5,
    }


def exact(arguments: dict[str, Any]) -> torch.Tensor:
    """In fp64, one sequence at a time."""
    q, k, v = (arguments[name] for name in ("q", "k_buffer", "v_buffer"))
    bounds = arguments["kv_indptr"].tolist()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
    for row in range(q.shape[0]):
        at = arguments["kv_indices"][bounds[row] : bounds[row + 1]].long()
        for head in range(k.shape[1]):
            heads = slice(head * group, head * group + group)
            logits = q[row, heads].double() @ k[at, head].double().T * arguments["sm_scale"]
            out[row, heads] = logits.softmax(-1) @ v[at, head].double()
    return out


def stock(arguments: dict[str, Any], splits: int = SPLITS) -> torch.Tensor:
    """Stock's two kernels."""
    q = arguments["q"]
    rows, heads, dim = q.shape
    buffers = (
        torch.empty(rows, heads, SPLITS, dim, device="cuda"),
        torch.empty(rows, heads, SPLITS, device="cuda"),
    )
    return lines.stock().decode_attention(
        **arguments,
        out=torch.full_like(q, torch.nan),
        buffers=buffers,
        splits=torch.full((rows,), splits, dtype=torch.int32, device="cuda"),
    )


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def run(
    arguments: dict[str, Any], config: Config | None = None, longest: int | None = None
) -> torch.Tensor:
    """The kernel on a poisoned output; the counters end as zeros."""
    q = arguments["q"]
    arrived = torch.zeros(q.shape[0] * q.shape[1], dtype=torch.int32, device="cuda")
    out = torch.full_like(q, torch.nan)
    kernel.decode_attention(**arguments, config=config, longest=longest, arrived=arrived, out=out)
    assert int(arrived.abs().sum()) == 0
    return out


@pytest.mark.parametrize("lengths", LARGE_BATCHES.values(), ids=list(LARGE_BATCHES))
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 256), (16, 2, 512)])
def test_large_batches(heads, kv_heads, dim, lengths):
    test_no_farther_from_fp64_than_stock(heads, kv_heads, dim, lengths)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_no_farther_from_fp64_than_stock(heads, kv_heads, dim, lengths):
    arguments = operands(lengths, heads, kv_heads, dim)
    expected = exact(arguments)
    found = run(arguments, longest=max(lengths))
    assert bool(found.isfinite().all())
    assert error(found, expected) <= 1.1 * error(stock(arguments), expected)
    for _ in range(20):
        again = run(arguments, longest=max(lengths))
        assert torch.equal(again.view(torch.int16), found.view(torch.int16))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_n", "warps", "keys_first", "dtype"),
    [
        (16, 8, 256, 16, 4, False, torch.bfloat16),
        (16, 8, 256, 32, 4, True, torch.bfloat16),
        (16, 8, 256, 64, 4, True, torch.bfloat16),  # the one with wgmma
        (16, 8, 256, 64, 8, True, torch.float16),
        (8, 1, 256, 128, 8, False, torch.bfloat16),
        (8, 1, 256, 32, 4, False, torch.float16),
        (16, 2, 512, 16, 4, False, torch.bfloat16),
        (16, 2, 512, 32, 8, True, torch.bfloat16),
        (16, 2, 512, 32, 8, False, torch.float16),
    ],
)
def test_other_cuts(heads, kv_heads, dim, block_n, warps, keys_first, dtype, fused):
    arguments = operands((1, 130, 1000, 77, 64), heads, kv_heads, dim, dtype)
    expected = exact(arguments)
    allowed = 1.1 * error(stock(arguments), expected)
    for target in (10, 40, 100):
        config = Config(block_n, warps, 2, target, 128, keys_first, fused)
        assert error(run(arguments, config), expected) <= allowed


@pytest.mark.parametrize("scale", [0.1, 10.0, 100.0])
def test_flat_and_peaked_softmax(scale):
    arguments = operands((900, 40), 16, 8, 256)
    arguments["sm_scale"] *= scale
    expected = exact(arguments)
    assert error(run(arguments), expected) <= 1.1 * error(stock(arguments), expected)


def test_a_thousand_random_batches():
    """Lengths, groups and head sizes at random, against the plain torch reference in fp64."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    for seed in range(1000):
        heads, kv_heads, dim = HEADS[draw(0, len(HEADS))]
        top = (4, 40, 400, 4000)[draw(0, 4)]
        lengths = tuple(draw(1, top) for _ in range(draw(1, 20)))
        arguments = operands(lengths, heads, kv_heads, dim, seed=seed)
        expected = exact(arguments)
        # Two roundings of the result, as test_no_farther_from_fp64_than_stock finds it for stock.
        assert error(run(arguments), expected) <= 2**-8, (heads, kv_heads, dim, lengths)


@pytest.mark.parametrize("early", [False, True], ids=["plain", "pdl"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 8, 256), (8, 1, 512)])
def test_lengths_change_between_replays(monkeypatch, heads, kv_heads, dim, early):
    """One captured graph, any lengths up to the longest, indices and lengths in fixed buffers."""
    monkeypatch.setattr(pdl, "wanted", early)
    batch, longest = 6, 3000
    whole = operands((longest,) * batch, heads, kv_heads, dim)
    whole["kv_indptr"] = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    indices = whole["kv_indices"].clone()
    arrived = torch.zeros(batch * kv_heads, dtype=torch.int32, device="cuda")
    out = torch.empty_like(whole["q"])
    options: dict[str, Any] = {"longest": longest, "arrived": arrived, "out": out}
    kernel.decode_attention(**whole, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # one after another, as layers are
            kernel.decode_attention(**whole, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
        lengths[0] = (1, longest, 64)[int(lengths[1]) % 3]
        whole["kv_indptr"].copy_(torch.cat([torch.zeros(1), lengths.cumsum(0)]).int())
        order = torch.randperm(indices.numel(), generator=generator).cuda()
        whole["kv_indices"].copy_(indices[order])
        out.fill_(torch.nan)
        graph.replay()
        expected = exact(whole)
        assert error(out, expected) <= 2**-8
        assert int(arrived.abs().sum()) == 0


def test_the_patch_passes_its_own_checks():
    from gemma4_turbo.ports.any.attention import decode_attention as patch

    checks = patch.verify(None, "cuda")  # type: ignore[arg-type]
    assert [check for check in checks if not check.passed] == []
    for heads, kv_heads, dim in HEADS:
        config = kernel.choose(4, kv_heads, heads // kv_heads, dim)
        key = ("cuda", torch.bfloat16, heads, kv_heads, dim, torch.int64, config)
        assert patch._compare(key) is None
