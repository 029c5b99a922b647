"""`decode_attention` in Triton's interpreter against plain torch in fp64.

Slots that no sequence holds are NaN, outputs are poisoned and lie between guards.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_turbo.kernels.attention import decode as kernel
from gemma4_turbo.kernels.attention.decode import Config
from gemma4_turbo.kernels.gpu import INTERPRETER

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

POISON = 12345.0
SPARE = 9
SPLIT = Config(16, 4, 3, 40, 16, False, True)
"""As many splits as there are blocks, while 32 programs suffice."""


def operands(
    lengths: list[int],
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments, slots shuffled over a pool with unused ones between them."""
    generator = torch.Generator().manual_seed(seed + sum(lengths))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    total = sum(lengths)
    pool = total + SPARE
    at = torch.randperm(pool, generator=generator)
    k, v = randn(pool, kv_heads, dim), randn(pool, kv_heads, dim)
    k[at[total:]], v[at[total:]] = torch.nan, torch.nan
    # A stride over rows that is more than a row, as after a split of Q, K and V.
    q = randn(len(lengths), group * kv_heads + 1, dim)[:, : group * kv_heads]
    return {
        "q": q,
        "k_buffer": k,
        "v_buffer": v,
        "kv_indptr": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "kv_indices": at[:total].clone(),
        "sm_scale": 2.0 / math.sqrt(dim),
    }


def exact(arguments: dict[str, Any]) -> torch.Tensor:
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }  # fmt: skip
    return kernel.reference_decode_attention(**wide)


def check(arguments: dict[str, Any], config: Config | None, longest: int | None = None) -> None:
    """Every element of the result, in a poisoned buffer with guards; the counters end as zeros."""
    q = arguments["q"]
    rows, heads, dim = q.shape
    whole = torch.full((rows + 2, heads + 1, dim), POISON, dtype=q.dtype)
    out = whole[1:-1, :heads]
    arrived = torch.zeros(rows * heads + 1, dtype=torch.int32)
    found = kernel.decode_attention(
        **arguments, config=config, longest=longest, arrived=arrived, out=out
    )
    assert found is out
    expected = exact(arguments)
    assert bool(out.isfinite().all())
    if expected.numel():
        # The result's rounding, and that of p, which averages out over the keys.
        ulp = torch.finfo(q.dtype).eps
        error = (out.double() - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(1e-9)
        assert float(error.max()) <= 2 * ulp
    assert bool((whole[0] == POISON).all() and (whole[-1] == POISON).all())
    assert bool((whole[:, heads] == POISON).all())
    assert int(arrived.abs().sum()) == 0


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Any], Config, int | None]:
    """Ragged lengths around the sizes of blocks and splits, any cut."""
    length = st.one_of(st.integers(0, 5), st.integers(14, 34), st.integers(60, 130))
    lengths = draw(st.lists(length, min_size=1, max_size=5))
    block_n = draw(st.sampled_from((16, 32, 64)))
    config = Config(
        block_n,
        4,
        3,
        draw(st.sampled_from((1, 10, 30, 60))),
        block_n * draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    arguments = operands(
        lengths,
        draw(st.sampled_from(kernel.GROUPS)),
        draw(st.sampled_from((1, 2))),
        seed=draw(st.integers(0, 99)),
    )
    return arguments, config, draw(st.sampled_from((None, max(lengths), 180)))


@settings(max_examples=10, deadline=None)
@given(batches())
def test_any_batch(case):
    check(*case)


# Each group and head size, which are sizes of tiles; the two orders of the product and the two ways to
# combine the splits, which are code, all together for one of them, with a group that fills its tile.
@pytest.mark.parametrize(("group", "dim", "dtype", "keys_first", "fused"), [
    (1, 256, torch.float16, False, True),
    (2, 256, torch.bfloat16, True, False),
    (8, 512, torch.bfloat16, True, True),
    (8, 512, torch.bfloat16, False, False),
    *((16, 256, torch.bfloat16, first, fused) for first in (True, False) for fused in (True, False)),
])  # fmt: skip
def test_groups_and_head_sizes(group, dim, dtype, keys_first, fused):
    check(
        operands([1, 38, 17], group, 1, dim, dtype),
        SPLIT._replace(keys_first=keys_first, fused=fused),
    )


# On both sides of one block and of three; two are between them.
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 47, 48, 49])
def test_around_every_block(length):
    check(operands([length, 1], kv_heads=1), SPLIT)


