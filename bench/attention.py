"""The extend attention against stock SGLang's kernel, one row of a CSV per measurement.

    python bench/attention.py                                 # every shape, stock and ours
    python bench/attention.py sliding_4096 full_4096          # some
    python bench/attention.py --tune sliding_4096             # tile sizes, fastest first

Medians of `triton.testing.do_bench`, which empties the L2 cache before each call; ``--graph`` takes
replays of a CUDA graph instead, without the host's share. Needs torch, triton, typer, rich and this
repository; without SGLang its columns are left out.
"""

from __future__ import annotations

import csv
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import triton
import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

# This folder holds a kernels.py; transformers looks for a package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.provenance import provenance  # noqa: E402
from gemma4_turbo.cli import lines  # noqa: E402
from gemma4_turbo.kernels.attention import extend as kernel  # noqa: E402
from gemma4_turbo.kernels.attention import extend_tiles as config  # noqa: E402

Call = Callable[[], Any]
RESULTS = Path(__file__).resolve().parent / "results"
DEVICE = "cuda"
DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """A batch. ``window`` is the layer's; a cached prefix is cut to it, as SGLang cuts it."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int = -1
    mask: str = ""  # "tree": of a verification; "image": some spans both ways
    target: float | None = None  # ours / stock


def _verify(batch: int, prefix: int, full: bool, target: float | None = None) -> Shape:
    """Four draft tokens a sequence, 26B-A4B."""
    if full:
        return Shape((4,) * batch, (prefix,) * batch, 16, 2, 512, -1, "tree", target)
    return Shape((4,) * batch, (min(prefix, 1023),) * batch, 16, 8, 256, 1024, "tree", target)


SHAPES: dict[str, Shape] = {
    "sliding_4096": Shape((4096,), (0,), 16, 8, 256, 1024, "", 0.16),
    "full_4096": Shape((4096,), (0,), 16, 2, 512, -1, "", 0.45),
    "sliding_8x512": Shape((512,) * 8, (0,) * 8, 16, 8, 256, 1024, "", 0.25),
    "sliding_prefix": Shape((4096,), (1023,), 16, 8, 256, 1024, "", 0.25),
    "full_prefix": Shape((4096,), (4096,), 16, 2, 512),
    "e2b_sliding": Shape((4096,), (0,), 8, 1, 256, 512, "", 0.25),
    "e2b_full": Shape((4096,), (0,), 8, 1, 512),
    "e4b_sliding": Shape((4096,), (0,), 8, 2, 256, 512),
    "31b_sliding": Shape((4096,), (0,), 32, 16, 256, 1024),
    "31b_full": Shape((4096,), (0,), 32, 4, 512),
    "ragged_sliding": Shape((4096, 700, 33) + (1,) * 13, (0,) * 16, 16, 8, 256, 1024),
    "ragged_full": Shape((4096, 700, 33) + (1,) * 13, (0, 0, 900) + (2000,) * 13, 16, 2, 512),
    "image_sliding": Shape((4096,), (0,), 16, 8, 256, 1024, "image"),
    "image_full": Shape((4096,), (0,), 16, 2, 512, -1, "image"),
    "verify_sliding": _verify(32, 4096, False, 0.33),
    "verify_full_4k": _verify(32, 4096, True, 0.33),
    "verify_full_32k": _verify(32, 32768, True, 0.33),
    "verify_sliding_b1": _verify(1, 32768, False),
    "verify_full_b1": _verify(1, 32768, True),
    "verify_full_b8": _verify(8, 32768, True),
}


class Case:
    """Tensors of a shape, K and V strided as after a QKV projection, pages in random order."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
        total, cached = sum(shape.lengths), sum(shape.prefixes)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=DEVICE, dtype=DTYPE)

        parts = randn(total, (heads + 2 * kv_heads) * dim).split(
            [heads * dim, kv_heads * dim, kv_heads * dim], -1
        )
        self.q, self.k, self.v = (part.unflatten(-1, (-1, dim)) for part in parts)
        self.q = self.q.contiguous()  # as the rotation leaves it
        self.k_buffer, self.v_buffer = (randn(cached + 1, kv_heads, dim) for _ in range(2))
        order = torch.randperm(cached, generator=generator, device=DEVICE) + 1
        self.indices = order
        self.qo_indptr = _starts(shape.lengths)
        self.kv_indptr = _starts(shape.prefixes).int()
        self.longest = max(shape.lengths)
        self.scale = dim**-0.5
        self.shape = shape
        self.mask: torch.Tensor | None = None
        self.mask_indptr: torch.Tensor | None = None
        self.offsets: torch.Tensor | None = None
        if shape.mask:
            masks = [
                _mask(new, old, shape.mask)
                for new, old in zip(shape.lengths, shape.prefixes, strict=True)
            ]
            self.mask = torch.cat(masks)
            self.mask_indptr = _starts(tuple(mask.numel() for mask in masks))
            self.offsets = torch.zeros(len(masks), dtype=torch.int32, device=DEVICE)

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

    def stock(self, function: Call) -> torch.Tensor:
        """One call of stock's, with the copies of K and V that its backend makes."""
        out = torch.empty_like(self.q)
        function(
            self.q,
            self.k.contiguous(),
            self.v.contiguous(),
            out,
            self.k_buffer,
            self.v_buffer,
            self.qo_indptr,
            self.kv_indptr,
            self.indices,
            self.mask,
            True,
            self.mask_indptr,
            self.longest,
            1.0,
            1.0,
            self.scale,
            logit_cap=0.0,
            sliding_window_size=self.shape.window,
            sinks=None,
            window_kv_offsets=self.offsets,
            xai_temperature_len=-1,
        )
        return out


