"""Reading a file that anybody may have put in its place: regular, of a known owner, of bounded size."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager


@contextmanager
def regular(
    name: str,
    folder: int | None = None,
    owners: Container[int] | None = None,
    follow: bool = False,
) -> Iterator[int]:
    """Descriptor of a regular file; a pipe or device is not opened.

    Args:
        name: a path; relative to ``folder``, if that is given.
        folder: descriptor of a directory.
        owners: user ids that the file may belong to; None: this process's own.
        follow: links, as those below /proc, which lead to what a process has open. Else none is.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is something else, or somebody else's.
    """
    owners = (os.geteuid(),) if owners is None else owners
    # Looked at before it is opened: opening a device may do things. It may change in between.
    _require(name, os.stat(name, dir_fd=folder, follow_symlinks=follow), owners)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    flags |= 0 if follow else os.O_NOFOLLOW
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        _require(name, os.fstat(descriptor), owners)
        yield descriptor
    finally:
        os.close(descriptor)


def _require(name: str, status: os.stat_result, owners: Container[int]) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners:
        raise ValueError(f"{name} is no regular file of this user")


def content(name: str, descriptor: int, limit: int) -> bytes:
    """What an open file holds, at most ``limit`` bytes; ValueError if more."""
    size = os.fstat(descriptor).st_size
    if size > limit:
        raise ValueError(f"{name} holds {size} bytes")
    parts = []
    while limit > 0 and (part := os.read(descriptor, limit)):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)
