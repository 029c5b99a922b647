"""The extend attention on the GPU: against fp64, and against stock SGLang's kernel.

Every geometry is compiled once and then sees many random ragged batches.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.kernels.attention import extend as kernel
from gemma4_turbo.kernels.attention import extend_tiles as config
from gemma4_turbo.kernels.attention import window as window_indices
from tests.extend_inputs import POISON, Batch, make, relative_error
from tests.gpu.lines import stocks_window

stock = lines.stock()

CASES = 90  # per geometry


class Geometry(NamedTuple):
    """What the kernels are compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int = -1
    mask: str = ""
    few: bool = False  # verification: 1 to 8 tokens a sequence
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    strided: bool = True
    skip_prefix: bool = True


GEOMETRIES = [
    Geometry(16, 8, 256, 1024),
    Geometry(16, 8, 256, 1024, few=True),
    Geometry(16, 8, 256, 1024, "image"),
    Geometry(16, 8, 256, 1024, "tree", few=True),
    Geometry(16, 2, 512),
    Geometry(16, 2, 512, few=True),
    Geometry(16, 2, 512, -1, "image"),
    Geometry(16, 2, 512, -1, "tree", few=True),
    Geometry(8, 1, 256, 512),
    Geometry(8, 1, 256, 512, "tree", few=True),
    Geometry(8, 1, 512),
    Geometry(8, 1, 512, -1, "tree", few=True),
    Geometry(8, 2, 256, 64),
    Geometry(8, 2, 512, -1, "random"),
    Geometry(16, 1, 512),
    Geometry(16, 1, 512, few=True),
    Geometry(2, 1, 256, 1),
    Geometry(2, 2, 256, 33, "random"),
    Geometry(6, 2, 256, 100),
    Geometry(6, 2, 512, -1, "tree", few=True),
    Geometry(4, 2, 256, dtype=torch.float16),
    Geometry(4, 1, 512, dtype=torch.float16, few=True),
    Geometry(4, 2, 256, 50, causal=False),
    Geometry(4, 1, 512, causal=False, strided=False),
    Geometry(4, 2, 256, 40, "random", skip_prefix=False),
    Geometry(4, 1, 512, -1, "random", few=True, skip_prefix=False),
    Geometry(8, 4, 128, 127),
    Geometry(8, 4, 128, -1, "tree", few=True),
]


@pytest.fixture(autouse=True)
def _inference():
    """As in a server, and with memory that was written to before."""
    poison = torch.full((64 << 20,), 0x7B, dtype=torch.uint8, device="cuda")
    del poison
    with torch.no_grad():
        yield


def drawn(geometry: Geometry, choose: random.Random, generator: torch.Generator) -> Batch:
    """A ragged batch with lengths around block sizes, 0 and 1 among them."""
    count = choose.choice((1, 1, 2, 3, 5, 9, 33))
    if geometry.few:
        lengths = [choose.randint(0, 8) for _ in range(count)]
        prefixes = [choose.choice((0, 1, 31, 64, 1000, 3000)) for _ in range(count)]
    else:
        most = 700 if count < 9 else 90
        sizes = (0, 1, 2, 31, 63, 64, 65, 127, 128, 129, choose.randint(1, most))
        lengths = [min(choose.choice(sizes), most) for _ in range(count)]
        prefixes = [choose.choice((0, 0, 1, 63, 64, 65, 500, 1300)) for _ in range(count)]
        if choose.random() < 0.3:
            prefixes = [0] * count
    if not any(lengths):
        lengths[-1] = 3
    if geometry.window > 0:
        prefixes = [min(prefix, geometry.window - 1) for prefix in prefixes]
    return make(
        generator,
        lengths,
        prefixes,
        heads=geometry.heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        window=geometry.window,
        causal=geometry.causal,
        mask=geometry.mask,
        skip_prefix=geometry.skip_prefix,
        cut=query_block(geometry.head_dim) if geometry.mask else 0,
        strided=geometry.strided,
        dtype=geometry.dtype,
        scale=choose.choice((1.0, 0.1, geometry.head_dim**-0.5)),
        graph=choose.random() < 0.3,
    )


