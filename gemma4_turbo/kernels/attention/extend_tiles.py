"""Tile sizes of the extend kernels, per head size. ``bench/attention.py --tune`` measures others."""

from __future__ import annotations

from typing import NamedTuple

from gemma4_turbo.kernels.gpu import Gpu


class Dense(NamedTuple):
    """Many queries per sequence: `extend_triton._dense_kernel`."""

    block_m: int  # rows of a tile: tokens times heads packed together
    block_n: int  # keys taken at a time
    pack: int  # at most so many query heads of one KV head in a tile
    value_blocks: int  # programs that share the value dimension; each computes all scores
    chunks: int  # pieces (1 or 2) in which Q and K are multiplied
    num_warps: int
    stages: int
    prefix_stages: int  # one more hides the look-up in kv_indices
    q_in_registers: bool = False  # the second of two chunks of Q: leaves room for a stage more


class Split(NamedTuple):
    """Few queries over many keys: `extend_triton._split_kernel`."""

    rows: int  # at most so many of a tile
    block_n: int
    extend_n: int  # block of the new tokens, which are few
    num_warps: int
    stages: int
    min_blocks: int  # a split has at least so many blocks of keys
    programs_per_sm: int  # wanted, before a sequence is split further


MAX_SPLITS = 64

# By head size and whether there is a custom mask, whose loads need registers. Measured on Hopper.
DENSE: dict[tuple[int, bool], Dense] = {
    (128, False): Dense(128, 64, 8, 1, 1, 8, 3, 3),
    (128, True): Dense(128, 32, 8, 1, 1, 8, 2, 3),
    (256, False): Dense(128, 64, 8, 1, 1, 8, 2, 3),
    (256, True): Dense(128, 32, 8, 1, 1, 8, 2, 3),
    (512, False): Dense(128, 32, 16, 2, 2, 8, 3, 3, True),
    (512, True): Dense(64, 32, 16, 1, 1, 8, 2, 3),
}
# For less memory, compiled and not measured: they fit, and no thread spills more than 16 bytes.
DENSE_163K: dict[tuple[int, bool], Dense] = {
    (128, False): Dense(128, 64, 8, 1, 1, 8, 2, 2),
    (128, True): Dense(64, 32, 8, 1, 1, 8, 2, 2),
    (256, False): Dense(64, 64, 8, 1, 1, 8, 2, 2),
    (256, True): Dense(64, 32, 8, 1, 1, 8, 2, 2),
    (512, False): Dense(64, 32, 16, 2, 2, 8, 2, 2),
    (512, True): Dense(64, 32, 16, 2, 2, 8, 2, 2),
}
DENSE_99K: dict[tuple[int, bool], Dense] = {
    (128, False): Dense(64, 32, 8, 1, 1, 4, 2, 2),
    (128, True): Dense(64, 32, 8, 1, 1, 8, 2, 2),
    (256, False): Dense(64, 32, 8, 1, 1, 8, 2, 2),
    (256, True): Dense(64, 32, 8, 1, 1, 8, 2, 2),
    (512, False): Dense(64, 16, 16, 1, 1, 8, 2, 2),
    (512, True): Dense(32, 16, 16, 1, 1, 4, 2, 2),
}


def dense_of(gpu: Gpu) -> dict[tuple[int, bool], Dense]:
    """The tiles for a GPU.

    One with tensor memory (compute capability 10.0) has Hopper's shared memory, and a tile takes more of
    it there: 279 KB for heads of 512.
    """
    if gpu.capability[0] == 9:
        return DENSE
    return DENSE_163K if gpu.shared_memory >= 163 * 1024 else DENSE_99K


SPLIT: dict[int, Split] = {
    128: Split(64, 32, 16, 4, 3, 4, 3),
    256: Split(32, 32, 16, 4, 3, 4, 1),
    512: Split(32, 16, 16, 4, 3, 8, 1),
}
SPLIT_ELSEWHERE: dict[int, Split] = {
    **SPLIT,
    512: Split(32, 16, 16, 8, 3, 8, 1),  # four warps would spill 150 bytes of a thread
}


def split_of(gpu: Gpu) -> dict[int, Split]:
    """As `dense_of`."""
    return SPLIT if gpu.capability[0] == 9 else SPLIT_ELSEWHERE


# Extends of at most so many tokens per sequence are split over their keys.
SPLIT_TOKENS = 16