def test_a_sequence_of_no_tokens_gives_zeros():
    arguments = operands([0, 40, 0])
    found = kernel.decode_attention(
        **arguments, config=SPLIT, out=torch.full_like(arguments["q"], POISON)
    )
    assert bool((found[[0, 2]] == 0).all())
    check(arguments, SPLIT)
    check(operands([0]), SPLIT)


def test_no_sequences():
    assert kernel.decode_attention(**operands([])).shape == (0, 4, 256)


def test_one_long_sequence_among_short_ones():
    """The long one is split, the short ones are not, and the bound on the grid holds."""
    check(operands([300] + [2] * 20, 2, 1), Config(16, 4, 3, 10, 16, False, True))


def test_more_indices_and_lengths_than_rows():
    """As in a CUDA graph's buffers, whose tails hold what an earlier batch left."""
    arguments = operands([20, 50])
    whole = arguments["kv_indptr"]
    arguments["kv_indptr"] = torch.cat([whole, torch.tensor([999, 1], dtype=torch.int32)])
    unused = arguments["v_buffer"][:, 0, 0].isnan().nonzero().flatten()
    arguments["kv_indices"] = torch.cat([arguments["kv_indices"], unused, unused])
    check(arguments, SPLIT)
    check(arguments, SPLIT._replace(min_chunk=64))  # several blocks in a program


def test_indices_of_32_bits_and_chosen_cut():
    arguments = operands([20, 50])
    arguments["kv_indices"] = arguments["kv_indices"].int()
    check(arguments, None)


def test_one_key_gives_its_value():
    """Softmax of one logit is 1, however large."""
    arguments = operands([1, 1], 2, 2)
    arguments["q"] = arguments["q"] * 1000
    found = kernel.decode_attention(**arguments, config=SPLIT)
    values = arguments["v_buffer"][arguments["kv_indices"]].repeat_interleave(2, 1)
    assert torch.equal(found, values)


@pytest.mark.parametrize("keys_first", [True, False])
def test_large_logits_do_not_overflow(keys_first):
    arguments = operands([80, 33], 2, 1)
    arguments["q"] = arguments["q"] * 200
    check(arguments, SPLIT._replace(keys_first=keys_first))


def test_the_last_split_sees_a_key_that_takes_all():
    """One key with a huge logit, in each block in turn: every split's weight is right."""
    for place in (0, 17, 40, 63):
        arguments = operands([64], 2, 1)
        at = int(arguments["kv_indices"][place])
        arguments["k_buffer"][at] = arguments["q"][0, 0] * 4
        found = kernel.decode_attention(**arguments, config=SPLIT)
        assert torch.equal(found[0, 0], arguments["v_buffer"][at, 0])


@pytest.mark.parametrize(
    ("group", "length", "fused"), [(16, 80, True), (2, 600, False)], ids=["fused", "second launch"]
)
def test_more_splits_than_are_loaded_at_once(group: int, length: int, fused: bool):
    """The last key takes all: what was added up before it must vanish."""
    arguments = operands([length], group, 1)
    at = int(arguments["kv_indices"][-1])
    arguments["q"][:] = arguments["q"][:, :1]
    arguments["k_buffer"][at] = arguments["q"][0, 0] * 4
    config = SPLIT._replace(target=100, fused=fused)
    found = kernel.decode_attention(**arguments, config=config)
    assert torch.equal(found[0], arguments["v_buffer"][at].expand(group, -1))


def test_the_arrival_does_not_change_the_bits():
    """Combined by the last split or by a second launch, with other orders of arrival: the same bits."""
    arguments = operands([50, 34], 2, 1)
    found = kernel.decode_attention(**arguments, config=SPLIT)
    again = kernel.decode_attention(**arguments, config=SPLIT._replace(fused=False))
    torch.testing.assert_close(found, again, rtol=0.01, atol=0.004)
    assert torch.equal(found, kernel.decode_attention(**arguments, config=SPLIT))


