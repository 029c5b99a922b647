"""Block sizes of SGLang's fused experts' kernel for Gemma 4's experts.

All variants of the kernel are compiled first, in parallel. Then a few numbers of tokens are measured with
every variant that makes sense there, the best ones with more groupings, and the other numbers of tokens
with the winners of their neighbours.

The calls of one measurement go through different routings, half of them near uniform (logits of a normal
distribution), half skewed (with a bias for every expert), so that neither the experts nor what is in the
L2 cache are always the same. Weights are bf16, 1.5 GB for a width of 704.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.progress import track

from gemma4_turbo.cli import lines, report, sglang_process
from gemma4_turbo.cli.report import Console
from gemma4_turbo.cli.tuning.timing import Timer, readings
from gemma4_turbo.kernels import moe_tables
from gemma4_turbo.kernels.moe_tables import bytes_in_flight

HIDDEN, EXPERTS, TOPK = 2816, 128, 8
UP, DOWN = "up", "down"
COARSE = (1, 8, 32, 128, 512, 2048, 8192)
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SHARED_BYTES = 227 * 1024
DEVICE = "cuda"
SKEW = 1.0
"""Standard deviation of the experts' biases, that of the logits being 1."""


class Tile(NamedTuple):
    """One configuration of the kernel."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int

    def config(self) -> dict[str, int]:
        """As SGLang writes it."""
        return {
            "BLOCK_SIZE_M": self.m,
            "BLOCK_SIZE_N": self.n,
            "BLOCK_SIZE_K": self.k,
            "GROUP_SIZE_M": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def rows_of_a_block(tokens: int) -> list[int]:
    """BLOCK_SIZE_M around the tokens that an expert gets on average, tokens / 16."""
    mean = tokens * TOPK // EXPERTS
    if mean <= 8:
        return [16]
    if mean <= 16:
        return [16, 32]
    if mean <= 64:
        return [16, 32, 64]
    if mean <= 128:
        return [64, 128]
    return [64, 128, 256]


def tiles(m: int, memory: int = SHARED_BYTES) -> list[Tile]:
    """Variants with so many rows that fit into shared memory and registers and keep loads in flight."""
    found = []
    small = m <= 32
    for n, k, warps, stages in product(
        (32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5)
    ):
        shared = bytes_in_flight(m, n, k, stages)
        sums = m * n // (warps * 32)
        in_flight = bytes_in_flight(m, n, k, stages - 1)
        if shared > memory or not 24_000 <= in_flight <= 160_000 or not 4 <= sums <= 128:
            continue
        if small and (n == 256 or k == 32 or (warps == 8 and n < 128)):
            continue
        if not small and (n < 64 or k > 128 or sums < 16 or (n == 64 and warps == 8)):
            continue
        found.append(Tile(m, n, k, 1 if small else 8, warps, stages))
    return found


def regrouped(tile: Tile) -> list[Tile]:
    """The same kernel with other orders of its programs."""
    return [tile._replace(group=group) for group in ((1, 16) if tile.m <= 32 else (1, 8, 32))]


def draws(tokens: int) -> int:
    """Routings of each kind in one measurement."""
    return 8 if tokens <= 64 else 4 if tokens <= 512 else 2 if tokens <= 2048 else 1


def routings(tokens: int, count: int) -> list[torch.Tensor]:
    """Expert ids ``[tokens, TOPK]``, near uniform and skewed in turn."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    return [
        (randn(tokens, EXPERTS) + skew * randn(EXPERTS)).topk(TOPK, dim=-1).indices.int()
        for _ in range(count)
        for skew in (0.0, SKEW)
    ]


