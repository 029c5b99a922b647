"""Triton's cache is filled by other processes, while this one imports SGLang and measures.

They compile and launch nothing: a kernel of theirs would run into a measurement. What does not compile
there is found again where it is tried.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

Job = tuple[Callable[..., object], tuple[Any, ...]]

HOST_BYTES = 3 << 30  # of a process with torch, Triton and part of SGLang
GPU_BYTES = 1 << 30  # of its CUDA context, and of tensors to compile with
STEP_S = 0.2


def workers(free_gpu: int) -> int:
    """How many such processes this machine bears, besides this one.

    Args:
        free_gpu: bytes of GPU memory that nobody will need.
    """
    cores = len(os.sched_getaffinity(0)) - 1
    return max(0, min(cores, 14, _free_host() // HOST_BYTES, free_gpu // GPU_BYTES))


def _free_host() -> int:
    """Bytes of memory that can be had without swapping."""
    with open("/proc/meminfo") as lines:
        found = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"]) * 1024


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    os.environ["GEMMA4_TURBO"] = "0"
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only


def _run(job: Job) -> None:
    function, arguments = job
    with contextlib.suppress(Exception):  # out of shared memory, above all
        function(*arguments)


class Compiler:
    """The processes; none of them: everything is compiled where it is first launched."""

    def __init__(self, count: int) -> None:
        self._pool = (
            ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_prepare)
            if count
            else None
        )
        self._futures: dict[Hashable, list[Future[None]]] = {}

    def order(self, key: Hashable, jobs: Sequence[Job]) -> None:
        """Have these done, after all that was ordered before."""
        if self._pool is not None:
            with contextlib.suppress(BrokenProcessPool, RuntimeError):
                self._futures[key] = [self._pool.submit(_run, job) for job in jobs]

    def wait(self, key: Hashable, go_on: Callable[[], None]) -> None:
        """Until a key's jobs are done. What a killed process has not done is done where it is needed."""
        left = set(self._futures.pop(key, ()))
        while left:
            go_on()
            _, left = wait(left, timeout=STEP_S)

    def close(self) -> None:
        """Drop what has not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
