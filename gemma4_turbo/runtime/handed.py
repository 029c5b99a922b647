"""Tensors that code of SGLang's hands from one function of ours to another: are they still the same?"""

from __future__ import annotations

import torch


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both are the same numbers in memory: an operator may hand on another object."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def version(tensor: torch.Tensor) -> int | None:
    """Raised by a change in place; none in inference mode."""
    return None if tensor.is_inference() else tensor._version
