"""Counters of what the patches did, readable from other processes.

SGLang runs the model in spawned processes and ends them with SIGKILL, so nothing can be asked of
them at exit. Each process that installs a patch therefore keeps its counters in shared memory and writes
its states into a JSON file, in the folder of `gemma4_turbo.engine.state_folder`. The memory is an anonymous
file that is sealed: nobody can shorten it and no disk is too full for it, either of which would end the
process at its next count (SIGBUS). The JSON file has its descriptor, under which others find it in /proc.
Where the folder or the memory cannot be used, only this process sees its counters.
"""

from __future__ import annotations

import array
import atexit
import fcntl
import json
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gemma4_turbo.engine import guarded, processes, state_folder
from gemma4_turbo.engine.processes import Process
from gemma4_turbo.engine.state_folder import Folder, file_head, file_name
from gemma4_turbo.engine.states import STATES
from gemma4_turbo.engine.switches import STATE_DIR

ENGAGED, CAPTURED, DECLINED = range(3)  # CAPTURED: those of ENGAGED that a CUDA graph recorded
_PER_PATCH = 4
_MAX_PATCHES = 128
_CELLS = _PER_PATCH * _MAX_PATCHES
_HEAD = 256  # bytes before the counters
_BYTES = _HEAD + 8 * _CELLS
_MAX_NAME, _MAX_REASON = 64, 1000  # characters
_MAX_STATES = 2 << 20  # bytes: more than `_MAX_PATCHES` of them take
_MAX_DESCRIPTOR = 1 << 20


class _Cells(Protocol):
    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class Counters:
    """The three counters of one patch in this process."""

    __slots__ = ("_base", "cells")

    def __init__(self, cells: _Cells, index: int) -> None:
        self.cells = cells
        self._base = index * _PER_PATCH

    def add_engaged(self, captured: bool) -> None:
        """Count one call of the patch's code. Cheap: additions in memory."""
        self.cells[self._base + ENGAGED] += 1
        if captured:
            self.cells[self._base + CAPTURED] += 1

    def add_declined(self) -> None:
        """Count one call that took stock's path."""
        self.cells[self._base + DECLINED] += 1

    @property
    def engaged(self) -> int:
        """Calls of the patch's code in this process."""
        return self.cells[self._base + ENGAGED]


