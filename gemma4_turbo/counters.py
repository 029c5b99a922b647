"""Counters of what the patches did, readable from other processes.

SGLang runs the model in spawned processes and ends them with SIGKILL, so nothing can be asked of
them at exit. Each process that installs a patch therefore keeps its counters in a small mapped
file and its states in a JSON file beside it, in ``GEMMA4_TURBO_STATE_DIR`` (default: a private
folder in the temporary directory). Where that folder cannot be written, the counters are kept in
memory and only this process sees them.
"""

from __future__ import annotations

import array
import atexit
import json
import mmap
import os
import tempfile
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_turbo.switches import STATE_DIR

ENGAGED, CAPTURED, DECLINED = range(3)  # CAPTURED: those of ENGAGED that a CUDA graph recorded
_PER_PATCH = 4
_MAX_PATCHES = 128
_BYTES = 8 * _PER_PATCH * _MAX_PATCHES


class Counters:
    """The three counters of one patch in this process."""

    __slots__ = ("_base", "_cells")

    def __init__(self, cells: MutableSequence[int], index: int) -> None:
        self._cells = cells
        self._base = index * _PER_PATCH

    def add_engaged(self, captured: bool) -> None:
        """Count one call of the patch's code. Cheap: additions in mapped memory."""
        self._cells[self._base + ENGAGED] += 1
        if captured:
            self._cells[self._base + CAPTURED] += 1

    def add_declined(self) -> None:
        """Count one call that took stock's path."""
        self._cells[self._base + DECLINED] += 1

    @property
    def engaged(self) -> int:
        """Calls of the patch's code in this process."""
        return self._cells[self._base + ENGAGED]


class ProcessReport(NamedTuple):
    """What another live process wrote."""

    pid: int
    command: str
    patches: list[dict[str, Any]]  # name, state, reason, engaged, captured, declined


def state_dir() -> Path:
    """Where the processes leave their states and counters."""
    chosen = os.environ.get(STATE_DIR, "").strip()
    if chosen:
        return Path(chosen)
    return Path(tempfile.gettempdir()) / f"gemma4_turbo-{os.getuid()}"


def _stat_fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()  # the name before it may hold anything


def _start_time(pid: int) -> str | None:
    """Distinguishes a process from a later one with the same pid."""
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] == "Z" else fields[19]


def _parent(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[1])


class Ledger:
    """This process's counters and states. One file pair, opened at the first state to report."""

    def __init__(self) -> None:
        self._cells: MutableSequence[int] = array.array("q", bytes(_BYTES))
        self._path: Path | None = None
        self._pid = 0
        self.problem: str | None = None

    def open(self) -> None:
        """Map the counters into the state folder; on failure keep them in memory."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        try:
            folder = state_dir()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError(f"{folder} belongs to another user")
            _sweep(folder)
            counters = folder / f"{self._pid}.counters"
            counters.write_bytes(bytes(_BYTES))
            with counters.open("r+b") as file:
                mapped = mmap.mmap(file.fileno(), _BYTES)
            self._cells = memoryview(mapped).cast("q")  # type: ignore[assignment]
            self._path = folder / f"{self._pid}.json"
            atexit.register(self.close)
        except OSError as error:
            self._cells = array.array("q", bytes(_BYTES))
            self._path = None
            self.problem = f"counters are visible in this process only: {error}"

    def counters(self, index: int) -> Counters:
        """Counters of the catalogue's patch number ``index``."""
        self.open()
        return Counters(self._cells, index)

    def publish(self, patches: list[dict[str, Any]]) -> None:
        """Write the states for other processes; ``patches`` in the catalogue's order."""
        self.open()
        if self._path is None:
            return
        record = {"pid": self._pid, "start": _start_time(self._pid), "patches": patches}
        try:
            scratch = self._path.with_suffix(".tmp")
            scratch.write_text(json.dumps(record))
            scratch.replace(self._path)
        except OSError as error:
            self.problem = f"states are visible in this process only: {error}"

    def close(self) -> None:
        """Remove this process's files. Nothing else is needed: a dead process's are swept."""
        if self._path is not None and self._pid == os.getpid():
            self._path.unlink(missing_ok=True)
            self._path.with_suffix(".counters").unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove the files of processes that are gone."""
    for path in folder.glob("*.json"):
        try:
            record = json.loads(path.read_text())
            alive = _start_time(int(record["pid"])) == record["start"]
        except (OSError, ValueError, KeyError, TypeError):
            alive = False
        if not alive:
            path.unlink(missing_ok=True)
            path.with_suffix(".counters").unlink(missing_ok=True)
    for path in folder.glob("*.counters"):  # of a process killed before it wrote its states
        if path.stem.isdecimal() and _start_time(int(path.stem)) is None:
            path.unlink(missing_ok=True)


def _command(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "?"
    return " ".join(raw.decode(errors="replace").split("\0")).strip()[:120]


def live_processes(folder: Path | None = None) -> list[ProcessReport]:
    """Every live process that reports below ``folder``, this one included."""
    folder = state_dir() if folder is None else folder
    reports = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            record = json.loads(path.read_text())
            pid = int(record["pid"])
            if _start_time(pid) != record["start"]:
                continue
            cells = array.array("q", path.with_suffix(".counters").read_bytes())
            patches = [
                dict(
                    patch,
                    engaged=cells[i * _PER_PATCH + ENGAGED],
                    captured=cells[i * _PER_PATCH + CAPTURED],
                    declined=cells[i * _PER_PATCH + DECLINED],
                )
                for i, patch in enumerate(record["patches"])
            ]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue  # being written, or gone meanwhile
        reports.append(ProcessReport(pid, _command(pid), patches))
    return reports


def descendants() -> list[ProcessReport]:
    """The live reporting processes below this one."""
    me = os.getpid()
    found = []
    for report in live_processes():
        pid: int | None = report.pid
        while pid and pid != me:
            pid = _parent(pid)
        if pid == me and report.pid != me:
            found.append(report)
    return found
