"""One kernel at one shape: which tiles are tried, whether they are right, which is the fastest.

A tile must be as close to the exact result as stock's code is. Of those that are, each is timed beside
stock's, in turn, at all points of the shape: numbers of rows, or lengths. The package's own tile is the
first one; another takes its place only where it is faster when both are read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from gemma4_turbo.cli.tuning.timing import Call
from gemma4_turbo.engine.gpu_profile import Shape, Word
from gemma4_turbo.kernels.gpu import Gpu

T = TypeVar("T")

FARTHER = 1.1
"""Ours may be so much farther from the exact result than stock's: the bound of the kernels' docstrings."""
ROUNDING = 2.0**-9
"""And always as far as bf16's rounding of the result may put a value."""
SLOWER = 1.1
"""Where the package's tiles were measured, stock's code takes a shape back only from so much longer calls:
a call alone does not show the launches that a whole step saves."""
GAIN = 0.98
"""Another tile than the package's own must take no more than this part of its time."""
FASTER = "stock's code is faster here"
WRONG = "no tile has the right result"
NONE_RUNS = "no tile runs"
ERROR = "the GPU reported an error"
REASONS = (FASTER, WRONG, NONE_RUNS, ERROR)
QUICK, THOROUGH = 5, 11  # readings
FINALISTS = 3


class Bench(Protocol):
    """A shape's tensors at one point. A call gets its number in a graph, to use other memory each time."""

    calls: int

    def ours(self, tile: Any) -> Call:
        """The kernel with a tile."""

    def stock(self) -> Call:
        """Stock's code; ImportError or AttributeError where this SGLang has none to call."""

    def error(self, call: Call) -> float:
        """Relative error (2-norm) of the call's result against fp32 or fp64; NaN if it is not finite."""


class Subject(Protocol):
    """A kernel at a shape. Picklable: other processes compile its tiles."""

    @property
    def kernel(self) -> str:
        """As the profile calls it."""

    @property
    def place(self) -> tuple[Word, ...]:
        """The shape as the kernel spells it in a profile."""

    @property
    def title(self) -> str:
        """For people."""

    @property
    def bytes(self) -> int:
        """Of GPU memory that a bench needs at most, about."""

    def candidates(self, gpu: Gpu) -> list[Any]:
        """Tiles, the one that the package takes by itself first."""

    def numbers(self, tile: Any) -> tuple[int, ...]:
        """A tile as the profile has it."""

    def benches(self, device: str) -> Iterator[Bench]:
        """One for each point."""

    def compile(self, tile: Any, device: str) -> None:
        """Launch what a bench would, on little memory."""


class Clock(Protocol):
    """Times calls."""

    def us(self, calls: Sequence[tuple[Call, int]], readings: int) -> list[float]:
        """Microseconds of each call, given how many of it make a measurement; read in turn."""


class Failed(NamedTuple):
    """A tile that cannot be taken."""

    reason: str
    wrong: bool  # its result, not its launch


def measure(
    subject: Subject, device: str, gpu: Gpu, clock: Clock, known: bool, go_on: Callable[[], None]
) -> Shape:
    """Everything about a subject.

    Args:
        subject: what is measured.
        device: where.
        gpu: its measures.
        clock: how.
        known: whether the package runs the kernel here without a profile.
        go_on: called between steps; raises to end the measurement.
    """
    tiles = list(dict.fromkeys(subject.candidates(gpu)))
    failed: dict[Any, Failed] = {}
    errors: dict[Any, float] = {}
    stock_error = 0.0
    first = Times(clock, QUICK)
    for bench in subject.benches(device):
        go_on()
        stock = bench.stock()
        allowed = bench.error(stock)
        stock_error = max(stock_error, allowed)
        right = []
        for tile in [tile for tile in tiles if tile not in failed]:
            found = _tried(bench, tile, allowed)
            if isinstance(found, Failed):
                failed[tile] = found
                continue
            errors[tile] = max(errors.get(tile, 0.0), found)
            right.append(tile)
        go_on()
        first.take(bench, stock, right)
        del bench, stock  # the next one needs the memory
    alive = [tile for tile in tiles if tile not in failed]
    if not alive:
        return _without(subject, failed, first.stock, stock_error)
    own = tiles[0]
    last = first.best(alive)[:FINALISTS]
    if own in alive and own not in last:
        last.append(own)
    again = Times(clock, THOROUGH)
    for bench in subject.benches(device):
        go_on()
        again.take(bench, bench.stock(), last)
        del bench
    tile = again.best(last)[0]
    if own in last and ratio(again.ours[tile], again.ours[own]) > GAIN:
        tile = own
    figures = {
        "us": sum(again.ours[tile]),
        "stock_us": sum(again.stock),
        "ratio": ratio(again.ours[tile], again.stock),
        "error": errors[tile],
        "stock_error": stock_error,
    }
    if own in last:
        figures["of_own"] = ratio(again.ours[tile], again.ours[own])
    if figures["ratio"] > (SLOWER if known else 1.0):
        reason = f"{FASTER}: ours takes {figures['ratio']:.2f} of its time"
        return Shape(subject.kernel, subject.place, None, reason, figures)
    return Shape(subject.kernel, subject.place, subject.numbers(tile), "", figures)


class Times:
    """Microseconds at each point, of stock's code and of tiles."""

    def __init__(self, clock: Clock, readings: int) -> None:
        self.clock, self.readings = clock, readings
        self.stock: list[float] = []
        self.ours: dict[Any, list[float]] = {}

    def take(self, bench: Bench, stock: Call, tiles: Sequence[Any]) -> None:
        """One point more."""
        calls = [stock, *map(bench.ours, tiles)]
        found = self.clock.us([(call, bench.calls) for call in calls], self.readings)
        self.stock.append(found[0])
        for tile, us in zip(tiles, found[1:], strict=True):
            self.ours.setdefault(tile, []).append(us)

    def best(self, tiles: Sequence[T]) -> list[T]:
        """Fastest first."""
        return sorted(tiles, key=lambda tile: ratio(self.ours[tile], self.stock))


def ratio(us: Sequence[float], of: Sequence[float]) -> float:
    """Geometric mean of the ratios at each point."""
    logs = [math.log(a / b) for a, b in zip(us, of, strict=True)]
    return math.exp(sum(logs) / len(logs))


def _tried(bench: Bench, tile: Any, stock_error: float) -> float | Failed:
    """The error of a tile, or why it cannot be taken."""
    try:
        error = bench.error(bench.ours(tile))
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        if is_fatal(problem):
            raise
        return Failed(f"{type(problem).__name__}: {problem}".splitlines()[0][:200], False)
    if error <= max(FARTHER * stock_error, ROUNDING):  # written so that a NaN fails
        return error
    return Failed(f"relative error {error:.1e}, stock's is {stock_error:.1e}", True)


def is_fatal(problem: BaseException) -> bool:
    """Whether nothing can be done on the GPU any more in this process."""
    told = str(problem)
    return "CUDA error" in told or "device-side assert" in told


def _without(
    subject: Subject, failed: dict[Any, Failed], stock_us: list[float], stock_error: float
) -> Shape:
    wrong = next((one for one in failed.values() if one.wrong), None)
    why = wrong or next(iter(failed.values()))
    kind = WRONG if wrong else NONE_RUNS
    figures = {"stock_us": sum(stock_us), "stock_error": stock_error}
    return Shape(subject.kernel, subject.place, None, f"{kind}: {why.reason}"[:300], figures)