def query_block(head_dim: int) -> int:
    return stock.query_block(head_dim)


def ours(batch: Batch, out: torch.Tensor) -> torch.Tensor:
    longest = int(batch.positional[5].diff().max())
    return kernel.extend_attention(*batch.positional, longest, **batch.keywords, out=out)


def by_stock(batch: Batch) -> torch.Tensor:
    q, k, v, *rest = batch.positional
    options = {name: x for name, x in batch.keywords.items() if name != "mask_query_block"}  # ours
    return stock.extend_attention(
        *(x.contiguous() for x in (q, k, v)),
        torch.full(q.shape, POISON, dtype=q.dtype, device=q.device),
        *rest,
        longest=int(batch.positional[5].diff().max()),
        **options,
    )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_no_further_from_fp64_than_stock(geometry):
    """Each batch, and all of a geometry together within 10 % of stock's error."""
    generator = torch.Generator("cuda").manual_seed(11)
    choose = random.Random(str(geometry))
    sums = {"ours": 0.0, "stock": 0.0, "norm": 0.0}
    for number in range(CASES):
        batch = drawn(geometry, choose, generator)
        out = torch.full_like(batch.positional[0], POISON)
        ours(batch, out)
        assert (out[batch.rows :] == POISON).all()
        exact = kernel.reference_extend_attention(*batch.positional, **batch.keywords)
        exact, got, other = (t[: batch.rows] for t in (exact, out, by_stock(batch)))
        assert got.isfinite().all()
        seen = (exact != 0).flatten(1).any(1)  # stock gives NaN where nothing is seen
        assert (got[~seen] == 0).all()
        mine, theirs = got[seen].double(), other[seen].double()
        exact = exact[seen]
        error, bound = ((t - exact).square().sum().item() for t in (mine, theirs))
        norm = exact.square().sum().item()
        sums = {
            "ours": sums["ours"] + error,
            "stock": sums["stock"] + bound,
            "norm": sums["norm"] + norm,
        }
        lengths, prefixes = (t.diff().tolist() for t in batch.positional[5:7])
        assert error**0.5 <= 1.5 * bound**0.5 + 2e-4 * norm**0.5, (number, lengths, prefixes)
    assert sums["ours"] ** 0.5 <= 1.1 * sums["stock"] ** 0.5, sums


