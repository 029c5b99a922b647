"""Several benchmarks on one GPU: they start side by side, and measure in turn."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def turn(timed: bool = True) -> Iterator[None]:
    """Alone among all processes with the same ``BENCH_LOCK``, a file; without it, at once.

    What is not ``timed`` runs beside its like, never beside what is.
    """
    path = os.environ.get("BENCH_LOCK")
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
        yield
