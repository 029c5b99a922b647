"""Times of calls inside replayed CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch

L2_BYTES = 160 * 2**20
"""To be read between two uses of the same memory: three times the L2 cache of an H100 or H200."""

K = TypeVar("K", bound=Hashable)
Call = Callable[[int], object]
"""A call; it gets its number in the graph, so that it can use other memory each time."""


class Timer:
    """A CUDA graph of so many calls."""

    def __init__(self, call: Call, calls: int, pool: Any = None) -> None:
        """``pool``: memory that it shares with other graphs, of which it needs no results."""
        self.calls = calls
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which may still be writing the inputs
        with torch.cuda.stream(stream):
            call(0)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                for i in range(calls):
                    call(i)
        self.times: list[float] = []

    def replay(self) -> None:
        """One reading, microseconds a call."""
        event: Any = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.times.append(start.elapsed_time(end) * 1e3 / self.calls)

    def us(self) -> float:
        """Median without the first reading."""
        return median(self.times[1:])


def readings(timers: list[Timer], replays: int) -> list[float]:
    """Microseconds of each, read in turn so that a change of clock meets all."""
    for _ in range(replays):
        for timer in timers:
            timer.replay()
    return [timer.us() for timer in timers]


def timed(calls: Mapping[K, Call], count: int, replays: int) -> dict[K, float]:
    """Microseconds of each in a graph of so many; one that cannot run is told on stderr, and left out."""
    timers = {}
    for name, call in calls.items():
        try:
            timers[name] = Timer(call, count)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return dict(zip(timers, readings(list(timers.values()), replays), strict=True))


class GraphClock:
    """`gemma4_turbo.cli.tuning.subject.Clock` on a GPU."""

    def readings(self, calls: Sequence[tuple[Call, int]], count: int) -> list[list[float]]:
        """See there. The first reading of each warms up and is left out."""
        pool = torch.cuda.graph_pool_handle()
        timers = [Timer(call, number, pool) for call, number in calls]
        readings(timers, count + 1)
        return [timer.times[1:] for timer in timers]