class Experts:
    """Weights, and the two launches of the kernel as stock makes them."""

    def __init__(self, width: int, real: bool = True) -> None:
        """``real=False``: the weights of one expert stand for all, to compile with."""
        self.width = width
        experts = EXPERTS if real else 1
        generator = torch.Generator(DEVICE).manual_seed(0)

        def weight(rows: int, columns: int) -> torch.Tensor:
            made = torch.empty(experts, rows, columns, device=DEVICE, dtype=torch.bfloat16)
            made.normal_(0, columns**-0.5, generator=generator)
            return made.expand(EXPERTS, rows, columns)

        self.weights = {UP: weight(2 * width, HIDDEN), DOWN: weight(HIDDEN, width)}
        self.tokens = 0

    def route(self, tokens: int, count: int) -> None:
        """Activations, results and routings for a number of tokens."""
        self.tokens = tokens
        self.ids = routings(tokens, count)
        self.factors = torch.full((tokens, TOPK), 1 / TOPK, device=DEVICE)
        self.aligned: dict[int, list[tuple[torch.Tensor, ...]]] = {}

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

        slots = tokens * TOPK
        self.inputs = {UP: randn(tokens, HIDDEN), DOWN: randn(slots, self.width)}
        self.outputs = {
            UP: randn(slots, 2 * self.width),
            DOWN: randn(tokens, TOPK, HIDDEN),
        }

    def launch(self, projection: str, tile: Tile, number: int) -> None:
        """The kernel for one routing."""
        import triton.language as tl

        sorted_ids, expert_ids, padded = self.alignment(tile.m)[number % len(self.ids)]
        up = projection == UP
        lines.stock().experts_kernel().invoke_fused_moe_kernel(
            self.inputs[projection],
            self.weights[projection],
            None,
            self.outputs[projection],
            None,
            None,
            None,
            self.factors,
            self.ids[number % len(self.ids)],
            sorted_ids,
            expert_ids,
            padded,
            not up,
            TOPK if up else 1,
            tile.config(),
            compute_type=tl.bfloat16,
            use_fp8_w8a8=False,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
            block_shape=None,
            filter_expert=False,
            **({} if up else {"router_topk": TOPK}),
        )

    def alignment(self, m: int) -> list[tuple[torch.Tensor, ...]]:
        """Slots grouped by expert in blocks of m, one for each routing."""
        if m not in self.aligned:
            stock = lines.stock()
            self.aligned[m] = [stock.align(ids, m, EXPERTS) for ids in self.ids]
        return self.aligned[m]

    def timer(self, projection: str, tile: Tile) -> Timer:
        """Of one call for each routing."""
        self.alignment(tile.m)
        return Timer(lambda i: self.launch(projection, tile, i), len(self.ids))


# -- compiling ------------------------------------------------------------------------------------------

_experts: Experts | None = None  # of a process that compiles


def compile_one(job: tuple[int, int, str, Tile]) -> str:
    """Fill Triton's cache for one variant; returns why it cannot run, or nothing."""
    global _experts
    width, tokens, projection, tile = job
    try:
        if _experts is None or _experts.width != width:
            _experts = Experts(width, real=False)
        if _experts.tokens != tokens:
            _experts.route(tokens, 1)
        _experts.launch(projection, tile, 0)
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, above all
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def like(tokens: int) -> int:
    """A small number of tokens for which Triton compiles the same kernel.

    It distinguishes whether the number of slots, and the padded one, are multiples of 16.
    """
    return 1 if tokens == 1 else 8 if tokens * TOPK <= EXPERTS else 32


def compile_all(
    wanted: Iterable[tuple[int, str, Tile]], width: int, pool: ProcessPoolExecutor, console: Console
) -> set[tuple[str, Tile]]:
    """Compile variants for ``(tokens, projection, tile)``; returns those that cannot run."""
    jobs = sorted({(width, like(tokens), projection, tile) for tokens, projection, tile in wanted})
    failed = set()
    for job, problem in track(
        zip(jobs, pool.map(compile_one, jobs, chunksize=2), strict=True),
        f"compiling {len(jobs)} variants", total=len(jobs), console=console, transient=True,
    ):  # fmt: skip
        if problem:
            failed.add(job[2:])
    return failed


