"""What every line's ports ask of a weight before a kernel reads it."""

from __future__ import annotations

import torch


def weight_unfit(weight: object) -> str | None:
    """Why a weight is not a plain parameter of numbers that a kernel can read, or None."""
    if type(weight) is not torch.nn.Parameter and type(weight) is not torch.Tensor:
        return f"a weight is a {type(weight).__name__}"
    if weight.layout != torch.strided or weight.is_meta:
        return f"a weight is {weight.layout} on {weight.device}"
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"a weight is {weight.dtype}"
    return None
