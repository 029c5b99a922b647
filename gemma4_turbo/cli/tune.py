"""``tune``: measure stock's kernels and ours on this GPU, and write down what the patches shall do here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gemma4_turbo.cli import report
from gemma4_turbo.cli.modules import CannotRunError
from gemma4_turbo.cli.report import Console
from gemma4_turbo.engine import gpu_profile, switches
from gemma4_turbo.engine.gpu_profile import TUNE, Key, Place, Profile, Shape
from gemma4_turbo.engine.switches import Decision
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.models.geometry import GEOMETRIES, Geometry, of_config

if TYPE_CHECKING:
    from gemma4_turbo.cli.tuning.compiling import Compiler
    from gemma4_turbo.cli.tuning.device import Device
    from gemma4_turbo.cli.tuning.subject import Subject

INTERRUPTED, TERMINATED = 130, 143
FINISH_S = 3.0
"""Of the time that is given: to end the other processes, and this one."""
OVERDUE_S = 5.0
"""So long after its end what is running is broken off; before, at the next step."""
CONFIG_BYTES = 1 << 20
FOLDER = "folder"
FIGURES = ("tiles", "of", "us", "stock_us", "ratio", "noise", "error", "stock_error", "of_own")
"""What is shared of a shape's."""
"""What a geometry from a folder is called: the profile holds no name of the user's."""


class TimeIsUpError(BaseException):
    """The measurement took as long as it may. No error of a kernel's, which would count against it."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came."""


# -- what is asked for ------------------------------------------------------------------------------


def geometries(names: Sequence[str]) -> dict[str, Geometry]:
    """By name; of all models if none is named. `CannotRunError` for what is no Gemma 4."""
    found: dict[str, Geometry] = {}
    for name in names or GEOMETRIES:
        if name.lower() in GEOMETRIES:
            found[name.lower()] = GEOMETRIES[name.lower()]
            continue
        geometry = _of_folder(name)
        known = next((n for n, other in GEOMETRIES.items() if _measures_as(other, geometry)), "")
        found[known or f"{FOLDER} {len(found) + 1}"] = geometry
    return found


def _measures_as(one: Geometry, other: Geometry) -> bool:
    return one._replace(full_every=0) == other._replace(full_every=0)


def _of_folder(name: str) -> Geometry:
    names = ", ".join(GEOMETRIES)
    path = Path(name) / "config.json"
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("its config.json is no file")
        with path.open("rb") as file:
            content = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        told = error.strerror or str(error)
        raise CannotRunError(
            f"--model: {name!r} is none of {names}, and no model folder: {told}"
        ) from None
    try:
        config = json.loads(content) if len(content) <= CONFIG_BYTES else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CannotRunError(f"--model: the config.json of {name!r} is no JSON object")
    try:
        return of_config(config)
    except ValueError as error:
        raise CannotRunError(f"--model: {name!r}: {error}") from None


# -- the profile as it grows -------------------------------------------------------------------------


class Store:
    """The profile, written after each measurement; until the first one, what is there stays."""

    def __init__(self, where: str, key: Key, fresh: bool) -> None:
        """``fresh``: keep nothing of an earlier run. `CannotRunError` if it could not be written."""
        self.where, self.key = where, key
        self.shapes: dict[Place, Shape] = {}
        self.replaced = ""  # an earlier profile, if it is not gone on with
        with contextlib.suppress(FileNotFoundError):
            self._go_on(fresh)
        self._write(gpu_profile.try_to_save)

    def _go_on(self, fresh: bool) -> None:
        """With an earlier run's; `CannotRunError` if what is there is no profile: the variable may be wrong."""
        try:
            before = gpu_profile.load(self.where)
        except gpu_profile.UnfitError as error:
            self.replaced = f"one that is not used: {error}"
            try:
                ours = gpu_profile.is_one(self.where)
            except OSError:
                return  # to read; `try_to_save` says whether it can be written
            if not ours and os.path.getsize(self.where):
                raise CannotRunError(
                    f"{self.where} is left alone: it is no GPU profile; remove it, or set "
                    f"{switches.GPU_PROFILE} to another path"
                ) from None
            return
        if before.key != self.key:
            self.replaced = f"one for {before.key.gpu}, SGLang {before.key.sglang}"
        elif not fresh:
            self.shapes = {(shape.kernel, shape.shape): shape for shape in before.shapes}

    def add(self, *shapes: Shape) -> None:
        """More that was measured."""
        self.shapes |= {(shape.kernel, shape.shape): shape for shape in shapes}
        if self.profile().shapes:
            self._write(gpu_profile.save)

    def profile(self) -> Profile:
        """So far. That something was not compared is no measurement, and stands in none alone."""
        from gemma4_turbo.cli.tuning import plain

        shapes = tuple(self.shapes.values())
        if all(map(plain.unasked, shapes)):
            shapes = ()
        return Profile(self.key, plain.decisions(shapes), shapes)

    def _write(self, save: Callable[[str, Profile], None]) -> None:
        try:
            save(self.where, self.profile())
        except (OSError, gpu_profile.UnfitError) as error:
            told = getattr(error, "strerror", None) or error
            raise CannotRunError(f"{self.where} cannot be written: {told}") from None


