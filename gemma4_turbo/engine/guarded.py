"""Reading a file that anybody may have put in its place: regular, of a known owner, of bounded size."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager


@contextmanager
def regular(
    name: str, folder: int | None = None, owners: Container[int] | None = None
) -> Iterator[int]:
    """Descriptor of a regular file; no link is followed, and a pipe or device is not opened.

    Args:
        name: a path; relative to ``folder``, if that is given.
        folder: descriptor of a directory.
        owners: user ids that the file may belong to; None: this process's own.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is something else, or somebody else's.
    """
    owners = (os.geteuid(),) if owners is None else owners
    # Looked at before it is opened: opening a device may do things. It may change in between.
    _require(name, os.stat(name, dir_fd=folder, follow_symlinks=False), owners)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        _require(name, os.fstat(descriptor), owners)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def shared(name: str) -> Iterator[int]:
    """Descriptor of an anonymous file of another process, read from its start; as `regular`, but by a link.

    Args:
        name: below /proc, where links lead to what a process has open, whatever that is.
    """
    _require(name, os.stat(name), (os.geteuid(),))
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _require(name, os.fstat(descriptor), (os.geteuid(),))
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
