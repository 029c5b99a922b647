"""Linear layers of a few rows: `gemma4_turbo.kernels.skinny_gemm` against cuBLAS and what follows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch

from gemma4_turbo.cli.tuning.timing import L2_BYTES, Call
from gemma4_turbo.kernels import skinny_gemm as kernel
from gemma4_turbo.kernels.gpu import Gpu
from gemma4_turbo.kernels.skinny_gemm import Config, Epilogue
from gemma4_turbo.models import geometry

TILES = (  # block_n, block_k, stages
    (64, 128, 3), (32, 128, 4), (32, 128, 6), (64, 128, 6), (128, 64, 4), (64, 64, 4), (16, 128, 6),
)  # fmt: skip
SMALL_TILES = ((32, 64, 4), (16, 128, 3), (32, 64, 2))
"""Where fewer than `ENOUGH` of the others fit into shared memory."""
ENOUGH = 6
FILLED = (0.8, 2.0)  # programs for each multiprocessor
REFILLED = 3  # tiles that are tried with the second number, too
POINTS = {rows: (1, rows) if rows == kernel.ROWS[0] else (rows,) for rows in kernel.ROWS}
COMPARED = 512  # columns of the result
COPIES = 96  # of a weight at most


class Linear(NamedTuple):
    """A weight ``[n, k]`` with up to so many rows of activations."""

    role: str
    n: int
    k: int
    epilogue: Epilogue
    most: int  # a key of `POINTS`

    @property
    def kernel(self) -> str:
        """As a profile calls it."""
        return "skinny_gemm"

    @property
    def place(self) -> tuple[int, ...]:
        """As in a profile."""
        return kernel.place((self.n, self.k), self.epilogue, self.most)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.role} {self.n} x {self.k}, up to {self.most} rows"

    @property
    def bytes(self) -> int:
        """Of all copies of the weight."""
        return 2 * self.n * self.k * _copies(self.n, self.k)

    @property
    def halves(self) -> int:
        """Rows of the weight that one column of the result needs."""
        return 2 if self.epilogue == Epilogue.GELU_AND_MUL else 1

    def candidates(self, gpu: Gpu) -> list[Config]:
        """What `choose` has, and a handful of others that fit."""
        own = kernel.choose(
            (self.n, self.k), self.epilogue, gpu.processors, self.most, gpu.shared_memory
        )
        fitting = [tile for tile in TILES if self._fits(tile, gpu)]
        if len(fitting) < ENOUGH:
            fitting += [tile for tile in SMALL_TILES if self._fits(tile, gpu)]
        first, second = FILLED
        found = [own, *(self._cut(tile, first, gpu) for tile in fitting)]
        return found + [self._cut(tile, second, gpu) for tile in fitting[:REFILLED]]

    def _fits(self, tile: tuple[int, int, int], gpu: Gpu) -> bool:
        block_n, block_k, stages = tile
        stage = 2 * block_k * (block_n * self.halves + self.most)
        return self.k % block_k == 0 and stages * stage <= gpu.shared_memory

    def _cut(self, tile: tuple[int, int, int], filled: float, gpu: Gpu) -> Config:
        block_n, block_k, stages = tile
        count = -(-(self.n // self.halves) // block_n)
        split = max(1, min(round(filled * gpu.processors / count), self.k // block_k))
        return Config(block_n, block_k, split, stages)

    def numbers(self, tile: Config) -> tuple[int, ...]:
        """All of it."""
        return tuple(tile)

    def benches(self, device: str) -> Iterator[LinearBench]:
        """One for each number of rows."""
        for rows in POINTS[self.most]:
            yield LinearBench(self, rows, device, _copies(self.n, self.k))

    def alike(self, tile: Config) -> tuple[Linear, Config]:
        """A small weight of the same divisibility."""
        n = 512 * self.halves
        small = Linear("", n, 4 * tile.block_k, self.epilogue, self.most)
        return small, tile._replace(split=min(tile.split, 2))

    def compile(self, tile: Config, device: str) -> None:
        """For each number of rows."""
        for bench in self.benches(device):
            bench.ours(tile)(0)

    @property
    def like_stock(self) -> None:
        """cuBLAS's kernels are compiled."""

    def compile_stock(self, device: str) -> None:
        """Nothing."""


