"""Triton's cache is filled by other processes, while this one imports SGLang and measures.

Three kinds of processes. Those that compile our kernels need neither the GPU nor SGLang, see
`gemma4_turbo.cli.tuning.processes`; those for stock's kernels need both, and launch nothing; those that run
calls launch them: what ``verify`` compares, and the first call of kernels that ask stock's results how they
are to compute. Jobs that are equal are done once. What is not done here is done where it is needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from enum import StrEnum
from multiprocessing import active_children, get_context
from typing import Any, NamedTuple

from gemma4_turbo.cli.tuning import processes


class Kind(StrEnum):
    """Of processes."""

    OURS = "ours"
    STOCK = "stock"
    CALLS = "calls"


class Job(NamedTuple):
    """A call in a process."""

    kind: Kind
    function: Callable[..., object]
    arguments: tuple[Any, ...]


HOST_BYTES = {Kind.OURS: 3 << 29, Kind.STOCK: 4 << 30, Kind.CALLS: 6 << 30}
"""Of a process: with torch and Triton, and with SGLang."""
GPU_BYTES = {Kind.OURS: 0, Kind.STOCK: 2 << 30, Kind.CALLS: 4 << 30}
"""Of its CUDA context and tensors."""
MOST = {Kind.OURS: 14, Kind.STOCK: 4, Kind.CALLS: 3}
STEP_S = 0.2
END_S = 5.0


def first_workers() -> int:
    """Processes for our kernels that this machine bears, beside this one and those that need SGLang."""
    cores = len(os.sched_getaffinity(0)) - 1
    others = sum(_others(cores).values())
    return max(0, min(cores - others, MOST[Kind.OURS], _free_host() // HOST_BYTES[Kind.OURS]))


def later_workers(free_gpu: int) -> dict[Kind, int]:
    """Processes of the other kinds; none of a kind whose memory is not free.

    Args:
        free_gpu: bytes of GPU memory that nobody will need.
    """
    host = _free_host()
    found = {}
    for kind, count in _others(len(os.sched_getaffinity(0)) - 1).items():
        count = max(0, min(count, host // HOST_BYTES[kind], free_gpu // GPU_BYTES[kind]))
        host -= count * HOST_BYTES[kind]
        free_gpu -= count * GPU_BYTES[kind]
        found[kind] = count
    return found


def _others(cores: int) -> dict[Kind, int]:
    """A third of the cores for what needs SGLang, which a machine of few cores does itself."""
    return {
        Kind.STOCK: min(MOST[Kind.STOCK], cores // 4),
        Kind.CALLS: min(MOST[Kind.CALLS], cores // 5),
    }


def _free_host() -> int:
    """Bytes of memory that can be had without swapping."""
    with open("/proc/meminfo") as lines:
        found = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"]) * 1024


class Compiler:
    """The processes; none of them: everything is compiled where it is first launched."""

    def __init__(self) -> None:
        self._not_ours = set(active_children())
        self._pools: dict[Kind, ProcessPoolExecutor] = {}
        self._futures: dict[Job, Future[Any]] = {}
        self._wanted: dict[Hashable, list[Job]] = {}
        self.counts = dict.fromkeys(Kind, 0)

    def start(self, kind: Kind, count: int) -> None:
        """So many processes of a kind, which begin to import at once."""
        if count <= 0:
            return
        pool = ProcessPoolExecutor(
            count,
            mp_context=get_context("spawn"),
            initializer=processes.begin,
            initargs=(str(kind),),
        )
        self._pools[kind], self.counts[kind] = pool, count
        for _ in range(count):
            pool.submit(processes.nothing)

    def order(self, key: Hashable, jobs: Sequence[Job]) -> int:
        """Have these done, after all that was ordered before. How many of them are new."""
        new = 0
        for job in jobs:
            new += job not in self._futures
            if self.ask(job) is not None:
                self._wanted.setdefault(key, []).append(job)
        return new

    def ask(self, job: Job) -> Future[Any] | None:
        """A job's result; None if there is no process for it."""
        pool = self._pools.get(job.kind)
        if job not in self._futures and pool is not None:
            with contextlib.suppress(BrokenProcessPool, RuntimeError):
                self._futures[job] = pool.submit(processes.run, job.function, job.arguments)
        return self._futures.get(job)

    def ready(self, key: Hashable) -> bool:
        """Whether a key's jobs are done. What a killed process has not done is done where it is needed."""
        left = [job for job in self._wanted.get(key, ()) if not self._futures[job].done()]
        self._wanted[key] = left
        return not left

    def keep(self, key: Hashable, jobs: Iterable[Job]) -> None:
        """The other jobs of a key are not needed, unless by another key."""
        kept = set(jobs)
        dropped = [job for job in self._wanted.get(key, ()) if job not in kept]
        self._wanted[key] = [job for job in self._wanted.get(key, ()) if job in kept]
        others = {job for every in self._wanted.values() for job in every}
        for job in dropped:
            if job not in others and self._futures[job].cancel():
                del self._futures[job]

    def pause(self) -> None:
        """Until any job is done, a moment at most."""
        left = [future for future in self._futures.values() if not future.done()]
        wait(left, timeout=STEP_S, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """End the processes now: a kernel takes many seconds to compile."""
        mine = [child for child in active_children() if child not in self._not_ours]
        for child in mine:
            child.kill()
        for child in mine:
            child.join(END_S)
        for pool in self._pools.values():
            with contextlib.suppress(RuntimeError):  # Ctrl-C came before its thread had begun
                pool.shutdown(wait=True, cancel_futures=True)
        self._pools = {}
