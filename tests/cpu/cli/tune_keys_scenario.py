"""For `test_tune_compiling`: what Triton would compile for other processes' jobs, and for what is timed.

Prints a line for each kernel that is timed and was compiled by no job. Nothing is compiled.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.runtime.jit import JITFunction

from gemma4_turbo.cli import tune
from gemma4_turbo.cli.tuning import decode, extend, processes, subject
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


def launch(bench: Any, tile: Any) -> None:
    """What `subject.measure` calls."""
    bench.ours(tile)(0)
    if isinstance(bench, extend.PrefillBench):
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
    jobs: dict[Any, set[tuple[str, str]]] = {}
    for one in tune.subjects({name: GEOMETRIES[name] for name in models}):
        tiles = subject.candidates(one, GPU)
        for tile in tiles:
            like, same = one.alike(tile)
            if (like, same) not in jobs:
                processes.ours(type(like).compile, like, same, tuple(GPU), early)
                jobs[like, same] = taken()
        timed = one._replace(experts=one.choices + 1) if one.kernel == "experts_few" else one
        processes.stand_in(tuple(GPU), early)  # whatever a job has left behind
        for bench in timed.benches("cpu"):
            for tile in tiles:
                launch(bench, tile)
                for name, key in taken() - jobs[one.alike(tile)]:
                    print(f"missing: {one.title} {tile}: {name} {key[:60]}")
    print(f"{len(jobs)} jobs, {len(set().union(*jobs.values()))} kernels")


if __name__ == "__main__":
    prepare()
    # Early or not is one flag for all kernels: without it one model is enough.
    main(False, sys.argv[1:2])
    main(True, sys.argv[1:])