def prepare_sglang() -> None:
    """The global arguments that stock's fused experts ask for; all of them where a process publishes them."""
    from sglang.srt import server_args

    if not hasattr(server_args, "_global_server_args"):
        sglang_process.prepare_sglang()
        return
    arguments: Any = SimpleNamespace(
        enable_deterministic_inference=False, enable_fused_moe_sum_all_reduce=False
    )
    server_args.set_global_server_args_for_scheduler(arguments)


# -- tuning ---------------------------------------------------------------------------------------------


class Times:
    """Microseconds of every measurement of one width."""

    def __init__(self, experts: Experts, failed: set[tuple[str, Tile]], replays: int) -> None:
        self.experts = experts
        self.failed = failed
        self.replays = replays
        self.us: dict[tuple[int, str, Tile], float] = {}

    def measure(self, tokens: int, wanted: Iterable[tuple[str, Tile]]) -> None:
        """What is new among these. Call it for one number of tokens after the other."""
        if self.experts.tokens != tokens:
            self.experts.route(tokens, draws(tokens))
        for projection, tile in wanted:
            key = (tokens, projection, tile)
            if key in self.us or (projection, tile) in self.failed:
                continue
            try:
                (self.us[key],) = readings([self.experts.timer(projection, tile)], self.replays)
            except Exception as error:
                if "out of resource" not in str(error):
                    raise
                self.failed.add((projection, tile))

    def best(self, tokens: int, projection: str, m: int, count: int) -> list[Tile]:
        """The fastest with so many rows, fastest first."""
        found = [
            (us, tile)
            for (t, p, tile), us in self.us.items()
            if (t, p, tile.m) == (tokens, projection, m)
        ]
        return [tile for _, tile in sorted(found)[:count]]

    def decide(self, tokens: int, stock: Tile) -> tuple[Tile, Tile]:
        """Up and down with equal rows, from the three best of each and stock's, measured again, in turn.

        Stock's is among them all, so that no table is slower than stock by another moment's clock.
        """
        self.measure(tokens, [])
        finalists = [
            (projection, tile)
            for m in sorted({tile.m for (t, _, tile) in self.us if t == tokens})
            for projection in (UP, DOWN)
            for tile in self.best(tokens, projection, m, 3)
        ]
        finalists += [pair for pair in both([stock]) if pair not in {*finalists, *self.failed}]
        timers = [self.experts.timer(projection, tile) for projection, tile in finalists]
        again = dict(zip(finalists, readings(timers, 2 * self.replays), strict=True))
        for (projection, tile), us in again.items():
            self.us[tokens, projection, tile] = us
        best: dict[tuple[str, int], tuple[float, Tile]] = {}
        for (projection, tile), us in again.items():
            key = projection, tile.m
            best[key] = min(best.get(key, (us, tile)), (us, tile))
        _, up, down = min(
            (best[UP, m][0] + best[DOWN, m][0], best[UP, m][1], best[DOWN, m][1])
            for projection, m in best
            if projection == UP and (DOWN, m) in best
        )
        return up, down


