"""Images and video frames in batches: which go together, and how many at a time.

Entries of one patch count share a bucket; a bucket is cut into chunks whose transient memory stays inside a
budget, one entry at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

ONE_HOT_INDEX = 8  # bytes of an int64, the type of stock's one-hot positions


class Encoder(NamedTuple):
    """What the encoder's transients depend on."""

    hidden_size: int
    intermediate_size: int
    positions: int  # rows of the position table
    element_size: int
    one_hot: bool  # the position table is read through a one-hot product
    masks: bool  # a [patches, patches] mask is built


def entry_bytes(encoder: Encoder, patches: int) -> int:
    """Peak of what one entry needs inside the encoder, weights and results left out.

    The larger of the patch embedder's (int64 one-hot of two coordinates and its copy in the
    weights' type) and a layer's (input and residual, gate and up before and after the clamp, their
    product; norms and rotated heads are smaller).
    """
    embedder = 0
    if encoder.one_hot:
        embedder = 2 * encoder.positions * (ONE_HOT_INDEX + encoder.element_size)
    layer = (4 * encoder.hidden_size + 6 * encoder.intermediate_size) * encoder.element_size
    mask = 2 * patches * patches if encoder.masks else 0
    return patches * max(embedder, layer) + mask


def plan(
    patch_counts: Sequence[int], bytes_of: Callable[[int], int], budget: int, most: int | None
) -> list[list[int]]:
    """Indices of ``patch_counts``, cut into chunks of equal count, each bucket in order.

    Args:
        patch_counts: of every entry.
        bytes_of: from a patch count to the bytes of one entry.
        budget: bytes of a chunk; an entry that is too large for it alone is a chunk of its own.
        most: entries of a chunk, or None.
    """
    buckets: dict[int, list[int]] = {}
    for index, count in enumerate(patch_counts):
        buckets.setdefault(count, []).append(index)
    chunks = []
    for count, members in buckets.items():
        size = max(1, budget // max(1, bytes_of(count)))
        size = size if most is None else min(size, most)
        chunks += [members[at : at + size] for at in range(0, len(members), size)]
    return chunks
