"""The folder in which processes leave files for each other: whose it must be, what may be touched.

The folder may be anywhere, so anything may lie in its place and in it. Used is only a real directory
of this user that nobody else may write, through its descriptor and without following links. A file is
ours if its name and its first bytes both carry the process that wrote it; others are left alone.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gemma4_turbo.engine import guarded, processes
from gemma4_turbo.engine.processes import Process
from gemma4_turbo.engine.switches import STATE_DIR

logger = logging.getLogger("gemma4_turbo")

MAX_ENTRIES = 1 << 16  # of the folder, whoever's they are
MAX_FILES = 4096  # of this boot and PID namespace
_PREFIX = "gemma4_turbo-"
_HEADS = {
    "json": '{{"gemma4_turbo_states": 1, "process": "{}"',
    "tmp": '{{"gemma4_turbo_states": 1, "process": "{}"',
    "counters": "gemma4_turbo counters 1 {}\n",  # of memory; a file of versions before
    "trial": "gemma4_turbo trial 1 {}\n",
}
_TRIAL_BYTES = 1 << 14

_failed: dict[str, str] = {}  # what went wrong at the last attempt to write, by folder
_said: set[str] = set()


class UnfitError(OSError):
    """The folder cannot be used; names variable and folder."""


def file_name(process: Process, kind: str) -> str:
    """Of a file that ``process`` writes; kinds: json, tmp, counters, trial."""
    return f"{_PREFIX}{process}.{kind}"


def file_head(process: Process, kind: str) -> bytes:
    """What such a file begins with."""
    return _HEADS[kind].format(process).encode()


def writer(name: str) -> tuple[Process, str] | None:
    """Process and kind by a file's name; None if the name is not one of ours."""
    stem, _, kind = name.rpartition(".")
    if kind not in _HEADS or not stem.startswith(_PREFIX):
        return None
    process = processes.parsed(stem.removeprefix(_PREFIX))
    return None if process is None else (process, kind)


# -- where it is --------------------------------------------------------------------------------


def _as_given() -> str:
    given = os.environ.get(STATE_DIR, "").strip()
    if not given:
        return os.path.join(_temporary(), f"gemma4_turbo-{os.geteuid()}")
    expanded = os.path.expanduser(given)
    if expanded.startswith("~"):
        raise UnfitError(f"{STATE_DIR}={given!r} names no user's home")
    return expanded


def _temporary() -> str:
    """As `tempfile` chooses, whose import takes longer than all of `gemma4_turbo.apply`."""
    given = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    for folder in (*given, "/tmp", "/var/tmp", "/usr/tmp"):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UnfitError(f"{STATE_DIR} is not set, and no temporary directory can be written")


def path() -> str:
    """The folder's absolute path; an empty variable counts as unset.

    Raises:
        UnfitError: if it has none.
    """
    given = _as_given()
    try:
        return os.path.abspath(given)  # also ends no longer in a slash, which would follow a link
    except OSError as error:
        raise UnfitError(
            f"{STATE_DIR}: {given!r} is relative to no folder: {_why(error)}"
        ) from None


def settle() -> None:
    """Make the variable absolute, so that it means the same after a ``chdir`` and in children."""
    with suppress(UnfitError):
        where = path()
        if os.environ.get(STATE_DIR, "").strip() or where != _as_given():
            os.environ[STATE_DIR] = where


# -- whether it can be used ---------------------------------------------------------------------


def problem(trial: bool = True) -> str | None:
    """Why processes cannot see each other's files, None if they can. Never raises.

    Args:
        trial: create the folder and write a file; else only look.
    """
    try:
        if not trial:
            where = path()
            try:
                with opened() as folder:
                    folder.files(processes.own())
            except FileNotFoundError:
                _require_creatable(where)
            return _failed.get(where)
        with opened(create=True) as folder:
            me = processes.own()
            folder.files(me)
            descriptor = folder.renew(me, "trial")
            try:
                write(descriptor, file_head(me, "trial").ljust(_TRIAL_BYTES, b"\0"))
            finally:
                os.close(descriptor)
                folder.discard(file_name(me, "trial"))
    except OSError as error:
        return _say(str(error))
    return None


@contextmanager
def opened(create: bool = False, where: str | None = None) -> Iterator[Folder]:
    """The folder. What goes wrong inside of the block is said once in the log.

    Args:
        create: make it if need be, and take the block for an attempt to write.
        where: instead of the variable's folder.

    Raises:
        FileNotFoundError: if there is none.
        UnfitError: if it cannot be used, or if the block raises an OSError.
    """
    descriptor = -1
    try:
        where = path() if where is None else where
        descriptor = _descriptor(where, create)
        yield Folder(where, descriptor)
    except OSError as error:
        if descriptor < 0 and isinstance(error, FileNotFoundError):
            raise
        unfit = error if isinstance(error, UnfitError) else _unfit(where, _why(error))
        if create and where is not None:
            _failed[where] = str(unfit)
        _say(str(unfit))
        raise unfit from None
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if create:
        _failed.pop(where, None)


