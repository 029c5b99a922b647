"""The identity of a process, for files that outlive it and that other containers see. Read from /proc."""

from __future__ import annotations

import os
import re
from typing import NamedTuple


class Process(NamedTuple):
    """One process among all of all boots and PID namespaces."""

    boot: str
    namespace: str  # of PIDs: containers count theirs independently of each other
    pid: int
    start: int  # tells it from a later process with the same PID

    def __str__(self) -> str:
        return f"{self.boot}-{self.namespace}-{self.pid}-{self.start}"


_WRITTEN = re.compile(r"([0-9a-z]{1,40})-([0-9]{1,20})-([1-9][0-9]{0,6})-([0-9]{1,19})")


def parsed(text: str) -> Process | None:
    """The inverse of ``str``; None for anything else."""
    match = _WRITTEN.fullmatch(text)
    if match is None:
        return None
    boot, namespace, pid, start = match.groups()
    process = Process(boot, namespace, int(pid), int(start))
    return process if str(process) == text else None  # no second spelling, as with zeros in front


def own() -> Process:
    """This process. Not cached: a fork changes it.

    Raises:
        OSError: if /proc does not tell, or tells of another PID namespace.
    """
    pid = os.getpid()
    if os.readlink("/proc/self") != str(pid):
        raise OSError("/proc belongs to another PID namespace")
    fields = _stat_fields(pid)
    if fields is None:
        raise OSError("/proc does not show this process")
    return Process(boot(), namespace(), pid, int(fields[19]))


def boot() -> str:
    """What no other boot and no other machine has."""
    try:
        match = re.fullmatch(rb"[0-9a-f-]{36}\n?", _read("/proc/sys/kernel/random/boot_id"))
        if match is not None:
            return match[0].decode().strip().replace("-", "")
    except OSError:
        pass  # some sandboxes leave it out
    match = re.search(rb"^btime ([0-9]+)", _read("/proc/stat", 1 << 20), re.MULTILINE)
    if match is None:
        raise OSError("/proc tells neither boot_id nor btime")
    return match[1].decode()


def namespace() -> str:
    """This process's PID namespace."""
    link = os.readlink("/proc/self/ns/pid")
    match = re.fullmatch(r"pid:\[([0-9]+)\]", link)
    if match is None:
        raise OSError(f"/proc tells no PID namespace: {link!r}")
    return match[1]


def lives(process: Process, me: Process) -> bool | None:
    """Whether ``process`` runs; None where ``me``, which asks, is in no position to tell."""
    if process[:2] != me[:2]:
        return None
    try:
        fields = _stat_fields(process.pid)
        if fields is None:
            os.kill(process.pid, 0)  # /proc may hide what there is
            return None
    except ProcessLookupError:
        return False
    except OSError:
        return None
    return fields[0] not in (b"Z", b"X") and int(fields[19]) == process.start


def parent(pid: int) -> int | None:
    """PID of the parent; None if the process is gone."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        return None
    return None if fields is None else int(fields[1])


def command(pid: int) -> str:
    """The start of the command line."""
    try:
        raw = _read(f"/proc/{pid}/cmdline")
    except OSError:
        return "?"
    return " ".join(raw.decode(errors="replace").split("\0")).strip()[:120]


def _read(path: str, limit: int = 4096) -> bytes:
    with open(path, "rb") as file:
        return file.read(limit)


def _stat_fields(pid: int) -> list[bytes] | None:
    """From the state on; None if there is no such process."""
    try:
        text = _read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
