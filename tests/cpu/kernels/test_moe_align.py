"""The alignment kernel in Triton's interpreter against a loop over the slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_turbo.kernels import moe_align as kernel

pytestmark = [
    pytest.mark.skipif(
        not kernel.INTERPRETED, reason="with a GPU, tests/gpu compares with stock itself"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]

POISON = -77_777
GUARD = 64


def oracle(ids: list[int], block: int, experts: int) -> tuple[list[int], list[int]]:
    """Sorted slots up to the last valid block, and the expert of every valid block."""
    sorted_slots: list[int] = []
    expert_ids: list[int] = []
    for expert in range(-1, experts):
        own = [slot for slot, id_ in enumerate(ids) if id_ == expert]
        own += [len(ids)] * (-len(own) % block)
        sorted_slots += own
        expert_ids += [expert] * (len(own) // block)
    return sorted_slots, expert_ids


def check(topk_ids: torch.Tensor, block: int, experts: int) -> None:
    """Every element of the outputs, in poisoned buffers with guards on both sides."""
    slots = topk_ids.numel()
    capacity = kernel.padded_capacity(slots, block, experts)
    lengths = (capacity, -(-capacity // block), 1)
    storage = [torch.full((length + 2 * GUARD,), POISON, dtype=torch.int32) for length in lengths]
    outputs = [
        whole[GUARD : GUARD + length] for whole, length in zip(storage, lengths, strict=True)
    ]
    before = topk_ids.clone()
    kernel.align_into(topk_ids, block, experts, *outputs)

    expected, expert_ids = oracle(topk_ids.flatten().tolist(), block, experts)
    assert len(expected) <= capacity
    assert outputs[2].tolist() == [len(expected)]
    filled = np.array(expected + [slots] * (capacity - len(expected)))
    np.testing.assert_array_equal(outputs[0].numpy(), filled)
    untouched = [POISON] * (lengths[1] - len(expert_ids))
    assert outputs[1].tolist() == expert_ids + untouched
    for whole, length in zip(storage, lengths, strict=True):
        assert (whole[:GUARD] == POISON).all()
        assert (whole[GUARD + length :] == POISON).all()
    assert torch.equal(topk_ids, before)


def drawn(tokens: int, topk: int, low: int, experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, experts, (tokens, topk), generator=generator, dtype=torch.int32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Ids drawn from very few experts or from many, with and without -1."""
    experts = draw(st.integers(1, 300))
    topk = draw(st.integers(1, 8))
    tokens = draw(st.integers(0, 20))
    pool = draw(st.lists(st.integers(-1, experts - 1), min_size=1, max_size=40))
    ids = draw(
        st.lists(st.sampled_from(pool), min_size=tokens * topk, max_size=tokens * topk),
    )
    block = draw(st.sampled_from((1, 3, 8, 16, 48, 64)))
    return torch.tensor(ids, dtype=torch.int32).reshape(tokens, topk), block, experts


@settings(max_examples=60, deadline=None)
@given(batches())
def test_any_batch(case):
    check(*case)


# The models' experts with the smallest block, and every block with those of the 26B.
@pytest.mark.parametrize(
    ("experts", "block"), [(64, 16), (128, 16), (256, 16), (128, 32), (128, 64), (128, 128)]
)
def test_sizes_of_models(experts, block):
    check(drawn(5, 8, 0, experts), block, experts)
    check(drawn(16, 8, -1, experts), block, experts)


@pytest.mark.parametrize("topk", range(1, 9))
def test_odd_sizes(topk):
    for tokens in (1, 7, 33) if topk % 2 else (2, 33):
        check(drawn(tokens, topk, -1, 128, seed=tokens), 16, 128)


@pytest.mark.parametrize("slots", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512])
def test_around_every_group_and_variant(slots):
    check(drawn(slots, 1, -1, 128, seed=slots), 16, 128)
    if slots % 2:  # few experts, whose blocks are many
        check(drawn(slots, 1, 0, 2, seed=slots), 16, 128)


@pytest.mark.parametrize("expert", [-1, 0, 1, 63, 64, 126, 127])
def test_all_slots_on_one_expert(expert):
    for tokens in (1, 5, 64):
        check(torch.full((tokens, 8), expert, dtype=torch.int32), 16, 128)


@pytest.mark.parametrize("experts", [1, 2, 3, 128, 200, 511, 512])
def test_each_slot_on_its_own_expert(experts):
    ids = torch.arange(experts, dtype=torch.int32).reshape(-1, 1)
    check(ids, 16, experts)
    check(ids.flip(0).contiguous(), 1, experts)


