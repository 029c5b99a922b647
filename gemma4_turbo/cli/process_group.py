"""A command in a process group of its own, so that all of it can be ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from gemma4_turbo.cli.modules import CannotRunError

GRACE_S = 10  # between SIGTERM and SIGKILL


class Outcome(NamedTuple):
    """How a command ended."""

    passed: bool
    how: str
    seconds: float


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    timeout: float | None,
) -> Outcome:
    """Run ``command`` to its end, or to the timeout; nothing of its process group outlives it."""
    started = time.monotonic()
    with stdout.open("wb") as out, stderr.open("wb") as err:
        try:
            # No stdin: a process outside the terminal's group cannot read it, and the first run
            # would take what the others need.
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as error:
            name = shlex.quote(command[0])
            raise CannotRunError(f"{name} cannot be started: {error.strerror}") from None
    try:
        status = child.wait(timeout)
        how = f"killed by {_signal_name(-status)}" if status < 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        status, how = -signal.SIGKILL, f"timeout of {timeout:g} s, process group killed"
    finally:
        _end(child)
    return Outcome(status == 0, how, time.monotonic() - started)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run as Ctrl-C does: a terminal does not reach the group."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the whole group. A server that the command left behind would disturb the next run."""
    try:
        if child.poll() is None:
            _signal_group(child, signal.SIGTERM)
            child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(child, signal.SIGKILL)
        child.wait()


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no name of their own
        return f"signal {number}"
