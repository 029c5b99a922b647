"""What a self-check draws and counts."""

from __future__ import annotations

import torch


def samples(rows: int, like: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Random rows like an activation, scales from 0.01 to 30, the global generator untouched."""
    generator = torch.Generator(like.device).manual_seed(rows)
    shape = (rows, like.shape[-1] if width is None else width)
    drawn = torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32)
    scale = torch.logspace(-2, 1.5, rows, device=like.device, dtype=torch.float32)
    return (drawn * scale[:, None]).to(like.dtype)


def two_rows(like: torch.Tensor) -> torch.Tensor:
    """Random rows like an activation, of scales 0.6 and 4, to tell a gate's activation from another.

    GELU of far smaller or larger gates is half of them, or all or nothing, as that of other activations,
    too; and the products of large ones are infinite in fp16.
    """
    return samples(5, like)[2:4]


def telling(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or random numbers where it says nothing of the code: not all finite, or mostly 0.

    A verdict is shared by all layers of the shape and stays; what is in this one may be written later.
    Random rows are of length 1: those of `samples` give activations that are infinite in fp16.
    """
    finite = torch.isfinite(weight.sum(dtype=torch.float32))
    if bool(finite) and 2 * int(torch.count_nonzero(weight)) > weight.numel():
        return weight.data
    generator = torch.Generator(weight.device).manual_seed(weight.shape[0])
    drawn = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return drawn.normal_(0, weight.shape[-1] ** -0.5, generator=generator)


def different_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many 16-bit elements differ, two NaN counting as equal."""
    return int(((a.view(torch.int16) != b.view(torch.int16)) & ~(a.isnan() & b.isnan())).sum())


def too_far(ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> int:
    """Numbers further apart than ``bound`` of their row's largest; a NaN is."""
    largest = theirs.float().abs().amax(-1, keepdim=True)
    return int((~((ours.float() - theirs.float()).abs() <= bound * largest)).sum())


def odd_rows(rows: torch.Tensor) -> torch.Tensor:
    """``rows``, of which the first ten became zero, subnormal, huge, infinite or not a number."""
    rows[0] = 0.0
    rows[1] *= -0.0
    rows[2] *= 1e-39
    rows[3] *= 1e-36
    rows[4] *= 1e18
    rows[5] *= 1e38
    rows[6, 3] = float("inf")
    rows[7, 4] = float("-inf")
    rows[8, 5] = float("nan")
    rows[9, ::2] *= 1e-38
    return rows