def destination() -> str:
    """Where the profile goes; `CannotRunError` if nowhere."""
    where = gpu_profile.path()
    if where is None:
        raise CannotRunError(
            f"there is no place for the profile: set {switches.GPU_PROFILE} to an absolute path"
        )
    return where


@contextlib.contextmanager
def alone(where: str) -> Iterator[None]:
    """No other ``tune`` writes into the same folder meanwhile: `CannotRunError` if one does."""
    folder = os.path.dirname(where)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotRunError(f"{where} cannot be written: {error.strerror or error}") from None
    try:
        # The folder, as the file itself is replaced. Not every file system has locks.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotRunError(
                    f"another tune is running, with its profile in {folder}: times would be wrong"
                ) from None
        yield
    finally:
        os.close(descriptor)


# -- measuring --------------------------------------------------------------------------------------


class Session:
    """One run. What is measured already is left out."""

    def __init__(self, device: Device, store: Store, compiler: Compiler, seconds: float) -> None:
        self.device, self.store, self.compiler = device, store, compiler
        self.end = time.monotonic() + seconds
        self.console = Console(stderr=True)
        self.left_out: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def go_on(self) -> None:
        """`TimeIsUpError` if there is no time left."""
        if self.left() < 0:
            raise TimeIsUpError

    def one(self, title: str, places: Iterable[Place], run: Callable[[], Iterable[Shape]]) -> None:
        """Measure one thing, tell of it and keep it. What fails alone is left out."""
        import torch

        from gemma4_turbo.cli.tuning import plain, subject

        try:
            shapes = list(run())
        except Exception as error:
            if subject.wants_memory(error):
                self._leave_out(title, "the GPU's memory does not suffice")
                return
            told = plain.printable(f"{type(error).__name__}: {error}".splitlines()[0][:200])
            if not subject.is_fatal(error):
                self._leave_out(title, told)
                return
            # Nothing runs on the GPU any more in this process: the next run must not begin here again.
            reason = f"{subject.ERROR}: {told}"[:300]
            self.store.add(*(Shape(kernel, shape, None, reason, {}) for kernel, shape in places))
            raise CannotRunError(
                f"{title}: {reason}. It is left to stock's code; the same command goes on with the rest"
            ) from None
        else:
            self.store.add(*shapes)
            for shape in shapes:
                self._tell(title, shape)
        finally:
            if self.device.torch_name == "cuda":
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()

    def _leave_out(self, title: str, why: str) -> None:
        self.left_out.append(f"{title}: {why}")
        self.console.print(report.plain(f"{title}: not measured: {why}", "yellow"), soft_wrap=True)

    def _tell(self, title: str, shape: Shape) -> None:
        from gemma4_turbo.cli.tuning import plain

        figures = shape.figures
        if not figures and not shape.reason:
            return  # only compared, and right
        if shape.shape == (plain.VERIFIED,):
            title = f"{title}, {shape.kernel}"
        told = shape.reason or f"{figures.get('ratio', float('nan')):.2f} of stock's time"
        if "of_own" in figures and not shape.reason:
            told += f", {figures['of_own']:.2f} of the package's own tile's"
        if few(shape):
            told += f"; with {figures['tiles']:.0f} of {figures['of']:.0f}, for want of time"
        self.console.print(report.plain(f"{title}: {told}"), soft_wrap=True)


def few(shape: Shape) -> bool:
    """Whether the time did not suffice for all of a shape's tiles."""
    return shape.figures.get("tiles", 0) < shape.figures.get("of", 0)


def subjects(models: dict[str, Geometry]) -> list[Subject]:
    """All kernels with tiles, at each shape once: a model after the other."""
    from gemma4_turbo.cli.tuning import decode, experts, extend, linear

    found: dict[Place, Subject] = {}
    for name, g in models.items():
        every: list[Subject] = [
            *linear.layers(g),
            *decode.layers(name, g),
            *extend.layers(g),
            *experts.layers(g),
        ]
        for one in every:
            found.setdefault((one.kernel, one.place), one)
    return list(found.values())


def tables(models: dict[str, Geometry]) -> list[Any]:
    """The fused experts that there are."""
    from gemma4_turbo.cli.tuning import moe

    shape = moe.EXPERTS, moe.HIDDEN, moe.TOPK
    widths = {g.expert_width for g in models.values() if (g.experts, g.hidden, g.topk) == shape}
    return [moe.Tables(width) for width in sorted(widths)]


