"""Files that must not change: looked at before and after."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Any


def look(path: Path) -> list[Any]:
    """What must not change of a file, pipe, link or folder, without opening what blocks."""
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    seen: list[Any] = [found.st_ino, found.st_mode, found.st_uid]
    if kind == stat.S_IFLNK:
        return [*seen, os.readlink(path), found.st_mtime_ns]
    if kind == stat.S_IFREG:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return [*seen, found.st_size, digest, found.st_mtime_ns]
    # A folder's own time changes with files that are not foreign.
    return seen if kind == stat.S_IFDIR else [*seen, found.st_mtime_ns]


def snapshot(folders: list[Path]) -> dict[str, list[Any]]:
    """Everything below the folders; links are not followed."""
    found = {}
    for folder in folders:
        for where, names, files in os.walk(folder):
            for name in ["", *names, *files]:
                path = Path(where, name)
                with contextlib.suppress(FileNotFoundError):
                    found[str(path)] = look(path)
    return found


def changes(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """A line for each that is gone or not as it was; what is new is not foreign."""
    return [
        f"{path}: {'gone' if path not in after else 'changed'}"
        for path, seen in before.items()
        if after.get(path) != seen
    ]