def _descriptor(where: str, create: bool) -> int:
    try:
        if create:
            _make(where)
        descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        raise _unfit(where, _in_the_way(where)) from None
    except FileNotFoundError as error:
        if not create:
            raise
        raise _unfit(where, f"cannot be made: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            us = os.geteuid()
            raise _unfit(where, f"belongs to another user: uid {status.st_uid}, ours is {us}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = f"mode {stat.S_IMODE(status.st_mode):04o}"
            raise _unfit(where, f"can be written by others ({mode}): chmod go-w")
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=descriptor, effective_ids=True):
            raise _unfit(where, "cannot be written by this process")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make(where: str) -> None:
    try:
        os.mkdir(where, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        os.makedirs(os.path.dirname(where), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(where, 0o700)


def _in_the_way(where: str) -> str:
    """Why something that should be the folder is no directory."""
    with suppress(OSError):
        if stat.S_ISLNK(os.lstat(where).st_mode):
            return "is a symbolic link, which is not followed"
    return "is not a directory"


def _require_creatable(where: str) -> None:
    above = os.path.dirname(where)
    while not os.path.lexists(above) and above != os.path.dirname(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise _unfit(where, f"cannot be made: {above!r} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        raise _unfit(where, f"cannot be made: {above!r} cannot be written by this process")


def _unfit(where: str | None, why: str) -> UnfitError:
    return UnfitError(f"{STATE_DIR}: {where!r} {why}")


def _why(error: OSError) -> str:
    return f"cannot be used: {error.strerror or error}"


def _say(text: str) -> str:
    if text not in _said:
        _said.add(text)
        logger.warning("gemma4_turbo: other processes do not see this one's counters: %s", text)
    return text


# -- what is in it ------------------------------------------------------------------------------


class Folder:
    """The open folder. Every method may raise an OSError, which `opened` explains."""

    def __init__(self, where: str, descriptor: int) -> None:
        self.where = where
        self._descriptor = descriptor

    def files(self, me: Process) -> list[tuple[Process, str]]:
        """Writer and kind of every file that is ours by name, of this boot and PID namespace."""
        files: list[tuple[Process, str]] = []
        with os.scandir(self._descriptor) as entries:
            for number, entry in enumerate(entries):
                if number == MAX_ENTRIES or len(files) == MAX_FILES:
                    raise _unfit(self.where, f"holds too many files (read: {number})")
                written = writer(entry.name)
                if written is not None and written[0][:2] == me[:2]:
                    files.append(written)
        return sorted(files, key=lambda file: file[0].pid)

    def read(self, name: str, limit: int) -> bytes:
        """What a regular file of this user holds, at most ``limit`` bytes; ValueError if more."""
        with guarded.regular(name, self._descriptor) as descriptor:
            return guarded.content(name, descriptor, limit)

    def new(self, name: str) -> int:
        """Descriptor of a file that was not there; FileExistsError if something was."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask says
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def renew(self, process: Process, kind: str) -> int:
        """`new`, after removing what ``process`` itself left there, as before an exec."""
        name = file_name(process, kind)
        try:
            return self.new(name)
        except FileExistsError:
            if not self.remove(process, kind):
                raise _unfit(self.where, f"holds {name}, which is not ours") from None
            return self.new(name)

    def holds(self, name: str, file: os.stat_result) -> bool:
        """Whether ``file`` is there still, under this name."""
        with suppress(OSError):
            status = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            return os.path.samestat(status, file)
        return False

    def rename(self, process: Process, kind: str, to: str) -> None:
        """Put a file of ours into the place of another one of ours, or of none."""
        source, target = file_name(process, kind), file_name(process, to)
        with suppress(FileNotFoundError):
            os.stat(target, dir_fd=self._descriptor, follow_symlinks=False)
            if not self.is_ours(process, to):
                raise _unfit(self.where, f"holds {target}, which is not ours")
        os.rename(source, target, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def is_ours(self, process: Process, kind: str) -> bool:
        """Whether the content says the same as the name."""
        head = file_head(process, kind)
        try:
            with guarded.regular(file_name(process, kind), self._descriptor) as descriptor:
                return os.pread(descriptor, len(head), 0) == head
        except (OSError, ValueError):
            return False

    def remove(self, process: Process, kind: str) -> bool:
        """Remove a file that is ours by name and content."""
        if not self.is_ours(process, kind):
            return False
        return self.discard(file_name(process, kind))

    def discard(self, name: str) -> bool:
        """Remove a file that this process has just made."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self._descriptor)
            return True
        return False

    def sweep(self, me: Process) -> None:
        """Remove the files of processes that are gone."""
        for process, kind in self.files(me):
            if processes.lives(process, me) is False:
                self.remove(process, kind)


def write(descriptor: int, content: bytes) -> None:
    """All of it."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
