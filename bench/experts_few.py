"""The experts of a few tokens of 26B-A4B: `gemma4_turbo.kernels.experts_few` against stock's fused experts.

    python bench/experts_few.py --width 704 --out experts-few.csv       # 352: the experts on two GPUs

Every call is one of a replayed CUDA graph, over weights of several layers in turn and another routing each
time, so that no row comes from the L2 cache. Lines of the result:

* ``stock``: SGLang's own ``fused_experts`` with its own table, and ``stock, tables`` with ours;
* ``today``: what is left of it under the patches `moe_configs`, `moe_align` and `experts_sum`: our table, slots
  aligned in one launch, the sum over the experts not counted;
* ``up``, ``down``: each launch of ours with each cut;
* ``both``: the two, with the default cut and with the best ones, with and without dependent launch.

Bytes are the distinct experts' weights, each read once, and the activations; ``of copy`` is their rate over that of a
copy of 1 GiB in this run. ``error`` is the distance from fp64 relative to the result's norm.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

# Scripts have their folder on the path, and transformers looks for a package called kernels.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402

from bench.common import cuts  # noqa: E402
from bench.common.provenance import provenance  # noqa: E402
from gemma4_turbo.cli import lines  # noqa: E402
from gemma4_turbo.cli.tuning.moe import prepare_sglang  # noqa: E402
from gemma4_turbo.cli.tuning.timing import Call, Timer, readings  # noqa: E402
from gemma4_turbo.kernels import experts_few as kernel  # noqa: E402
from gemma4_turbo.kernels import moe_align, moe_tables, pdl  # noqa: E402
from gemma4_turbo.kernels.experts_few import Down, Tiles, Up  # noqa: E402

HIDDEN, EXPERTS, TOPK = 2816, 128, 8
LAYERS, CALLS = 4, 16  # of one layer's experts a token reads 95 MB, or 48 on two GPUs
DEVICE = "cuda"
UPS = (
    Up(4, 1, 256, 1), Up(4, 1, 256, 2), Up(4, 1, 256, 4), Up(2, 1, 256, 1), Up(2, 1, 256, 4),
    Up(2, 2, 256, 1), Up(2, 2, 256, 4), Up(1, 2, 256, 4), Up(2, 2, 128, 1), Up(8, 1, 256, 1),
)  # fmt: skip
DOWNS = (
    Down(8, 1, 128, 1, 0), Down(8, 1, 128, 2, 0), Down(8, 1, 128, 4, 0), Down(8, 1, 64, 1, 0),
    Down(8, 1, 64, 2, 0), Down(8, 1, 256, 1, 0), Down(8, 1, 256, 4, 0), Down(4, 1, 256, 1, 0),
    Down(4, 1, 256, 4, 0), Down(4, 2, 128, 1, 0),
)  # fmt: skip
PREFETCHES = (0, 2, 4, 8)
COLUMNS = ("tokens", "what", "pdl", "cut", "us", "gb_per_s", "of_copy", "error")


def text(tile: tuple[int, ...]) -> str:
    """As a table shows a cut."""
    return "/".join(map(str, tile))


class Layers:
    """Weights of several layers, activations and routings for one number of tokens."""

    def __init__(self, width: int, real: bool = True) -> None:
        """``real=False``: of one layer with a single expert, to compile with."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.experts = EXPERTS if real else 1

        def weight(rows: int, columns: int) -> torch.Tensor:
            made = torch.empty(self.experts, rows, columns, device=DEVICE)
            return made.normal_(0, columns**-0.5, generator=generator).bfloat16()

        self.width = width
        count = LAYERS if real else 1
        self.w13 = [weight(2 * width, HIDDEN) for _ in range(count)]
        self.w2 = [weight(HIDDEN, width) for _ in range(count)]
        self.generator = generator

    def route(self, tokens: int) -> None:
        """Near uniform routings: logits of a normal distribution."""
        self.tokens = tokens

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=self.generator, device=DEVICE)

        self.x = [randn(tokens, HIDDEN).bfloat16() for _ in range(CALLS)]
        chosen = [randn(tokens, EXPERTS).topk(TOPK, dim=-1) for _ in range(CALLS)]
        self.ids = [(ids % self.experts).int() for _, ids in chosen]
        self.factors = [scores.softmax(dim=-1) for scores, _ in chosen]
        self.h = [randn(tokens * TOPK, self.width).bfloat16() for _ in range(CALLS)]
        self.out = torch.empty_like(self.x[0])
        distinct = sum([len(ids.unique()) for ids in self.ids]) / CALLS
        row = 2 * HIDDEN * self.width
        self.up_bytes = distinct * 2 * row + tokens * (2 * HIDDEN + 2 * TOPK * self.width)
        self.down_bytes = distinct * row + tokens * (2 * TOPK * self.width + 2 * HIDDEN)

    def up(self, tile: Up) -> Call:
        """The first launch."""
        return lambda i: kernel.launch_up(self.x[i], self.w13[i % len(self.w13)], self.ids[i], tile)

    def down(self, tile: Down) -> Call:
        """The second launch."""
        return lambda i: kernel.launch_down(
            self.h[i], self.w2[i % len(self.w2)], self.factors[i], self.ids[i], self.out, tile
        )

    def both(self, tiles: Tiles) -> Callable[[int], torch.Tensor]:
        """The two."""
        return lambda i: kernel.launch_experts_few(
            self.x[i], self.w13[i % len(self.w13)], self.w2[i % len(self.w2)],
            self.factors[i], self.ids[i], None, tiles,
        )  # fmt: skip

    def exact(self) -> torch.Tensor:
        """The first call's result in fp64."""
        chosen, places = self.ids[0].unique(return_inverse=True)
        w13, w2 = (whole[0][chosen].double() for whole in (self.w13, self.w2))
        return kernel.reference_experts_few(
            self.x[0].double(), w13, w2, self.factors[0].double(), places.int()
        )