@pytest.mark.parametrize("count", [15, 16, 17, 31, 32, 33, 48])
def test_blocks_that_are_just_full(count):
    ids = torch.tensor([5] * count + [6] + [-1] * count, dtype=torch.int32)
    check(ids.reshape(1, -1), 16, 128)


def test_no_tokens():
    """Shapes as in stock; nothing is read, and the padded count is 0."""
    check(torch.empty((0, 8), dtype=torch.int32), 16, 128)
    sorted_token_ids, expert_ids, post_pad = kernel.moe_align(
        torch.empty((0, 8), dtype=torch.int32), 16, 128
    )
    assert (sorted_token_ids.numel(), expert_ids.numel(), post_pad.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(
    ("slots", "block", "experts", "length"),
    [(8, 16, 128, 128), (128, 16, 128, 2048), (129, 16, 128, 2064), (256, 64, 128, 8383)],
)
def test_lengths(slots, block, experts, length):
    """Fewer slots than buckets: a block each. Otherwise: every bucket a slot short of a block."""
    ids = drawn(slots, 1, 0, experts)
    sorted_token_ids, expert_ids, post_pad = kernel.moe_align(ids, block, experts)
    assert len(sorted_token_ids) == length
    assert len(expert_ids) == -(-length // block)
    assert post_pad.shape == (1,)
    assert {t.dtype for t in (sorted_token_ids, expert_ids, post_pad)} == {torch.int32}


def test_reference():
    """Plain torch gives the same, slot order included."""
    for tokens, low, block in ((1, 0, 16), (9, -1, 48), (40, 0, 64)):
        ids = drawn(tokens, 8, low, 128)
        got, expected = kernel.moe_align(ids, block, 128), kernel.reference_align(ids, block, 128)
        assert kernel.difference(got, expected, block) is None
        assert torch.equal(got[0], expected[0])


def test_difference_sees_what_matters_and_nothing_else():
    """The order inside an expert is free; everything else that is valid is not."""
    ids = torch.tensor([[3, 3, 5, 3, 3]], dtype=torch.int32)
    right = kernel.reference_align(ids, 2, 8)  # slots 0 1 | 3 4 | 2 pad, then pads

    def changed(output: int, at: int | list[int], value: int | list[int]) -> str | None:
        other = tuple(t.clone() for t in right)
        other[output][at] = torch.as_tensor(value, dtype=torch.int32)
        return kernel.difference(other, right, 2)

    assert changed(0, [0, 3], [4, 0]) is None  # across the blocks of one expert
    assert changed(0, [4, 5], [5, 2]) is None  # a slot and its expert's pad
    assert changed(1, 3, 9) is None  # not a valid block
    assert changed(0, [0, 4], [2, 0]) == "an expert's slots differ"
    assert changed(0, 0, 5) == "an expert's slots differ"
    assert changed(1, 2, 4) == "expert_ids differ"
    assert changed(0, 6, 0) == "sorted_token_ids differ beyond num_tokens_post_pad"
    assert changed(2, 0, 8) == "num_tokens_post_pad is 8, not 6"
    short = (right[0][:-1], right[1], right[2])
    assert "sorted_token_ids is" in str(kernel.difference(short, right, 2))


def test_ids_that_no_expert_has_stay_inside_the_buffers():
    """Not checked; with a power of two of experts every store stays inside all the same."""
    ids = torch.tensor([[200, -5, 128, 3, -2, 2**31 - 1, -(2**31), 7]], dtype=torch.int32)
    capacity = kernel.padded_capacity(8, 16, 128)
    whole = [torch.full((n + 2 * GUARD,), POISON, dtype=torch.int32) for n in (capacity, 8, 1)]
    kernel.align_into(ids, 16, 128, *(t[GUARD:-GUARD] for t in whole))
    for tensor in whole:
        assert (tensor[:GUARD] == POISON).all()
        assert (tensor[-GUARD:] == POISON).all()


@pytest.mark.parametrize(
    ("topk_ids", "block", "experts", "named"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), 16, 128, "topk_ids must be int32"),
        (torch.zeros(2, 16, dtype=torch.int32)[:, ::2], 16, 128, "topk_ids must be contiguous"),
        (torch.zeros(65, 8, dtype=torch.int32), 16, 128, "topk_ids must have at most 512"),
        (torch.zeros(2, 8, dtype=torch.int32), 0, 128, "block_size"),
        (torch.zeros(2, 8, dtype=torch.int32), 16, 0, "num_experts"),
        (torch.zeros(2, 8, dtype=torch.int32), 16, 513, "num_experts"),
    ],
)
def test_declines_name_the_argument(topk_ids, block, experts, named):
    with pytest.raises(ValueError, match=named):
        kernel.moe_align(topk_ids, block, experts)