@pytest.mark.parametrize("processors", [78, 132])
def test_no_lengths_need_more_programs_than_the_grid_has(monkeypatch, processors):
    """The bound of `slots`, by counting as the kernel counts."""
    monkeypatch.setattr(kernel, "gpu", lambda device: INTERPRETER._replace(processors=processors))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        batch = int(torch.randint(1, 257, (1,), generator=generator))
        kv_heads = int(2 ** torch.randint(0, 5, (1,), generator=generator))
        longest = int(torch.randint(1, 5000, (1,), generator=generator))
        lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
        config = kernel.choose(batch, kv_heads, 2, 256)
        target = kernel.target_programs(config, torch.device("cpu"))
        chunk = max(-(-int(lengths.sum()) * kv_heads // target), config.min_chunk)
        needed = int(torch.clamp(-(-lengths // chunk), min=1).sum())
        for bound in (None, longest):
            there = kernel.slots(batch, kv_heads, config, torch.device("cpu"), bound)
            assert needed <= there <= batch + target


@pytest.mark.parametrize(
    ("pairs", "splits"),
    # 512 whole pairs are two rounds of 396 programs; in thirds they are four, each a third as long.
    [(256, 1), (396, 1), (400, 3), (512, 3), (700, 1), (792, 1), (1024, 1), (4096, 1)],
)
def test_no_round_for_a_few_programs(monkeypatch, pairs, splits):
    gpu = INTERPRETER._replace(processors=kernel.PROCESSORS)
    monkeypatch.setattr(kernel, "gpu", lambda device: gpu)
    config = kernel.choose(pairs // 4, 4, 2, 256)
    chunk = -(-pairs * 1024 // kernel.target_programs(config, torch.device("cpu")))
    chunk = max(-(-chunk // config.block_n) * config.block_n, config.min_chunk)
    assert max(1, -(-1024 // chunk)) == splits
    # What the grid has beyond them has no work, and waits for a place all the same.
    grid = 4 * kernel.slots(pairs // 4, 4, config, torch.device("cpu"), 1024)
    assert grid - splits * pairs <= pairs + kernel.PROCESSORS
    if splits == 1:
        assert grid - pairs <= kernel.PROCESSORS + 4


# What `choose` looks at, all of it together: it takes microseconds.
@pytest.mark.parametrize("dim", kernel.HEAD_DIMS)
def test_every_batch_gets_a_cut_that_the_kernel_takes(dim):
    batches, kv_heads = (1, 2, 7, 8, 32, 64, 256), (1, 2, 8, 16)
    for case in itertools.product(batches, kv_heads, kernel.GROUPS):
        config = kernel.choose(*case, dim)
        assert config.min_chunk % config.block_n == 0, case
        assert config.block_n * dim * 4 * (config.stages - 1) < 200_000, case


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"q": torch.zeros(2, 4, 128, dtype=torch.bfloat16)}, "heads of 256 or 512"),
        ({"q": torch.zeros(2, 4, 256)}, "q must be"),
        ({"q": torch.zeros(2, 4 * 256, dtype=torch.bfloat16)}, "q must be"),
        ({"q": torch.zeros(2, 3, 256, dtype=torch.bfloat16)}, "k_buffer must have Hkv"),
        ({"q": torch.zeros(2, 64, 256, dtype=torch.bfloat16)}, "Hq / Hkv"),
        ({"q": torch.zeros(2, 4 * 256 + 1, dtype=torch.bfloat16)[:, 1:].unflatten(1, (4, 256))}, "q must be aligned"),
        ({"k_buffer": torch.zeros(9, 2, 256, dtype=torch.float8_e5m2)}, "k_buffer is"),
        ({"v_buffer": torch.zeros(9, 2, 512, dtype=torch.bfloat16)}, "v_buffer must be"),
        ({"v_buffer": torch.zeros(9, 1, 256, dtype=torch.bfloat16)}, "k_buffer must have Hkv"),
        ({"v_buffer": torch.zeros(9, 2, 257, dtype=torch.bfloat16)[..., :256]}, "v_buffer must be aligned"),
        ({"kv_indptr": torch.zeros(2, dtype=torch.int32)}, "kv_indptr must have"),
        ({"kv_indptr": torch.zeros(3)}, "kv_indptr must be"),
        ({"kv_indices": torch.zeros(3, 3, dtype=torch.int64)}, "kv_indices must be"),
        ({"kv_indices": torch.zeros(6, dtype=torch.int64)[::2]}, "kv_indices must be"),
        ({"config": Config(24, 4, 3, 30, 48, False, True)}, "config.block_n"),
        ({"config": Config(32, 4, 3, 30, 48, False, True)}, "config.min_chunk"),
        ({"longest": -1}, "longest"),
        ({"arrived": torch.zeros(3, dtype=torch.int32)}, "arrived"),
        ({"out": torch.zeros(2, 4, 512, dtype=torch.bfloat16)}, "out must be"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changed, named):
    with pytest.raises(ValueError, match=named):
        kernel.decode_attention(**(operands([3, 4]) | changed))
