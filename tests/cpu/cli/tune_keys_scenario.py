"""For `test_tune_compiling`: what Triton would compile for other processes' jobs, and for what is timed.

Prints a line for each kernel that is timed and was compiled by no job. Nothing is compiled.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.runtime.jit import JITFunction

from gemma4_turbo.cli import tune
from gemma4_turbo.cli.tuning import decode, processes, subject
from gemma4_turbo.kernels.gpu import Gpu
from gemma4_turbo.models.geometry import GEOMETRIES

GPU = Gpu((9, 0), 132, 227 * 1024)
asked: set[tuple[str, str]] = set()


def note(self: Any, key: str, *_: Any, **__: Any) -> None:
    """In the compiler's place."""
    asked.add((self.fn.__name__, key))


def taken() -> set[tuple[str, str]]:
    """What was asked for since."""
    found = set(asked)
    asked.clear()
    return found


def launch(one: Any, tile: Any) -> None:
    """What `subject.measure` calls."""
    for bench in one.benches("cpu"):
        bench.ours(tile)(0)
        if one.kernel == "extend_attention":
            bench.ours(tile)(-1)


def prepare() -> None:
    """Nothing is drawn, compiled or launched."""
    processes.draw_nothing()
    decode.L2_BYTES = 1
    JITFunction._do_compile = note
    run = JITFunction.run
    JITFunction.run = lambda self, *a, grid, warmup, **o: run(self, *a, grid=grid, warmup=True, **o)


def main(early: bool, models: list[str]) -> None:
    """See the module."""
    processes.stand_in(tuple(GPU), early)
    jobs, compiled, timed = set(), set(), set()
    for one in tune.subjects({name: GEOMETRIES[name] for name in models}):
        for tile in subject.candidates(one, GPU):
            like, same = one.alike(tile)
            if (like, same) not in jobs:
                jobs.add((like, same))
                processes.ours(type(like).compile, like, same, tuple(GPU), early)
                compiled |= taken()
            if one.kernel != "experts_few":
                launch(one, tile)
            else:
                launch(one._replace(experts=one.choices + 1), tile)
            missing = taken() - compiled
            timed |= missing
            for name, key in missing:
                print(f"missing: {one.title} {tile}: {name} {key[:60]}")
    print(f"{len(jobs)} jobs, {len(compiled)} kernels")


if __name__ == "__main__":
    prepare()
    for early in (False, True):
        main(early, sys.argv[1:])
