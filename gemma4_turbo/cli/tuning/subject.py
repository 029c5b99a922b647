"""One kernel at one shape: which tiles are tried, whether they are right, which is the fastest.

A tile must be as close to the exact result as stock's code is. Of those that are, each is timed beside
stock's, in turn, at all points of the shape: numbers of rows, or lengths. The package's own tile is the
first one. It is read again with the two fastest others, more often; one of them takes its place only if it
is faster by more than the readings scatter, and at no point slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median
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
MORE = 1.02
"""What was chosen before stays while it takes no more than this part of what is faster: the package's own
tile beside another one, and where the package has tiles for the GPU, ours beside stock's code. Calls of ours
are timed as a server makes them, with programmatic dependent launch where there is some, so a single one
shows all that a step of a captured graph gains."""
FASTER = "stock's code is faster here"
WRONG = "no tile has the right result"
NONE_RUNS = "no tile runs"
ERROR = "the GPU reported an error"
REASONS = (FASTER, WRONG, NONE_RUNS, ERROR)
FATAL = (
    "CUDA error",  # torch's; Triton tells the driver's words alone
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
)
QUICK, THOROUGH = 4, 12  # readings
FINALISTS = 2  # beside the package's own
NORMAL = 1.4826  # standard deviations in a median absolute deviation, and
EFFICIENCY = (
    1.2533  # standard errors of a median in one of a mean, of normally distributed readings
)


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

    def alike(self, tile: Any) -> tuple[Subject, Any]:
        """A shape and a tile that are compiled to the same kernels: equal for all that are."""

    def compile(self, tile: Any, device: str) -> None:
        """Launch what a bench would."""

    @property
    def like_stock(self) -> Subject | None:
        """A shape with the same kernels of stock's, equal for all that have; None: nothing to compile."""

    def compile_stock(self, device: str) -> None:
        """Launch them as a bench would."""


class Clock(Protocol):
    """Times calls."""

    def readings(self, calls: Sequence[tuple[Call, int]], count: int) -> list[list[float]]:
        """Microseconds of each call, ``count`` times, read in turn; with it how many make a reading."""


class Failed(NamedTuple):
    """A tile that cannot be taken."""

    reason: str
    wrong: bool  # its result, not its launch


def measure(
    subject: Subject,
    device: str,
    gpu: Gpu,
    clock: Clock,
    known: bool,
    go_on: Callable[[], None],
    most: int = 1 << 30,
) -> Shape:
    """Everything about a subject.

    Args:
        subject: what is measured.
        device: where.
        gpu: its measures.
        clock: how.
        known: whether the package runs the kernel here without a profile.
        go_on: called between steps; raises to end the measurement.
        most: tiles that are tried.
    """
    every = candidates(subject, gpu)
    trial = Trial(subject, device, clock, go_on, every[:most])
    own = every[0]
    if len(trial.tiles) > FINALISTS + 1:
        trial.round(trial.tiles, QUICK)
        trial.finals(own)
    else:
        trial.round(trial.tiles, THOROUGH)
    alive = trial.alive()
    figures: dict[str, float] = {"tiles": len(trial.tiles), "of": len(every)}
    if not alive:
        figures |= {"stock_us": trial.times.stock_us(), "stock_error": trial.stock_error}
        return _without(subject, trial.failed, figures)
    times = trial.times
    tile = times.best(alive)[0]
    if own in alive and tile != own:
        against = times.against(tile, own)
        if not (against.faster and against.worst <= 1.0 + against.noise):
            tile = own
    stock = times.against(tile, None)
    figures |= {
        "us": times.us(tile),
        "stock_us": times.stock_us(),
        "ratio": stock.ratio,
        "noise": stock.noise,
        "error": trial.errors[tile],
        "stock_error": trial.stock_error,
    }
    if own in alive:
        figures["of_own"] = times.against(tile, own).ratio
    # Where stock's code runs without a profile, ours must be no slower; elsewhere stock's must be faster.
    if stock.slower if known else stock.ratio > 1.0:
        reason = f"{FASTER}: ours takes {stock.ratio:.2f} of its time"
        return Shape(subject.kernel, subject.place, None, reason, figures)
    return Shape(subject.kernel, subject.place, subject.numbers(tile), "", figures)


def candidates(subject: Subject, gpu: Gpu) -> list[Any]:
    """Each tile once, the package's own first."""
    return list(dict.fromkeys(subject.candidates(gpu)))


class Against(NamedTuple):
    """One call's time beside another's."""

    ratio: float  # geometric mean over the points
    noise: float  # two standard errors of it
    worst: float  # at a single point

    @property
    def faster(self) -> bool:
        """By more than noise, and enough."""
        return self.ratio < 1 / MORE and self.ratio + self.noise < 1.0

    @property
    def slower(self) -> bool:
        """By more than noise, and enough."""
        return self.ratio > MORE and self.ratio - self.noise > 1.0


def against(these: Sequence[Sequence[float]], those: Sequence[Sequence[float]]) -> Against:
    """Readings at each point, made in turn: what slows one reading slows its neighbour, too."""
    means, squares = [], 0.0
    for ours, theirs in zip(these, those, strict=True):
        logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
        middle = median(logs)
        means.append(middle)
        deviation = NORMAL * median(abs(one - middle) for one in logs)
        squares += (EFFICIENCY * deviation) ** 2 / len(logs)
    ratio = math.exp(sum(means) / len(means))
    return Against(ratio, 2 * ratio * math.sqrt(squares) / len(means), math.exp(max(means)))


