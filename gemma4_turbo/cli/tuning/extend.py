"""Attention of new tokens: `gemma4_turbo.kernels.attention.extend` against stock's kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import torch

from gemma4_turbo.cli import lines
from gemma4_turbo.cli.tuning.timing import Call as Numbered
from gemma4_turbo.kernels import measured
from gemma4_turbo.kernels.attention import extend as kernel
from gemma4_turbo.kernels.attention import extend_tiles as config
from gemma4_turbo.kernels.gpu import Gpu
from gemma4_turbo.models import geometry

Attend = Callable[..., torch.Tensor]
MOST = 3  # candidates where the package's own was measured: such a kernel takes seconds to compile
CALLS = 3  # of a graph: each takes long, and reads more than a cache holds


def dtype_of(device: str) -> torch.dtype:
    """bf16; fp16 in Triton's interpreter, whose products know no bf16."""
    return torch.float16 if kernel.INTERPRETED and device == "cpu" else torch.bfloat16


class Shape(NamedTuple):
    """A batch. ``window`` is the layer's; a cached prefix is cut to it, as SGLang cuts it."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int = -1
    mask: str = (
        ""  # "tree": of a verification; "image": some spans both ways, "holes": keys that no
    )
    # query sees
    target: float | None = None  # ours / stock


class Case:
    """Tensors of a shape, K and V strided as after a QKV projection, pages in random order."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cuda") -> None:
        generator = torch.Generator(device).manual_seed(seed)
        heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
        total, cached = sum(shape.lengths), sum(shape.prefixes)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype_of(device))

        widths = [heads * dim, kv_heads * dim, kv_heads * dim]
        parts = torch.split(randn(total, sum(widths)), widths, -1)
        self.q, self.k, self.v = (part.view(total, -1, dim) for part in parts)
        self.q = self.q.contiguous()  # as the rotation leaves it
        self.k_buffer, self.v_buffer = (randn(cached + 1, kv_heads, dim) for _ in range(2))
        order = torch.randperm(cached, generator=generator, device=device) + 1
        self.indices = order
        self.qo_indptr = _starts(shape.lengths, device)
        self.kv_indptr = _starts(shape.prefixes, device).int()
        self.longest = max(shape.lengths)
        self.scale = dim**-0.5
        self.shape = shape
        self.mask: torch.Tensor | None = None
        self.mask_indptr: torch.Tensor | None = None
        self.offsets: torch.Tensor | None = None
        if shape.mask:
            masks = [
                _mask(new, old, shape.mask, device)
                for new, old in zip(shape.lengths, shape.prefixes, strict=True)
            ]
            self.mask = torch.cat(masks)
            self.mask_indptr = _starts(tuple(mask.numel() for mask in masks), device)
            self.offsets = torch.zeros(len(masks), dtype=torch.int32, device=device)

    def ours(
        self, dense: config.Dense | None = None, split: config.Split | None = None
    ) -> torch.Tensor:
        """One call, with the tables' tile sizes or others."""
        return kernel.launch_extend(
            self.q,
            self.k,
            self.v,
            self.k_buffer,
            self.v_buffer,
            self.qo_indptr,
            self.kv_indptr,
            self.indices,
            self.longest,
            sm_scale=self.scale,
            is_causal=True,
            sliding_window_size=self.shape.window,
            custom_mask=self.mask,
            mask_indptr=self.mask_indptr,
            skip_prefix_custom_mask=True,
            window_kv_offsets=self.offsets,
            mask_query_block=0,
            out=torch.empty_like(self.q),
            dense=dense,
            split=split,
        )

    def stock(self, function: Attend) -> torch.Tensor:
        """One call of stock's, with the copies of K and V that its backend makes."""
        return function(
            self.q,
            self.k.contiguous(),
            self.v.contiguous(),
            torch.empty_like(self.q),
            self.k_buffer,
            self.v_buffer,
            self.qo_indptr,
            self.kv_indptr,
            self.indices,
            self.longest,
            sm_scale=self.scale,
            sliding_window_size=self.shape.window,
            custom_mask=self.mask,
            mask_indptr=self.mask_indptr,
            window_kv_offsets=self.offsets,
        )

    def exact(self) -> torch.Tensor:
        """In fp64."""
        return kernel.reference_extend_attention(
            self.q,
            self.k,
            self.v,
            self.k_buffer,
            self.v_buffer,
            self.qo_indptr,
            self.kv_indptr,
            self.indices,
            sm_scale=self.scale,
            sliding_window_size=self.shape.window,
            custom_mask=self.mask,
            mask_indptr=self.mask_indptr,
            window_kv_offsets=self.offsets,
        )


