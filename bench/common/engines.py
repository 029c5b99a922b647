"""Engines in processes of their own: started, asked, ended, and what they died of."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from bench.common.options import patches_of
from bench.common.ports import own_port
from bench.common.turns import turn
from bench.common.variants import BITS, EXACT, PATCHED
from gemma4_turbo.catalogue import by_name

BENCH = Path(__file__).resolve().parents[1]

console = Console(width=150)
EngineT = TypeVar("EngineT", bound="Engine")


class Engine:
    """A worker process and its pipe."""

    patience_s = 40.0  # until a process that was told to end is killed
    script = "workers/engine.py"
    untimed: frozenset[str] = frozenset()  # commands beside which others' may run

    def __init__(
        self,
        variant: str,
        patches: list[str],
        arguments: dict[str, Any],
        log: Path,
        also: Sequence[str] = (),
    ) -> None:
        self.variant = variant
        self.also = also  # patches besides these
        self.log = log
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GEMMA4_TURBO")
        }
        environment["PYTHONPATH"] = self.path()
        environment["PYTHONSAFEPATH"] = "1"  # bench/kernels.py is not the package kernels
        arguments = {"nccl_port": own_port(), **arguments}
        self.process = subprocess.Popen(
            [sys.executable, str(BENCH / self.script), str(log), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | self.switches(patches),
            start_new_session=True,
        )
        self.ready_s: float | None = None

    def path(self) -> str:
        """Where the process finds the package."""
        path = [str(BENCH / "site"), str(BENCH.parent), os.environ.get("PYTHONPATH", "")]
        return os.pathsep.join(part for part in path if part)

    def switches(self, patches: list[str]) -> dict[str, str]:
        """What the process is told of the patches by its environment."""
        if self.variant in (PATCHED, BITS):
            names = patches_of("exact") if self.variant == BITS else patches
            also = () if self.variant == BITS else self.also
            only = ",".join(dict.fromkeys([*names, *also])) if names else "*"
            return {
                "BENCH_PATCHED": "1",
                "GEMMA4_TURBO_STRICT": "1",
                "GEMMA4_TURBO_SELECTION": f"only={only};skip=",
                **{by_name(name).env: "1" for name in also},
            }
        exact = {"BENCH_EXACT_ATTENTION": "1"} if self.variant == EXACT else {}
        return {"BENCH_PATCHED": "0", "GEMMA4_TURBO": "0", **exact}

    def wait_ready(self) -> None:
        """Until the engine stands."""
        if self.ready_s is None:
            self.ready_s = float(self._answer()["ready_s"])
            console.print(f"{self.variant}: ready after {self.ready_s:.0f} s")

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.wait_ready()
        assert self.process.stdin is not None
        with turn(do not in self.untimed):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = [text for text in self.log.read_text(errors="replace").splitlines() if text]
            sys.exit(
                f"engine.py: the {self.variant} engine died ({self.log}):\n" + "\n".join(tail[-12:])
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process and its children."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()


def fate(engine: Engine) -> str:
    """Whether an engine starts, or the error that its log ends with."""
    try:
        engine.wait_ready()
        return "starts"
    except SystemExit:
        lines = engine.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.match(r"(\[.*\] )?\w*Error: ", line)]
        return f"does not start: {errors[-1] if errors else lines[-1:]}"
    finally:
        engine.stop()


def end_on_sigterm() -> None:
    """`timeout` ends a run as an error would: what is known is saved, no engine or server stays."""

    def terminated(*_: object) -> None:
        Engine.patience_s = 0
        sys.exit(143)

    signal.signal(signal.SIGTERM, terminated)


def in_turn(live: dict[str, Any], round_: int) -> list[Any]:
    """The variants of a round, in the other order every other round."""
    order = list(live.values())
    return order if round_ % 2 == 0 else order[::-1]


@contextlib.contextmanager
def engines(make: Callable[[str], EngineT], variants: list[str]) -> Iterator[dict[str, EngineT]]:
    """Several engines at once, stopped at the end."""
    live = {variant: make(variant) for variant in variants}
    try:
        for engine in live.values():
            engine.wait_ready()
        yield live
    finally:
        for engine in live.values():
            engine.stop()


def outlived(engine: Engine, do: Callable[[], None]) -> str | None:
    """What an engine died of in ``do``; None if it did not."""
    try:
        do()
    except (SystemExit, OSError) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            raise  # this process was told to end
        return cause_of_death(engine.log)
    return None


@contextlib.contextmanager
def started(make: Callable[[str], Engine], names: list[str]) -> Iterator[dict[str, Engine]]:
    """Engines at once, without those that do not start; stopped at the end.

    Other processes' timings wait until all have started; see `bench.common.turns`.
    """
    made: dict[str, Engine] = {}
    try:
        with turn(timed=False):
            made |= {name: make(name) for name in names}
            live = dict(made)
            for name, engine in made.items():
                cause = outlived(engine, engine.wait_ready)
                if cause is not None:
                    console.print(f"{name}: did not start: {cause} ({engine.log})")
                    live.pop(name).stop()
        yield live
    finally:
        for engine in made.values():
            engine.stop()


def cause_of_death(log: Path) -> str:
    """What the log says of the exception: that of the scheduler, else the last one."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    hit = [i for i, line in enumerate(lines) if "hit an exception" in line]
    named = [
        line.strip()[:300]
        for line in lines[hit[-1] if hit else 0 :]
        if re.match(r"^(\[.*\] )?\w+(\.\w+)*(Error|Exception)\b", line)
    ]
    if not named:
        return "no exception in the log"
    return named[0] if hit else named[-1]
