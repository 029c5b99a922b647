"""By which ways processes that SGLang starts get the patches, and which of them none reaches.

The entry point works where SGLang calls ``load_plugins``: in its main process and in
``run_scheduler_process``. A ``sitecustomize`` works in every Python process of this machine that
inherits the environment.
"""

from __future__ import annotations

import ast
import logging
import os
import sys
import zipfile
import zipimport
from collections.abc import Iterable, Iterator
from importlib import machinery
from importlib.metadata import entry_points
from typing import cast

logger = logging.getLogger("gemma4_turbo")

PLUGIN_GROUP = "sglang.srt.plugins"
ENTRY_POINT, SITECUSTOMIZE = "entry point", "sitecustomize"
PACKAGE = "gemma4_turbo"
MOST_BYTES = 1 << 20  # of a sitecustomize
_STARTER = ("sglang.srt.managers.scheduler", "run_scheduler_process")

NO_WAY = (
    "spawned processes would stay stock: gemma4_turbo's entry point is not installed "
    "or not allowed by SGLANG_PLUGINS, and no sitecustomize on PYTHONPATH calls it"
)


class Routes(list[str]):
    """The ways that are open; ``problems``: why one of them could not be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []


def bootstrap_routes() -> Routes:
    """By which ways a process that SGLang spawns gets the patches: entry point, sitecustomize.

    Never raises: what goes wrong with one way is logged and kept, and is not that way.
    """
    routes = Routes()
    for name, is_open in ((ENTRY_POINT, _entry_point), (SITECUSTOMIZE, _sitecustomize)):
        try:
            if is_open():
                routes.append(name)
        except Exception as error:
            routes.problems.append(
                f"{name} could not be looked at: {type(error).__name__}: {error}"
            )
            logger.warning("gemma4_turbo: %s", routes.problems[-1])
    return routes


def _entry_point() -> bool:
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    return any(
        entry.value.startswith(f"{PACKAGE}.") and (not allowed or entry.name in allowed)
        for entry in entry_points(group=PLUGIN_GROUP)
    )


# -- sitecustomize --------------------------------------------------------------------------------

# As Python has them when it starts; this process may have got others since.
_FINDERS = (
    zipimport.zipimporter,
    machinery.FileFinder.path_hook(
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    ),
)


def _sitecustomize() -> bool:
    pythonpath = os.environ.get("PYTHONPATH", "")
    # Spawned processes inherit the flags.
    if not pythonpath or sys.flags.ignore_environment or sys.flags.no_site:
        return False
    spec = next(_sitecustomizes(pythonpath.split(os.pathsep)), None)
    if spec is None:
        return False
    try:
        code = _read(spec)
    except OSError:
        return False  # Python cannot read it either, says so and goes on
    return _calls_us(
        code, is_source=cast("str", spec.origin).endswith(tuple(machinery.SOURCE_SUFFIXES))
    )


def _sitecustomizes(entries: Iterable[str]) -> Iterator[machinery.ModuleSpec]:
    """The specs of those on PYTHONPATH, in order; Python runs the first one only.

    By finders of its own: the import system's keep what they have seen once.
    """
    for entry in dict.fromkeys(entries):
        for finder in _FINDERS:
            try:
                # An empty entry is the current folder.
                spec = finder(entry or os.getcwd()).find_spec("sitecustomize")
            except (ImportError, OSError):  # not its kind; or no folder that this user may search
                continue
            if spec is not None and spec.loader is not None:
                yield spec
            break


def _read(spec: machinery.ModuleSpec) -> bytes:
    """What a spec's loader would load, bounded."""
    archive, origin = getattr(spec.loader, "archive", None), cast("str", spec.origin)
    if archive is None:
        with open(origin, "rb") as file:
            code = file.read(MOST_BYTES + 1)
    else:
        member = os.path.relpath(origin, archive)
        with zipfile.ZipFile(archive) as opened, opened.open(member) as file:
            code = file.read(MOST_BYTES + 1)
    if len(code) > MOST_BYTES:
        raise ValueError(f"{origin} is larger than {MOST_BYTES} bytes")
    return code


def _calls_us(code: bytes, is_source: bool) -> bool:
    """Whether the package is named in the code: imported, or run by name. A comment is no code."""
    if PACKAGE.encode() not in code:
        return False
    if not is_source:
        return True
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return False  # Python cannot run it either
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in said and PACKAGE in node.value:
                return True
            continue
        else:
            continue
        if any(name.partition(".")[0] == PACKAGE for name in names):
            return True
    return False


# -- processes that SGLang starts without its plugins ---------------------------------------------


def unreached_schedulers(
    routes: Iterable[str], engine: object, server_args: object, starter: object
) -> list[str]:
    """Why schedulers of a launch would be stock though there is a way into ordinary ones.

    Args:
        routes: of `bootstrap_routes`.
        engine: SGLang's class whose ``_launch_subprocesses`` was called, None if unknown.
        server_args: stock's ``ServerArgs``.
        starter: the function that each scheduler process is to run, None for SGLang's.
    """
    bases = getattr(engine, "__mro__", ())
    by_ray = any(
        base.__name__ == "RayEngine" or base.__module__.startswith("sglang.srt.ray")
        for base in bases
    )
    asked = not getattr(server_args, "grpc_mode", False) and getattr(server_args, "use_ray", False)
    if by_ray or (not bases and asked is True):
        return [
            "--use-ray: the schedulers would be stock: SGLang's Ray actors load no plugins, and "
            "whether a sitecustomize reaches Ray's workers cannot be seen from here"
        ]
    name = (getattr(starter, "__module__", ""), getattr(starter, "__name__", ""))
    if starter is None or name == _STARTER or SITECUSTOMIZE in routes:
        return []
    return [
        f"the schedulers may be stock: they are started by {'.'.join(name)}, not by SGLang's "
        f"{_STARTER[1]}, which loads the plugins; a sitecustomize on PYTHONPATH would reach them"
    ]


def unreached_encoders(routes: Iterable[str], server_args: object) -> list[str]:
    """Why ranks of an encoder server would be stock: only the first is in the main process."""
    ranks = getattr(server_args, "tp_size", 1)
    if not isinstance(ranks, int) or ranks < 2 or SITECUSTOMIZE in routes:
        return []
    return [
        f"--encoder-only with {ranks} ranks: all but the first would be stock: SGLang starts them "
        "without its plugins; a sitecustomize on PYTHONPATH would reach them"
    ]


def unreached_replicas(routes: Iterable[str], server_args: object) -> list[str]:
    """Why replicas of an encoder server would be stock: none of them is in the main process."""
    if SITECUSTOMIZE in routes:
        return []
    return [
        f"--encoder-only with --dp-size {getattr(server_args, 'dp_size', '?')}: every encoder would be "
        "stock: SGLang starts them without its plugins; a sitecustomize on PYTHONPATH would reach them"
    ]
