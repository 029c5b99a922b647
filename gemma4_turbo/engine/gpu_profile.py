"""The GPU profile: what ``tune`` measured on this machine, and whether it still holds.

A JSON file of the user's. It says of every shape of a kernel's with which tile it runs, or why stock's
code runs, and which patches are on. It holds for one GPU, driver, SGLang, torch, Triton and version of
this package; any other is ignored, and the log says so once. Shapes that it says nothing of are looked up
in the package's own, in ``gemma4_turbo/profiles``: others measured them, on the same GPU with the same
SGLang, torch and Triton, and their tiles alone are taken. Whatever lies in a file's place, nothing here
raises into a server. Neither torch nor Triton is imported.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata, resources
from typing import Any, NamedTuple

from gemma4_turbo.engine import guarded, nvml
from gemma4_turbo.engine.switches import GPU_PROFILE, Decision
from gemma4_turbo.version import __version__

logger = logging.getLogger("gemma4_turbo")

MARK = "gemma4_turbo_gpu_profile"
FORMAT = 1
NAME = "gpu_profile.json"
TUNE = "python -m gemma4_turbo tune"
MAX_BYTES = 4 << 20
MAX_ROWS = 20_000  # of shapes
MAX_TEXT = 300
MAX_NUMBERS = 512  # of a tile; a table of the fused experts has 13 for each number of tokens
SYSTEM = 0  # uid; an image's builder may leave a profile for every user
PROFILES = resources.files("gemma4_turbo") / "profiles"  # in a zip, if the package is

Word = int | str
Place = tuple[str, tuple[Word, ...]]
"""A kernel's name and one of its shapes, as the kernel spells it."""

Tiles = dict[Place, tuple[tuple[int, ...] | None, str]]
"""By place: the numbers of a tile, or None and why stock's code is to run."""


class UnfitError(ValueError):
    """The file cannot be used; says why in one line."""


class Key(NamedTuple):
    """What a profile holds for."""

    gpu: str
    driver: str
    sglang: str
    torch: str
    triton: str
    gemma4_turbo: str


PACKAGES = Key._fields[2:-1]
"""Beside ours. The file calls each by its name."""


class Shape(NamedTuple):
    """What was measured of a kernel at one shape."""

    kernel: str
    shape: tuple[Word, ...]
    tile: tuple[int, ...] | None
    reason: str  # why there is no tile, or ""
    figures: dict[str, float]  # microseconds and errors, for people


class Profile(NamedTuple):
    """A whole file."""

    key: Key
    patches: dict[str, Decision]
    shapes: tuple[Shape, ...]


class Lookup(NamedTuple):
    """The file's path, None if it has none; the profile, None if none is in use, and why."""

    path: str | None
    profile: Profile | None
    reason: str


class Packaged(NamedTuple):
    """One of the package's profiles."""

    path: str
    profile: Profile


# -- where it is ----------------------------------------------------------------------------------


def path() -> str | None:
    """The file's absolute path, None if none is wanted or there is no home to have it in."""
    if not wanted():
        return None
    if given := os.environ.get(GPU_PROFILE, "").strip():
        return given
    folder = os.environ.get("XDG_CONFIG_HOME", "").strip()
    if not os.path.isabs(folder):  # as the XDG Base Directory Specification has it
        folder = os.path.expanduser("~/.config")
    return os.path.join(folder, "gemma4_turbo", NAME) if os.path.isabs(folder) else None


def wanted() -> bool:
    """Whether any is: not where the variable is 0, or no absolute path, of which `switches.read` tells."""
    given = os.environ.get(GPU_PROFILE, "").strip()
    return not given or os.path.isabs(given)


# -- what it says ---------------------------------------------------------------------------------


def decoded(content: bytes) -> Profile:
    """A profile from a file's bytes. `UnfitError`, naming the field, if it is none."""
    import json

    try:
        whole = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UnfitError(f"it is no JSON: {type(error).__name__}") from None
    if not isinstance(whole, dict) or whole.get(MARK) != FORMAT:
        raise UnfitError(f"{MARK} must be {FORMAT}")
    key = _of(whole, "key", dict)
    patches = {
        _text(name, "a patch's name"): Decision(_of(one, "on", bool), _of(one, "reason", str))
        for name, one in _of(whole, "patches", dict).items()
    }
    rows = _of(whole, "shapes", list)
    if len(rows) > MAX_ROWS:
        raise UnfitError(f"shapes must have at most {MAX_ROWS} rows, got {len(rows)}")
    return Profile(
        Key(*(_of(key, name, str) for name in Key._fields)), patches, tuple(map(_shape, rows))
    )


