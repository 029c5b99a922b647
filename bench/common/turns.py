"""Several benchmarks on one GPU: they start and answer side by side, and are timed one after the other.

What is timed waits for whoever starts or answers, however long that takes, and these never wait for one
that only waits: so timings come last, and a start is held up by no more than the timing that is running.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator

_of_thread = threading.local()


@contextlib.contextmanager
def turn(timed: bool = True) -> Iterator[None]:
    """Alone among all processes with the same ``BENCH_LOCK``, a file; without it, at once.

    What is not ``timed`` runs beside its like, never beside what is. A turn inside one that is timed, of the
    same thread, is a part of it: several timings can follow each other with nobody else in between.
    """
    path = os.environ.get("BENCH_LOCK")
    if not path or getattr(_of_thread, "alone", False):
        yield
        return
    with open(path, "a") as file:
        # Linux grants a shared lock while others hold it shared, whoever waits for it alone.
        fcntl.flock(file, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
        _of_thread.alone = timed
        try:
            yield
        finally:
            _of_thread.alone = False
