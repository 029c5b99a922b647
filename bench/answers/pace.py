"""How decoding with and without an MTP assistant is timed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bench.common.engines import Engine, in_turn
from bench.common.results import Results
from bench.common.turns import turn
from bench.speculation.comparing import PLAIN

UNITS = {"decode step": "ms", "verify step": "ms", "tokens a second": "1/s"}
"""Of what is timed."""


class Pace(NamedTuple):
    """How decoding is timed."""

    sizes: list[int]  # requests at once; none: not at all
    prompts: list[list[int]]
    new: int  # tokens timed
    rounds: int

    def read(self, engine: Engine, size: int) -> dict[str, float]:
        """Tokens a second of all requests, and milliseconds of a step; nothing of a reading without steps."""
        said = engine("step", ids=self.prompts[:size], new=self.new)
        if said["steps"] <= 0 or said["seconds"] <= 0:
            return {}
        step = "decode step" if engine.variant == PLAIN else "verify step"
        return {
            "tokens a second": said["tokens"] / said["seconds"],
            step: said["seconds"] / said["steps"] * 1e3,
        }

    def __call__(self, live: dict[str, Engine], results: Results) -> None:
        """Median and range of the rounds of each engine and size; the first, which warms up, is left out."""
        found: dict[tuple[str, str, int], list[float]] = {}
        if not self.sizes:
            return
        with turn():  # all rounds in one go
            for round_ in range(-1, self.rounds):
                for engine in in_turn(live, round_):
                    for size in self.sizes:
                        for name, value in self.read(engine, size).items():
                            if round_ >= 0:
                                found.setdefault((engine.variant, name, size), []).append(value)
        for (variant, name, size), values in found.items():
            unit, spread = UNITS[name], max(values) - min(values)
            results.add(variant, f"{name}, batch {size}", size, 0, float(np.median(values)), unit)
            results.add(variant, f"{name}, batch {size}, range", size, 0, spread, unit)
