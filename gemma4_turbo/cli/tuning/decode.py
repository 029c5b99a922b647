"""Attention of a decode step: `gemma4_turbo.kernels.attention.decode` against stock's two kernels.

Every call of a graph has slots of its own, so many that none of the KV cache stays in the L2 cache. Sliding
layers see their window, as the backend gives it to them; stock's number of splits comes from the whole
sequence, also as there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.cli.tuning.timing import L2_BYTES, Call
from gemma4_turbo.kernels import pdl
from gemma4_turbo.kernels.attention import decode as kernel
from gemma4_turbo.kernels.attention.decode import Config
from gemma4_turbo.kernels.gpu import Gpu, gpu
from gemma4_turbo.models import geometry

STOCK_SPLITS = 8  # of stock at most, by default
BATCHES = (1, 8, 32, 128)
LENGTHS = (1024, 8192)
TOKENS = 1 << 18  # of all sequences at one point, at most
COMPARED = 2  # sequences, and so many at the end
TILES = {  # block_n, warps, stages, keys_first
    256: ((64, 4, 2, False), (32, 4, 2, False), (32, 4, 3, False), (16, 4, 3, False), (64, 4, 3, True)),
    512: ((32, 4, 2, False), (16, 4, 3, False), (16, 4, 2, False), (32, 8, 2, False), (64, 4, 2, True)),
}  # fmt: skip
TARGETS = (10, 20, 30, 60)  # tenths of the multiprocessors


class Shape(NamedTuple):
    """The attention of a layer."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    window: int | None


class Point(NamedTuple):
    """A shape with a batch of sequences."""

    shape: Shape
    batch: int
    length: int
    mix: bool  # lengths from 1 to twice the mean instead of equal ones

    def lengths(self) -> list[int]:
        """Tokens of every sequence."""
        if not self.mix:
            return [self.length] * self.batch
        generator = torch.Generator().manual_seed(self.batch)
        return torch.randint(1, 2 * self.length, (self.batch,), generator=generator).tolist()

    def seen(self) -> list[int]:
        """Tokens that the layer attends to."""
        window = self.shape.window
        return [length if window is None else min(length, window) for length in self.lengths()]


