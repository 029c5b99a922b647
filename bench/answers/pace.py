"""How decode steps are timed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bench.common.engines import Engine, in_turn
from bench.common.results import Results
from bench.common.turns import turn

UNITS = {"decode step": "ms", "verify step": "ms", "tokens a second": "1/s"}
"""Of what is timed."""


class Pace(NamedTuple):
    """How decode steps are timed."""

    sizes: list[int]  # of batches; none: not at all
    prompts: list[list[int]]
    new: int = 96  # tokens timed
    rounds: int = 3

    def read(self, engine: Engine, size: int) -> dict[str, float]:
        """One reading: milliseconds of a step."""
        return {"decode step": engine("pace", ids=self.prompts[:size], new=self.new)["ms"]}

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