class _Unopened:
    """Zeros, until the first count."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getitem__(self, index: int, /) -> int:
        return 0

    def __setitem__(self, index: int, value: int, /) -> None:
        self._ledger.open()
        self._ledger.cells[index] = value


class ProcessReport(NamedTuple):
    """What another live process wrote."""

    pid: int
    command: str
    patches: list[dict[str, Any]]  # name, state, reason, engaged, captured, declined


_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


class Ledger:
    """This process's counters and states. Memory and file are made at the first thing to report."""

    def __init__(self) -> None:
        self._handed: dict[int, Counters] = {}
        self._patches: list[dict[str, Any]] | None = None
        self._where: str | None = None  # for good: the variable may change later
        self._start_over()
        _ledgers.add(self)

    def _start_over(self) -> None:
        """As in a new process: after a fork the files are the parent's."""
        self._lock = threading.RLock()
        self._pid = 0
        self._process: Process | None = None
        self._memory: tuple[int, os.stat_result] | None = None  # descriptor of the counters
        self._file: os.stat_result | None = None  # of the states
        self._failed: str | None = None
        self._lost: str | None = None
        self._switch(_Unopened(self))

    def _switch(self, cells: _Cells) -> None:
        self.cells = cells
        for counters in self._handed.values():
            counters.cells = cells

    @property
    def problem(self) -> str | None:
        """Why other processes do not see all of this, or this one all of theirs."""
        return self._failed or self._lost

    def open(self) -> None:
        """Share the counters with other processes; on failure only this one sees them."""
        with self._lock:
            if self._pid != os.getpid():
                if self._pid:  # a fork that Python was not told of
                    self._start_over()
                self._pid = os.getpid()
                self._switch(array.array("q", bytes(8 * _CELLS)))
                atexit.register(self.close)
                self._write()

    def counters(self, index: int) -> Counters:
        """Counters of the catalogue's patch number ``index``."""
        with self._lock:
            return self._handed.setdefault(index, Counters(self.cells, index))

    def publish(self, patches: list[dict[str, Any]]) -> None:
        """Write the states for other processes; ``patches`` in the catalogue's order."""
        with self._lock:
            self._patches = [dict(patch, reason=_clipped(patch["reason"])) for patch in patches]
            if self._pid == os.getpid():
                self._write()
            else:
                self.open()

    def look(self) -> str | None:
        """`problem`, after a look whether file and memory are there still."""
        with self._lock:
            if self._pid == os.getpid():
                held = False
                if self._process is not None and self._file is not None:
                    with suppress(OSError), state_folder.opened(where=self._where) as folder:
                        held = folder.holds(file_name(self._process, "json"), self._file)
                if not (held and self._is_shared()) or self._failed:
                    self._write()
            return self.problem

    def _write(self) -> None:
        """The states, and before them the memory where it is not there (any more)."""
        try:
            with state_folder.opened(create=True, where=self._where) as folder:
                me = processes.own()
                if self._file is None or not folder.holds(file_name(me, "json"), self._file):
                    if self._file is not None:
                        self._lost = (
                            f"{STATE_DIR}: {folder.where!r} was emptied or moved "
                            "while it was in use, and who has not written since is not seen"
                        )
                        self._file = None
                    folder.sweep(me)
                self._process, self._where = me, folder.where
                if not self._is_shared():
                    self._share(me)
                if self._patches is not None:
                    self._write_states(folder, me)
                self._failed = None
        except OSError as error:
            self._failed = str(error)

    def _is_shared(self) -> bool:
        """Whether the descriptor is still that of the counters: somebody may have closed it."""
        if self._memory is None:
            return False
        descriptor, memory = self._memory
        with suppress(OSError):
            return os.path.samestat(os.fstat(descriptor), memory)
        return False

    def _share(self, me: Process) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no anonymous files: os.memfd_create")
        descriptor = os.memfd_create("gemma4_turbo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            state_folder.write(descriptor, file_head(me, "counters").ljust(_BYTES, b"\0"))
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapped = memoryview(mmap.mmap(descriptor, _BYTES))[_HEAD:].cast("q")
            memory = os.fstat(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        for index in range(_CELLS):
            mapped[index] = self.cells[index]
        self._memory = descriptor, memory
        self._switch(mapped)

    def _unshare(self) -> None:
        if self._memory is not None and self._is_shared():
            os.close(self._memory[0])
        self._memory = None

    def _write_states(self, folder: Folder, me: Process) -> None:
        assert self._memory is not None
        more = {"counters": self._memory[0], "patches": self._patches}
        content = file_head(me, "json") + b", " + json.dumps(more).encode()[1:]
        descriptor = folder.renew(me, "tmp")
        try:
            state_folder.write(descriptor, content)
            folder.rename(me, "tmp", "json")
            self._file = os.fstat(descriptor)
        except BaseException:
            folder.discard(file_name(me, "tmp"))
            raise
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Remove this process's file. Nothing else is needed: a dead process's is swept."""
        with self._lock:
            if self._process is None or self._pid != os.getpid():
                return
            with suppress(OSError), state_folder.opened(where=self._where) as folder:
                folder.remove(self._process, "json")
            self._unshare()
            self._process = self._file = None


def _forked() -> None:
    for ledger in list(_ledgers):
        ledger._unshare()
        ledger._start_over()


os.register_at_fork(after_in_child=_forked)


def _clipped(reason: str) -> str:
    return reason[:_MAX_REASON].encode("utf-8", "backslashreplace").decode()[:_MAX_REASON]


def live_processes(folder: Path | None = None) -> list[ProcessReport]:
    """Every live process that reports in ``folder``, this one included; none if it is unfit."""
    reports = []
    with suppress(OSError):
        where = None if folder is None else os.path.abspath(folder)
        with state_folder.opened(where=where) as opened:
            me = processes.own()
            for process, kind in opened.files(me):
                if kind == "json" and processes.lives(process, me):
                    with _skipping():
                        patches = _patches(opened, process)
                        reports.append(
                            ProcessReport(process.pid, processes.command(process.pid), patches)
                        )
    return reports


@contextmanager
def _skipping() -> Iterator[None]:
    """A file that is no report: being written, gone meanwhile, or planted."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        yield


def _patches(folder: Folder, process: Process) -> list[dict[str, Any]]:
    """What a process wrote; an error of `_skipping` if it is not what `Ledger` writes."""
    record = json.loads(
        folder.read(file_name(process, "json"), _MAX_STATES), parse_constant=_no_constant
    )
    if record["process"] != str(process) or record["gemma4_turbo_states"] != 1:
        raise ValueError("states of another process")
    counted = _counted(process, record["counters"])
    cells = array.array("q", counted[_HEAD:])
    written = record["patches"]
    if not isinstance(written, list) or len(written) > _MAX_PATCHES or min(cells) < 0:
        raise ValueError("not what a process counts")
    return [
        {
            "name": _text(patch["name"], _MAX_NAME),
            "state": STATES[STATES.index(patch["state"])],
            "reason": _text(patch["reason"], _MAX_REASON),
            "engaged": cells[i * _PER_PATCH + ENGAGED],
            "captured": cells[i * _PER_PATCH + CAPTURED],
            "declined": cells[i * _PER_PATCH + DECLINED],
        }
        for i, patch in enumerate(written)
    ]


def _counted(process: Process, descriptor: Any) -> bytes:
    """The memory that a process shares; ValueError if it is something else."""
    if type(descriptor) is not int or not 0 <= descriptor < _MAX_DESCRIPTOR:
        raise ValueError("no descriptor")
    with guarded.regular(f"/proc/{process.pid}/fd/{descriptor}", follow=True) as memory:
        counted = guarded.content("counters", memory, _BYTES)
    if len(counted) != _BYTES or not counted.startswith(file_head(process, "counters")):
        raise ValueError("counters of another process")
    return counted


def _no_constant(text: str) -> None:
    raise ValueError(text)


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise ValueError("no text, or too long")
    value.encode()  # half of a surrogate pair could not be printed
    return value


def descendants() -> list[ProcessReport]:
    """The live reporting processes below this one."""
    me = os.getpid()
    below = []
    for report in live_processes():
        pid: int | None = report.pid
        while pid and pid != me:
            pid = processes.parent(pid)
        if pid == me and report.pid != me:
            below.append(report)
    return below
