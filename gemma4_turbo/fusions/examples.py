"""What `verify` draws for a fusion: arguments of Gemma 4's shapes, few rows where Triton is interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

EPS = 1e-6

A = TypeVar("A")
Examples = list[tuple[str, Callable[[], A]]]
"""In words, and what draws the arguments: the same ones each time, as both sides may overwrite theirs."""


def rows(device: str, width: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Activations ``[rows, width]``, scales from 0.01 to 30."""
    count = 512 if device == "cuda" else 6
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(count, width, generator=generator, device=device)
    scale = torch.logspace(-2, 1.5, count, device=device)[:, None]
    return (x * scale).to(dtype)


def weight(device: str, width: int, seed: int) -> torch.Tensor:
    """A norm's weight ``[width]``, bf16, from 0.5 to 2.5."""
    return (rows(device, width, seed)[-1].float().tanh() + 1.5).bfloat16()


def root(device: str, width: int) -> torch.Tensor:
    """The router's factor, bf16."""
    return torch.tensor(width**-0.5, device=device, dtype=torch.bfloat16)


def scalar(device: str) -> torch.Tensor:
    """A layer's factor, bf16."""
    return torch.tensor([0.7], device=device, dtype=torch.bfloat16)
