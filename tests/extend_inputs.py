"""Random ragged batches for the extend attention, on any device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

POISON = 12345.0
GUARD = 3  # rows of q and out that belong to no sequence


@dataclass
class Batch:
    """The arguments of `extend_attention`, and where its output may be written."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    rows: int = 0  # of q that belong to sequences


def make(
    generator: torch.Generator,
    lengths: list[int],
    prefixes: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 128,
    window: int = -1,
    causal: bool = True,
    mask: str = "",
    skip_prefix: bool = True,
    cut: int = 0,
    strided: bool = True,
    dtype: torch.dtype = torch.float16,
    scale: float | None = None,
    wide: tuple[torch.dtype, torch.dtype] = (torch.int64, torch.int32),
    graph: bool = False,
) -> Batch:
    """A batch whose pages are shuffled and whose unused slots, rows and mask bytes are NaN or wrong.

    Args:
        generator: of the values and of their device.
        lengths: new tokens of each sequence.
        prefixes: cached tokens of each sequence.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: D.
        window: as `sliding_window_size`.
        causal: as `is_causal`.
        mask: "", "random", "image" (causal, but some spans both ways) or "tree".
        skip_prefix: as `skip_prefix_custom_mask`.
        cut: as `mask_query_block`.
        strided: k and v are slices of a wider tensor, as after a QKV projection.
        dtype: of q, k and v.
        scale: `sm_scale`; default ``head_dim ** -0.5``.
        wide: dtypes of qo_indptr and kv_indptr.
        graph: kv_indices is longer than needed, as a CUDA graph's buffer is.
    """
    device = generator.device

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def integers(values: list[int], kind: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    total, cached = sum(lengths), sum(prefixes)
    rows = total + GUARD
    q = randn(rows, heads, head_dim)
    if strided:
        qkv = randn(rows, (heads + 2 * kv_heads) * head_dim)
        q, k, v = (
            part.unflatten(-1, (-1, head_dim))
            for part in qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
        )
    else:
        k, v = randn(rows, kv_heads, head_dim), randn(rows, kv_heads, head_dim)
    k[total:], v[total:] = torch.nan, torch.nan
    slots = cached + 7
    order = torch.randperm(slots, generator=generator, device=device)
    buffers = [randn(slots, kv_heads, head_dim) for _ in range(2)]
    for buffer in buffers:
        buffer[order[cached:]] = torch.nan
    kv_indices = order[: slots if graph else cached]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    cached_starts = [sum(prefixes[:i]) for i in range(len(prefixes) + 1)]
    keywords: dict[str, Any] = {
        "sm_scale": head_dim**-0.5 if scale is None else scale,
        "is_causal": causal,
        "sliding_window_size": window,
    }
    if mask:
        offsets = [5 * i for i in range(len(lengths))] if window > 0 else [0] * len(lengths)
        parts = []
        for new, old, offset in zip(lengths, prefixes, offsets, strict=True):
            parts.append(_mask(generator, mask, new, old, offset).flatten())
        sizes = [part.numel() for part in parts]
        keywords |= {
            "custom_mask": torch.cat([*parts, torch.ones(1, device=device).bool()]),
            "mask_indptr": integers([sum(sizes[:i]) for i in range(len(sizes) + 1)], torch.int64),
            "skip_prefix_custom_mask": skip_prefix,
            "mask_query_block": cut,
        }
        if window > 0:
            keywords["window_kv_offsets"] = integers(offsets, torch.int32)
    positional = (
        q,
        k,
        v,
        *buffers,
        integers(starts, wide[0]),
        integers(cached_starts, wide[1]),
        kv_indices,
    )
    return Batch(positional, keywords, total)


def _mask(generator: torch.Generator, kind: str, new: int, old: int, offset: int) -> torch.Tensor:
    """``[new, offset + old + new]``; the bytes of keys before the window are wrong on purpose."""
    device = generator.device
    body = torch.ones(new, old + new, dtype=torch.bool, device=device).tril(old)
    if kind == "random":
        body = torch.rand(new, old + new, generator=generator, device=device) < 0.5
    elif kind == "image" and new > 2:
        first = int(torch.randint(0, new - 1, (), generator=generator, device=device))
        last = int(torch.randint(first + 1, new, (), generator=generator, device=device))
        body[first : last + 1, old + first : old + last + 1] = True
    elif kind == "tree":
        body[:, old:] &= torch.rand(new, new, generator=generator, device=device) < 0.6
        body[:, old:] |= torch.eye(new, dtype=torch.bool, device=device)
    noise = torch.rand(new, offset, generator=generator, device=device) < 0.5
    return torch.cat([noise, body], 1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``, in fp64."""
    got, expected = got.double(), expected.double()
    norm = float(expected.norm())
    return float((got - expected).norm()) / norm if norm else float(got.norm())