def _shape(row: Any) -> Shape:
    words = _of(row, "shape", list)
    if len(words) > MAX_NUMBERS or not all(isinstance(word, str) or _whole(word) for word in words):
        raise UnfitError("shape must be a list of whole numbers and texts")
    tile = row.get("tile")
    if tile is not None and not (
        isinstance(tile, list) and len(tile) <= MAX_NUMBERS and all(map(_whole, tile))
    ):
        raise UnfitError("tile must be null or a list of whole numbers")
    figures = row.get("figures", {})
    if not isinstance(figures, dict) or not all(
        _whole(value) or (isinstance(value, float) and math.isfinite(value))
        for value in figures.values()
    ):
        raise UnfitError("figures must be numbers")
    return Shape(
        _of(row, "kernel", str),
        tuple(words),
        None if tile is None else tuple(tile),
        _of(row, "reason", str),
        {_text(name, "a figure's name"): float(value) for name, value in figures.items()},
    )


def _no_number(name: str) -> None:
    raise ValueError(name)  # NaN and its like, which Python writes and JSON does not know


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise UnfitError(f"{what} must be printable and no longer than {MAX_TEXT}")
    return value


def is_one(where: str) -> bool:
    """Whether a file is a profile, be it damaged or of another format; OSError if it cannot be read."""
    if os.path.islink(where) or not os.path.isfile(where):  # a pipe would be waited for
        raise OSError(errno.EINVAL, "no regular file")
    with open(where, "rb") as file:
        return f'"{MARK}"'.encode() in file.read(MAX_BYTES)


def _of(record: Any, field: str, kind: type) -> Any:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise UnfitError(f"{field} must be of type {kind.__name__}, got {type(value).__name__}")
    return _text(value, field) if kind is str else value


def encoded(profile: Profile) -> bytes:
    """The inverse of `decoded`, a line for each shape."""
    import json

    lines = []
    for shape in profile.shapes:
        figures = {k: round(v, 6) for k, v in shape.figures.items() if math.isfinite(v)}
        lines.append(json.dumps(shape._asdict() | {"figures": figures}))
    patches = {name: one._asdict() for name, one in profile.patches.items()}
    head = f'"{MARK}": {FORMAT},\n "key": {json.dumps(profile.key._asdict())}'
    rows = ",\n  ".join(lines)
    text = f'{{{head},\n "patches": {json.dumps(patches)},\n "shapes": [\n  {rows}\n ]}}\n'
    return text.encode()


# -- the file -------------------------------------------------------------------------------------


