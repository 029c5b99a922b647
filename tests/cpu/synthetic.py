"""A small package that stands in for SGLang where only the mechanism is in question."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo import fingerprints, gates, patching, switches
from gemma4_turbo.catalogue import BITWISE, Alias, Patch
from gemma4_turbo.checks import Check
from gemma4_turbo.states import PatchStatus

RELEASE = "1.0"
Build = Callable[[patching.PatchRun, dict[str, Any]], dict[str, Any]]

LEAF = '''\
"""Stock."""


def answer(x: int) -> int:
    """Twice."""
    return x * 2


class Model:
    """Stock's model."""

    def forward(self, x: int) -> int:
        return x + 1

    @staticmethod
    def scale(x: int) -> int:
        return x * 10

    @classmethod
    def name(cls) -> str:
        return cls.__name__
'''


def record(name: str, *targets: str, **fields: Any) -> Patch:
    """A catalogue record with plain values for everything that is not given."""
    values: dict[str, Any] = {
        "name": name,
        "summary": name,
        "targets": targets,
        "relies_on": (),
        "written_for": (RELEASE,),
        "superseded_when": (targets[0] if targets else "nowhere:nothing", "stock_has_it_now"),
        "superseded_since": "",
        "numerics": BITWISE,
        "traced": False,
        "default": True,
        "origin": "test",
        "aliases": (),
    }
    return Patch(**{**values, **fields})


def alias(env: str, disables: bool = True) -> Alias:
    """An alias variable."""
    return Alias(env, disables)


class Code(types.ModuleType):
    """What ``patches/<name>.py`` is in the package."""

    def __init__(self, patch: Patch, build: Build) -> None:
        super().__init__(f"gemma4_turbo.patches.{patch.name}")
        self.build = build
        self.undone = 0

    def undo(self, run: patching.PatchRun) -> None:
        """Count the calls."""
        self.undone += 1

    def verify(self, run: patching.PatchRun, device: str) -> list[Check]:
        """Nothing to compare."""
        return []


class World:
    """The stand-in package on disk, and engines whose patches are written for it."""

    def __init__(self, root: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.package = package
        self.leaf = f"{package}.leaf"
        self.table: dict[str, dict[str, str]] = {RELEASE: {}}
        self._monkeypatch = monkeypatch
        self._engines: list[patching.Engine] = []
        (root / package).mkdir(exist_ok=True)
        self.write("__init__", "")
        self.write("leaf", LEAF)
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.setattr(patching, "ROOT", package)
        monkeypatch.setattr(fingerprints, "known_releases", lambda: self.table)
        for function in ("register", "install", "remove"):  # they stand in SGLang's own modules
            monkeypatch.setattr(gates, function, lambda engine: None)

    def write(self, module: str, source: str) -> Path:
        """A module of the package."""
        path = self.root / self.package / f"{module}.py"
        path.write_text(source)
        importlib.invalidate_caches()
        return path

    def edit(self, old: str, new: str) -> None:
        """Change one place of the leaf's source on disk."""
        path = self.root / self.package / "leaf.py"
        text = path.read_text()
        assert text.count(old) == 1
        self.write("leaf", text.replace(old, new))

    def target(self, qualname: str, module: str = "leaf") -> str:
        """``module:qualname`` in this package."""
        return f"{self.package}.{module}:{qualname}"

    def imported(self, module: str = "leaf") -> Any:
        """A module of the package, imported now if it is not yet."""
        return importlib.import_module(f"{self.package}.{module}")

    def engine(self, *patches: tuple[Patch, Build]) -> patching.Engine:
        """An engine for ``patches``, written for the package's source as it is now."""
        records = [patch for patch, _ in patches]
        source = fingerprints.folder_source(self.root)
        self.table[RELEASE] |= fingerprints.record_release(source, records)
        for patch, build in patches:
            code = Code(patch, build)
            self._monkeypatch.setitem(sys.modules, code.__name__, code)
        made = patching.Engine(records)
        self._engines.append(made)
        return made

    def close(self) -> None:
        """Leave the process as it was."""
        for engine in self._engines:
            engine.revert()
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, patching._FirstImport)]
        for name in [n for n in sys.modules if n.partition(".")[0] == self.package]:
            del sys.modules[name]


def returning(value: Any) -> Build:
    """A build whose replacements all return ``value``."""

    def build(run: patching.PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return value

        return dict.fromkeys(stock, replacement)

    return build


def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours is set, and none that a test sets outlives it."""
    import os

    ours = {switches.SELECTION, *(v for v in os.environ if v.startswith(switches.MASTER))}
    for variable in ours:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def only_row(engine: patching.Engine) -> PatchStatus:
    """The status of the only patch."""
    (row,) = engine.status()
    return row