def measure(session: Session, models: dict[str, Geometry], prepare: Callable[[], None]) -> None:
    """All of it, a model after the other, and what is compiled before what is not.

    Args:
        session: what measures.
        models: which geometries.
        prepare: import SGLang; other processes compile meanwhile.
    """
    from gemma4_turbo.cli.tuning import device as devices
    from gemma4_turbo.cli.tuning import plain, subject, works
    from gemma4_turbo.cli.tuning.budget import Budget

    def wanted(one: Any) -> bool:
        known = session.store.shapes.get((one.kernel, one.place))
        return known is None or few(known)

    tiled = list(filter(wanted, subjects(models)))
    experts = list(filter(wanted, tables(models)))
    devices.require_memory(
        session.device, max((one.bytes for one in (*tiled, *experts)), default=0)
    )
    known = plain.compared(session.store.shapes.values())
    verify = works.Verify(session.compiler, session.device, known or ())
    if known is not None:
        verify.begin()
    left: list[works.Work] = [
        *(works.Tiled(one, session.device, session.compiler) for one in tiled),
        *(works.Tables(pair, session.device, session.compiler) for pair in experts),
    ]
    prepare()
    left += works.plains(models, session.device, session.compiler, session.store.shapes)
    budget = Budget()
    with _progress(session.console) as progress:
        task = progress.add_task("", total=len(left) + 1)

        def through(left: list[works.Work]) -> None:
            begun = time.monotonic()
            while left:
                session.go_on()
                if verify.found():
                    session.one("verify", [], lambda: verify.run(session.go_on))
                level = budget.level(session.left() - verify.seconds(), [one.guess for one in left])
                work = next((one for one in left if session.compiler.ready(one.key)), None)
                progress.update(task, description=left[0].title if work is None else work.title)
                if work is None:
                    left[0].trim(level)
                    session.compiler.pause()
                    continue
                left.remove(work)
                session.one(work.title, [work.key], lambda: work.run(level, session.go_on))  # noqa: B023
                budget.add(work.guess, level, time.monotonic() - begun)
                begun = time.monotonic()
                progress.advance(task)

        through(left)
        progress.update(task, description="verify")
        if verify.wanted:
            session.one("verify", [], lambda: verify.run(session.go_on))
        if verify.broke:
            raise CannotRunError(f"verify: {subject.ERROR}; the same command goes on with the rest")
        # What had fewer tiles when the time looked short, now that there is time left.
        for one in tiled:
            short = session.store.shapes.get((one.kernel, one.place))
            if short is None or not few(short):
                continue
            again = works.Tiled(one, session.device, session.compiler)
            if budget.level(session.left(), [again.guess]) == 0:
                progress.update(task, total=(progress.tasks[task].total or 0) + 1)
                through([again])


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


# -- the command ------------------------------------------------------------------------------------


def run(names: Sequence[str], minutes: float, fresh: bool, share: bool) -> int:
    """The command: 0 measured, 130 interrupted."""
    where = destination()
    if share:
        return _share(where)
    models = geometries(names)
    if (problem := report.torch_problem()) is not None:
        raise CannotRunError(problem)
    from gemma4_turbo.cli.tuning import budget, compiling
    from gemma4_turbo.cli.tuning import device as devices

    with signals(minutes * 60 - budget.since_start() + OVERDUE_S):
        compiler = compiling.Compiler()
        try:
            compiler.start(compiling.Kind.OURS, compiling.first_workers())
            found = devices.find()
            with alone(where):
                session = _session(found, where, models, fresh, compiler, minutes * 60)
                return report_of(session, lambda: measure(session, models, _import_sglang))
        except TerminatedError:
            return TERMINATED
        except TimeIsUpError:
            raise CannotRunError("the time was up before anything was measured") from None
        finally:
            with undisturbed():
                compiler.close()


def _session(
    found: Device,
    where: str,
    models: dict[str, Geometry],
    fresh: bool,
    compiler: Compiler,
    seconds: float,
) -> Session:
    from gemma4_turbo.catalogue import by_name
    from gemma4_turbo.cli.tuning import budget, compiling
    from gemma4_turbo.cli.tuning import device as devices
    from gemma4_turbo.kernels import measured, pdl

    store = Store(where, found.key, fresh)
    # Stock's code is stock's here, and tiles are the kernels' own: no earlier profile, none of the
    # package's, no patch.
    os.environ[switches.GPU_PROFILE] = switches.NO_GPU_PROFILE
    measured.forget()
    ENGINE.revert()
    pdl.wanted = by_name("pdl").default  # ours are launched as a server launches them
    largest = max((one.bytes for one in (*subjects(models), *tables(models))), default=0)
    for kind, count in compiling.later_workers(found.free - largest - devices.SPARE).items():
        compiler.start(kind, count)
    return Session(found, store, compiler, seconds - budget.since_start() - FINISH_S)


