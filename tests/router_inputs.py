"""Router logits that are hard to order: ties, infinities, NaN rows, subnormals, signed zeros."""

from __future__ import annotations

from typing import Any

import torch

KINDS = (
    "all equal",
    "two values",
    "few values",
    "signed zeros",
    "subnormal",
    "wide",
    "infinities",
    "nan",
    "all -inf",
    "all nan",
    "any bits",
    "tie at the k-th place",
)


def logits(
    kind: str, rows: int, experts: int, topk: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """``[rows, experts]`` logits of one of `KINDS` on the generator's device."""
    shape = (rows, experts)
    place: Any = {"device": generator.device, "generator": generator}

    def rand() -> torch.Tensor:
        return torch.rand(shape, **place)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, **place)

    def constant(value: float) -> torch.Tensor:
        return torch.full(shape, value, device=generator.device, dtype=dtype)

    bits = torch.int32 if dtype == torch.float32 else torch.int16
    normal = torch.randn(shape, **place).to(dtype)
    if kind == "all equal":
        return constant(1.5)
    if kind == "two values":
        return integers(0, 2).to(dtype)
    if kind == "few values":
        return (integers(-3, 4) / 2).to(dtype)
    if kind == "signed zeros":
        zeros = torch.where(rand() < 0.5, constant(0.0), constant(-0.0))
        return torch.where(rand() < 0.2, constant(-1.0), zeros)
    if kind == "subnormal":
        tiny = integers(0, 6).to(bits).view(dtype)
        return torch.where(rand() < 0.5, tiny, -tiny)
    if kind == "wide":  # differences beyond 87, where exp is subnormal or zero
        return (torch.randn(shape, **place) * 60).to(dtype)
    if kind == "infinities":
        with_plus = torch.where(rand() < 0.03, constant(float("inf")), normal)
        return torch.where(rand() < 0.3, constant(float("-inf")), with_plus)
    if kind == "nan":
        with_inf = torch.where(rand() < 0.05, constant(float("inf")), normal)
        return torch.where(rand() < 0.03, constant(float("nan")), with_inf)
    if kind == "all -inf":
        return constant(float("-inf"))
    if kind == "all nan":
        return constant(float("nan"))
    if kind == "any bits":  # NaN payloads and negative NaN among them
        info = torch.iinfo(bits)
        drawn = torch.randint(info.min, info.max + 1, shape, dtype=torch.int64, **place)
        return drawn.to(bits).view(dtype)
    if kind == "tie at the k-th place":
        made = normal.clone()
        kth = made.topk(topk, dim=-1)[0][:, -1:]
        return torch.where(rand() < 0.2, kth.expand(shape), made)
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


def bits_differ(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> int:
    """Rows of (weights, ids) that differ in any bit, NaN and -0 included."""
    weights = got[0].view(torch.int32) != expected[0].view(torch.int32)
    ids = got[1] != expected[1]
    assert got[0].dtype == expected[0].dtype == torch.float32
    assert got[1].dtype == expected[1].dtype == torch.int32
    assert got[0].shape == expected[0].shape
    assert got[1].shape == expected[1].shape
    return int((weights | ids).any(dim=-1).sum())