def _starts(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    sums = itertools.accumulate(lengths, initial=0)
    return torch.tensor(list(sums), dtype=torch.int64, device=device)


def _mask(new: int, old: int, kind: str, device: str) -> torch.Tensor:
    mask = torch.ones(new, old + new, dtype=torch.bool, device=device).tril(old)
    if kind == "holes":  # no interval of keys for every query
        mask &= torch.arange(old + new, device=device) % 7 != 3
    if kind == "image":  # spans inside stock's blocks of 32 queries, beyond which it sees nothing
        for first in range(0, new - 32, 512):
            mask[first : first + 32, old + first : old + first + 32] = True
    return mask.flatten()


def stock_function() -> Attend | None:
    """The line's ``extend_attention``, None where there is no line, or none of its kernel."""
    try:
        stock = lines.stock()
        import_module(stock.extend_kernel)
    except (ImportError, LookupError):
        return None
    return stock.extend_attention


DENSE: dict[int, tuple[config.Dense, ...]] = {
    256: (
        config.Dense(128, 64, 8, 1, 1, 8, 2, 3), config.Dense(64, 64, 8, 1, 1, 8, 2, 2),
        config.Dense(64, 64, 8, 1, 1, 4, 2, 2), config.Dense(64, 32, 8, 1, 1, 4, 2, 2),
    ),
    512: (
        config.Dense(128, 32, 16, 2, 2, 8, 3, 3, True), config.Dense(64, 32, 16, 1, 1, 8, 2, 2),
        config.Dense(64, 32, 16, 2, 2, 8, 2, 2), config.Dense(32, 16, 16, 1, 1, 4, 2, 2),
    ),
}  # fmt: skip
MASKED: dict[int, tuple[config.Dense, ...]] = {
    256: (config.Dense(64, 32, 8, 1, 1, 8, 2, 2), config.Dense(64, 32, 8, 1, 1, 4, 2, 2)),
    512: (config.Dense(64, 32, 16, 2, 2, 8, 2, 2), config.Dense(32, 16, 16, 1, 1, 4, 2, 2)),
}
SPLIT: dict[int, tuple[config.Split, ...]] = {
    256: (
        config.Split(32, 32, 16, 4, 3, 4, 1), config.Split(32, 32, 16, 4, 2, 4, 2),
        config.Split(16, 32, 16, 4, 3, 4, 2),
    ),
    512: (
        config.Split(32, 16, 16, 4, 3, 8, 1), config.Split(32, 16, 16, 8, 3, 8, 1),
        config.Split(16, 16, 16, 4, 2, 8, 2),
    ),
}  # fmt: skip
POINTS: dict[str, tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...]] = {
    config.DENSE_KIND: (((4096,), (0,), ""), ((1024,), (2048,), "")),
    config.MASKED: (
        ((1024,), (512,), "holes"),
        ((256, 300), (1000, 0), "holes"),
        ((3072,), (1024,), "holes"),
    ),
    config.SPLIT_KIND: (((4,), (8192,), "tree"), ((4,) * 16, (2048,) * 16, "tree")),
}
"""Lengths, prefixes and mask of each kind of tile. A tile of few rows fills the GPU with a short prompt,
where one of many does not; a long one is there so that it is not taken for that alone."""
CHECKED = ((300, 1, 39), (0, 200, 1100))
"""Tokens in all are a multiple of four, as in `POINTS`: for others Triton compiles the kernel anew."""
FEW = ((4, 3, 16), (1100, 33, 200))


