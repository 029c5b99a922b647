"""Arguments of every fusion that is bitwise, for tests with and without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from gemma4_turbo.fusions import layer_norms, layer_tail, ple_tail, qkv, router_norm
from gemma4_turbo.fusions.fusion import Fusion
from gemma4_turbo.kernels.norms.layer_norms import Router
from gemma4_turbo.kernels.norms.layer_tail import Experts, NextNorm
from gemma4_turbo.kernels.qkv import Rope

EPS = 1e-6


class Draw:
    """Random operands, the same every time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def rows(self, *shape: int) -> torch.Tensor:
        """Normally distributed, bf16."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.bfloat16()

    def weight(self, width: int) -> torch.Tensor:
        """Around 1."""
        return (self.rows(width).float().tanh() + 1.5).bfloat16()

    def scalar(self, value: float) -> torch.Tensor:
        """One element."""
        return torch.tensor([value], device=self.device, dtype=torch.bfloat16)


def norms(draw: Draw, width: int, routed: str) -> layer_norms.Args:
    """With a router and without: three results or one. Its scale as it is, or folded into a weight."""
    w = [draw.weight(width) for _ in range(4)]
    root = None if routed == "folded" else draw.scalar(width**-0.5)
    router = Router(w[2], root, EPS, w[3], EPS) if routed else None
    x, residual = draw.rows(3, width), draw.rows(3, width)
    return layer_norms.Args(x, residual, w[0], EPS, w[1], EPS, router)


def tail(draw: Draw, width: int, experts: str, following: bool) -> layer_tail.Args:
    """A dense layer, experts that stock has summed, experts that nobody has."""
    x, residual, w = draw.rows(3, width), draw.rows(3, width), draw.weight(width)
    branch = None
    if experts:
        output = draw.rows(3, 4, width) if experts == "unsummed" else draw.rows(3, width)
        branch = Experts(output, draw.weight(width), EPS, draw.weight(width), EPS)
    after = NextNorm(draw.weight(width), EPS, 0) if following else None
    return layer_tail.Args(x, w, EPS, residual, draw.scalar(0.7), branch, after)


def heads(draw: Draw, shared: bool, rope: bool) -> qkv.Args:
    """A layer with K and V of its own, and one that shares them."""
    d = 128
    whole = draw.rows(3, 8 * d)
    q, k, v = whole.split([4 * d, 2 * d, 2 * d], dim=-1)
    turn = None
    if rope:
        angles = torch.arange(64.0)[:, None] * torch.logspace(0, -4, d // 2)
        cache = torch.cat([angles.cos(), angles.sin()], dim=-1).to(draw.device)
        turn = Rope(torch.tensor([5, 0, 63], device=draw.device), cache)
    weights = draw.weight(d), draw.weight(d)
    own = (None, None) if shared else (k, v)
    return qkv.Args(q, *own, *weights, EPS, d, turn, None)


def three(draw: Draw, width: int) -> ple_tail.Args:
    """The three launches."""
    x, residual, contribution = (draw.rows(3, width) for _ in range(3))
    gate, factor = draw.rows(3, 256), draw.rows(3, 256)
    w, last = draw.weight(width), draw.weight(width)
    scalar = draw.scalar(0.7)
    return ple_tail.Args(x, w, EPS, residual, gate, factor, contribution, last, EPS, scalar)


def end(draw: Draw, width: int) -> ple_tail.NormAdd:
    """The last of them with the next norm."""
    x, residual = draw.rows(3, width), draw.rows(3, width)
    w, after = draw.weight(width), draw.weight(width)
    return ple_tail.NormAdd(x, w, EPS, residual, draw.scalar(0.7), after, EPS)


def case(name: str, device: str, width: int = 512) -> tuple[Fusion[Any, Any], Any]:
    """A fusion and arguments for it, drawn anew at every call."""
    draw = Draw(device)
    scaled = draw.rows(3, width), draw.weight(width), draw.scalar(0.1), EPS
    made: tuple[Fusion[Any, Any], Any] = {
        "layer_norms": lambda: (layer_norms.LayerNorms("layer_norms"), norms(draw, width, "")),
        "layer_norms, router": lambda: (
            layer_norms.LayerNorms("layer_norms"),
            norms(draw, width, "scale"),
        ),
        "layer_norms, folded router": lambda: (
            layer_norms.LayerNorms("layer_norms"),
            norms(draw, width, "folded"),
        ),
        "router_norm": lambda: (
            router_norm.RouterNorm("router_norm"),
            router_norm.Args(*scaled),
        ),
        "ple_tail": lambda: (ple_tail.PleTail("ple_tail"), three(draw, width)),
        "ple_tail, next norm": lambda: (ple_tail.PleInputNorm("input_norm"), end(draw, width)),
        "input_norm": lambda: (layer_tail.LayerTail("input_norm"), tail(draw, width, "", True)),
        "input_norm, experts": lambda: (
            layer_tail.LayerTail("input_norm"),
            tail(draw, width, "summed", True),
        ),
        "experts_sum": lambda: (
            layer_tail.ExpertsTail("experts_sum"),
            tail(draw, width, "unsummed", False),
        ),
        "qkv_norm": lambda: (qkv.Qkv("qkv_norm"), heads(draw, False, False)),
        "qkv_norm, shared KV": lambda: (qkv.Qkv("qkv_norm"), heads(draw, True, False)),
        "rope_store": lambda: (qkv.Qkv("rope_store"), heads(draw, False, True)),
        "rope_store, shared KV": lambda: (qkv.Qkv("rope_store"), heads(draw, True, True)),
    }[name]()
    return made


NAMES = (
    "layer_norms",
    "layer_norms, router",
    "router_norm",
    "ple_tail",
    "ple_tail, next norm",
    "input_norm",
    "input_norm, experts",
    "experts_sum",
    "qkv_norm",
    "qkv_norm, shared KV",
    "rope_store",
    "rope_store, shared KV",
)