def _copies(n: int, k: int) -> int:
    return max(2, min(COPIES, -(-L2_BYTES // (n * k * 2))))


class LinearBench:
    """Weights and activations."""

    def __init__(self, layer: Linear, rows: int, device: str, copies: int) -> None:
        generator = torch.Generator(device).manual_seed(rows)

        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            made = torch.empty(shape, device=device, dtype=torch.bfloat16)
            return made.normal_(0, scale, generator=generator)

        self.layer, self.calls = layer, copies
        self.weights = [randn(layer.n, layer.k, scale=layer.k**-0.5) for _ in range(copies)]
        self.x = randn(rows, layer.k)
        times = layer.epilogue == Epilogue.GELU_TIMES
        self.extra = randn(rows, layer.n) if times else None
        width = layer.n // layer.halves
        # An odd step: a fragment of a matrix product holds every second, fourth or eighth column.
        self.columns = torch.arange(0, width, width // COMPARED | 1, device=device)

    def ours(self, tile: Config) -> Call:
        """The kernel."""
        epilogue = self.layer.epilogue
        count = kernel.tiles(self.weights[0], epilogue, tile)
        arrived = torch.zeros(count, dtype=torch.int32, device=self.x.device)
        return lambda i: kernel.launch_skinny_gemm(
            self.x, self.weights[i], tile, epilogue, self.extra, arrived
        )

    def stock(self) -> Call:
        """cuBLAS, and SGLang's kernel for the activation after it."""
        epilogue, extra = self.layer.epilogue, self.extra
        if epilogue != Epilogue.GELU_AND_MUL or self.x.device.type != "cuda":
            return lambda i: kernel.reference_skinny_gemm(self.x, self.weights[i], epilogue, extra)
        from sglang.srt.layers.activation import gelu_tanh_and_mul

        def call(i: int) -> torch.Tensor:
            y = torch.nn.functional.linear(self.x, self.weights[i])
            out = y.new_empty(y.shape[0], y.shape[1] // 2)
            gelu_tanh_and_mul(y, out)
            return out

        return call

    def error(self, call: Call) -> float:
        """Of some columns of a second call, against fp64: the first one leaves counters behind."""
        call(0)
        got = call(0)
        assert isinstance(got, torch.Tensor)
        if not got.isfinite().all():
            return math.nan
        exact = self.exact
        return float((got[:, self.columns].double() - exact).norm() / exact.norm())

    @cached_property
    def exact(self) -> torch.Tensor:
        """Some columns in fp64."""
        rows = self.columns
        if self.layer.halves == 2:
            rows = torch.cat([rows, rows + self.layer.n // 2])
        extra = None if self.extra is None else self.extra[:, self.columns].double()
        return kernel.reference_skinny_gemm(
            self.x.double(), self.weights[0][rows].double(), self.layer.epilogue, extra
        )


def layers(g: geometry.Geometry) -> list[Linear]:
    """The linear layers of a decoder layer, both kinds of attention, for each number of rows."""
    found: dict[tuple[int, ...], str] = {}

    def add(role: str, n: int, k: int, epilogue: Epilogue = Epilogue.NONE) -> None:
        if n % 16 == 0 and k % 64 == 0:  # as the kernel takes them
            found.setdefault((n, k, epilogue), role)

    for kind, heads, size in (
        ("sliding", g.kv_heads_sliding, geometry.HEAD_DIM_SLIDING),
        ("full", g.kv_heads_full, geometry.HEAD_DIM_FULL),
    ):
        add(f"QKV, {kind}", (g.heads + 2 * heads) * size, g.hidden)
        if g.kv_shared_layers:  # `qkv_proj` leaves K and V out there
            add(f"Q, {kind}", g.heads * size, g.hidden)
        add(f"O, {kind}", g.hidden, g.heads * size)
    for mlp in sorted({g.mlp, 2 * g.mlp if g.double_wide_mlp else g.mlp}):
        add("gate and up", 2 * mlp, g.hidden, Epilogue.GELU_AND_MUL)
        add("down", g.hidden, mlp)
    if g.per_layer_width:
        add("per-layer gate", g.per_layer_width, g.hidden, Epilogue.GELU_TIMES)
        add("per-layer projection", g.hidden, g.per_layer_width)
    if g.experts:
        add("router", g.experts, g.hidden)
    return [
        Linear(role, n, k, Epilogue(epilogue), most)
        for (n, k, epilogue), role in found.items()
        for most in POINTS
    ]
