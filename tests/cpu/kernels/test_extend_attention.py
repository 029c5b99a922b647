"""The extend attention in Triton's interpreter against plain torch in fp64."""

from __future__ import annotations

import random

import pytest
import torch

from gemma4_turbo.kernels.attention import extend as kernel
from gemma4_turbo.kernels.attention import extend_tiles as config
from gemma4_turbo.kernels.gpu import Gpu
from tests.extend_inputs import POISON, Batch, make, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")

SMALL = config.Dense(32, 16, 4, 1, 1, 4, 2, 3)
HALVES = config.Dense(16, 32, 2, 2, 2, 4, 2, 3)
REGISTERS = HALVES._replace(q_in_registers=True)
FEW = config.Split(16, 16, 16, 4, 2, 1, 3)
TABLES = (config.DENSE, config.DENSE_163K, config.DENSE_99K)


def check(
    batch: Batch,
    dense: config.Dense | None = None,
    split: config.Split | None = None,
    bound: float = 1e-3,
) -> None:
    """Every row, in a poisoned output whose other rows stay as they are."""
    q = batch.positional[0]
    lengths = batch.positional[5].diff()
    longest = int(lengths.max()) if len(lengths) else 0
    out = torch.full(q.shape, POISON, dtype=q.dtype)
    defaults = {
        "custom_mask": None,
        "mask_indptr": None,
        "skip_prefix_custom_mask": True,
        "window_kv_offsets": None,
        "mask_query_block": 0,
    }
    kernel.launch_extend(
        *batch.positional,
        longest,
        **(defaults | batch.keywords),
        out=out,
        dense=dense,
        split=split,
    )
    expected = kernel.reference_extend_attention(*batch.positional, **batch.keywords)
    assert (out[batch.rows :] == POISON).all()
    assert out[: batch.rows].isfinite().all()
    assert relative_error(out[: batch.rows], expected[: batch.rows]) < bound


def drawn(seed: int) -> tuple[dict, list[int], list[int], random.Random]:
    """A random case; sequences of length 0 and 1 among them."""
    choose = random.Random(seed)
    count = choose.randint(1, 3)
    lengths = [choose.choice((0, 1, 2, 5, 17, 33, 40)) for _ in range(count)]
    prefixes = [choose.choice((0, 0, 1, 7, 30, 64)) for _ in range(count)]
    if not any(lengths):
        lengths[0] = 3
    kv_heads = choose.choice((1, 2))
    mask = choose.choice(("", "", "random", "image", "tree"))
    keywords = {
        "heads": kv_heads * choose.choice((1, 2, 3, 4, 6)),
        "kv_heads": kv_heads,
        "window": choose.choice((-1, 0, 1, 5, 16, 31, 50)),
        "causal": choose.random() < 0.8,
        "mask": mask,
        "skip_prefix": choose.random() < 0.7,
        "cut": choose.choice((0, 0, 8, 16)),
        "strided": choose.random() < 0.6,
        "wide": choose.choice(((torch.int64, torch.int32), (torch.int32, torch.int64))),
        "graph": choose.random() < 0.3,
    }
    return keywords, lengths, prefixes, choose


@pytest.mark.parametrize("seed", range(30))
def test_any_ragged_batch(seed):
    keywords, lengths, prefixes, choose = drawn(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = make(generator, lengths, prefixes, **keywords)
    if seed % 3 == 2 and batch.positional[7].shape[0]:
        check(batch, split=FEW)
    else:
        check(batch, dense=choose.choice((SMALL, HALVES, REGISTERS)))


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"),
    [(128, 8, 2, 20), (256, 4, 2, 40), (256, 8, 1, 30), (512, 8, 1, -1), (512, 16, 1, -1)],
)
def test_the_tables_tiles(head_dim, heads, kv_heads, window):
    """What is launched without overrides, for prefill, chunked prefill, images and verification."""
    generator = torch.Generator().manual_seed(head_dim + heads)
    shape = {"head_dim": head_dim, "heads": heads, "kv_heads": kv_heads, "window": window}
    check(make(generator, [70, 1], [0, 0], **shape))
    check(make(generator, [40], [33], **shape))
    check(make(generator, [40], [5], **shape, mask="image", cut=32))
    check(make(generator, [4, 4], [50, 3], **shape, mask="tree", graph=True))


# The prefix and the new tokens are two loops over blocks, each with an edge of its own: all prefixes with
# some lengths and all lengths behind one prefix. The window cuts both: every one at the shortest length
# and at one that it does not cover.
@pytest.mark.parametrize(
    ("length", "window", "prefixes"),
    [
        (1, -1, (0, 15, 16, 17)),
        (33, 32, (0, 15, 16, 17)),
        *((length, -1, (17,)) for length in (2, 31, 32, 33)),
        *((length, window, (16,)) for length in (1, 33) for window in (1, 31, 33)),
    ],
)
def test_around_the_edges_of_blocks(length, window, prefixes):
    """Tiles of 8 tokens and blocks of 16 keys; prefixes just short of a block, full, just over."""
    generator = torch.Generator().manual_seed(length)
    for prefix in prefixes:
        shape = {"heads": 4, "kv_heads": 1, "window": window}
        check(make(generator, [length, 9], [prefix, 40], **shape), dense=SMALL)


