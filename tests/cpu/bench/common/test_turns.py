"""bench/common/turns.py between real processes."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.answers.pace import Pace
from bench.common.turns import turn

REPOSITORY = Path(__file__).resolve().parents[4]
BODY = """
import sys
from bench.common.turns import turn
print("asks", flush=True)
with turn(timed=sys.argv[1] == "timed"):
    print("has it", flush=True)
    if sys.argv[2] == "stays":
        sys.stdin.readline()
"""


class Other:
    """A process that wants a turn, and, if it ``stays``, keeps it until it is told to leave."""

    def __init__(self, kind: str, lock: Path, stays: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BODY, kind, "stays" if stays else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # or a line could lie read where select does not see it
            cwd=REPOSITORY,
            env={**os.environ, "BENCH_LOCK": str(lock), "PYTHONPATH": str(REPOSITORY)},
        )
        assert self.line() == "asks"

    def line(self) -> str:
        """What it says next; nothing, if it says nothing for long."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 20)[0]:
            return ""
        return self.process.stdout.readline().decode().strip()

    def waits(self) -> bool:
        """Sleeps in the kernel for the lock: Linux names what a process waits for as `->`."""
        inode = f":{os.stat(os.environ['BENCH_LOCK']).st_ino} "
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for line in Path("/proc/locks").read_text().splitlines():
                if "->" in line and inode in line and f" {self.process.pid} " in line:
                    return True
            time.sleep(0.02)
        return False

    def leave(self) -> None:
        self.process.communicate(b"\n", timeout=20)


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Other]]:
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setenv("BENCH_LOCK", str(lock))
    made: list[Other] = []

    def make(kind: str, stays: bool = True) -> Other:
        made.append(Other(kind, lock, stays))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.communicate()


def test_a_start_does_not_wait_for_a_timing_that_waits(other: Callable[..., Other]):
    """One engine takes minutes to start, another run waits to be timed, a third starts meanwhile."""
    slow = other("start")
    assert slow.line() == "has it"
    timing = other("timed")
    assert timing.waits()
    third = other("start")
    assert third.line() == "has it"
    slow.leave()
    assert timing.waits()  # for the third now
    third.leave()
    assert timing.line() == "has it"


def test_a_start_waits_for_the_timing_that_runs(other: Callable[..., Other]):
    timing = other("timed")
    assert timing.line() == "has it"
    start = other("start")
    assert start.waits()
    timing.leave()
    assert start.line() == "has it"


class Timed:
    """An engine whose timings take turns as `bench.engine.Engine` does."""

    def __init__(self, variant: str, seen: Callable[[], None]) -> None:
        self.variant, self.seen = variant, seen

    def __call__(self, do: str, **arguments: Any) -> dict[str, float]:
        with turn():
            self.seen()
        return {"seconds": 1.0, "steps": 1, "tokens": 1}


def test_rounds_follow_each_other(other: Callable[..., Other]):
    """A process that wants a turn after the first of them has it behind the last."""
    waiting: list[Other] = []
    count = 0

    def seen() -> None:
        nonlocal count
        count += 1
        if not waiting:
            waiting.append(other("start", stays=False))
        assert waiting[0].waits()

    class Results:
        def add(self, *row: Any) -> None:
            pass

    pace: Any = Pace([1, 2], [[1], [2]], new=1, rounds=3)
    pace({name: Timed(name, seen) for name in ("stock", "default")}, Results())
    assert count == 2 * 2 * 4
    assert waiting[0].line() == "has it"


def test_without_a_lock_nobody_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BENCH_LOCK", raising=False)
    with turn(), turn(timed=False), turn():
        pass
