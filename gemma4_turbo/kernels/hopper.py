"""Kernels whose tiles fill a Hopper GPU's shared memory: on one with less a launch would raise."""

from __future__ import annotations

import functools

import torch


@functools.cache
def unfit(argument: str, device: torch.device) -> str | None:
    """Why a compiled kernel does not run where ``argument`` lies, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{argument} must be on a CUDA device, got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"{argument} is on a GPU of compute capability {capability}, the kernel is tuned for 9.0"
    return None