def stock_tile(tokens: int, width: int) -> Tile:
    """What stock runs, for both projections where it has no table for the second."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import try_get_optimal_moe_config

    found = try_get_optimal_moe_config(
        (EXPERTS, 2 * width, HIDDEN), (EXPERTS, HIDDEN, width), TOPK, None, tokens
    )
    return Tile(
        found["BLOCK_SIZE_M"],
        found["BLOCK_SIZE_N"],
        found["BLOCK_SIZE_K"],
        found["GROUP_SIZE_M"],
        found.get("num_warps", 4),
        found.get("num_stages", 3),
    )


def both(chosen: Iterable[Tile]) -> list[tuple[str, Tile]]:
    """Each for both projections."""
    return [(projection, tile) for tile in chosen for projection in (UP, DOWN)]


def tune(
    width: int, counts: list[int], workers: int, replays: int, console: Console
) -> tuple[moe_tables.Pair, list[dict[str, Any]]]:
    """Tables and measurements for experts of this width."""
    coarse = [tokens for tokens in COARSE if tokens in counts] or counts[:1]
    started = time.monotonic()

    def say(what: str) -> None:
        told = f"{time.monotonic() - started:4.0f} s: N={width}: {what}"
        console.print(report.plain(told), soft_wrap=True)

    first = {
        tokens: both(tile for m in rows_of_a_block(tokens) for tile in tiles(m))
        for tokens in coarse
    }
    stocks = {tokens: stock_tile(tokens, width) for tokens in counts}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failed = compile_all(
            [(t, *pair) for t, pairs in first.items() for pair in pairs]
            + [(t, *pair) for t, tile in stocks.items() for pair in both([tile])],
            width, pool, console,
        )  # fmt: skip
        say(f"compiled, {len(failed)} do not fit")
        times = Times(Experts(width), failed, replays)
        for tokens in track(coarse, "every variant", console=console, transient=True):
            times.measure(tokens, first[tokens])
        say("measured every variant for a few numbers of tokens")
        second = {tokens: winners(tokens, coarse, times) for tokens in counts}
        failed |= compile_all(
            [(t, *pair) for t, pairs in second.items() for pair in pairs], width, pool, console
        )
        say("compiled the winners' other groupings")
    up: moe_tables.Table = {}
    down: moe_tables.Table = {}
    for tokens in track(counts, "winners", console=console, transient=True):
        times.measure(tokens, [*second[tokens], *both([stocks[tokens]])])
        chosen = times.decide(tokens, stocks[tokens])
        up[tokens], down[tokens] = (tile.config() for tile in chosen)
    say("done")
    chosen_tiles = {
        (tokens, projection): Tile(*table[tokens].values())
        for projection, table in ((UP, up), (DOWN, down))
        for tokens in counts
    }
    rows = [
        {
            "width": width,
            "tokens": tokens,
            "projection": projection,
            **tile._asdict(),
            "us": round(us, 2),
            "chosen": int(chosen_tiles[tokens, projection] == tile),
            "stock": int(stocks[tokens] == tile),
        }
        for (tokens, projection, tile), us in times.us.items()
    ]
    return moe_tables.Pair(up, down), rows


def winners(tokens: int, coarse: list[int], times: Times) -> list[tuple[str, Tile]]:
    """What was best at the neighbours among the numbers that were measured fully, and its groupings."""
    below = max((t for t in coarse if t <= tokens), default=coarse[0])
    above = min((t for t in coarse if t >= tokens), default=coarse[-1])
    found: list[tuple[str, Tile]] = []
    for near in sorted({below, above}):
        for projection in (UP, DOWN):
            for m in rows_of_a_block(near):
                if m not in rows_of_a_block(tokens):
                    continue
                best = times.best(near, projection, m, 6)
                found += [(projection, tile) for tile in best]
                found += [(projection, other) for tile in best[:2] for other in regrouped(tile)]
    return list(dict.fromkeys(found))


# -- a handful ------------------------------------------------------------------------------------------

HANDFUL = {  # n, k, warps, stages; for few rows of a block and for many
    True: ((32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3)),
    False: ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4)),
}  # fmt: skip
HANDFUL_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHORT_TOKENS = (1, 32, 512, 4096)
"""Where the time is short."""
NEAR = 2.0**-7
"""Relative difference (2-norm) from stock's tile: two roundings of bf16."""