# -- compiling ------------------------------------------------------------------------------------------


def _compile(job: tuple[int, bool, Up | Down]) -> str:
    """Fill Triton's cache for one cut, in a process of its own; returns why it cannot run, or nothing."""
    width, early, tile = job

    def run() -> None:
        layers = Layers(width, real=False)
        layers.route(1)
        pdl.wanted = early
        (layers.up(tile) if isinstance(tile, Up) else layers.down(tile))(0)
        torch.cuda.synchronize()

    return cuts.problem(run)


def jobs(width: int) -> list[tuple[int, bool, Up | Down]]:
    """Every kernel that may be timed."""
    plain: list[Up | Down] = [*UPS, *DOWNS]
    early: list[Up | Down] = [*UPS]
    early += [down._replace(prefetch=fetched) for down in DOWNS for fetched in PREFETCHES]
    return [(width, False, tile) for tile in plain] + [(width, True, tile) for tile in early]


# -- stock ----------------------------------------------------------------------------------------------


class Stock:
    """SGLang's fused experts, as 26B-A4B calls them."""

    def __init__(self) -> None:
        prepare_sglang()
        self.calls = lines.stock()
        self.module = self.calls.experts_module()
        self.tables = self.calls.experts_tables()

    def call(self, layers: Layers) -> Callable[[int], torch.Tensor]:
        """One layer's experts."""

        def run(i: int) -> torch.Tensor:
            w13, w2 = layers.w13[i % len(layers.w13)], layers.w2[i % len(layers.w2)]
            return self.calls.fused_experts(layers.x[i], w13, w2, layers.factors[i], layers.ids[i])

        return run

    @contextmanager
    def swapped(self, owner: Any, **names: Any) -> Iterator[None]:
        """Attributes of a module replaced for a while."""
        kept = {name: getattr(owner, name) for name in names}
        for name, value in names.items():
            setattr(owner, name, value)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(owner, name, value)

    def tuned(self, pair: moe_tables.Pair) -> Any:
        """Our tables in the place of SGLang's."""

        def get_moe_configs(*_: Any, down_moe: bool = False, **__: Any) -> moe_tables.Table:
            return pair.down if down_moe else pair.up

        return self.swapped(self.tables, get_moe_configs=get_moe_configs)

    def without_sum(self) -> Any:
        """Slots aligned by our kernel; the sum left to the layer's end."""

        def combine(_: torch.Tensor, out: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
            return out

        names = {"moe_combine_topk": combine, "moe_sum_reduce_torch_compile": combine}
        here = {name: ours for name, ours in names.items() if hasattr(self.module, name)}
        if "moe_combine_topk" in here:
            del here["moe_sum_reduce_torch_compile"]
        return self.swapped(self.module, moe_align_block_size=moe_align.launch_align, **here)


# -- timing ---------------------------------------------------------------------------------------------


def copy_gbps() -> float:
    """What a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    (us,) = readings([Timer(lambda _: target.copy_(source), 4)], 5)
    return 2 * source.numel() / us / 1e3


class Bench:
    """Rows of one width."""

    def __init__(self, layers: Layers, stock: Stock | None, replays: int, base: dict[str, Any]):
        self.layers, self.stock, self.replays, self.base = layers, stock, replays, base
        self.copy = copy_gbps()
        self.rows: list[dict[str, Any]] = []

    def row(self, what: str, cut: str, us: float, size: float, error: float | None = None) -> None:
        """One measurement."""
        self.rows.append(
            self.base
            | {
                "width": self.layers.width,
                "tokens": self.layers.tokens,
                "what": what,
                "pdl": int(pdl.wanted),
                "cut": cut,
                "us": round(us, 2),
                "bytes": round(size),
                "gb_per_s": round(size / us / 1e3),
                "of_copy": round(size / us / 1e3 / self.copy, 3),
                "copy_gb_per_s": round(self.copy),
                "error": error,
            }
        )

    def time(self, what: str, calls: dict[str, Call], size: float, exact: torch.Tensor | None = None) -> dict[str, float]:  # fmt: skip
        """Microseconds of each by name, read in turn; those that cannot run are left out."""
        timers, errors = {}, {}
        for name, call in calls.items():
            try:
                if exact is not None:
                    found: Any = call(0)
                    errors[name] = float((found.double() - exact).norm() / exact.norm())
                timers[name] = Timer(call, CALLS)
            except Exception as error:
                print(f"{what} {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        times = dict(zip(timers, readings(list(timers.values()), self.replays), strict=True))
        for name, us in times.items():
            self.row(what, name, us, size, errors.get(name))
        return times

    def tokens(self, tokens: int) -> None:
        """Everything for one number of tokens."""
        layers = self.layers
        layers.route(tokens)
        exact, size = layers.exact(), layers.up_bytes + layers.down_bytes
        pdl.wanted = False
        if self.stock is not None:
            call = self.stock.call(layers)
            self.time("stock", {"": call}, size, exact)
            device = torch.cuda.get_device_name().replace(" ", "_")
            pair = moe_tables.load(moe_tables.Key(EXPERTS, layers.width, device))
            if pair is not None:
                with self.stock.tuned(pair):
                    self.time("stock, tables", {"": call}, size, exact)
                    with self.stock.without_sum():
                        self.time("today", {"": call}, size)
        ups = {tile: layers.up(tile) for tile in UPS}
        downs = {tile: layers.down(tile) for tile in DOWNS}
        up_us = self.time("up", {text(t): call for t, call in ups.items()}, layers.up_bytes)
        down_us = self.time("down", {text(t): call for t, call in downs.items()}, layers.down_bytes)
        chosen = Tiles(
            min(UPS, key=lambda tile: up_us.get(text(tile), float("inf"))),
            min(DOWNS, key=lambda tile: down_us.get(text(tile), float("inf"))),
        )
        default = kernel.choose(TOPK)
        cuts = [default._replace(down=default.down._replace(prefetch=0)), chosen]
        self.both(dict.fromkeys(cuts), size, exact)
        pdl.wanted = True
        cuts = [
            Tiles(cut.up, cut.down._replace(prefetch=fetched))
            for cut in cuts
            for fetched in PREFETCHES
        ]
        self.both(dict.fromkeys(cuts), size, exact)
        pdl.wanted = False

    def both(self, cuts: dict[Tiles, None], size: float, exact: torch.Tensor) -> None:
        """The two launches with each cut."""
        calls: dict[str, Call] = {
            f"{text(cut.up)} {text(cut.down)}": self.layers.both(cut) for cut in cuts
        }
        self.time("both", calls, size, exact)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The best line of each kind, with its share of stock's time."""
    best = frame.loc[frame.groupby(["width", "tokens", "what", "pdl"], sort=False).us.idxmin()]
    stock = frame[frame.what == "stock"].groupby(["width", "tokens"]).us.min()
    keys = pd.MultiIndex.from_frame(best[["width", "tokens"]])
    ratio = best.us.to_numpy() / stock.reindex(keys).to_numpy()
    return best[["width", *COLUMNS]].assign(of_stock=ratio.round(3))


def main(
    width: Annotated[str, typer.Option(help="Comma list: 704, 352 on two GPUs")] = "704",
    tokens: Annotated[str, typer.Option(help="Comma list")] = "1,2,3,4,8",
    workers: Annotated[int, typer.Option(help="Processes that compile")] = 14,
    replays: Annotated[int, typer.Option(help="Readings per measurement")] = 9,
    seconds: Annotated[float, typer.Option(help="No further number of tokens after so long")] = 80,
    out: Annotated[Path, typer.Option(help="CSV to write")] = Path("experts-few.csv"),
) -> None:
    """Measure."""
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s: {what}", file=sys.stderr)

    widths = [int(value) for value in width.split(",")]
    wanted = [job for value in widths for job in jobs(value)]
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        compiled = pool.map(_compile, wanted, chunksize=2)
        first, stock = Layers(widths[0]), None
        try:
            first.route(1)
            stock = Stock()
            stock.call(first)(0)  # compiles its activation with nvcc
            torch.cuda.synchronize()
        except Exception as error:
            stock = None
            print(f"no stock: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
        say("stock stands")
        cuts.tell(wanted, compiled)
        say(f"{len(wanted)} kernels compiled")
        for value in widths:
            layers = first if value == widths[0] else Layers(value)
            bench = Bench(layers, stock, replays, provenance())
            for count in map(int, tokens.split(",")):
                if time.monotonic() - started > seconds:
                    say(f"no time left for {count} tokens of width {value}")
                    break
                bench.tokens(count)
                say(f"width {value}, {count} tokens")
                pd.DataFrame([*rows, *bench.rows]).to_csv(out, index=False)
            rows += bench.rows
    frame = pd.DataFrame(rows)
    print(frame[list(COLUMNS)].to_string(index=False))
    print(f"a copy: {frame.copy_gb_per_s.max()} GB/s")
    print(summary(frame).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