class Prefill(NamedTuple):
    """A layer's attention with one kind of tile."""

    heads: int
    kv_heads: int
    dim: int
    window: int  # -1: none
    kind: str

    @property
    def kernel(self) -> str:
        """As a profile calls it."""
        return config.NAME

    @property
    def place(self) -> tuple[int | str, ...]:
        """As in a profile."""
        return self.dim, self.heads // self.kv_heads, self.kind

    @property
    def title(self) -> str:
        """For people."""
        return f"prefill, {self.heads} and {self.kv_heads} heads of {self.dim}, {self.kind}"

    @property
    def bytes(self) -> int:
        """Q, K, V and results, and fp64's at the lengths where it is compared."""
        rows = 4096 * (3 * self.heads + 4 * self.kv_heads) * self.dim * 2
        return rows + 16 * 2048 * self.kv_heads * self.dim * 4 + (1 << 29)

    def candidates(self, gpu: Gpu) -> list[Any]:
        """What the table has for the GPU, and others."""
        if self.kind == config.SPLIT_KIND:
            return [config.split_of(gpu)[self.dim], *SPLIT[self.dim]]
        masked = self.kind == config.MASKED
        own = config.dense_of(gpu)[self.dim, masked]
        found = list(dict.fromkeys([own, *(MASKED if masked else DENSE)[self.dim]]))
        return found[:MOST] if gpu.capability[0] in measured.KNOWN else found

    def numbers(self, tile: config.Dense | config.Split) -> tuple[int, ...]:
        """All of it."""
        return tuple(map(int, tile))

    def shape(self, lengths: tuple[int, ...], prefixes: tuple[int, ...], mask: str) -> Shape:
        """A batch; a window's prefix is what a sliding layer is given of it."""
        if self.window > 0:
            prefixes = tuple(min(old, self.window - 1) for old in prefixes)
        return Shape(lengths, prefixes, self.heads, self.kv_heads, self.dim, self.window, mask)

    def benches(self, device: str) -> Iterator[PrefillBench]:
        """One for each batch."""
        for lengths, prefixes, mask in POINTS[self.kind]:
            yield PrefillBench(self, self.shape(lengths, prefixes, mask), device)

    def alike(
        self, tile: config.Dense | config.Split
    ) -> tuple[Prefill, config.Dense | config.Split]:
        """Strides are compiled into the kernel: no other shape is."""
        return self, tile

    def compile(self, tile: config.Dense | config.Split, device: str) -> None:
        """What is timed and what is compared."""
        for bench in self.benches(device):
            bench.ours(tile)(0)
            bench.ours(tile)(-1)

    @property
    def like_stock(self) -> Prefill:
        """This one."""
        return self

    def compile_stock(self, device: str) -> None:
        """What is timed and what is compared."""
        for bench in self.benches(device):
            bench.stock()(0)
            bench.stock()(-1)


class PrefillBench:
    """A batch that is timed, and a small one that is compared."""

    calls = CALLS

    def __init__(self, subject: Prefill, shape: Shape, device: str) -> None:
        self.kind = subject.kind
        few = subject.kind == config.SPLIT_KIND
        lengths, prefixes = FEW if few else CHECKED
        self.case = Case(shape, 0, device)
        self.small = Case(subject.shape(lengths, prefixes, shape.mask), 1, device)

    def _call(self, run: Callable[[Case], torch.Tensor]) -> Numbered:
        """A numbered call; the small batch has number -1."""
        return lambda i: run(self.small if i < 0 else self.case)

    def ours(self, tile: config.Dense | config.Split) -> Numbered:
        """The kernel."""
        if isinstance(tile, config.Split):
            return self._call(lambda case: case.ours(split=tile))
        return self._call(lambda case: case.ours(dense=tile))

    def stock(self) -> Numbered:
        """Stock's; without a GPU the equation itself."""
        if self.case.q.device.type != "cuda":
            return self._call(lambda case: case.exact().to(case.q.dtype))
        function = stock_function()
        if function is None:
            raise ImportError("SGLang has no extend_attention_fwd")
        return self._call(lambda case: case.stock(function))

    @cached_property
    def exact(self) -> torch.Tensor:
        """Of the small batch, in fp64."""
        return self.small.exact()

    def error(self, call: Numbered) -> float:
        """Of the small batch, against fp64; rows that see no key are left out."""
        got = call(-1)
        assert isinstance(got, torch.Tensor)
        call(0)  # what does not run at the other size is found here
        exact = self.exact
        seen = exact.abs().amax(-1) > 0
        return float((got.double() - exact)[seen].norm() / exact[seen].norm())


def layers(g: geometry.Geometry) -> list[Prefill]:
    """Both kinds of layer with every kind of tile."""
    return [
        Prefill(g.heads, kv_heads, dim, window, kind)
        for kv_heads, dim, window in (
            (g.kv_heads_sliding, geometry.HEAD_DIM_SLIDING, g.window),
            (g.kv_heads_full, geometry.HEAD_DIM_FULL, -1),
        )
        for kind in POINTS
    ]