class Tables(NamedTuple):
    """The fused experts of a model, as ``tune`` measures them."""

    width: int

    @property
    def kernel(self) -> str:
        """As a profile calls it."""
        return "moe_configs"

    @property
    def place(self) -> tuple[int, ...]:
        """As in a profile."""
        return EXPERTS, self.width

    @property
    def title(self) -> str:
        """For people."""
        return f"fused experts, {EXPERTS} of {self.width}"

    @property
    def bytes(self) -> int:
        """Weights, activations and results of the largest number of tokens."""
        slots = max(HANDFUL_TOKENS) * TOPK
        return 6 * EXPERTS * self.width * HIDDEN + 2 * slots * (3 * self.width + HIDDEN)

    def jobs(self, memory: int) -> list[tuple[int, int, str, Tile]]:
        """Every variant that may be timed but stock's, as `compile_one` takes them."""
        found = {
            (self.width, like(tokens), projection, tile): None
            for tokens in HANDFUL_TOKENS
            for m in rows_of_a_block(tokens)
            for projection, tile in both(handful(m, memory))
        }
        return list(found)


def handful(m: int, memory: int) -> list[Tile]:
    """A few variants with so many rows that fit into shared memory."""
    small = m <= 32
    return [
        Tile(m, n, k, 1 if small else 8, warps, stages)
        for n, k, warps, stages in HANDFUL[small]
        if bytes_in_flight(m, n, k, stages) <= memory and m * n // (warps * 32) <= 128
    ]


def few(
    subject: Tables,
    memory: int,
    shipped: moe_tables.Pair | None,
    go_on: Callable[[], None],
    counts: tuple[int, ...] = (),
) -> tuple[moe_tables.Pair, dict[str, float]]:
    """Tables from a handful of variants, stock's and the shipped ones, and microseconds over all.

    Args:
        subject: the experts.
        memory: bytes of shared memory that a CTA may have.
        shipped: the package's tables for this GPU and Triton, if it has some.
        go_on: called between steps; raises to end the measurement.
        counts: numbers of tokens; empty: `HANDFUL_TOKENS`.
    """
    counts = counts or HANDFUL_TOKENS
    prepare_sglang()
    times = Times(Experts(subject.width), set(), 5)
    pair = moe_tables.Pair({}, {})
    us = stock_us = shipped_us = 0.0
    for tokens in counts:
        go_on()
        stock = stock_tile(tokens, subject.width)
        wanted = [tile for m in rows_of_a_block(tokens) for tile in handful(m, memory)]
        theirs = [] if shipped is None else [_closest(table, tokens) for table in shipped]
        times.measure(tokens, both(dict.fromkeys([stock, *theirs, *wanted])))
        go_on()
        chosen = times.decide(tokens, stock)
        if not all(
            near(times.experts, projection, tile, stock)
            for projection, tile in zip((UP, DOWN), chosen, strict=True)
        ):
            chosen = stock, stock
        pair.up[tokens], pair.down[tokens] = (tile.config() for tile in chosen)
        us += sum(times.us[tokens, p, t] for p, t in zip((UP, DOWN), chosen, strict=True))
        stock_us += sum(times.us[tokens, projection, stock] for projection in (UP, DOWN))
        if theirs:
            shipped_us += sum(
                times.us[tokens, p, t] for p, t in zip((UP, DOWN), theirs, strict=True)
            )
    figures = {"us": us, "stock_us": stock_us, "ratio": us / stock_us}
    figures |= {"tiles": len(counts), "of": len(HANDFUL_TOKENS)}
    return pair, figures | ({"of_own": us / shipped_us} if shipped_us else {})


def _closest(table: moe_tables.Table, tokens: int) -> Tile:
    """As SGLang looks it up."""
    config = table[min(table, key=lambda n: abs(n - tokens))]
    return Tile(*(config[field] for field in moe_tables.REQUIRED))


def near(experts: Experts, projection: str, tile: Tile, stock: Tile) -> bool:
    """Whether a tile's result is stock's but for the order of its sums."""
    found = []
    for one in (tile, stock):
        experts.outputs[projection].fill_(torch.nan)
        experts.launch(projection, one, 0)
        found.append(experts.outputs[projection].double())
    return bool((found[0] - found[1]).norm() <= NEAR * found[1].norm())
