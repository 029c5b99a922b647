"""Norms of Q, K and V, their rotation, and K and V into the pool."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from gemma4_turbo.engine.run import peer
from gemma4_turbo.fusions.comparison import samples
from gemma4_turbo.fusions.examples import EPS, Examples, rows, weight
from gemma4_turbo.fusions.fusion import Fusion, Tensors, differing
from gemma4_turbo.fusions.stock import Stock, followed
from gemma4_turbo.kernels import qkv as kernel
from gemma4_turbo.kernels.qkv import Rope, Store
from gemma4_turbo.runtime import custom_ops

Heads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
NO_ROPE = (None, None)


class Args(NamedTuple):
    """As `gemma4_turbo.kernels.qkv.qkv`."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    q_weight: torch.Tensor
    k_weight: torch.Tensor | None
    eps: float
    head_dim: int
    rope: Rope | None
    store: Store | None


class Qkv(Fusion[Args, Heads]):
    """`gemma4_turbo.kernels.qkv`. Its norms are Triton kernels of stock's: there is one kind."""

    follows_rmsnorm = False

    def unfit(self, args: Args) -> str | None:
        return kernel.unfit(*args[:5], *args[6:8])

    def launch(self, args: Args, kind: int) -> Heads:
        return kernel.launch_qkv(*args)

    def operator(self) -> Any:
        return custom_ops.register(
            "qkv_norm",
            "qkv(Tensor(a!) q, Tensor(b!)? k, Tensor(c!)? v, Tensor q_weight, Tensor? k_weight,"
            " float eps, int head_dim, Tensor? positions, Tensor? cos_sin_cache) -> ()",
            _run,
            lambda *args: None,
            counted=False,
        )

    def traced(self, args: Args, kind: int) -> Heads:
        self.op(*args[:7], *(args.rope or NO_ROPE))
        return args[:3]

    def theirs(self, stock: Stock, args: Args, shared_heads: int = 1) -> Heads:
        """In place, on strided rows, as stock.

        Args:
            stock: whose calls.
            args: `unfit` has nothing against them; ``store`` is not read.
            shared_heads: of K where it is shared: stock rotates as many zeros.
        """
        q, k, v = args[:3]
        rows, d = q.shape[0], args.head_dim
        kv_heads = shared_heads if k is None else k.shape[1] // d
        k_weight = None if k is None else args.k_weight
        heads = q.shape[1] // d, kv_heads, d
        stock.qkv_rmsnorm(q, k, v, args.q_weight, k_weight, *heads, args.eps)
        if args.rope is not None:
            key = torch.zeros_like(q[:, : kv_heads * d]) if k is None else k
            positions, cache = args.rope
            stock.rotate(positions, q.view(rows, -1, d), key.view(rows, -1, d), cache)
        return q, k, v

    def reference(self, args: Args) -> Heads:
        return kernel.reference_qkv(*args)

    def drawn(self, args: Args) -> Args:
        rows, like = 64, args.q
        kv = 0 if args.k is None else args.k.shape[1]
        whole = samples(rows, like, like.shape[1] + 2 * kv)
        q, k, v = torch.split(whole, [like.shape[1], kv, kv], dim=-1)
        rope = args.rope
        if rope is not None:
            last = rope.cos_sin_cache.shape[0] - 1
            places = torch.linspace(0, last, rows, device=like.device)
            rope = Rope(places.to(rope.positions.dtype), rope.cos_sin_cache)
        if args.k is None:
            return args._replace(q=q, rope=rope, store=None)
        return args._replace(q=q, k=k, v=v, rope=rope, store=None)

    def examples(self, device: str) -> Examples[Args]:
        """Both head sizes; with rotation for `rope_store`, the norms alone for `qkv_norm`."""
        heads, kv_heads = 4, 2

        def draw(head_dim: int) -> Args:
            whole = rows(device, (heads + 2 * kv_heads) * head_dim, 7)
            sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
            q, k, v = torch.split(whole, sizes, dim=-1)
            weights = weight(device, head_dim, 3), weight(device, head_dim, 4)
            angles = torch.arange(4096.0)[:, None] * torch.logspace(0, -4, head_dim // 2)
            cache = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
            positions = torch.arange(q.shape[0], device=device) * 7 % 4096
            turn = Rope(positions, cache) if self.patch == "rope_store" else None
            return Args(q, k, v, *weights, EPS, head_dim, turn, None)

        return [(f"head size {head_dim}", partial(draw, head_dim)) for head_dim in (256, 512)]

    def like(self, args: Args) -> torch.Tensor:
        return args.q

    def written(self, args: Args, result: Heads) -> Tensors:
        return result

    def differing(self, args: Args, kind: int) -> int:
        """With one head a program and with several."""
        stocks = self.drawn(args)
        theirs = self.theirs(followed(), stocks)
        found = 0
        for several in (False, True):
            found += differing(kernel.launch_qkv(*self.drawn(args), several), theirs)
        return found


def _run(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    eps: float,
    head_dim: int,
    positions: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
) -> None:
    rope = None
    if positions is not None and cos_sin_cache is not None:
        rope = Rope(positions, cos_sin_cache)
    run = peer("qkv_norm" if rope is None else "rope_store")  # both have this operator
    run.engaged(custom_ops.capturing())
    kernel.launch_qkv(q, k, v, q_weight, k_weight, eps, head_dim, rope, None)
