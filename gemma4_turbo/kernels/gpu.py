"""Properties of the GPU that tiles are chosen by."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """One GPU."""

    capability: tuple[int, int]
    processors: int
    shared_memory: int  # bytes that one CTA may have


INTERPRETER = Gpu((9, 0), 8, 227 * 1024)
"""Tiles are Hopper's there."""


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The GPU of a device."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    memory = getattr(
        found, "shared_memory_per_block_optin", 64 * 1024
    )  # ROCm has no such attribute
    return Gpu((found.major, found.minor), found.multi_processor_count, memory)