# Group times tokens are the rows of a tile: fewer, as many and more than it has, by both factors.
@pytest.mark.parametrize(
    ("group", "tokens"), [(2, 1), (2, 4), (2, 8), (8, 1), (8, 2), (8, 8), (16, 1), (16, 4)]
)
def test_verification(group, tokens):
    """Splits of the keys and their sum, for the groups of all Gemma 4 models."""
    generator = torch.Generator().manual_seed(group)
    for window in (-1, 24) if tokens in (1, 8) else (24,):
        shape = {"heads": group, "kv_heads": 1, "window": window, "mask": "tree", "graph": True}
        check(make(generator, [tokens] * 3, [0, 17, 90], **shape), split=FEW)


BY_INTERVALS, BY_BYTES = 1, 2


WORKS = {"image": BY_INTERVALS, "random": BY_BYTES, "one row": BY_BYTES, "nothing": BY_INTERVALS}
# Every mask, in the plainest call and in the one with all options; of the others one that each launch does.
MASKED = [
    *((mask, window, cut, graph) for mask in WORKS for window, cut, graph in ((-1, 0, 0), (20, 8, 1))),
    *(("image", window, cut, 0) for window, cut in ((-1, 16), (20, 0))),
    ("random", -1, 16, 1),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "window", "cut", "graph"), MASKED)
def test_a_masks_intervals(mask, window, cut, graph, monkeypatch):
    """One launch does all of the work, the other one nothing."""
    works, graph = WORKS[mask], bool(graph)
    generator = torch.Generator().manual_seed(9)
    kind = mask if mask in ("image", "random") else "image"
    shape = {"heads": 4, "kv_heads": 2, "window": window, "mask": kind, "cut": cut, "graph": graph}
    batch = make(generator, [24, 0, 1, 17], [7, 3, 20, 0], **shape)  # tiles of 8 tokens
    bytes_, starts = batch.keywords["custom_mask"], batch.keywords["mask_indptr"]
    if mask == "one row":
        bytes_[int(starts[4]) - 2] = False  # of the last query: a hole before its last key
    if mask == "nothing":
        bytes_[int(starts[3]) :] = False  # the last sequence sees no new key
    launch = kernel._launch_dense
    ran: list[int] = []

    def only(wanted):
        def launch_dense(*arguments):
            ran.append(arguments[-1])
            if arguments[-1] == wanted:
                launch(*arguments)

        monkeypatch.setattr(kernel, "_launch_dense", launch_dense)

    only(works)
    check(batch, dense=SMALL)
    assert ran == [BY_INTERVALS, BY_BYTES]
    only(BY_INTERVALS + BY_BYTES - works)
    with pytest.raises(AssertionError):  # still poisoned
        check(batch, dense=SMALL)


def test_a_mask_over_the_prefix_is_read_byte_by_byte(monkeypatch):
    launch, ran = kernel._launch_dense, []
    monkeypatch.setattr(
        kernel, "_launch_dense", lambda *args: (ran.append(args[-1]), launch(*args))
    )
    generator = torch.Generator().manual_seed(9)
    check(make(generator, [40], [7], mask="image", skip_prefix=False), dense=SMALL)
    assert ran == [0]


def test_one_sequence_is_split_much():
    """Most splits of the short sequence are empty, and not read."""
    generator = torch.Generator().manual_seed(5)
    batch = make(generator, [2, 3], [300, 1], heads=2, kv_heads=1)
    check(batch, split=FEW._replace(programs_per_sm=64))


@pytest.mark.parametrize("split", [None, FEW])
def test_large_scores(split):
    """Scores of thousands: the running maximum keeps the exponentials finite."""
    generator = torch.Generator().manual_seed(6)
    batch = make(generator, [20], [40], scale=300.0)
    check(batch, dense=SMALL if split is None else None, split=split, bound=2e-2)


@pytest.mark.parametrize("split", [None, FEW])
def test_a_query_that_sees_nothing_is_zero(split):
    """Where a softmax over nothing would be NaN."""
    generator = torch.Generator().manual_seed(7)
    batch = make(generator, [6], [20], mask="random", skip_prefix=False)
    batch.keywords["custom_mask"][: 26 * 2] = False
    check(batch, dense=SMALL if split is None else None, split=split)
    expected = kernel.reference_extend_attention(*batch.positional, **batch.keywords)
    assert (expected[:2] == 0).all()


def test_nothing_to_do():
    """No token, or no sequence: the output is left alone."""
    generator = torch.Generator().manual_seed(8)
    batch = make(generator, [0, 0], [4, 0])
    check(batch)
    assert kernel.extend_attention(*batch.positional, 0).shape == batch.positional[0].shape