@pytest.mark.parametrize(
    ("lengths", "prefixes", "geometry"),
    [
        ([4096], [0], Geometry(16, 8, 256, 1024)),
        ([4096], [0], Geometry(16, 2, 512)),
        ([512] * 8, [0] * 8, Geometry(16, 8, 256, 1024)),
        ([4096], [1023], Geometry(16, 8, 256, 1024)),
        ([2048], [3000], Geometry(16, 2, 512)),
        ([4096], [0], Geometry(8, 1, 256, 512)),
        ([4] * 32, [1023] * 32, Geometry(16, 8, 256, 1024, "tree")),
        ([4] * 8, [32768] * 8, Geometry(16, 2, 512, -1, "tree")),
        ([2], [32768], Geometry(16, 2, 512, -1, "tree")),
    ],
)
def test_shapes_of_the_models(lengths, prefixes, geometry):
    generator = torch.Generator("cuda").manual_seed(12)
    batch = make(
        generator,
        lengths,
        prefixes,
        heads=geometry.heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        window=geometry.window,
        mask=geometry.mask,
        dtype=torch.bfloat16,
    )
    got = ours(batch, torch.full_like(batch.positional[0], POISON))[: batch.rows]
    exact = torch.cat(
        [  # a head at a time: fp64 scores of all would not fit
            kernel.reference_extend_attention(
                batch.positional[0][:, h : h + 1],
                *(
                    t[:, h // (geometry.heads // geometry.kv_heads)][:, None]
                    for t in batch.positional[1:5]
                ),
                *batch.positional[5:],
                **batch.keywords,
            )
            for h in range(geometry.heads)
        ],
        1,
    )[: batch.rows]
    other = by_stock(batch)[: batch.rows]
    assert relative_error(got, exact) <= 1.1 * relative_error(other, exact)


TILES: list[dict[str, Any]] = [
    {"dense": config.Dense(64, 32, 8, 1, 1, 4, 2, 3)},
    {"dense": config.Dense(64, 32, 1, 2, 2, 4, 2, 2)},
    {"dense": config.Dense(128, 32, 8, 2, 2, 8, 3, 3, True)},
    {"dense": config.Dense(64, 64, 8, 1, 1, 8, 1, 1)},
    {"dense": config.Dense(128, 32, 8, 2, 1, 8, 2, 3)},
    {"split": config.Split(16, 32, 16, 4, 2, 1, 64)},
    {"split": config.Split(32, 32, 16, 8, 2, 2, 8)},
]


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("head_dim", [256, 512])
def test_other_tiles_give_the_same(head_dim, tiles):
    """Tile sizes that the table does not have, many splits among them."""
    generator = torch.Generator("cuda").manual_seed(13)
    shape: dict[str, Any] = {"heads": 8, "kv_heads": 1, "head_dim": head_dim}
    shape["dtype"] = torch.bfloat16
    for window in (-1, 70):
        batch = make(generator, [8, 0, 5, 8], [900, 10, 0, 64], window=window, **shape)
        out = torch.full_like(batch.positional[0], POISON)
        defaults = dict.fromkeys(("custom_mask", "mask_indptr", "window_kv_offsets"))
        kernel.launch_extend(
            *batch.positional,
            8,
            **defaults,
            **batch.keywords,
            skip_prefix_custom_mask=True,
            mask_query_block=0,
            out=out,
            **tiles,
        )
        exact = kernel.reference_extend_attention(*batch.positional, **batch.keywords)
        assert relative_error(out[: batch.rows], exact[: batch.rows]) < 5e-3


# What GPUs with less shared memory than this one get, in what they are for.
@pytest.mark.parametrize("mask", ["", "image"])
@pytest.mark.parametrize("head_dim", [128, 256, 512])
@pytest.mark.parametrize("table", [config.DENSE_163K, config.DENSE_99K], ids=["163K", "99K"])
def test_tiles_for_less_memory(table, head_dim, mask, monkeypatch):
    monkeypatch.setattr(config, "dense_of", lambda gpu: table)
    monkeypatch.setattr(config, "split_of", lambda gpu: config.SPLIT_ELSEWHERE)
    for name in ("found_dense", "found_split"):  # a profile of this GPU comes before the tables
        monkeypatch.setattr(config, name, lambda *_: None)
    generator = torch.Generator("cuda").manual_seed(17)
    shape = {"heads": 8, "kv_heads": 2, "head_dim": head_dim, "dtype": torch.bfloat16}
    for lengths, prefixes in (([300, 1, 70], [0, 200, 33]), ([4, 3], [900, 0])):
        batch = make(generator, lengths, prefixes, mask=mask, **shape)
        got = kernel.extend_attention(
            *batch.positional,
            max(lengths),
            **batch.keywords,
            out=torch.empty_like(batch.positional[0]),
        )
        exact = kernel.reference_extend_attention(*batch.positional, **batch.keywords)
        assert relative_error(got[: batch.rows], exact[: batch.rows]) < 5e-3


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(("head_dim", "window"), [(256, 300), (512, -1)])
def test_a_captured_call_follows_its_lengths(head_dim, window, few):
    """Lengths, prefixes, pages and masks change between replays of one CUDA graph."""
    generator = torch.Generator("cuda").manual_seed(14)
    shape: dict[str, Any] = {
        "heads": 8,
        "kv_heads": 2,
        "head_dim": head_dim,
        "window": window,
        "mask": "tree" if few else "",
        "dtype": torch.bfloat16,
        "graph": True,
    }
    most = 8 if few else 200
    plans = [
        ([most] * 4, [290, 256, 64, 1]),
        ([1, most, 0, 2], [5, 0, 290, 290]),
        ([most, 1, 1, 1], [0, 0, 0, 0]),
    ]
    batches = [make(generator, new, old, **shape) for new, old in plans]
    held = [torch.zeros_like(t) for t in batches[0].positional]
    names = [name for name, t in batches[0].keywords.items() if isinstance(t, torch.Tensor)]
    options = dict(batches[0].keywords)
    for name in names:
        size = max(batch.keywords[name].numel() for batch in batches)
        options[name] = options[name].new_zeros(size)
    out = torch.empty_like(held[0])

    def fill(batch: Batch) -> None:
        for mine, given in zip(held, batch.positional, strict=True):
            flat = mine if mine.shape == given.shape else mine[: given.shape[0]]
            flat.copy_(given)
        for name in names:
            options[name][: batch.keywords[name].numel()] = batch.keywords[name]

    fill(batches[0])
    kernel.extend_attention(*held, most, **options, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.extend_attention(*held, most, **options, out=out)
    for batch in reversed(batches):
        fill(batch)
        out.fill_(POISON)
        graph.replay()
        exact = kernel.reference_extend_attention(*batch.positional, **batch.keywords)
        assert relative_error(out[: batch.rows], exact[: batch.rows]) < 5e-3
        assert (out[batch.rows :] == POISON).all()


def test_nothing_waits_for_the_gpu():
    """Neither the attention nor the window's slots synchronise."""
    generator = torch.Generator("cuda").manual_seed(15)
    batches = [
        make(generator, [70, 3], [40, 90], head_dim=256, window=50, dtype=torch.bfloat16),
        make(generator, [4, 4], [400, 90], head_dim=256, mask="tree", dtype=torch.bfloat16),
    ]
    outs = [torch.empty_like(batch.positional[0]) for batch in batches]
    table = torch.randint(0, 500, (4, 900), device="cuda", dtype=torch.int32)
    lens = torch.tensor([5, 800], device="cuda")
    indptr = torch.zeros(5, dtype=torch.int32, device="cuda")
    rows = torch.tensor([3, 1], device="cuda")
    for mode in ("default", "error"):  # compiled first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for batch, out in zip(batches, outs, strict=True):
                kernel.extend_attention(*batch.positional, 70, **batch.keywords, out=out)
            kernel.extend_attention(*batches[1].positional, 4, **batches[1].keywords, out=outs[1])
            window_indices.window_indices(indptr, table, 100, lens, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_odd_addresses():
    """Bases and strides that are no multiples of 16 bytes."""
    generator = torch.Generator("cuda").manual_seed(16)
    batch = make(generator, [100, 4], [70, 10], head_dim=256, window=60, dtype=torch.bfloat16)
    moved = []
    for tensor in batch.positional[:5]:
        rows, heads, dim = tensor.shape
        wide = torch.zeros(rows, heads, dim + 3, dtype=tensor.dtype, device="cuda")
        wide[:, :, 1 : dim + 1] = tensor
        moved.append(wide[:, :, 1 : dim + 1])
    odd = Batch((*moved, *batch.positional[5:]), batch.keywords, batch.rows)
    got = ours(odd, torch.full_like(batch.positional[0], POISON))
    expected = ours(batch, torch.full_like(batch.positional[0], POISON))
    assert torch.equal(got[: batch.rows], expected[: batch.rows])


@pytest.mark.parametrize("batch", [1, 3, 64, 300])
@pytest.mark.parametrize("window", [15, 511, 1023])
def test_window_slots_are_stocks(batch, window):
    """Through stock's own function, with its own translation of slots."""
    generator = torch.Generator("cuda").manual_seed(batch)
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    table = torch.randint(0, 9000, (batch, 2000), dtype=torch.int32, **options)
    lens = torch.randint(0, 2000, (batch,), **options)
    rows = torch.randperm(batch, **options)
    mapping = torch.randint(0, 4000, (9001,), **options)

    for slots in (None, mapping):
        indptrs = [torch.zeros(batch + 9, dtype=torch.int32, device="cuda") for _ in range(2)]
        expected = stocks_window(table, slots)(indptrs[0], window, lens, rows)
        got = window_indices.window_indices(indptrs[1], table, window, lens, rows, slots)
        assert torch.equal(got[1][: expected[1].numel()], expected[1])
        for mine, theirs in zip((got[0], *got[2:]), (expected[0], *expected[2:]), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