class Times:
    """Readings at each point, of stock's code and of tiles."""

    def __init__(self) -> None:
        self.stock: list[list[float]] = []
        self.ours: dict[Any, list[list[float]]] = {}

    def take(
        self, bench: Bench, stock: Call, tiles: Sequence[Any], clock: Clock, count: int
    ) -> dict[Any, Failed]:
        """One point more. Tiles that cannot be timed are left out, and returned."""
        failed: dict[Any, Failed] = {}
        try:
            found = _read(bench, stock, tiles, clock, count)
        except Exception as problem:
            _raise_unless_a_tiles(problem)
            for tile in tiles:  # which of them it was
                if (why := _timed_alone(bench, tile, clock)) is not None:
                    failed[tile] = why
            if not failed:
                raise  # stock's code, perhaps
        if failed:
            tiles = [tile for tile in tiles if tile not in failed]
            found = _read(bench, stock, tiles, clock, count)
        self.stock.append(found[0])
        for tile, readings in zip(tiles, found[1:], strict=True):
            self.ours.setdefault(tile, []).append(readings)
        return failed

    def us(self, tile: Any) -> float:
        """Of all points."""
        return sum(map(median, self.ours[tile]))

    def stock_us(self) -> float:
        """Likewise stock's."""
        return sum(map(median, self.stock))

    def against(self, tile: Any, other: Any) -> Against:
        """A tile beside another, or stock's code: None."""
        return against(self.ours[tile], self.stock if other is None else self.ours[other])

    def best(self, tiles: Sequence[T]) -> list[T]:
        """Fastest first."""
        return sorted(tiles, key=lambda tile: self.against(tile, None).ratio)


class Trial:
    """Tiles of a subject, compared and timed."""

    def __init__(
        self,
        subject: Subject,
        device: str,
        clock: Clock,
        go_on: Callable[[], None],
        tiles: list[Any],
    ) -> None:
        self.subject, self.device, self.clock, self.go_on = subject, device, clock, go_on
        self.tiles = tiles
        self.failed: dict[Any, Failed] = {}
        self.errors: dict[Any, float] = {}
        self.stock_error = 0.0
        self.times = Times()

    def alive(self) -> list[Any]:
        """Tiles that are right and timed."""
        return [tile for tile in self.times.ours if tile not in self.failed]

    def round(self, tiles: Sequence[Any], count: int) -> None:
        """Compare them at each point, and time those that are right everywhere so far."""
        for bench in self.subject.benches(self.device):
            self.go_on()
            stock = bench.stock()
            allowed = bench.error(stock)
            self.stock_error = max(self.stock_error, allowed)
            right = []
            for tile in [tile for tile in tiles if tile not in self.failed]:
                found = _tried(bench, tile, allowed)
                if isinstance(found, Failed):
                    self.failed[tile] = found
                    continue
                self.errors[tile] = max(self.errors.get(tile, 0.0), found)
                right.append(tile)
            self.go_on()
            self.failed |= self.times.take(bench, stock, right, self.clock, count)
            del bench, stock  # the next one needs the memory

    def finals(self, own: Any) -> None:
        """The fastest and the package's own, again and more often. The first readings are forgotten.

        The next ones if none of these can be timed again.
        """
        first = self.alive()
        ranked = self.times.best(first)
        while left := [tile for tile in ranked if tile not in self.failed]:
            others = [tile for tile in left if tile != own][:FINALISTS]
            last = [own, *others] if own in left else others
            self.times = Times()
            for bench in self.subject.benches(self.device):
                self.go_on()
                last = [tile for tile in last if tile not in self.failed]
                self.failed |= self.times.take(bench, bench.stock(), last, self.clock, THOROUGH)
                del bench
            if self.alive():
                return


def _tried(bench: Bench, tile: Any, stock_error: float) -> float | Failed:
    """The error of a tile, or why it cannot be taken."""
    try:
        error = bench.error(bench.ours(tile))
    except Exception as problem:
        return _does_not_run(problem)
    if error <= max(FARTHER * stock_error, ROUNDING):  # written so that a NaN fails
        return error
    return Failed(f"relative error {error:.1e}, stock's is {stock_error:.1e}", True)


def _read(
    bench: Bench, stock: Call, tiles: Sequence[Any], clock: Clock, count: int
) -> list[list[float]]:
    calls = [stock, *map(bench.ours, tiles)]
    return clock.readings([(call, bench.calls) for call in calls], count)


def _timed_alone(bench: Bench, tile: Any, clock: Clock) -> Failed | None:
    """Why a tile cannot be timed."""
    try:
        clock.readings([(bench.ours(tile), bench.calls)], 1)
    except Exception as problem:
        return _does_not_run(problem)
    return None


def _does_not_run(problem: Exception) -> Failed:
    _raise_unless_a_tiles(problem)
    return Failed(f"{type(problem).__name__}: {problem}".splitlines()[0][:200], False)


def _raise_unless_a_tiles(problem: Exception) -> None:
    """What no single tile is to blame for, or after which none can be tried."""
    if is_fatal(problem) or wants_memory(problem):
        raise problem


def is_fatal(problem: BaseException | str) -> bool:
    """Whether nothing can be done on the GPU any more in this process."""
    return not wants_memory(problem) and any(words in str(problem) for words in FATAL)


def wants_memory(problem: BaseException | str) -> bool:
    """Whether the GPU's memory did not suffice: torch's allocator says so, or the driver."""
    return isinstance(problem, torch.OutOfMemoryError) or "out of memory" in str(problem)


def _without(subject: Subject, failed: dict[Any, Failed], figures: dict[str, float]) -> Shape:
    wrong = next((one for one in failed.values() if one.wrong), None)
    why = wrong or next(iter(failed.values()))
    kind = WRONG if wrong else NONE_RUNS
    return Shape(subject.kernel, subject.place, None, f"{kind}: {why.reason}"[:300], figures)