def _starts(lengths: tuple[int, ...]) -> torch.Tensor:
    sums = itertools.accumulate(lengths, initial=0)
    return torch.tensor(list(sums), dtype=torch.int64, device=DEVICE)


def _mask(new: int, old: int, kind: str) -> torch.Tensor:
    mask = torch.ones(new, old + new, dtype=torch.bool, device=DEVICE).tril(old)
    if kind == "image":  # spans inside stock's blocks of 32 queries, beyond which it sees nothing
        for first in range(0, new - 32, 512):
            mask[first : first + 32, old + first : old + first + 32] = True
    return mask.flatten()


def stock_function() -> Call | None:
    """SGLang's wrapper, None where it cannot be imported."""
    try:
        return lines.attention_kernel("extend_attention").extend_attention_fwd  # type: ignore[no-any-return]
    except ImportError:
        return None


def microseconds(call: Call, graph: bool) -> float:
    """Median of one call."""
    if graph:
        return float(triton.testing.do_bench_cudagraph(call, rep=60, return_mode="median")) * 1e3
    return float(triton.testing.do_bench(call, warmup=30, rep=150, return_mode="median")) * 1e3


def flops(shape: Shape) -> float:
    """Of the scores and values that are seen, a custom mask counted as causal."""
    pairs = 0
    window = shape.window if shape.window > 0 else 1 << 60
    for new, old in zip(shape.lengths, shape.prefixes, strict=True):
        full = max(0, min(new, window - old))  # queries that see everything before them
        pairs += full * old + full * (full + 1) // 2 + (new - full) * (window + 1)
    return 4.0 * pairs * shape.heads * shape.head_dim


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, Frobenius norm."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def dense_candidates(shape: Shape) -> list[config.Dense]:
    """Tile sizes to try for many queries."""
    # block_m, block_n, value_blocks, chunks, num_warps, stages, q_in_registers
    if shape.head_dim == 512:
        tiles = [
            (128, 32, 2, 2, 8, 3, True),
            (128, 32, 2, 2, 8, 2, True),
            (128, 32, 2, 1, 8, 2, False),
            (128, 32, 2, 2, 8, 2, False),
            (128, 64, 2, 2, 8, 1, False),
            (128, 16, 2, 1, 8, 3, False),
            (64, 32, 1, 1, 8, 2, False),
            (64, 32, 2, 1, 4, 2, False),
            (64, 32, 2, 1, 8, 3, False),
        ]
    else:
        tiles = [
            (128, 64, 1, 1, 8, 2, False),
            (128, 64, 1, 2, 8, 3, True),
            (128, 64, 1, 2, 8, 2, True),
            (128, 32, 1, 1, 8, 3, False),
            (128, 32, 1, 1, 8, 4, False),
            (128, 32, 1, 2, 8, 4, True),
            (128, 64, 2, 2, 8, 3, True),
            (64, 32, 1, 1, 4, 2, False),
            (64, 32, 1, 1, 4, 3, False),
            (64, 64, 1, 1, 8, 2, False),
        ]
    group = shape.heads // shape.kv_heads
    packs = sorted({1, group})
    prefix = (3, 2) if sum(shape.prefixes) else (3,)
    return [
        config.Dense(m, n, pack, values, chunks, warps, stages, prefix_stages, registers)
        for (m, n, values, chunks, warps, stages, registers), pack, prefix_stages in (
            itertools.product(tiles, packs, prefix)
        )
    ]