def load(where: str) -> Profile:
    """The profile of a file.

    Raises:
        FileNotFoundError: if there is none.
        UnfitError: if it cannot be used.
    """
    try:
        with guarded.regular(where, owners=(os.geteuid(), SYSTEM)) as descriptor:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise UnfitError(f"it can be written by others (mode {mode:04o}): chmod go-w")
            return decoded(guarded.content("it", descriptor, MAX_BYTES))
    except (FileNotFoundError, UnfitError):
        raise
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            raise FileNotFoundError(where) from None
        raise UnfitError(f"it cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        told = str(error).replace(where, "it")
        if os.path.islink(where):
            told = "it is a symbolic link, which is not followed"
        raise UnfitError(told) from None


def save(where: str, profile: Profile) -> None:
    """Put a profile into the file's place at once: a reader sees the old one or the new one.

    Raises:
        OSError: if it cannot be written.
        UnfitError: if a link or something else that is no file is in the way.
    """
    with _beside(where, profile) as beside:
        os.replace(beside, where)


def try_to_save(where: str, profile: Profile) -> None:
    """Raise what `save` would, and leave the file's place as it is."""
    with _beside(where, profile):
        pass


@contextlib.contextmanager
def _beside(where: str, profile: Profile) -> Iterator[str]:
    """A file in the same folder, gone in the end unless it was renamed."""
    folder = os.path.dirname(where)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.path.lexists(where) and (os.path.islink(where) or not os.path.isfile(where)):
        raise UnfitError("it is a symbolic link or no regular file, and is left alone")
    beside = f"{where}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(beside, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(encoded(profile))
            file.flush()
            os.fsync(file.fileno())
        yield beside
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is in place already
            os.unlink(beside)


# -- whether it holds -----------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of all that a profile depends on, as installed; "" for what is not."""
    found = {"gemma4_turbo": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package) or ""  # None of a broken installation
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def stale(key: Key) -> str | None:
    """Why a profile does not hold on this machine, or None."""
    for name, here in versions().items():
        measured = getattr(key, name)
        if measured != here:
            return f"it was measured with {name} {measured}, here is {here or 'none'}"
    try:
        machine = nvml.look()
    except (OSError, AttributeError) as error:  # AttributeError: a driver without the function
        return f"it was measured on {key.gpu}, and no NVIDIA driver answers here ({error})"
    if machine.driver != key.driver:
        return f"it was measured with driver {key.driver}, here is {machine.driver}"
    # A slice of a GPU has a name of its own: NVIDIA H200 MIG 1g.18gb.
    if not any(key.gpu == name or key.gpu.startswith(f"{name} MIG") for name in machine.names):
        here = ", ".join(sorted(set(machine.names))) or "none"
        return f"it was measured on {key.gpu}, here is {here}"
    return None


def lookup() -> Lookup:
    """The user's profile: looked for once in a process, and ignored aloud if there is one that does not hold."""
    where = path()
    return Lookup(None, None, "") if where is None else _lookup(where)


@functools.cache
def _lookup(where: str) -> Lookup:
    try:
        profile = load(where)
        reason = stale(profile.key)
    except FileNotFoundError:
        return Lookup(where, None, "")
    except Exception as error:  # a server starts whatever is wrong with the file
        reason = _told(error)
    if reason is None:
        return Lookup(where, profile, "")
    logger.warning(
        "gemma4_turbo: the GPU profile %s is ignored: %s; measure again: %s", where, reason, TUNE
    )
    return Lookup(where, None, reason)


def packaged(gpu: str) -> Packaged | None:
    """The package's profile for a GPU of this name, the first by its file's; None if none is, or is wanted.

    Neither driver nor our version must be the same: a driver changes times and not results, and the files
    are this version's. A file that cannot be used is told of and left out.
    """
    if not wanted():
        return None
    return next((one for one in _packaged() if one.profile.key.gpu == gpu), None)


@functools.cache
def _packaged() -> tuple[Packaged, ...]:
    """All that are for these versions."""
    try:
        return tuple(_read_packaged())
    except Exception as error:  # a server starts whatever is wrong with the folder
        logger.warning("gemma4_turbo: the package's GPU profiles cannot be used: %s", _told(error))
        return ()


def _read_packaged() -> Iterator[Packaged]:
    try:
        files = sorted(PROFILES.iterdir(), key=lambda file: file.name)
    except FileNotFoundError:  # an installation without empty folders
        return
    here: dict[str, str] = {}
    for file in files:
        if not file.name.endswith(".json"):
            continue
        try:
            if not file.is_file():  # a pipe would be waited for
                raise UnfitError("it is no regular file")
            profile = decoded(file.read_bytes())
        except Exception as error:
            logger.warning(
                "gemma4_turbo: the package's GPU profile %s is skipped: %s", file, _told(error)
            )
            continue
        here = here or versions()
        if all(_public(getattr(profile.key, name)) == _public(here[name]) for name in PACKAGES):
            # Which patches are right and fast is another machine's finding.
            yield Packaged(str(file), profile._replace(patches={}))


def _public(version: str) -> str:
    """Without what a build adds of its own: 2.14.1 of 2.14.1+cu130."""
    return version.partition("+")[0]


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, UnfitError) else f"{type(error).__name__}: {error}"


def forget() -> None:
    """Look for them again."""
    _lookup.cache_clear()
    _packaged.cache_clear()


# -- what patches and kernels ask ------------------------------------------------------------------


def decisions() -> Mapping[str, Decision]:
    """By patch: whether what was measured here wants it on. The package's profiles decide about none."""
    profile = lookup().profile
    return {} if profile is None else profile.patches


def tiles(gpu: str) -> Tiles:
    """What was measured on a GPU of this name: by the user, else by those whose profile the package has."""
    own, others = lookup().profile, packaged(gpu)
    merged = {} if others is None else by_place(others.profile.shapes)
    if own is not None and own.key.gpu == gpu:
        merged |= by_place(own.shapes)
    return merged


def by_place(shapes: Iterable[Shape]) -> Tiles:
    """Tiles as kernels look them up."""
    return {(one.kernel, one.shape): (one.tile, one.reason) for one in shapes}