def test_the_wrapper_allocates_its_output():
    generator = torch.Generator().manual_seed(9)
    batch = make(generator, [9, 4], [3, 0], window=4)
    got = kernel.extend_attention(*batch.positional, 9, **batch.keywords)
    expected = kernel.reference_extend_attention(*batch.positional, **batch.keywords)
    assert got.is_contiguous()
    assert relative_error(got[:13], expected[:13]) < 1e-3


def test_tables_fit_the_kernels():
    """Tile sizes that the kernels can work with, for every head size."""
    for table in TABLES:
        assert set(table) == set(config.DENSE)
        for (head_dim, _), tile in table.items():
            assert head_dim in kernel.HEAD_DIMS
            assert tile.block_m % tile.pack == 0
            assert head_dim % (tile.value_blocks * tile.chunks) == 0
            assert tile.chunks == 2 or not tile.q_in_registers
    assert set(config.SPLIT) == set(config.SPLIT_ELSEWHERE) == set(kernel.HEAD_DIMS)


@pytest.mark.parametrize(
    ("gpu", "table"),
    [
        (Gpu((9, 0), 132, 232448), config.DENSE),
        (Gpu((10, 0), 148, 232448), config.DENSE_163K),
        (Gpu((8, 0), 108, 166912), config.DENSE_163K),
        (Gpu((8, 9), 142, 101376), config.DENSE_99K),
        (Gpu((12, 0), 170, 101376), config.DENSE_99K),
    ],
)
def test_the_table_of_a_gpu(gpu, table):
    assert config.dense_of(gpu) is table
    assert (config.split_of(gpu) is config.SPLIT) == (table is config.DENSE)


# Heads of 512 with a mask have the smallest tiles, heads of 256 without one are the most common.
@pytest.mark.parametrize(("head_dim", "mask"), [(256, ""), (512, "image")])
@pytest.mark.parametrize("table", [config.DENSE_163K, config.DENSE_99K], ids=["163K", "99K"])
def test_tiles_for_less_memory(head_dim, mask, table, monkeypatch):
    monkeypatch.setattr(config, "dense_of", lambda gpu: table)
    generator = torch.Generator().manual_seed(head_dim)
    check(make(generator, [70, 1], [33, 0], head_dim=head_dim, mask=mask))


@pytest.mark.parametrize(
    ("programs", "window", "keys", "splits"),
    [(1000, 0, 1 << 20, 1), (64, 0, 1 << 20, 8), (1, 0, 1 << 30, 64), (1, 1024, 1 << 30, 8)],
)
def test_split_count(programs, window, keys, splits):
    """No more than fill the GPU, and none that is too short for its window."""
    tile = config.Split(32, 32, 16, 4, 2, 4, 3)
    assert kernel.split_count(tile, programs, window, keys, 132) == splits


def arguments(**changes: object) -> tuple[tuple, dict]:
    names = ("q", "k", "v", "k_buffer", "v_buffer", "qo_indptr", "kv_indptr", "kv_indices")
    batch = make(torch.Generator().manual_seed(0), [3], [2])
    named = dict(zip(names, batch.positional, strict=True)) | {"max_extend_len": 3}
    named |= batch.keywords
    for name, change in changes.items():
        named[name] = change(named.get(name)) if callable(change) else change
    return tuple(named.pop(name) for name in (*names, "max_extend_len")), named


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"q": lambda q: q.float()}, "q must be bfloat16 or float16"),
        ({"q": lambda q: q[:, :, :96]}, "q must be"),
        ({"k": lambda k: k.bfloat16()}, "k must be torch.float16"),
        ({"v": lambda v: v[:-1]}, "k and v must have q's"),
        ({"k_buffer": lambda b: b.to(torch.float8_e4m3fn)}, "k_buffer must be torch.float16"),
        ({"v_buffer": lambda b: b[:, :1]}, "v_buffer must be"),
        ({"v": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2)}, "v must be contiguous"),
        ({"q": lambda q: q[:, :3]}, "divisor"),
        ({"sm_scale": 0.0}, "sm_scale"),
        ({"max_extend_len": -1}, "max_extend_len"),
        ({"custom_mask": torch.ones(15)}, "custom_mask"),
        ({"custom_mask": torch.ones(15).bool()}, "mask_indptr"),
        (
            {
                "custom_mask": torch.ones(15).bool(),
                "mask_indptr": torch.zeros(2, dtype=torch.int64),
                "sliding_window_size": 4,
            },
            "window_kv_offsets",
        ),
        ({"out": lambda _: torch.empty(1, 4, 128)}, "out must be"),
    ],
)
def test_errors_name_the_argument(changes, told):
    positional, named = arguments(**changes)
    with pytest.raises(ValueError, match=told):
        kernel.extend_attention(*positional, **named)
