"""What ``tune`` has to do, as pieces that wait for other processes, take a time and give shapes of a profile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from gemma4_turbo.cli.tuning import budget, plain, processes, subject
from gemma4_turbo.cli.tuning.budget import LEVELS, Guess
from gemma4_turbo.cli.tuning.compiling import Compiler, Job, Kind
from gemma4_turbo.cli.tuning.device import Device
from gemma4_turbo.cli.tuning.kernel_cases import Case
from gemma4_turbo.engine.gpu_profile import Place, Shape
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import moe_tables, pdl
from gemma4_turbo.models.geometry import GEOMETRIES, Geometry

GoOn = Callable[[], None]


class Work(Protocol):
    """One piece."""

    key: Place
    title: str
    guess: Guess

    def trim(self, level: int) -> None:
        """Wait for no more than what is needed at a level of `budget.LEVELS`."""

    def run(self, level: int, go_on: GoOn) -> Iterable[Shape]:
        """Measure it."""


class Tiled:
    """A kernel with tiles at one shape."""

    def __init__(self, one: subject.Subject, device: Device, compiler: Compiler) -> None:
        self.one, self.device, self.compiler = one, device, compiler
        self.key, self.title = (one.kernel, one.place), one.title
        self.jobs = [self._job(tile) for tile in subject.candidates(one, device.gpu)]
        new = [compiler.order(self.key, [job]) for job in self.jobs]
        self.stock: list[Job] = []
        if one.like_stock is not None:
            self.stock = [
                Job(
                    Kind.STOCK,
                    type(one.like_stock).compile_stock,
                    (one.like_stock, device.torch_name),
                )
            ]
            compiler.order(self.key, self.stock)
        self.guess = budget.guess(one.kernel, new, compiler.counts[Kind.OURS])

    def _job(self, tile: Any) -> Job:
        like, same = self.one.alike(tile)
        arguments = type(like).compile, like, same, tuple(self.device.gpu), pdl.wanted
        return Job(Kind.OURS, processes.ours, arguments)

    def trim(self, level: int) -> None:
        """The first tiles, and stock's kernel."""
        self.compiler.keep(self.key, [*self.jobs[: LEVELS[level]], *self.stock])

    def run(self, level: int, go_on: GoOn) -> list[Shape]:
        """See `subject.measure`."""
        device = self.device
        return [
            subject.measure(
                self.one,
                device.torch_name,
                device.gpu,
                device.clock,
                device.known,
                go_on,
                LEVELS[level],
            )
        ]


class Tables:
    """The fused experts of a model."""

    def __init__(self, pair: Any, device: Device, compiler: Compiler) -> None:
        from gemma4_turbo.cli.tuning import moe

        self.pair, self.device = pair, device
        self.key, self.title = (pair.kernel, pair.place), pair.title
        self.guess = Guess(budget.TABLES_S)
        memory = device.gpu.shared_memory
        compiler.order(
            self.key, [Job(Kind.STOCK, moe.compile_one, (job,)) for job in pair.jobs(memory)]
        )

    def trim(self, level: int) -> None:
        """They are few."""

    def run(self, level: int, go_on: GoOn) -> list[Shape]:
        """See `gemma4_turbo.cli.tuning.moe.few`."""
        from gemma4_turbo.cli.tuning import moe

        pair, name = self.pair, self.device.key.gpu.replace(" ", "_")
        shipped = None
        with contextlib.suppress(ValueError):
            shipped = moe_tables.load(moe_tables.Key(moe.EXPERTS, pair.width, name))
        counts = moe.SHORT_TOKENS if level else moe.HANDFUL_TOKENS
        found, figures = moe.few(pair, self.device.gpu.shared_memory, shipped, go_on, counts)
        return [Shape(pair.kernel, pair.place, moe_tables.numbers(found), "", figures)]


class Plain:
    """A kernel without tiles at one shape."""

    def __init__(self, case: Case, names: tuple[str, ...], device: Device, compiler: Compiler):
        self.case, self.device = case, device
        self.key = plain.place(case)
        self.title = f"{case.kernel}, {case.case}, {case.tokens} rows"
        arguments = (case.kernel, case.case, case.tokens), names, device.torch_name, pdl.wanted
        compiler.order(self.key, [Job(Kind.CALLS, plain.warm, arguments)])
        warm = compiler.counts[Kind.CALLS] > 0
        self.guess = budget.fixed(budget.PLAIN_S if warm else budget.PLAIN_COLD_S)

    def trim(self, level: int) -> None:
        """There is nothing to choose."""

    def run(self, level: int, go_on: GoOn) -> list[Shape]:
        """See `plain.measure`."""
        return [plain.measure(self.case, self.device.torch_name, self.device.clock, go_on)]


def plains(
    models: dict[str, Geometry], device: Device, compiler: Compiler, known: Container[Place]
) -> list[Plain]:
    """Of these models. SGLang is there."""
    names = tuple(name for name in models if name in GEOMETRIES)
    cases = [case for case in plain.cases(models) if plain.place(case) not in known]
    return [Plain(case, names, device, compiler) for case in cases]


class Verify:
    """What ``verify`` compares, in another process if there is one: a server's patches go in there."""

    def __init__(self, compiler: Compiler, device: Device, known: Sequence[str]) -> None:
        """``known``: patches that are left out."""
        self.compiler = compiler
        self.arguments = device.torch_name, tuple(known)
        self.wanted = False
        self.broke = False  # the GPU, for this process
        self.future: Future[Any] | None = None

    def begin(self) -> None:
        """Have it done."""
        self.wanted = True
        self.future = self.compiler.ask(Job(Kind.CALLS, checks, self.arguments))

    def seconds(self) -> float:
        """That this process needs for it."""
        return budget.VERIFY_S if self.wanted and self.future is None else 0.0

    def found(self) -> bool:
        """Whether the other process is done with it. One that was killed counts as none."""
        if not self.wanted or self.future is None or not self.future.done():
            return False
        if self.future.exception() is not None or not isinstance(self.future.result(), list):
            self.future = None
        return self.future is not None

    def run(self, go_on: GoOn) -> list[Shape]:
        """What was found, when it was."""
        go_on()
        while self.future is not None and not self.found():
            go_on()
            self.compiler.pause()
        self.wanted = False
        if self.future is not None:
            return plain.verified(self.future.result())
        found = checks(*self.arguments)
        self.broke = any(not one.passed and subject.is_fatal(one.allowed) for one in found)
        return plain.verified(found)


def checks(device: str, known: Sequence[str]) -> list[Any]:
    """What ``verify`` compares but these patches, with the patches in for so long."""
    from gemma4_turbo.cli import verify
    from gemma4_turbo.cli.modules import import_targets

    early = pdl.wanted
    ENGINE.apply()
    try:
        import_targets()
        return verify.check_all(device, but=known)
    finally:
        ENGINE.revert()
        pdl.wanted = early
