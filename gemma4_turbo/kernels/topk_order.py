"""The order in which ``torch.topk`` on CUDA returns equal values, in plain numpy.

A literal simulation, slow and independent of the Triton kernel, for machines without a GPU:
gather (elements above the K-th value in index order, then those equal to it), then the unstable
32-slot bitonic sort that PyTorch runs for K <= 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

SLOTS = 32


def _radix_key(value: float) -> tuple[int, float, bool]:
    # Bit-pattern order: NaN above everything, and +0 above -0.
    if math.isnan(value):
        return (1, 0.0, True)
    return (0, value, not math.copysign(1.0, value) < 0)


def _greater(a: float, b: float) -> bool:
    # Float order: -0 equals +0, all NaN are equal and greatest.
    return (math.isnan(a) and not math.isnan(b)) or a > b


def _bitonic_sort(values: list[float], ids: list[int], count: int) -> None:
    valid = [slot < count for slot in range(SLOTS)]

    def merge(stride: int, flag: Callable[[int], bool]) -> None:
        for thread in range(SLOTS // 2):
            a = 2 * thread - (thread & (stride - 1))
            b = a + stride
            ahead = (_greater(values[a], values[b]) and valid[a]) or not valid[b]
            if ahead == flag(thread):
                values[a], values[b] = values[b], values[a]
                ids[a], ids[b] = ids[b], ids[a]
                valid[a], valid[b] = valid[b], valid[a]

    size = 2
    while size < SLOTS:
        stride = size // 2
        while stride > 0:
            merge(stride, lambda thread, half=size // 2: (thread & half) != 0)
            stride //= 2
        size *= 2
    stride = SLOTS // 2
    while stride > 0:
        merge(stride, lambda thread: False)
        stride //= 2


def cuda_topk_ids(logits: npt.ArrayLike, topk: int) -> npt.NDArray[np.int64]:
    """Indices ``[T, K]`` in the order of ``torch.topk(logits, K)`` on CUDA.

    Args:
        logits: ``[T, E]``, any float dtype; bf16 and fp16 may come widened to float32.
        topk: K, 1 to min(E, 32).

    Raises:
        ValueError: if topk is outside that range.
    """
    table = np.asarray(logits, dtype=np.float32)
    if not 1 <= topk <= min(table.shape[1], SLOTS):
        raise ValueError(f"topk must be in 1..{min(table.shape[1], SLOTS)}, got {topk}")
    result = np.empty((table.shape[0], topk), dtype=np.int64)
    for row, raw in enumerate(table.tolist()):
        keys = [_radix_key(value) for value in raw]
        kth = sorted(keys, reverse=True)[topk - 1]
        ids = [i for i, key in enumerate(keys) if key > kth]
        ids += [i for i, key in enumerate(keys) if key == kth][: topk - len(ids)]
        if topk > 1:
            ids += [0] * (SLOTS - topk)
            values = [raw[i] for i in ids]
            _bitonic_sort(values, ids, topk)
        result[row] = ids[:topk]
    return result