@contextlib.contextmanager
def signals(seconds: float) -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, and so does its time, whatever takes so long.

    Args:
        seconds: from now.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminated(*_: object) -> None:
        raise TerminatedError

    def overdue(*_: object) -> None:
        raise TimeIsUpError

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminated),
        signal.SIGALRM: signal.signal(signal.SIGALRM, overdue),
    }
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No signal breaks off the end."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_of(session: Session, work: Callable[[], None]) -> int:
    """Run it, and say how it ended: on stdout, as all else goes to stderr."""
    import torch

    store, end, status = session.store, "", 0
    told = Console(stderr=True)
    told.print(report.plain(f"Profile: {store.where}"), soft_wrap=True)
    if store.replaced:
        said = f"The first measurement replaces {store.replaced}"
        told.print(report.plain(said, "yellow"), soft_wrap=True)
    try:
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            work()
    except TimeIsUpError:
        end = "; the time is up: the same command goes on with what is left"
    except KeyboardInterrupt as error:
        end = "; interrupted: the same command goes on with what is left"
        status = TERMINATED if isinstance(error, TerminatedError) else INTERRUPTED
    finally:
        with undisturbed():
            session.compiler.close()
    with undisturbed():
        report.show(Console(), summary(store.profile(), store.where, end))
    return status


def _import_sglang() -> None:
    import logging

    from gemma4_turbo.cli import lines

    logging.getLogger("sglang").setLevel(logging.ERROR)  # which tables of its own it does without
    try:
        lines.stock()
        lines.rules()
    except Exception as error:
        raise CannotRunError(
            f"SGLang cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        ) from None


def summary(profile: Profile, where: str, end: str = "") -> report.Listing:
    """What a profile says, for people."""
    lines = report.Listing()
    by_kernel: dict[str, list[Shape]] = {}
    for shape in profile.shapes:
        by_kernel.setdefault(shape.kernel, []).append(shape)
    for kernel, shapes in by_kernel.items():
        timed = [shape for shape in shapes if "ratio" in shape.figures]
        taken = [shape for shape in timed if shape.tile is not None]
        if not timed:
            continue
        ratios = sorted(shape.figures["ratio"] for shape in taken)
        of = f", {ratios[0]:.2f} to {ratios[-1]:.2f} of stock's time" if ratios else ""
        short = sum(map(few, timed))
        of += f"; {short} with fewer tiles, for want of time" if short else ""
        lines.add(f"  {kernel:<18}{len(taken)} of {len(timed)} measured shapes are ours{of}", 6)
    for name, decision in profile.patches.items():
        word = "on" if decision.on else "off"
        lines.add(f"  {name:<18}{word}: {decision.reason}", 6, "" if decision.on else "yellow")
    count = len(profile.shapes)
    if count:
        lines.add(f"{count} measurements on {profile.key.gpu} in {where}{end}", 2)
    else:
        lines.add(f"Nothing was measured, and {where} is as it was{end}", 2)
    return lines


def _share(where: str) -> int:
    """Print the profile. It is put together from known fields: no path and no name of a user's is one."""
    try:
        profile = gpu_profile.load(where)
    except FileNotFoundError:
        raise CannotRunError(f"there is no profile at {where}: {TUNE}") from None
    except gpu_profile.UnfitError as error:
        raise CannotRunError(f"{where} is not used: {error}") from None
    print(gpu_profile.encoded(shared(profile)).decode(), end="")
    return 0


def _known_part(reason: str) -> str:
    """Which kind of reason it is: what an exception says may hold a path."""
    from gemma4_turbo.cli.tuning import plain, subject

    known = (*subject.REASONS, plain.NOT_COMPARED)
    return next((part for part in known if reason.startswith(part)), "")


def shared(profile: Profile) -> Profile:
    """Numbers and known names alone."""
    from gemma4_turbo.cli.tuning.kernel_cases import CASES
    from gemma4_turbo.cli.tuning.plain import VERIFIED, WITH_TILES

    kernels = {*WITH_TILES, *CASES, *(patch.name for patch in ENGINE.catalogue)}
    words = {VERIFIED, "dense", "masked", "split", "bfloat16", "float32"}
    words |= {case.case for make in CASES.values() for case in make(GEOMETRIES)}

    def word(value: int | str) -> int | str:
        return value if isinstance(value, int) or value in words else "other"

    shapes = tuple(
        shape._replace(
            shape=tuple(map(word, shape.shape)),
            reason=_known_part(shape.reason),
            figures={name: value for name, value in shape.figures.items() if name in FIGURES},
        )
        for shape in profile.shapes
        if shape.kernel in kernels
    )
    patches = {
        name: Decision(one.on, "") for name, one in profile.patches.items() if name in kernels
    }
    return Profile(profile.key, patches, shapes)
