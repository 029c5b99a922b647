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
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

# This folder holds a kernels.py; transformers looks for a package of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common.provenance import provenance  # noqa: E402
from gemma4_turbo.cli.tuning.extend import Case, Shape, stock_function  # noqa: E402
from gemma4_turbo.kernels.attention import extend_tiles as config  # noqa: E402

Call = Callable[[], Any]
RESULTS = Path(__file__).resolve().parent / "results"


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
