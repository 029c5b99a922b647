"""How many tiles of a shape are tried, so that every shape has its turn before the time is up."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

LEVELS = (1 << 30, 3, 1)
"""Tiles of a shape, the package's own first: all, a few, that one."""
SETUP_S, TILE_S = 0.3, 0.05
"""To draw a shape's tensors and to compare and time a tile, about."""
COMPILE_S = {"skinny_gemm": 1.0, "decode_attention": 2.5, "extend_attention": 6.0}
"""Of one core for one tile."""
TRUST_S = 10.0  # what is measured counts as much as the guesses once it has taken so long
LONGEST_START_S = 120.0
VERIFY_S = 60.0
PLAIN_S, PLAIN_COLD_S = 0.3, 1.5
"""To compare two calls without tiles, and to compile them before."""
TABLES_S = (12.0, 4.0, 4.0)


def since_start() -> float:
    """Seconds since this process began: most of its imports come before its first line.

    0 in one that began long ago, and did something else before.
    """
    with open("/proc/self/stat") as file:
        began = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    return seconds if 0 <= seconds <= LONGEST_START_S else 0.0


class Guess(NamedTuple):
    """Seconds that a shape takes at each level."""

    seconds: tuple[float, ...]


def guess(kernel: str, new: Sequence[int], workers: int) -> Guess:
    """Of a kernel with tiles.

    Args:
        kernel: its name.
        new: for each tile what is to be compiled for it, and for no tile before.
        workers: processes that do so.
    """
    core = COMPILE_S.get(kernel, 1.0) / max(1, workers)
    return Guess(
        tuple(SETUP_S + TILE_S * len(new[:most]) + core * sum(new[:most]) for most in LEVELS)
    )


def fixed(seconds: float) -> Guess:
    """Of what has no tiles."""
    return Guess((seconds,) * len(LEVELS))


class Budget:
    """What was guessed, and what it took."""

    def __init__(self) -> None:
        self.guessed = self.took = TRUST_S

    def add(self, one: Guess, level: int, seconds: float) -> None:
        """A shape is done."""
        self.guessed += one.seconds[level]
        self.took += seconds

    def level(self, seconds: float, left: Sequence[Guess]) -> int:
        """The first at which all that is left fits into the time."""
        pace = self.took / self.guessed
        for level in range(len(LEVELS)):
            if pace * sum(one.seconds[level] for one in left) <= seconds:
                return level
        return len(LEVELS) - 1
