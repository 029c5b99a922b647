"""`gemma4_turbo.kernels.attention.decode` against stock's two kernels, and the best cut per shape.

    python bench/decode_attention.py                                  # every model, kernel against stock
    python bench/decode_attention.py --tune --shapes 26b-a4b/sliding --batches 8,32 --lengths 512

Every shape is timed in a CUDA graph over so many copies of the KV cache that none stays in the L2 cache.
Sliding layers see their window, as the backend gives it to them; stock's number of splits comes from
the whole sequence, also as there. Writes a CSV with one row per measurement and prints a table.
"""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

# Scripts have their folder on the path, and transformers looks for a package called kernels.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from bench.common.provenance import provenance  # noqa: E402
from gemma4_turbo.cli.tuning.decode import Arena, Point, Shape  # noqa: E402
from gemma4_turbo.cli.tuning.timing import Timer, readings  # noqa: E402
from gemma4_turbo.kernels import pdl as dependent_launch  # noqa: E402
from gemma4_turbo.kernels.attention import decode as kernel  # noqa: E402
from gemma4_turbo.kernels.attention.decode import Config  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

SHARED_BYTES = 227 * 1024


def shapes() -> dict[str, Shape]:
    """Both kinds of layer of every model; equal shapes once."""
    found: dict[tuple[Any, ...], Shape] = {}
    for name, g in geometry.GEOMETRIES.items():
        for shape in (
            Shape(
                f"{name}/sliding", g.heads, g.kv_heads_sliding, geometry.HEAD_DIM_SLIDING, g.window
            ),
            Shape(f"{name}/full", g.heads, g.kv_heads_full, geometry.HEAD_DIM_FULL, None),
        ):
            found.setdefault(shape[1:], shape)
    return {shape.name: shape for shape in found.values()}


def chosen_cut(point: Point) -> Config:
    """What the kernel takes for a point by itself."""
    shape = point.shape
    return kernel.choose(point.batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.dim)


def shared_bytes(dim: int, config: Config) -> int:
    """Shared memory of a program, roughly: K and V blocks in flight, Q, and what a conversion takes."""
    buffers = config.stages if config.keys_first and config.block_n >= 64 else config.stages - 1
    return buffers * config.block_n * dim * 4 + 16 * dim * 2 + 2048


def tiles(dim: int) -> list[Config]:
    """Kernel variants that fit; how many programs there are is another matter."""
    found = []
    for block_n, warps, stages, keys_first in itertools.product(
        (16, 32, 64, 128), (4, 8), (2, 3, 4, 5), (False, True)
    ):
        config = Config(block_n, warps, stages, 30, max(64, block_n), keys_first, True)
        in_flight = (stages - 1) * block_n * dim * 4
        if shared_bytes(dim, config) > SHARED_BYTES or not 30_000 <= in_flight <= 150_000:
            continue
        if (keys_first and block_n * dim < 8192) or (block_n == 16 and warps == 8):
            continue
        if block_n * dim > 16384 and warps == 4 and not keys_first:
            continue
        found.append(config)
    return found


def _compile(job: tuple[Shape, int, Config, bool]) -> None:
    """Fill Triton's cache for one variant, in a process of its own, with one token a sequence."""
    shape, batch, config, dependent_launch.wanted = job
    arena = Arena(Point(shape._replace(window=1), batch, 1, False))
    arena.longest = 4096
    arena.ours(config)(0)
    torch.cuda.synchronize()


def compile_all(points: list[Point], workers: int, console: Console) -> None:
    """All variants that the tuning of these points may ask for."""
    jobs = {}
    for point in points:
        shape = point.shape
        block_b = max(32, 1 << (point.batch - 1).bit_length())
        for config in tiles(shape.dim):
            for fused in (True, False):
                variant = config._replace(fused=fused)
                jobs[shape.heads // shape.kv_heads, shape.dim, block_b, variant] = (
                    shape,
                    point.batch,
                    variant,
                    dependent_launch.wanted,
                )
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in track(
            pool.map(_compile, jobs.values(), chunksize=4),
            "compiling", total=len(jobs), console=console, transient=True,
        ):  # fmt: skip
            pass


def measured(
    point: Point, arena: Arena, config: Config, us: float, stock_us: float
) -> dict[str, Any]:
    """A row of the CSV."""
    return {
        "shape": point.shape.name,
        "heads": f"{point.shape.heads}/{point.shape.kv_heads}",
        "dim": point.shape.dim,
        "window": point.shape.window or 0,
        "batch": point.batch,
        "length": point.length,
        "mix": int(point.mix),
        "config": "/".join(str(int(value)) for value in config),
        "us": round(us, 2),
        "stock_us": round(stock_us, 2),
        "ratio": round(us / stock_us, 3),
        "gbps": round(arena.bytes / us / 1e3),
        "error": round(arena.error(arena.ours(config)), 6),
        "stock_error": round(arena.error(arena.stock()), 6),
    }