def split_candidates(shape: Shape) -> list[config.Split]:
    """Tile sizes to try for few queries."""
    needed = max(shape.lengths) * (shape.heads // shape.kv_heads)
    rows = [16, 32] if needed > 16 else [16]
    found = []
    for row, block, warps, stages, programs in itertools.product(
        rows, (16, 32, 64), (4, 8), (2, 3), (1, 2, 4)
    ):
        buffers = 2 * stages * block * shape.head_dim * 2
        if buffers <= 200 * 1024 and (block > 16 or shape.head_dim == 512):
            found.append(config.Split(row, block, 16, warps, stages, 128 // block, programs))
    return found


def tune(name: str, shape: Shape, stock: Call | None, graph: bool, top: int) -> None:
    """Sweep the tile sizes of one shape and print the fastest."""
    case = Case(shape)
    few = max(shape.lengths) <= 2 * config.SPLIT_TOKENS and sum(shape.prefixes) > 0
    candidates: list[tuple[str, Any]] = []
    if few:
        candidates += [("split", tile) for tile in split_candidates(shape)]
    if not few or max(shape.lengths) > config.SPLIT_TOKENS:
        candidates += [("dense", tile) for tile in dense_candidates(shape)]
    before = case.ours().clone()
    outcomes: dict[int, tuple[float, float] | str] = {}

    def compile_one(index: int) -> None:
        kind, tile = candidates[index]
        try:
            case.ours(**{kind: tile})
        except Exception as error:  # out of shared memory, most of all
            outcomes[index] = type(error).__name__

    with Progress() as progress:
        task = progress.add_task(f"{name}: compiling", total=len(candidates))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
            for _ in pool.map(compile_one, range(len(candidates))):
                progress.advance(task)
        torch.cuda.synchronize()
        task = progress.add_task(f"{name}: measuring", total=len(candidates))
        for index, (kind, tile) in enumerate(candidates):
            if index not in outcomes:
                error = difference(case.ours(**{kind: tile}), before)
                call = lambda kind=kind, tile=tile: case.ours(**{kind: tile})  # noqa: E731
                outcomes[index] = (microseconds(call, graph), error)
            progress.advance(task)
    ours_us = microseconds(case.ours, graph)
    stock_us = None if stock is None else microseconds(lambda: case.stock(stock), graph)
    table = Table(title=f"{name}: table's choice {ours_us:.1f} us, stock {stock_us or 0:.1f} us")
    for column in ("us", "TFLOP/s", "of stock", "difference", "tile"):
        table.add_column(column)
    timed = {index: found for index, found in outcomes.items() if not isinstance(found, str)}
    for index, (us, error) in sorted(timed.items(), key=lambda item: item[1])[:top]:
        ratio = "" if stock_us is None else f"{us / stock_us:.3f}"
        rate = f"{flops(shape) / us / 1e6:.0f}"
        tile = candidates[index][1]
        values = ", ".join(f"{field}={value}" for field, value in tile._asdict().items())
        table.add_row(f"{us:.1f}", rate, ratio, f"{error:.1e}", f"{type(tile).__name__}({values})")
    failed = [found for found in outcomes.values() if isinstance(found, str)]
    Console(width=200).print(table, f"{len(failed)} do not run: {', '.join(sorted(set(failed)))}")


def measure(
    name: str, shape: Shape, stock: Call | None, graph: bool, rounds: int
) -> dict[str, Any]:
    """One row: stock and ours in turn, medians of the rounds."""
    case = Case(shape)
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    got = case.ours()
    row: dict[str, Any] = {"shape": name, "mode": "graph" if graph else "eager"}
    if stock is not None:
        row["difference"] = difference(got, case.stock(stock))
    for _ in range(rounds):
        times["ours"].append(microseconds(case.ours, graph))
        if stock is not None:
            times["stock"].append(microseconds(lambda: case.stock(stock), graph))
    row["ours_us"] = median(times["ours"])
    row["ours_tflops"] = flops(shape) / row["ours_us"] / 1e6
    if stock is not None:
        row["stock_us"] = median(times["stock"])
        row["ratio"] = row["ours_us"] / row["stock_us"]
        row["target"] = shape.target
    return row


def main(
    names: Annotated[list[str] | None, typer.Argument(help=" | ".join(SHAPES))] = None,
    sweep: Annotated[bool, typer.Option("--tune", help="Sweep the tile sizes")] = False,
    graph: Annotated[bool, typer.Option(help="Replays of a CUDA graph")] = False,
    rounds: Annotated[int, typer.Option(help="Stock and ours in turn, so many times")] = 3,
    top: Annotated[int, typer.Option(help="Rows that --tune prints")] = 12,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = RESULTS / "attention.csv",
) -> None:
    """Ours against stock."""
    chosen = names or list(SHAPES)
    for name in chosen:
        if name not in SHAPES:
            raise typer.BadParameter(f"choose from {', '.join(SHAPES)}", param_hint="names")
    if not torch.cuda.is_available():
        raise SystemExit("bench/attention.py: needs a CUDA device")
    stock = stock_function()
    if sweep:
        for name in chosen:
            tune(name, SHAPES[name], stock, graph, top)
        return
    base = provenance()
    rows = [measure(name, SHAPES[name], stock, graph, rounds) for name in track(chosen)]
    columns = ("shape", "mode", "ours_us", "ours_tflops", "stock_us", "ratio", "target")
    fresh = not out.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*base, *columns, "difference"], restval="")
        if fresh:
            writer.writeheader()
        writer.writerows(base | row for row in rows)
    table = Table(title=f"{base['gpu']}, SGLang {base['sglang']}, Triton {base['triton']}")
    for column in (*columns, "difference"):
        table.add_column(column)
    for row in rows:
        values = [row.get(column) for column in (*columns, "difference")]
        table.add_row(*(_short(value) for value in values))
    Console(width=140).print(table)


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
