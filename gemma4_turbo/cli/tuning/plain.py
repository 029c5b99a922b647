"""Patches whose kernels have no tiles: as right as ``verify`` finds them, and how long they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from statistics import median

from gemma4_turbo.cli import lines
from gemma4_turbo.cli.tuning.kernel_cases import CASES, Case, Models
from gemma4_turbo.cli.tuning.subject import ERROR, Clock, against, is_fatal, wants_memory
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.gpu_profile import Shape
from gemma4_turbo.engine.switches import Decision
from gemma4_turbo.kernels import pdl
from gemma4_turbo.models.geometry import GEOMETRIES

VERIFIED = "compared with stock"
NOT_COMPARED = "not compared"
"""What the reason of a patch's row begins with if the next run is to compare it."""
ROWS = (1, 32, 1024, 4096)
CALLS = 40  # of a graph
READINGS = 8
SLOWER = 1.1
"""A patch is off from so much of stock's time on. A tenth is allowed because it saves launches: without CUDA
graphs a step is bound by CPU launch overhead, and the times here are of graphs."""
WITH_TILES = ("skinny_gemm", "decode_attention", "extend_attention", "experts_few", "moe_configs")
"""They are compared at each of their shapes."""


def verified(checks: Iterable[Check]) -> list[Shape]:
    """What ``verify`` found, a row for each patch.

    Where the memory did not suffice nothing was compared, and after an error of the GPU neither: see
    `NOT_COMPARED`.
    """
    failed: dict[str, str] = {}
    left: dict[str, str] = {}
    culprit = ""
    for check in checks:
        if check.patch in WITH_TILES and culprit:
            continue
        if culprit:
            if check.patch != culprit:
                left[check.patch] = f"{ERROR} at {culprit}"
            continue
        if not check.passed and wants_memory(check.allowed):
            left[check.patch] = "the GPU's memory does not suffice"
            continue
        told = f"{check.what} against {check.against}: {check.allowed}"
        failed[check.patch] = failed.get(check.patch) or ("" if check.passed else told)
        if not check.passed and is_fatal(check.allowed):
            culprit = check.patch
    found = {name: (() if not why else None, why) for name, why in failed.items()}
    for name, why in left.items():
        if not failed.get(name):  # one that is wrong is so whatever else was left out
            found[name] = None, f"{NOT_COMPARED}: {why}"
    return [
        Shape(name, (VERIFIED,), tile, printable(why), {})
        for name, (tile, why) in found.items()
        if name not in WITH_TILES
    ]


def unasked(shape: Shape) -> bool:
    """Whether a row is of a patch that is still to be compared."""
    return shape.shape == (VERIFIED,) and shape.reason.startswith(NOT_COMPARED)


def compared(shapes: Iterable[Shape]) -> tuple[str, ...] | None:
    """Patches that need no comparison any more; None: of any."""
    rows = [shape for shape in shapes if shape.shape == (VERIFIED,)]
    if rows and not any(map(unasked, rows)):
        return None
    return (*WITH_TILES, *(row.kernel for row in rows if not unasked(row)))


def printable(text: str) -> str:
    """As a profile may hold it."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300]


def cases(models: Models) -> Iterator[Case]:
    """What is timed, of the patches that this SGLang takes."""
    for patch, make in CASES.items():
        if lines.patch_unfit(patch) is None:
            yield from (case for case in make(models) if case.tokens in ROWS)


def place(case: Case) -> tuple[str, tuple[str | int, ...]]:
    """As in a profile."""
    return case.kernel, (case.case, case.tokens)


def measure(case: Case, device: str, clock: Clock, go_on: Callable[[], None]) -> Shape:
    """Stock's time and ours."""
    go_on()
    calls = case.build(device)
    every = [(lambda _: calls.stock(), CALLS), (lambda _: calls.ours(), CALLS)]
    stock_us, us = clock.readings(every, READINGS)
    found = against([us], [stock_us])
    figures = {"us": median(us), "stock_us": median(stock_us)}
    figures |= {"ratio": found.ratio, "noise": found.noise}
    return Shape(*place(case), (), "", figures)


def warm(case: tuple[str, str, int], names: tuple[str, ...], device: str, early: bool) -> None:
    """Have a case's kernels compiled.

    Args:
        case: its kernel, case and rows.
        names: of the models' geometries.
        device: where.
        early: `gemma4_turbo.kernels.pdl.wanted`.
    """
    pdl.wanted = early
    models = {name: GEOMETRIES[name] for name in names}
    kernel, *rest = case
    for one in CASES[kernel](models):
        if [one.case, one.tokens] == rest:
            calls = one.build(device)
            calls.stock()
            calls.ours()


def decisions(shapes: Iterable[Shape]) -> dict[str, Decision]:
    """Which patches are to be otherwise than by default, from all that was measured."""
    found: dict[str, Decision] = {}
    ratios: dict[str, list[float]] = {}
    for shape in shapes:
        if shape.kernel in WITH_TILES or unasked(shape):
            continue
        if shape.shape == (VERIFIED,) and shape.tile is None:
            reason = f"its result differs from stock's on this GPU: {shape.reason}"
            found[shape.kernel] = Decision(False, reason[:300])
        elif shape.tile is None and shape.reason.startswith(ERROR):
            found.setdefault(shape.kernel, Decision(False, shape.reason))
        elif shape.figures.get("ratio", 0.0) > 0.0:  # the file may have been edited
            ratios.setdefault(shape.kernel, []).append(shape.figures["ratio"])
    for patch, every in ratios.items():
        mean = math.exp(sum(map(math.log, every)) / len(every))
        if mean > SLOWER and patch not in found:
            found[patch] = Decision(False, f"measured here: {mean:.2f} of stock's time")
    return found