class Arena:
    """A KV pool and queries of one point, and as many sets of slots as the L2 cache needs."""

    def __init__(self, point: Point, device: str = "cuda", copies: int | None = None) -> None:
        """``copies``: sets of slots; None: as many as keep the L2 cache cold."""
        shape, seen = point.shape, point.seen()
        total = sum(seen)
        row = shape.kv_heads * shape.dim * 4  # K and V
        self.bytes = total * row + 2 * point.batch * shape.heads * shape.dim * 2
        self.copies = copies or max(2, min(64, -(-L2_BYTES // (total * row))))
        self.calls = max(4, self.copies)
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

        pool = total * self.copies
        self.k, self.v = (randn(pool, shape.kv_heads, shape.dim) for _ in range(2))
        at = torch.randperm(pool, generator=generator, device=device)
        self.indices = [at[i * total : (i + 1) * total].clone() for i in range(self.copies)]
        self.q = randn(point.batch, shape.heads, shape.dim)
        self.out = torch.empty_like(self.q)
        odd = [max(1, n * (4 - i % 4) // 4 - 3) for i, n in enumerate(seen)]
        self.indptr, self.odd = (
            torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
            for n in (seen, odd)
        )
        rows = range(point.batch)
        self.compared = sorted({*rows[:COMPARED], *rows[-COMPARED:]})
        self.lengths = torch.tensor(point.lengths(), dtype=torch.int64, device=device)
        self.arrived = torch.zeros(point.batch * shape.kv_heads, dtype=torch.int32, device=device)
        self.scale = shape.dim**-0.5
        self.longest = max(seen) if shape.window is None else shape.window
        self.stock_buffers = (
            torch.empty(point.batch, shape.heads, STOCK_SPLITS, shape.dim, device=device),
            torch.empty(point.batch, shape.heads, STOCK_SPLITS, device=device),
        )
        self.splits = torch.ones(point.batch, dtype=torch.int32, device=device)

    def ours(self, config: Config) -> Call:
        """A call of the kernel; it gets the call's number."""

        def call(i: int) -> None:
            kernel.launch_decode_attention(
                self.q, self.k, self.v, self.indptr, self.indices[i % self.copies], self.scale,
                config, self.longest, self.arrived, self.out,
            )  # fmt: skip

        return call

    def stock(self) -> Call:
        """A call of stock's kernels, with stock's splits for these lengths."""
        from sglang.srt.layers.attention import triton_backend

        stock = lines.stock()
        triton_backend.get_num_kv_splits_triton[(1,)](
            self.splits, self.lengths, len(self.lengths), 1, self.q.shape[1], self.k.shape[1],
            STOCK_SPLITS, gpu(self.q.device).processors, MAX_NUM_SEQ=256,
        )  # fmt: skip

        def call(i: int) -> None:
            stock.decode_attention(
                self.q, self.k, self.v, self.out, self.indptr, self.indices[i % self.copies],
                self.stock_buffers, self.splits, self.scale, pdl.supported(self.q.device),
            )  # fmt: skip

        return call

    def error(self, call: Call) -> float:
        """Relative error (2-norm) against fp64, of the first and the last sequences, NaN for any that is not finite.

        First of other lengths, which are no whole blocks of keys, as all that are timed are.
        """
        timed, exact = self.indptr.clone(), self.exact
        try:
            self.indptr.copy_(self.odd)  # as a captured graph is given other lengths
            odd = self._error(call, exact[0])
        finally:
            self.indptr.copy_(timed)
        return max(self._error(call, exact[1]), odd, key=lambda error: (math.isnan(error), error))

    def _error(self, call: Call, exact: torch.Tensor) -> float:
        self.out.fill_(torch.nan)
        call(0)
        if not self.out.isfinite().all():
            return math.nan
        return float((self.out[self.compared].double() - exact).norm() / exact.norm())

    @cached_property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In fp64, of the sequences that are compared, of both lengths."""
        group = self.q.shape[1] // self.k.shape[1]
        found = []
        for bounds in (self.odd.tolist(), self.indptr.tolist()):
            exact = self.q[self.compared].double()
            for i, head in itertools.product(range(len(exact)), range(self.k.shape[1])):
                row = self.compared[i]
                at = self.indices[0][bounds[row] : bounds[row + 1]]
                heads = slice(head * group, head * group + group)
                logits = self.q[row, heads].double() @ self.k[at, head].double().T * self.scale
                exact[i, heads] = logits.softmax(-1) @ self.v[at, head].double()
            found.append(exact)
        return found[0], found[1]


class Attention(NamedTuple):
    """A layer's attention with a batch of sequences."""

    shape: Shape
    batch: int

    @property
    def kernel(self) -> str:
        """As a profile calls it."""
        return "decode_attention"

    @property
    def place(self) -> tuple[int, ...]:
        """As in a profile."""
        pairs = self.batch * self.shape.kv_heads
        return self.shape.dim, self.shape.heads // self.shape.kv_heads, pairs

    @property
    def title(self) -> str:
        """For people."""
        s = self.shape
        return f"decode, {s.heads} and {s.kv_heads} heads of {s.dim}, {self.batch} sequences"

    @property
    def points(self) -> list[Point]:
        """A short and a long cache; a window is the whole of what a sliding layer sees."""
        window = self.shape.window
        lengths = LENGTHS if window is None else (window,)
        fitting = [n for n in lengths if n * self.batch <= TOKENS] or [TOKENS // self.batch]
        return [Point(self.shape, self.batch, length, False) for length in fitting]

    @property
    def bytes(self) -> int:
        """K and V of all calls of a graph."""
        row = self.shape.kv_heads * self.shape.dim * 4
        most = max(point.batch * point.length for point in self.points) * row
        return most + 2 * L2_BYTES

    def candidates(self, gpu: Gpu) -> list[Config]:
        """What `choose` has, and others, with that many programs and with more or fewer."""
        s = self.shape
        own = kernel.choose(self.batch, s.kv_heads, s.heads // s.kv_heads, s.dim)
        found = [own]
        for block_n, warps, stages, keys_first in TILES[s.dim]:
            chunk = max(block_n, own.min_chunk)
            found.append(
                own._replace(
                    block_n=block_n,
                    warps=warps,
                    stages=stages,
                    min_chunk=chunk,
                    keys_first=keys_first,
                )
            )
        found += [own._replace(target=target) for target in TARGETS]
        return [*found, own._replace(fused=not own.fused)]

    def numbers(self, tile: Config) -> tuple[int, ...]:
        """All of it."""
        return tuple(map(int, tile))

    def benches(self, device: str) -> Iterator[Arena]:
        """One for each length."""
        for point in self.points:
            row = self.shape.kv_heads * self.shape.dim * 4
            copies = max(1, min(64, -(-L2_BYTES // (sum(point.seen()) * row))))
            yield Arena(point, device, copies)

    def alike(self, tile: Config) -> tuple[Attention, Config]:
        """One KV head; batches that differ in nothing but the kernel's constants."""
        shape = self.shape
        one = Shape("", shape.heads // shape.kv_heads, 1, shape.dim, None)
        batch = max(32, 1 << (self.batch - 1).bit_length())
        same = tile._replace(target=10, min_chunk=max(64, tile.block_n))
        return Attention(one, batch), same

    def compile(self, tile: Config, device: str) -> None:
        """With a token a sequence, and a length that asks for splits."""
        arena = Arena(Point(self.shape._replace(window=1), self.batch, 1, False), device, 1)
        arena.longest = max(point.length for point in self.points)
        arena.ours(tile)(0)

    @property
    def like_stock(self) -> Attention:
        """Of any batch."""
        return Attention(self.shape._replace(name=""), min(BATCHES))

    def compile_stock(self, device: str) -> None:
        """With a token a sequence."""
        Arena(Point(self.shape._replace(window=1), self.batch, 1, False), device, 1).stock()(0)


def layers(name: str, g: geometry.Geometry) -> list[Attention]:
    """Both kinds of layer with every batch."""
    shapes = (
        Shape(f"{name}/sliding", g.heads, g.kv_heads_sliding, geometry.HEAD_DIM_SLIDING, g.window),
        Shape(f"{name}/full", g.heads, g.kv_heads_full, geometry.HEAD_DIM_FULL, None),
    )
    return [
        Attention(shape, batch)
        for shape in shapes
        if shape.heads // shape.kv_heads in kernel.GROUPS
        for batch in BATCHES
    ]