def compare(point: Point, replays: int) -> dict[str, Any]:
    """The chosen cut against stock."""
    arena, config = Arena(point), chosen_cut(point)
    timers = [Timer(arena.ours(config), arena.copies), Timer(arena.stock(), arena.copies)]
    us, stock_us = readings(timers, replays)
    return measured(point, arena, config, us, stock_us)


def tune(point: Point, replays: int) -> list[dict[str, Any]]:
    """Every kernel variant with two numbers of programs, then the best four with all."""
    arena, shape = Arena(point), point.shape
    (stock_us,) = readings([Timer(arena.stock(), arena.copies)], replays)
    times: dict[Config, float] = {}

    def time(configs: list[Config]) -> None:
        for config in configs:
            if config not in times:
                (times[config],) = readings([Timer(arena.ours(config), arena.copies)], replays)

    chosen = chosen_cut(point)
    time([chosen])
    time([
        tile._replace(target=target, fused=chosen.fused)
        for tile in tiles(shape.dim)
        for target in (20, 40)
    ])  # fmt: skip
    best: list[Config] = []
    for config in sorted(times, key=times.__getitem__):
        if all(config[:3] != other[:3] or config.keys_first != other.keys_first for other in best):
            best.append(config)
    time([
        config._replace(target=target, min_chunk=chunk, fused=fused)
        for config in best[:4]
        for target in (10, 20, 30, 40, 60, 90)
        for chunk in (64, 128)
        for fused in (True, False)
        if chunk % config.block_n == 0
    ])  # fmt: skip
    order = sorted(times, key=times.__getitem__)
    kept = order[:20] if chosen in order[:20] else [*order[:20], chosen]
    return [
        measured(point, arena, config, times[config], stock_us) | {"chosen": int(config == chosen)}
        for config in kept
    ]


def main(
    tune_: Annotated[bool, typer.Option("--tune", help="Search for the best cut")] = False,
    shapes_: Annotated[str, typer.Option("--shapes", help="Comma list, or all")] = "all",
    batches: Annotated[str, typer.Option(help="Comma list")] = "1,8,32,64",
    lengths: Annotated[
        str, typer.Option(help="Comma list of tokens a sequence")
    ] = "512,4096,16384",
    mix: Annotated[bool, typer.Option(help="Ragged batches too")] = False,
    pdl: Annotated[
        bool, typer.Option(help="Programmatic dependent launch, as the patch pdl")
    ] = False,
    replays: Annotated[int, typer.Option(help="Readings per measurement")] = 9,
    workers: Annotated[int, typer.Option(help="Processes that compile")] = 14,
    max_gib: Annotated[float, typer.Option(help="Leave out points with more KV")] = 20.0,
    out: Annotated[Path, typer.Option(help="CSV to write")] = Path("decode-attention.csv"),
) -> None:
    """Measure or tune."""
    console = Console(stderr=True)
    known = shapes()
    names = list(known) if shapes_ == "all" else shapes_.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name} is none of {', '.join(known)}", param_hint="--shapes")
    dependent_launch.wanted = pdl
    points = [
        Point(known[name], batch, length, ragged)
        for name in names
        for batch in map(int, batches.split(","))
        for length in map(int, lengths.split(","))
        for ragged in ((False, True) if mix and batch > 1 else (False,))
    ]
    points = [
        point
        for point in points
        if sum(point.seen()) * point.shape.kv_heads * point.shape.dim * 8 <= max_gib * 2**30
    ]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        if tune_:
            compile_all(points, workers, console)
        for point in track(points, "timing", console=console, transient=True):
            rows += tune(point, replays) if tune_ else [compare(point, replays)]
            torch.cuda.empty_cache()
            write(rows, out)
    frame = pd.DataFrame(rows)
    key = ["shape", "batch", "length", "mix"]
    if tune_:
        print("\nbest, and the one that `choose` gives:")
        first = frame.groupby(key, sort=False).head(3)
        frame = pd.concat([first, frame[frame.chosen == 1]]).drop_duplicates()
    print(frame.sort_values([*key, "us"]).to_string(index=False))


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """All rows so far, with GPU and versions."""
    frame = pd.DataFrame(rows)
    for name, value in provenance().items():
        frame[name] = value
    frame.to_csv(out, index=False)


if __name__ == "__main__":
    typer.run(main)
