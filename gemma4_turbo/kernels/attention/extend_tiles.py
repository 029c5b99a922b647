"""Tile sizes of the extend kernels, per head size. ``bench/attention.py --tune`` measures others."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemma4_turbo.kernels import measured
from gemma4_turbo.kernels.gpu import Gpu, gpu


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


def dense_of(here: Gpu) -> dict[tuple[int, bool], Dense]:
    """The tiles for a GPU.

    One with tensor memory (compute capability 10.0) has Hopper's shared memory, and a tile takes more of
    it there: 279 KB for heads of 512.
    """
    if here.capability[0] in measured.KNOWN:
        return DENSE
    return DENSE_163K if here.shared_memory >= 163 * 1024 else DENSE_99K


SPLIT: dict[int, Split] = {
    128: Split(64, 32, 16, 4, 3, 4, 3),
    256: Split(32, 32, 16, 4, 3, 4, 1),
    512: Split(32, 16, 16, 4, 3, 8, 1),
}
SPLIT_ELSEWHERE: dict[int, Split] = {
    **SPLIT,
    512: Split(32, 16, 16, 8, 3, 8, 1),  # four warps would spill 150 bytes of a thread
}


def split_of(here: Gpu) -> dict[int, Split]:
    """As `dense_of`."""
    return SPLIT if here.capability[0] in measured.KNOWN else SPLIT_ELSEWHERE


NAME = "extend_attention"
DENSE_KIND, MASKED, SPLIT_KIND = "dense", "masked", "split"
"""Kinds of tiles in a GPU profile; masked ones are for a custom mask."""


def dense_tile(numbers: tuple[int, ...]) -> Dense:
    """A tile from a profile's numbers; ValueError if it is none."""
    measured.require(len(numbers) == len(Dense._fields), numbers)
    tile = Dense._make(numbers)._replace(q_in_registers=bool(numbers[-1]))
    measured.require(
        all(measured.power(n, 16, 256) for n in (tile.block_m, tile.block_n))
        and measured.power(tile.pack, 1, 64)
        and measured.power(tile.value_blocks, 1, 4)
        and tile.chunks in (1, 2)
        and measured.power(tile.num_warps, 1, 16)
        and all(1 <= n <= 8 for n in (tile.stages, tile.prefix_stages))
        and numbers[-1] in (0, 1),
        numbers,
    )
    return tile


def split_tile(numbers: tuple[int, ...]) -> Split:
    """As `dense_tile`."""
    measured.require(len(numbers) == len(Split._fields), numbers)
    tile = Split(*numbers)
    measured.require(
        all(measured.power(n, 16, 256) for n in (tile.rows, tile.block_n, tile.extend_n))
        and measured.power(tile.num_warps, 1, 16)
        and 1 <= tile.stages <= 8
        and 1 <= tile.min_blocks <= 64
        and 1 <= tile.programs_per_sm <= 16,
        numbers,
    )
    return tile


def found_dense(
    head_dim: int, group: int, custom: bool, device: torch.device
) -> measured.Row[Dense] | None:
    """What was measured on this GPU of so many query heads for a KV head; None if nothing was."""
    kind = MASKED if custom else DENSE_KIND
    return measured.look(NAME, device, (head_dim, group, kind), dense_tile)


def found_split(head_dim: int, group: int, device: torch.device) -> measured.Row[Split] | None:
    """As `found_dense`."""
    return measured.look(NAME, device, (head_dim, group, SPLIT_KIND), split_tile)


def dense(head_dim: int, group: int, custom: bool, device: torch.device) -> Dense:
    """The tile for many queries on a GPU: the measured one, or the table's."""
    row = found_dense(head_dim, group, custom, device)
    if row is not None and row.tile is not None:
        return row.tile
    return dense_of(gpu(device))[head_dim, custom]


def split(head_dim: int, group: int, device: torch.device) -> Split:
    """The tile for few queries on a GPU: as `dense`."""
    row = found_split(head_dim, group, device)
    return row.tile if row is not None and row.tile is not None else split_of(gpu(device))[head_dim]


# Extends of at most so many tokens per sequence are split over their keys.
SPLIT_TOKENS = 16
